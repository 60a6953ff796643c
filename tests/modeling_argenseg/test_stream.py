"""One token stream: what `forward` reads at each position, what it learns there, and how the model is stored."""

import pytest
import tiny
import torch
from tiny import CAT, CODES, DOG, DONE, EOS, FIRST_VISUAL, GEN_END, GEN_START, IMAGE, PAD, SIDES, SURE, T
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageTextToText, Trainer, TrainingArguments

from modeling_argenseg import ARGenSegForConditionalGeneration
from modeling_argenseg.cache_name import CACHE

V1, V2 = FIRST_VISUAL, FIRST_VISUAL + CODES - 1  # the first and the last visual id
LAST = tiny.WORDS[-1]  # a word whose id is above the visual ids


def labelled(*parts, prompt=2):
    """A row and its labels, the first `prompt` ids not learned."""
    ids = tiny.stream(*parts)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


def two_rows():
    """A picture at different places of two rows."""
    a, b = tiny.pictures(2)
    rows = [tiny.stream(CAT, SURE, GEN_START, a, DONE, EOS), tiny.stream(DOG, GEN_START, b, DONE, LAST, EOS)]
    return torch.cat(rows)


def parts_of(net):
    model = net.model
    return model.get_input_embeddings(), model.generation_projector, model.scale_embedding, model.position_embedding


