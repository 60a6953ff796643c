"""Starting from a plain vision-language model: what is taken over, what is new, and that the result runs."""

import copy

import pytest
import tiny
import torch
from tiny import (
    CODES,
    DONE,
    EOS,
    FIRST_VISUAL,
    GEN_START,
    IMAGE,
    PAD,
    SURE,
    VOCAB,
    T,
    answers,
    generate,
    left_padded,
    starts_of,
    stream,
    visual_logits,
)
from transformers import (
    AutoModelForImageTextToText,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4vConfig,
    Idefics3Config,
    LlavaNextConfig,
    MistralConfig,
    PaliGemmaConfig,
    Qwen2Config,
    Qwen3Config,
)

from modeling_argenseg import ARGenSegForConditionalGeneration

NEW = 2 + CODES  # <gen_start>, <gen_end> and the codebook


def tied_config():
    text = tiny.text_config(Qwen2Config, tie_word_embeddings=True)
    return tiny.internvl_config(text, tie_word_embeddings=True)


def qwen3_config():
    return tiny.internvl_config(tiny.text_config(Qwen3Config, head_dim=8))


def plain_vlm(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.update(pad_token_id=PAD, eos_token_id=EOS)
    return model.eval()


def rows_of(vlm):
    """Rows of the embedding and the head (V, hidden)."""
    return vlm.get_input_embeddings().weight.detach().clone(), vlm.get_output_embeddings().weight.detach().clone()


def new_parts(net):
    model = net.model
    return [
        p for m in (model.generation_projector, model.scale_embedding, model.position_embedding) for p in m.parameters()
    ]


def prompt_of(net):
    count = 4 if net.config.vlm_config.model_type == "llava" else 1
    size = 8 if net.config.vlm_config.model_type == "internvl_hybrid" else tiny.IMAGE_PIXELS
    return stream(*[IMAGE] * count, 10, 11), tiny.images(1, size=size)


ALL = [tiny.internvl_config, tiny.hybrid_config, tiny.llava_config, tied_config, qwen3_config]
every_vlm = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)


@every_vlm
def test_old_rows_stay_and_new_rows_are_their_mean(make):
    vlm = plain_vlm(make())
    embedding, head = rows_of(vlm)
    net = ARGenSegForConditionalGeneration.from_vlm(vlm, tiny.visual_tokenizer())
    assert net.config.gen_start_token_id == VOCAB and net.config.gen_end_token_id == VOCAB + 1
    assert net.config.visual_token_offset == VOCAB + 2 and net.config.text_config.vocab_size == VOCAB + NEW
    for old, new in ((embedding, net.get_input_embeddings().weight), (head, net.get_output_embeddings().weight)):
        assert new.shape == (VOCAB + NEW, 32) and torch.equal(new[:VOCAB], old)
        torch.testing.assert_close(new[VOCAB:], old.mean(0).expand(NEW, -1))
    assert all(parameter.abs().sum() == 0 for parameter in new_parts(net))
    quantizer, tokenizer = net.model.quantizer.state_dict(), tiny.visual_tokenizer().quantize.state_dict()
    assert all(torch.equal(tensor, quantizer[name]) for name, tensor in tokenizer.items())


@every_vlm
def test_text_and_images_work_as_before(make):
    vlm = plain_vlm(make())
    reference = copy.deepcopy(vlm)
    net = ARGenSegForConditionalGeneration.from_vlm(vlm, tiny.visual_tokenizer()).eval()
    ids, images = prompt_of(net)
    expected = reference(input_ids=ids, pixel_values=images).logits
    torch.testing.assert_close(net(ids, pixel_values=images).logits[..., :VOCAB], expected, atol=1e-5, rtol=1e-5)


