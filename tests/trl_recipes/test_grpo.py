"""Reinforcement learning on masks: probabilities are those of sampling, the reward is evaluation's, and it learns."""

import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import own_masks
import pytest
import tiny
import torch
from own_masks import trl_command
from tiny import CAT, DOG, DONE, EOS, GEN_START, SURE, T, left_padded, stream
from trl import GRPOTrainer

from modeling_argenseg import ARGenSegForConditionalGeneration
from modeling_argenseg.generation_argenseg import PICTURE_DEFAULTS
from processing import ARGenSegProcessor
from trl_recipes import grpo, sft
from trl_recipes.export import set_picture_options
from trl_recipes.lora import load_data, read_metrics
from trl_recipes.mask_data.arguments import MaskDataArguments

PROMPTS = [stream(tiny.IMAGE, CAT, DOG, 7, 8), stream(tiny.IMAGE, 5)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return own_masks.as_jsonl(tmp_path_factory.mktemp("data") / "own")


@pytest.fixture(scope="module")
def processor(toy_folder) -> ARGenSegProcessor:
    return ARGenSegProcessor.from_pretrained(toy_folder)


def hidden_states(net: Any, ids: torch.Tensor, length: int, **inputs: Any) -> torch.Tensor:
    outputs = net(ids, output_hidden_states=True, logits_to_keep=1, **inputs)
    return outputs.hidden_states[-1][:, -length - 1 : -1]


@pytest.mark.parametrize("scale_attention", ["causal", "block"])
def test_pictures_have_the_probabilities_that_generate_tells(scale_attention: str) -> None:
    net = tiny.model(scale_attention=scale_attention)
    inputs, texts = left_padded(PROMPTS), [[SURE, GEN_START, DONE], [GEN_START, DONE, DOG]]
    out = tiny.generate(net, inputs, *texts, pixel_values=tiny.images(2), picture_do_sample=True)
    length = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, length, dtype=torch.long)], dim=1)
    hidden = hidden_states(net, out.sequences, length, attention_mask=mask, pixel_values=tiny.images(2))
    logps, entropies = grpo.answer_log_probs(net, hidden, out.sequences)
    is_visual = net.config.is_visual(out.sequences[:, -length:])
    for row in range(2):
        expected = out.picture_token_logprobs[row][0]
        torch.testing.assert_close(logps[row][is_visual[row]], expected, atol=1e-4, rtol=1e-4)
    assert (entropies[is_visual] > 0).all() and (entropies[is_visual] <= np.log(tiny.CODES) + 1e-4).all()


def test_probabilities_sum_to_one_over_what_can_be_chosen() -> None:
    """Under a temperature and a logit adjustment, for a visual token of each scale and for text."""
    net = tiny.model()
    net.model.quantizer.ema_vocab_hit_SV.copy_(torch.rand(len(tiny.SIDES), tiny.CODES))
    set_picture_options(net, picture_logit_adjustment=0.7)
    (picture,) = tiny.pictures(1)
    row = torch.cat([PROMPTS[0], stream(SURE, GEN_START, picture, DONE, EOS)], dim=1)
    length = T + 4
    hidden = hidden_states(net, row, length, pixel_values=tiny.images(1))
    drawn = {2: 0, 4: 1, 11: 2, T + 1: 3}  # column of the answer: scale
    for column, choices in [
        *((column, range(tiny.FIRST_VISUAL, tiny.FIRST_VISUAL + tiny.CODES)) for column in drawn),
        (0, [word for word in range(tiny.VOCAB) if not net.config.is_visual(torch.tensor(word))]),
    ]:
        found = []
        for choice in choices:
            changed = row.clone()
            changed[0, -length + column] = choice
            if column == 0 and choice in (tiny.GEN_END, tiny.IMAGE):
                continue
            if column == 0 and choice == GEN_START:
                changed[0, -length + column] = GEN_START  # a picture that does not begin there
            found.append(grpo.answer_log_probs(net, hidden, changed, temperature=0.8)[0][0, column])
        assert torch.stack(found).exp().sum().item() == pytest.approx(1, abs=1e-4)
        if column in drawn:
            logits = net.visual_logits(hidden[0, column]) - 0.7 * net.model.quantizer.log_frequency(drawn[column])
            torch.testing.assert_close(torch.stack(found), (logits / 0.8).log_softmax(-1))