class TestFindPictures:
    def test_finds_all_and_leaves_pending_starts(self):
        model, (a, b, c) = tiny.model().model, tiny.pictures(3)
        first = tiny.stream(GEN_START, a, CAT, GEN_START, GEN_START, b, DONE, GEN_START)
        second = tiny.stream(*[CAT] * (first.shape[1] - T - 1), GEN_START, c)
        rows, columns = model.find_pictures(torch.cat([first, second]))
        assert rows.tolist() == [0, 0, 1] and columns.tolist() == [0, T + 3, first.shape[1] - T - 1]
        ids = model.picture_ids(torch.cat([first, second]), rows, columns)
        assert torch.equal(ids + FIRST_VISUAL, torch.stack([a, b, c]))

    def test_no_pictures(self):
        rows, columns = tiny.model().model.find_pictures(tiny.stream(CAT, GEN_START, GEN_END, 41, V2 + 1))
        assert rows.numel() == columns.numel() == 0

    @pytest.mark.parametrize(
        "parts",
        [
            pytest.param((CAT, V1, DOG), id="outside"),
            pytest.param((V2, CAT), id="before any start"),
            pytest.param((CAT, GEN_START, *[V1] * (T - 1)), id="cut at the end"),
            pytest.param((CAT, GEN_START, *[V1] * (T - 1), DONE), id="too short"),
            pytest.param((CAT, GEN_START, *[V1] * (T + 1), DONE), id="too long"),
            pytest.param((GEN_START, CAT, *[V1] * T), id="a word after the start"),
            pytest.param((GEN_START, *[V1] * 5, GEN_START, *[V1] * (2 * T - 5)), id="two starts, right total"),
            pytest.param((GEN_START, *[V1] * (T - 1), CAT, GEN_START, *[V1] * (T + 1)), id="uneven, right total"),
            pytest.param((GEN_START, *[V1] * (T + 1), CAT, GEN_START, *[V1] * (T - 1)), id="uneven, cut at the end"),
            pytest.param((GEN_START, *[V1] * (T // 2), PAD, *[V1] * (T - T // 2)), id="torn apart"),
        ],
    )
    def test_broken_pictures_are_refused(self, parts):
        with pytest.raises(ValueError, match=f"followed by exactly {T} visual ids"):
            tiny.model()(tiny.stream(*parts))

    def test_a_picture_must_not_go_on_in_the_next_row(self):
        ids = torch.cat([tiny.stream(*[CAT] * T, GEN_START), tiny.stream(*[V1] * T, CAT)])
        with pytest.raises(ValueError, match="followed by exactly"):
            tiny.model()(ids)


class TestEmbeddings:
    @pytest.mark.parametrize("depth", [1, 2])
    def test_every_position_by_hand(self, depth):
        net, ids = tiny.model(generation_projector_depth=depth), two_rows()
        embed, projector, scale_embedding, position_embedding = parts_of(net)
        embeds = net.model.embed_stream(ids)
        for row, start in ((0, 2), (1, 1)):
            codes = ids[row, start + 1 : start + 1 + T] - FIRST_VISUAL
            after = start + T  # the position of v_T
            assert torch.equal(embeds[row, : start + 1], embed(ids[row, : start + 1]))
            assert torch.equal(embeds[row, after], embed(torch.tensor(GEN_END)))
            assert torch.equal(embeds[row, after + 1 :], embed(ids[row, after + 1 :]))
            f_hats, at = list(net.model.quantizer.accumulate(codes[None])), 1
            for scale, side in enumerate(SIDES[1:], start=1):
                for cell in range(side * side):  # the query of token at + cell (0-based) stands one to the left of it
                    feature = F.adaptive_avg_pool2d(f_hats[scale - 1], side)[0, :, cell // side, cell % side]
                    query = projector(feature) + scale_embedding.weight[scale] + position_embedding.weight[at + cell]
                    torch.testing.assert_close(embeds[row, start + at + cell], query)
                at += side * side
        assert (len(projector) == 3) == (depth == 2)

    def test_a_scale_does_not_see_itself_or_what_follows(self):
        net, ids = tiny.model(), two_rows()[:1]
        before = net.model.embed_stream(ids)
        changed = ids.clone()
        third = slice(3 + 1 + 4, 3 + 1 + 4 + 9)  # tokens of the scale of side 3
        changed[:, third] = FIRST_VISUAL + (changed[:, third] - FIRST_VISUAL + 1) % CODES
        differs = (before != net.model.embed_stream(changed)).any(-1)[0].nonzero()[:, 0]
        assert differs.tolist() == list(range(2 + 14, 2 + T))  # the queries of side 4 and nothing else

    def test_image_features_stand_in_order(self):
        net = tiny.model()
        ids = torch.cat([tiny.stream(IMAGE, CAT, IMAGE), tiny.stream(DOG, IMAGE, DOG)])
        features = net.get_image_features(tiny.images(3)).pooler_output
        assert features.shape == (3, 1, 32)
        seen = {}
        net.model.language_model.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
        out = net(ids, pixel_values=tiny.images(3))
        at = seen["inputs_embeds"][ids == IMAGE]
        torch.testing.assert_close(at, features[:, 0])
        assert torch.equal(seen["inputs_embeds"][0, 1], net.get_input_embeddings()(torch.tensor(CAT)))
        torch.testing.assert_close(out.image_hidden_states, features)

    @pytest.mark.parametrize("placeholders, images", [(0, 1), (1, 2), (2, 1)])
    def test_images_and_placeholders_must_match(self, placeholders, images):
        with pytest.raises(ValueError, match="put one image in the prompt for each image passed"):
            tiny.model()(tiny.stream(CAT, *[IMAGE] * placeholders), pixel_values=tiny.images(images))

    @pytest.mark.parametrize("given", [{}, {"input_ids": tiny.stream(CAT), "inputs_embeds": torch.zeros(1, 1, 32)}])
    def test_exactly_one_input(self, given):
        with pytest.raises(ValueError, match="exactly one of"):
            tiny.model()(**given)


class TestAttention:
    """Which inputs a position depends on, measured by gradients, so that no mask code is trusted."""

    @staticmethod
    def seen_from(net, embeds, ids, position):
        """Positions of row 0 whose input embedding changes the hidden state at `position`."""
        mask = net.model.attention_mask_of(ids, embeds, None, None)
        hidden = net.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        (gradient,) = torch.autograd.grad(hidden[0, position].sum(), embeds)
        return (gradient[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist()

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("scale_attention", ["causal", "block"])
    def test_reach(self, scale_attention, attention):
        net, ids = tiny.model(scale_attention=scale_attention, attention=attention), two_rows()[:1]
        embeds = net.model.embed_stream(ids).detach().requires_grad_()
        queries = range(2 + 5, 2 + 14)  # those of side 3: <gen_start> stands at 2
        for position in (0, 2, 3, queries[0], queries[4], queries[-1], 2 + T, 2 + T + 1):
            last = queries[-1] if scale_attention == "block" and position in queries else position
            if scale_attention == "block" and position == 3:
                last = 2 + 4  # the queries of side 2
            assert self.seen_from(net, embeds, ids, position) == list(range(last + 1)), position

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("scale_attention", ["causal", "block"])
    def test_padding_changes_nothing(self, scale_attention, attention):
        net = tiny.model(scale_attention=scale_attention, attention=attention)
        a, b = tiny.pictures(2)
        rows = [tiny.stream(CAT, IMAGE, GEN_START, a, DONE), tiny.stream(IMAGE, GEN_START, b, DONE, GEN_START, a)]
        images = tiny.images(2)
        together = net(**tiny.left_padded(rows, extra=3), pixel_values=images).logits
        for row, ids in enumerate(rows):
            alone = net(ids, pixel_values=images[row : row + 1]).logits[0]
            torch.testing.assert_close(together[row, -ids.shape[1] :], alone, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("scale_attention", ["causal", "block"])
    def test_packing_changes_nothing(self, scale_attention, attention):
        net = tiny.model(scale_attention=scale_attention, attention=attention)
        rows = [row[None] for row in two_rows()]
        positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
        packed = net(torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([net(row).logits for row in rows], dim=1)
        torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("scale_attention", ["causal", "block"])
    @pytest.mark.parametrize("padding", [0, 2])
    def test_a_cached_prefix_changes_nothing(self, scale_attention, attention, padding):
        net = tiny.model(scale_attention=scale_attention, attention=attention)
        a, b = tiny.pictures(2)
        whole = tiny.left_padded([tiny.stream(CAT, GEN_START, a, DONE, SURE, GEN_START, b, DONE)], extra=padding)
        at = padding + T + 3  # the second turn begins with SURE
        first = net(whole["input_ids"][:, :at], attention_mask=whole["attention_mask"][:, :at], use_cache=True)
        second = net(whole["input_ids"][:, at:], attention_mask=whole["attention_mask"], cache=getattr(first, CACHE))
        torch.testing.assert_close(second.logits, net(**whole).logits[:, at:], atol=1e-4, rtol=1e-4)


class TestLoss:
    def test_text_and_visual_means_by_hand(self):
        net, ids = tiny.model(visual_loss_weight=0.25), two_rows()
        labels = ids.clone()
        labels[0, :2] = -100
        labels[1, :1] = -100
        out = net(ids, labels=labels)
        text, visual = [], []
        logprobs = out.logits.log_softmax(-1)
        for row in range(2):
            for position in range(ids.shape[1] - 1):
                target = int(labels[row, position + 1])
                if target != -100:
                    losses = visual if FIRST_VISUAL <= target < FIRST_VISUAL + CODES else text
                    losses.append(-logprobs[row, position, target])
        assert len(visual) == 2 * T and len(text) == 3 + 4
        torch.testing.assert_close(out.text_loss, torch.stack(text).mean())
        torch.testing.assert_close(out.visual_loss, torch.stack(visual).mean())
        torch.testing.assert_close(out.loss, out.text_loss + 0.25 * out.visual_loss)

    @pytest.mark.parametrize("num_scales", [None, 2])
    def test_scales_weigh_the_same(self, num_scales):
        net = tiny.model(visual_loss="scale", num_scales=num_scales)
        length = net.config.picture_length
        a, b, c = tiny.pictures(3, length=length)
        row = labelled(CAT, SURE, GEN_START, a, DONE, GEN_START, b, DONE, GEN_START, c, prompt=length + 3)
        out = net(**row)
        losses = F.cross_entropy(out.logits[0, :-1], row["input_ids"][0, 1:], reduction="none")
        starts = [length + 4, 2 * length + 6]  # b and c: the first picture is history and not learned
        means, at = [], 0
        for side in SIDES[:num_scales]:
            means.append(torch.cat([losses[s + at : s + at + side * side] for s in starts]).mean())
            at += side * side
        assert at == length
        torch.testing.assert_close(out.visual_loss, torch.stack(means).mean())
        token = tiny.model(num_scales=num_scales)(**row).visual_loss
        torch.testing.assert_close(token, torch.cat([losses[s : s + length] for s in starts]).mean())

    def test_scales_without_labels_do_not_count(self):
        net = tiny.model(visual_loss="scale")
        row = labelled(CAT, GEN_START, *tiny.pictures(1), DONE, prompt=2)
        row["labels"][0, 3:] = -100  # of the picture only v_1 is left to learn
        out = net(**row)
        torch.testing.assert_close(out.visual_loss, F.cross_entropy(out.logits[0, 1:2], row["input_ids"][0, 2:3]))

    def test_head_at_marked_positions_only(self):
        net = tiny.model(visual_loss="scale")
        row = labelled(CAT, SURE, GEN_START, *tiny.pictures(1), DONE, prompt=2)
        keep = F.pad(row["labels"][:, 1:] != -100, (0, 1))
        part, whole = net(**row, logits_to_keep=keep), net(**row)
        assert part.logits.shape == (int(keep.sum()), tiny.VOCAB)
        for name in ("loss", "text_loss", "visual_loss"):
            torch.testing.assert_close(part[name], whole[name])

    @pytest.mark.parametrize("visual_loss", ["token", "scale"])
    @pytest.mark.parametrize(
        "parts, absent",
        [((CAT, DOG, SURE, EOS), "visual_loss"), ((CAT, GEN_START, tiny.pictures(1)), "text_loss")],
    )
    def test_an_absent_part_is_a_differentiable_zero(self, parts, absent, visual_loss):
        net = tiny.model(visual_loss=visual_loss)
        out = net(**labelled(*parts))
        assert out[absent].item() == 0 and out[absent].requires_grad
        present = {"text_loss", "visual_loss"} - {absent}
        assert out.loss.item() == out[present.pop()].item() > 0
        out[absent].backward()
        assert net.lm_head.weight.grad.abs().sum() == 0

    def test_nothing_to_learn_is_zero_not_nan(self):
        ids = two_rows()
        out = tiny.model()(ids, labels=torch.full_like(ids, -100))
        assert out.loss.item() == 0
        out.loss.backward()

    def test_all_new_parts_learn_and_the_quantizer_does_not(self):
        net, ids = tiny.model(), two_rows()
        net.train()(ids, labels=ids).loss.backward()
        for module in parts_of(net):
            assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
        assert all(p.grad is None and not p.requires_grad for p in net.model.quantizer.parameters())

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("scale_attention", ["causal", "block"])
    def test_gradient_checkpointing(self, scale_attention, use_reentrant):
        ids, images, gradients = two_rows(), tiny.images(1), []
        ids[0, 0] = IMAGE
        for checkpointing in (False, True):
            net = tiny.model(scale_attention=scale_attention).train()
            runs = []
            net.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda m, a, runs=runs: runs.append(1))
            if checkpointing:
                net.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            net(ids, labels=ids, pixel_values=images).loss.backward()
            assert len(runs) == 1 + checkpointing  # run again in the backward pass
            gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)


class TestTrainer:
    @staticmethod
    def weights_after_one_step(tmp_path, rows, batch, accumulation):
        net = tiny.model().train()
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1,
            learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, weight_decay=0.0,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        Trainer(model=net, args=arguments, train_dataset=rows).train()
        return dict(net.named_parameters())

    def test_accumulation_equals_one_batch_of_like_rows(self, tmp_path):
        """Two means, so the claim holds where rows have as many text labels and as many visual labels."""
        a, b = tiny.pictures(2)
        rows = [
            {name: ids[0] for name, ids in labelled(*parts).items()}
            for parts in ((CAT, SURE, GEN_START, a, DONE, EOS), (DOG, CAT, GEN_START, b, SURE, EOS))
        ]
        start = dict(tiny.model().named_parameters())
        whole = self.weights_after_one_step(tmp_path, rows, batch=2, accumulation=1)
        parts = self.weights_after_one_step(tmp_path, rows, batch=1, accumulation=2)
        assert (whole["lm_head.weight"] - start["lm_head.weight"]).abs().max() > 1e-4
        for name, weight in whole.items():
            torch.testing.assert_close(parts[name], weight, atol=1e-6, rtol=1e-4, msg=name)

    def test_accumulation_is_the_mean_over_unlike_batches(self, tmp_path):
        (a,) = tiny.pictures(1)
        long = labelled(CAT, SURE, GEN_START, a, *[DONE] * 5, EOS)
        short = labelled(CAT, SURE, DOG)
        start, gradients = tiny.model(), []
        for row in (long, short):
            net = tiny.model().train()
            net(**row).loss.backward()
            gradients.append(net.lm_head.weight.grad)
        rows = [{name: ids[0] for name, ids in row.items()} for row in (long, short)]
        after = self.weights_after_one_step(tmp_path, rows, batch=1, accumulation=2)["lm_head.weight"]
        torch.testing.assert_close(start.lm_head.weight - after, 0.1 * sum(gradients) / 2, atol=1e-6, rtol=1e-4)


class TestCoarsePrefix:
    def test_forward_reads_the_first_scales_as_in_a_whole_picture(self):
        coarse, whole = tiny.model(num_scales=2), tiny.model()
        (picture,) = tiny.pictures(1)
        assert coarse.config.picture_length == 5
        ids = tiny.stream(CAT, GEN_START, picture[:5], DONE)
        logits = coarse(ids).logits
        full = whole(tiny.stream(CAT, GEN_START, picture)).logits
        torch.testing.assert_close(logits[0, : 2 + 4], full[0, : 2 + 4])  # up to the query of v_5
        assert not torch.allclose(logits[0, 2 + 4], full[0, 2 + 4])  # here <gen_end>, there a query

    @pytest.mark.parametrize("num_scales", [1, 2, 3])
    def test_generation_draws_the_first_scales(self, num_scales):
        coarse, whole = tiny.model(num_scales=num_scales), tiny.model()
        prompt = tiny.left_padded([tiny.stream(CAT, DOG)])
        length = coarse.config.picture_length
        out = tiny.generate(coarse, prompt, [GEN_START, DONE])
        (answer,) = tiny.answers(out.sequences, 2)
        (complete,) = tiny.answers(tiny.generate(whole, prompt, [GEN_START, DONE]).sequences, 2)
        assert answer == [*complete[: 1 + length], DONE, EOS]
        logits = coarse(out.sequences).logits[0, 2 : 2 + length, FIRST_VISUAL : FIRST_VISUAL + CODES]
        assert (logits.argmax(-1) + FIRST_VISUAL).tolist() == tiny.drawn(answer)
        assert tiny.visual_tokenizer().decode(logits.argmax(-1)[None]).shape == (1, 3, 16, 16)


class TestStorage:
    VLMS = [tiny.internvl_config, tiny.hybrid_config, tiny.llava_config]

    @pytest.mark.parametrize("vlm", VLMS, ids=lambda make: make.__name__)
    @pytest.mark.parametrize("changes", [{}, {"scale_attention": "block", "generation_projector_depth": 2}])
    def test_round_trip(self, tmp_path, vlm, changes):
        net = tiny.model(vlm(), **changes)
        net.save_pretrained(tmp_path)
        loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is ARGenSegForConditionalGeneration and type(loaded.model.vlm) is type(net.model.vlm)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        state = loaded.state_dict()
        assert state.keys() == net.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        torch.testing.assert_close(loaded(two_rows()).logits, net(two_rows()).logits)
        assert not any(parameter.requires_grad for parameter in loaded.model.quantizer.parameters())
        assert loaded.config.to_diff_dict().keys() == AutoConfig.from_pretrained(tmp_path).to_diff_dict().keys()
        assert all(getattr(loaded.config, name) == value for name, value in changes.items())

    def test_bfloat16_keeps_the_quantizer_in_float32(self, tmp_path):
        net = tiny.model()
        net.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert loaded.lm_head.weight.dtype == loaded.model.generation_projector[0].weight.dtype == torch.bfloat16
        for name, tensor in net.model.quantizer.state_dict().items():
            assert torch.equal(loaded.model.quantizer.state_dict()[name], tensor), name
        ids = two_rows()
        loaded.train()(ids, labels=ids).loss.backward()
        assert loaded.model.generation_projector[0].weight.grad.abs().sum() > 0
        out = tiny.generate(loaded.eval(), tiny.left_padded([tiny.stream(CAT)]), [GEN_START, DONE])
        (answer,) = tiny.answers(out.sequences, 1)
        assert len(answer) == T + 3 and len(set(tiny.drawn(answer))) > 3

    @pytest.mark.parametrize(
        "field", [{"scale_attention": "row"}, {"generation_projector_depth": 3}, {"visual_loss": "mean"}]
    )
    def test_bad_options_are_refused(self, field):
        with pytest.raises(ValueError, match=f"{next(iter(field))} must be"):
            tiny.config(**field)

    def test_set_visual_tokenizer_copies_codebook_and_phi(self):
        net, tokenizer = tiny.model(), tiny.visual_tokenizer(seed=7)
        codes = torch.arange(T)[None] % CODES
        assert not torch.allclose(net.model.quantizer.next_scale_inputs(codes), tokenizer.next_scale_inputs(codes))
        net.set_visual_tokenizer(tokenizer)
        assert torch.equal(net.model.quantizer.next_scale_inputs(codes), tokenizer.next_scale_inputs(codes))

    def test_logits_to_keep_and_tuples(self):
        net, ids = tiny.model(), two_rows()
        logits = net(ids).logits
        torch.testing.assert_close(net(ids, logits_to_keep=3).logits, logits[:, -3:])
        torch.testing.assert_close(net(ids, return_dict=False)[0], logits)