@every_vlm
@pytest.mark.parametrize("changes", [{}, {"scale_attention": "block", "generation_projector_depth": 2}])
def test_trains_and_draws(make, changes):
    net = ARGenSegForConditionalGeneration.from_vlm(plain_vlm(make()), tiny.visual_tokenizer(), **changes)
    start, first = net.config.gen_start_token_id, net.config.visual_token_offset
    ids, images = prompt_of(net)
    (picture,) = tiny.pictures(1)
    row = torch.cat([ids, stream(start, picture - tiny.FIRST_VISUAL + first, EOS)], dim=1)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(90):
        out = net.train()(row, pixel_values=images, labels=row)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.visual_loss.item())
    assert all(bool(parameter.grad.any()) for parameter in new_parts(net))
    assert losses[-1] < 0.1 * losses[0]
    prompt = torch.cat([ids, stream(start)], dim=1)
    sequence = net.eval().generate(prompt, pixel_values=images, max_new_tokens=1, do_sample=False)
    drawn = sequence[0, prompt.shape[1] : prompt.shape[1] + T]
    assert (drawn == row[0, prompt.shape[1] : -1]).float().mean() > 0.9  # it has learned its one picture by heart


@pytest.mark.parametrize("make", [tiny.internvl_config, tied_config], ids=lambda make: make.__name__)
def test_tying_is_kept(make, tmp_path):
    tied = make is tied_config
    net = ARGenSegForConditionalGeneration.from_vlm(plain_vlm(make()), tiny.visual_tokenizer())
    assert (net.lm_head.weight is net.get_input_embeddings().weight) == tied == net.config.tie_word_embeddings
    net.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert torch.equal(loaded.lm_head.weight, net.lm_head.weight)


def test_from_paths_from_a_config_and_from_a_model(tmp_path):
    vlm, tokenizer = plain_vlm(tiny.internvl_config()), tiny.visual_tokenizer()
    vlm.save_pretrained(tmp_path / "vlm")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    from_model = ARGenSegForConditionalGeneration.from_vlm(vlm, tokenizer).state_dict()
    for as_path in (str, lambda path: path):
        net = ARGenSegForConditionalGeneration.from_vlm(as_path(tmp_path / "vlm"), as_path(tmp_path / "tokenizer"))
        assert net.state_dict().keys() == from_model.keys()
        assert all(torch.equal(tensor, from_model[name]) for name, tensor in net.state_dict().items())
    net = ARGenSegForConditionalGeneration.from_vlm(tiny.internvl_config(), tokenizer)
    assert net.lm_head.weight.shape == (VOCAB + NEW, 32) and net.lm_head.weight[:VOCAB].std() > 0.1


@pytest.mark.parametrize("spare", [0, 5])
def test_a_vocabulary_that_has_room_is_not_grown(spare):
    vlm = plain_vlm(tiny.internvl_config(tiny.text_config(vocab_size=100 + NEW + spare)))
    embedding, head = rows_of(vlm)
    net = ARGenSegForConditionalGeneration.from_vlm(vlm, tiny.visual_tokenizer(), first_new_token_id=100)
    assert net.config.gen_start_token_id == 100 and net.config.visual_token_offset == 102
    for old, new in ((embedding, net.get_input_embeddings().weight), (head, net.lm_head.weight)):
        assert new.shape == old.shape and torch.equal(new[:100], old[:100])
        torch.testing.assert_close(new[100 : 100 + NEW], old[:100].mean(0).expand(NEW, -1))


def test_room_for_a_part_of_the_new_ids_only():
    vlm = plain_vlm(tiny.internvl_config())
    _, head = rows_of(vlm)
    net = ARGenSegForConditionalGeneration.from_vlm(vlm, tiny.visual_tokenizer(), first_new_token_id=VOCAB - 4)
    assert net.lm_head.weight.shape[0] == VOCAB - 4 + NEW
    assert torch.equal(net.lm_head.weight[: VOCAB - 4], head[:-4])
    torch.testing.assert_close(net.lm_head.weight[VOCAB - 4 :], head[:-4].mean(0).expand(NEW, -1))


def test_the_vlm_that_was_passed_is_left_alone():
    config = tiny.internvl_config()
    vlm = plain_vlm(config)
    before, given = copy.deepcopy(vlm.state_dict()), vlm.config.to_dict()
    net = ARGenSegForConditionalGeneration.from_vlm(vlm, tiny.visual_tokenizer())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert vlm.config.to_dict() == given
    assert all(torch.equal(tensor, vlm.state_dict()[name]) for name, tensor in before.items())
    given = config.to_dict()
    ARGenSegForConditionalGeneration.from_vlm(config, tiny.visual_tokenizer())
    assert config.to_dict() == given