def test_a_batch_that_draws_nothing() -> None:
    net = tiny.model()
    ids, mask = (left_padded(PROMPTS)[name] for name in ("input_ids", "attention_mask"))
    hidden = hidden_states(net, ids, 2, attention_mask=mask, pixel_values=tiny.images(2))
    logps, entropies = grpo.answer_log_probs(net, hidden, ids)
    assert (logps < 0).all() and (entropies > 0).all()


def test_the_reward_is_the_iou_that_evaluation_counts(processor) -> None:
    masks = own_masks.masks()
    truth = [own_masks.rle(masks["square"])]
    codes = processor.encode_masks([masks["square"], masks["disc"]])
    words = processor.tokenizer("no", add_special_tokens=False)["input_ids"]
    pictures = [[processor.gen_start_token_id, *(row + processor.visual_token_offset).tolist()] for row in codes]
    end, size = [processor.tokenizer.eos_token_id], [own_masks.HEIGHT, own_masks.WIDTH]
    answers = [words + pictures[0] + end, pictures[1], words + end, words + end, pictures[1] + end]
    reward = grpo.mask_reward(processor)
    found = reward(completion_ids=answers, masks=[truth, truth, truth, [], []], image_size=[size] * 5, prompts=None)
    _, drawn = processor.decode_masks(codes, [tuple(size)] * 2)
    expected = [(mask & masks["square"]).sum() / (mask | masks["square"]).sum() for mask in drawn]
    assert found == [*map(pytest.approx, expected), 0.0, 1.0, 0.0]


def test_requests_are_as_the_model_is_asked_them(processor, data) -> None:
    rows, _ = load_data(MaskDataArguments(data=str(data), eval_data=str(data)), seed=0, progress=False)
    requests = grpo.requests_of(rows, processor)
    assert len(requests) == 6 and set(requests.column_names) == {"image", "image_size", "prompt", "masks"}
    assert requests[0]["prompt"] == [{"role": "user", "content": "Please segment the square in this image."}]
    assert [len(row["masks"]) for row in requests] == [1, 1, 0] * 2


def test_masks_in_the_history_are_refused(processor, tmp_path) -> None:
    own_masks.write_pictures(tmp_path)
    turns = [("user", "the square"), ("assistant", "<mask>"), ("user", "and the ball"), ("assistant", "<mask>")]
    row = {
        "image": "images/0.png",
        "mask": ["masks/0_square.png", "masks/0_disc.png"],
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in turns
        ],
    }  # fmt: skip
    file = own_masks.write_jsonl(tmp_path / "train.jsonl", [row])
    rows, _ = load_data(MaskDataArguments(data=str(file), eval_data=str(file)), seed=0, progress=False)
    with pytest.raises(ValueError, match=r"train\.jsonl line 1, field 'conversation': masks before the last answer"):
        grpo.requests_of(rows, processor)


def test_it_learns_to_draw_better(toy_folder, data, tmp_path) -> None:
    """From a model that knows another picture: it draws one thing in two, badly."""
    changes = dict(
        max_steps=20, eval_steps=20, save_steps=10, learning_rate=3e-4, per_device_train_batch_size=24,
        gradient_accumulation_steps=2, max_completion_length=40,
    )  # fmt: skip
    grpo.main(trl_command("grpo", toy_folder, data, tmp_path / "out", **changes))
    before, after = read_metrics(tmp_path / "out")
    assert after["giou"] > before["giou"] + 0.02, (before, after)
    loaded = ARGenSegForConditionalGeneration.from_pretrained(tmp_path / "out")
    start = ARGenSegForConditionalGeneration.from_pretrained(toy_folder)
    moved = {name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, start.state_dict()[name])}
    assert moved and not any("vision_tower" in name or "quantizer" in name for name in moved)
    with pytest.raises(SystemExit, match="temperature"):
        grpo.main(trl_command("grpo", toy_folder, data, tmp_path / "out", **(changes | {"temperature": 0.5})))