def test_bfloat16_keeps_the_quantizer_in_float32():
    vlm, tokenizer = plain_vlm(tiny.internvl_config()).to(torch.bfloat16), tiny.visual_tokenizer()
    net = ARGenSegForConditionalGeneration.from_vlm(vlm, tokenizer)
    assert net.lm_head.weight.dtype == net.model.scale_embedding.weight.dtype == torch.bfloat16
    for name, tensor in tokenizer.quantize.state_dict().items():
        kept = net.model.quantizer.state_dict()[name]
        assert kept.dtype == torch.float32 and torch.equal(kept, tensor), name


@every_vlm
def test_bfloat16_says_what_it_said(make, tmp_path):
    plain_vlm(make()).save_pretrained(tmp_path)
    vlm = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    net = ARGenSegForConditionalGeneration.from_vlm(vlm, tiny.visual_tokenizer()).eval()
    ids, images = prompt_of(net)
    ids, images = torch.cat([ids, torch.arange(3, 40)[None].repeat(1, 12)], dim=1), images.bfloat16()
    expected = vlm(input_ids=ids, pixel_values=images).logits
    torch.testing.assert_close(net(ids, pixel_values=images).logits[..., :VOCAB], expected)
    buffers = dict(net.model.vlm.named_buffers())
    assert all(buffers[name].dtype == buffer.dtype for name, buffer in vlm.base_model.named_buffers())


def test_rows_between_the_old_vocabulary_and_the_first_new_token_are_the_mean_too():
    vlm = plain_vlm(tiny.internvl_config())
    embedding, head = rows_of(vlm)
    net = ARGenSegForConditionalGeneration.from_vlm(vlm, tiny.visual_tokenizer(), first_new_token_id=VOCAB + 3)
    for old, new in ((embedding, net.get_input_embeddings().weight), (head, net.lm_head.weight)):
        assert torch.equal(new[:VOCAB], old)
        torch.testing.assert_close(new[VOCAB:], old.mean(0).expand(3 + NEW, -1))


def test_the_first_layer_of_a_deep_projector_starts_at_random():
    changes = {"generation_projector_depth": 2}
    net = ARGenSegForConditionalGeneration.from_vlm(tiny.internvl_config(), tiny.visual_tokenizer(), **changes)
    first = net.model.generation_projector[0]
    assert 0.2 < first.weight.std() < 0.4 and not first.bias.any()  # initializer_range is 0.3


def test_the_generation_config_is_taken_over():
    vlm = plain_vlm(tiny.internvl_config())
    vlm.generation_config.update(eos_token_id=[EOS, 9], pad_token_id=5, max_new_tokens=7)
    net = ARGenSegForConditionalGeneration.from_vlm(vlm, tiny.visual_tokenizer())
    config = net.generation_config
    assert (config.eos_token_id, config.pad_token_id, config.max_new_tokens) == ([EOS, 9], 5, 7)
    assert config is not vlm.generation_config


def test_the_state_of_the_vlm_is_taken_over():
    vlm, tokenizer = plain_vlm(tiny.internvl_config()).train(), tiny.visual_tokenizer()
    vlm.set_attn_implementation("eager")
    vlm.requires_grad_(False)  # as peft leaves a model whose adapters were merged
    net = ARGenSegForConditionalGeneration.from_vlm(vlm, tokenizer)
    assert net.training and net.model.language_model.config._attn_implementation == "eager"
    assert all(one.requires_grad == ("quantizer" not in name) for name, one in net.named_parameters())
    assert not ARGenSegForConditionalGeneration.from_vlm(vlm.eval(), tokenizer).training


def test_changes_reach_the_config():
    changes = {"scale_attention": "block", "visual_loss": "scale", "visual_loss_weight": 2.0, "num_scales": 3}
    net = ARGenSegForConditionalGeneration.from_vlm(tiny.internvl_config(), tiny.visual_tokenizer(), **changes)
    assert {name: getattr(net.config, name) for name in changes} == changes
    first = net.config.visual_token_offset
    out = net.generate(**left_padded([stream(10, first - 2)]), max_new_tokens=1, do_sample=False, eos_token_id=EOS)
    assert ((out >= first) & (out < first + CODES)).sum() == 1 + 4 + 9


@every_vlm
@pytest.mark.parametrize("scale_attention", ["causal", "block"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_drawing_equals_teacher_forcing_and_batch_equals_single(make, scale_attention, attention):
    net = tiny.model(make(), attention=attention, scale_attention=scale_attention)
    prompts, text = [stream(6, 5), stream(7, 8, 9, 6, 5)], [SURE, GEN_START, DONE]
    together = generate(net, left_padded(prompts), text, text)
    for row, prompt in enumerate(prompts):
        alone = generate(net, left_padded([prompt]), text)
        assert answers(together.sequences, 5)[row] == answers(alone.sequences, prompt.shape[1])[0]
        (start,) = starts_of(alone.sequences[0])
        ids = alone.sequences[0, start + 1 : start + 1 + T] - FIRST_VISUAL
        logits = visual_logits(net, alone.sequences[0], start)
        assert torch.equal(logits.argmax(-1), ids) and len(ids.unique()) > 2
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(alone.picture_token_logprobs[0][0], logprobs, atol=1e-4, rtol=1e-4)


@every_vlm
@pytest.mark.parametrize("scale_attention", ["causal", "block"])
def test_a_static_cache_gives_the_same_ids(make, scale_attention):
    """Also with language models that name the kinds of their layers: their masks come by kind."""
    net = tiny.model(make(), scale_attention=scale_attention)
    prompts, texts = left_padded(tiny.PROMPTS[1:3]), tiny.TEXTS[1:3]
    plain, static = (generate(net, prompts, *texts, cache_implementation=kind).sequences for kind in (None, "static"))
    assert torch.equal(plain, static)


def llava_next_config():
    one = tiny.llava_config()
    return LlavaNextConfig(vision_config=one.vision_config, text_config=one.text_config, image_token_id=IMAGE)


def idefics_config():
    text = tiny.text_config()
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Idefics3Config(vision_config=vision, text_config=text, image_token_id=IMAGE)


def glm4v_config():
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_heads": 2}
    text = tiny.text_config().to_dict() | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    return Glm4vConfig(text_config=text | {"model_type": "glm4v_text"}, vision_config=vision)


def mistral_config():
    return tiny.internvl_config(tiny.text_config(MistralConfig, sliding_window=8))


def mixed_config():
    text = tiny.text_config(Gemma3TextConfig, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    return tiny.internvl_config(text)


def paligemma_config():
    text = tiny.text_config(GemmaConfig, head_dim=8)
    return PaliGemmaConfig(vision_config=tiny.llava_config().vision_config, text_config=text, projection_dim=32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (paligemma_config, "PaliGemmaModel cannot be built on: tokens of an image see those after them"),
        (
            llava_next_config,
            "LlavaNextModel cannot be built on: its image features need image_sizes beside pixel_values",
        ),
        (glm4v_config, "Glm4vModel cannot be built on: its image features need image_grid_thw"),
        (idefics_config, "Idefics3Model cannot be built on"),
        (mistral_config, "layers of sliding_attention.*set sliding_window=None"),
        (mixed_config, "layers of sliding_attention.*set sliding_window=None"),
    ],
)
def test_what_cannot_be_built_on_is_told(make, message):
    with pytest.raises(ValueError, match=message):
        ARGenSegForConditionalGeneration.from_vlm(make(), tiny.visual_tokenizer())


def test_a_window_that_is_switched_off():
    config = tiny.internvl_config(tiny.text_config(MistralConfig, sliding_window=None))
    net = ARGenSegForConditionalGeneration.from_vlm(config, tiny.visual_tokenizer()).eval()
    ids, image = prompt_of(net)
    start = net.config.gen_start_token_id
    out = generate(net, {"input_ids": ids}, [SURE, start, DONE], pixel_values=image)
    assert int(net.config.is_visual(out.sequences).sum()) == T