def quick(name: str, model: Path, data: Path, output: Path, **changes: Any) -> list[str]:
    """One step of sixteen answers, without evaluation."""
    sizes = dict(max_steps=1, eval_strategy="no", save_strategy="no", per_device_train_batch_size=16)
    options = sizes | dict(gradient_accumulation_steps=1, max_completion_length=12)
    return trl_command(name, model, data, output, **(options | changes))


def test_what_the_model_has_for_generating_does_not_bend_the_sampling(toy_folder, data, tmp_path, monkeypatch) -> None:
    """Its probabilities would not be those that are learned."""
    shutil.copytree(toy_folder, tmp_path / "model")
    net = ARGenSegForConditionalGeneration.from_pretrained(toy_folder)
    words = [3, net.config.gen_start_token_id, 4]
    own = dict(min_p=0.2, no_repeat_ngram_size=2, picture_top_k=2, picture_top_p=0.5, picture_stop_at_scale=2)
    own |= dict(picture_guidance_scale=1.0, picture_prefill="always", picture_answer_ids=words, do_sample=True)
    set_picture_options(net, **own)
    net.generation_config.save_pretrained(tmp_path / "model")
    used, sample = [], ARGenSegForConditionalGeneration._sample

    def spy(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        used.append((options["generation_config"], [type(one).__name__ for one in options["logits_processor"]]))
        return sample(self, input_ids, **options)

    monkeypatch.setattr(ARGenSegForConditionalGeneration, "_sample", spy)
    grpo.main(quick("grpo", tmp_path / "model", data, tmp_path / "out"))
    ((config, processors),) = used
    assert processors == ["SuppressTokensLogitsProcessor"]
    assert {name: getattr(config, name) for name in PICTURE_DEFAULTS} == PICTURE_DEFAULTS | {"picture_do_sample": True}
    kept = ARGenSegForConditionalGeneration.from_pretrained(tmp_path / "out").generation_config
    assert {name: getattr(kept, name) for name in own} == own


def test_padding_is_not_learned(toy_folder, data, tmp_path, monkeypatch) -> None:
    """Of an answer that was cut, beside a longer one that draws; one that is cut at its picture keeps it."""
    arguments = quick("grpo", toy_folder, data, tmp_path / "out", max_completion_length=4)
    trainer = grpo.prepare(*grpo.make_parser().parse_args_and_config(arguments))
    config, tokenizer = trainer.model.config, trainer.processor.tokenizer
    picture = [config.gen_start_token_id, *range(config.visual_token_offset, config.visual_token_offset + T)]
    answers = [[7] * 4, [7] * 3 + picture, [7] + picture + [7, tokenizer.eos_token_id], [7, tokenizer.eos_token_id]]
    rows = [torch.tensor(answer) for answer in answers]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    monkeypatch.setattr(trainer.model, "generate", lambda input_ids, **_: torch.cat([input_ids, padded], dim=1))
    count = (
        {"num_generations": 4} if "num_generations" in signature(GRPOTrainer._generate_single_turn).parameters else {}
    )
    assert trainer._generate_single_turn([[5, 6]] * 4, None, {}, **count) == (answers, None)


@pytest.mark.parametrize("adapters", [False, True])
def test_it_can_stay_near_the_model_that_it_began_with(adapters, toy_folder, data, tmp_path) -> None:
    changes = dict(max_steps=3, beta=0.1, use_peft=adapters, lora_dropout=0.0)
    recipe, training, model_args = grpo.make_parser().parse_args_and_config(
        quick("grpo", toy_folder, data, tmp_path / "out", **changes)
    )
    trainer = grpo.prepare(recipe, training, model_args)
    sft.train(trainer)
    first, *later = (entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert abs(first) < 1e-6 and max(later) > 1e-4


@pytest.mark.parametrize(
    "option", [("--repetition_penalty", "1.1"), ("--top_k", "5"), ("--top_p", "0.9"), ("--use_vllm", "true")]
)
def test_what_would_change_the_sampling_is_refused(option, toy_folder, data, tmp_path) -> None:
    with pytest.raises(SystemExit, match=f"{option[0]} does not go with masks"):
        grpo.main([*trl_command("grpo", toy_folder, data, tmp_path / "out"), *option])
