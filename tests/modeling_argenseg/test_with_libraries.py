"""What transformers, accelerate and peft do to a model from outside: offloading, evaluation, wrappers."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import cpu_offload
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from tiny import CAT, DONE, FIRST_VISUAL, GEN_START, IMAGE, PAD, SURE, T, generate, images, pictures, stream
from transformers import Trainer, TrainingArguments

from modeling_argenseg import ARGenSegForConditionalGeneration

PROMPT = {"input_ids": stream(IMAGE, CAT, 7), "pixel_values": images(1)}
ROW = stream(CAT, GEN_START, pictures(1), DONE)


@pytest.mark.filterwarnings("ignore:torch")
def test_a_model_whose_linear_layers_have_no_parameters_any_more() -> None:
    packed = torch.ao.quantization.quantize_dynamic(tiny.model(), {torch.nn.Linear}, dtype=torch.qint8)
    assert not list(packed.model.generation_projector.parameters())
    assert draw(packed).shape == draw(tiny.model()).shape


def draw(net: Any) -> torch.Tensor:
    text = [SURE, GEN_START, DONE]
    inputs = {name: PROMPT[name] for name in ("input_ids",)}
    return generate(net, inputs, text, pixel_values=PROMPT["pixel_values"], picture_logit_adjustment=0.1).sequences


@pytest.mark.parametrize(
    ("where", "tied"),
    [("disk", False), ("disk", True), ("head on disk", False), ("cpu_offload", False), ("cpu_offload", True)],
)
def test_an_offloaded_model_draws_the_same(tmp_path: Path, where: str, tied: bool) -> None:
    net = tiny.model(tie_word_embeddings=tied)
    expected = draw(net)
    if where == "cpu_offload":
        found = draw(cpu_offload(net))
    else:
        net.save_pretrained(tmp_path / "model")
        places = {"": "disk"} if where == "disk" else {"model": "cpu", "lm_head": "disk"}
        options: dict[str, Any] = {"device_map": places, "offload_folder": str(tmp_path / "off")}
        found = draw(ARGenSegForConditionalGeneration.from_pretrained(tmp_path / "model", **options))
    assert torch.equal(found, expected)


def test_an_image_reaches_embeddings_of_an_offloaded_model() -> None:
    net, ids = tiny.model(), PROMPT["input_ids"]
    with torch.no_grad():
        expected = net(**PROMPT).logits
        net = cpu_offload(net)
        embeds = net.get_input_embeddings()(ids)
        found = net(inputs_embeds=embeds, pixel_values=PROMPT["pixel_values"]).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_trainer_evaluates(tmp_path: Path, adapted: bool) -> None:
    net: Any = tiny.model()
    if adapted:
        net = get_peft_model(net, LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"]))
    data = Dataset.from_list([{"input_ids": ROW[0].tolist(), "labels": ROW[0].tolist()}] * 3)
    seen = []

    def accuracy(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"accuracy": 1.0}

    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=2)
    found = Trainer(net, arguments, eval_dataset=data, compute_metrics=accuracy).evaluate()
    with torch.no_grad():
        expected = net(ROW, labels=ROW).loss
    assert found["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert found["eval_accuracy"] == 1.0 and seen == [(3, ROW.shape[1], tiny.VOCAB)]


def test_the_projector_can_be_saved_with_an_adapter() -> None:
    net = tiny.model()
    expected = draw(net)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["generation_projector"]}
    adapted: Any = get_peft_model(net, LoraConfig(task_type=TaskType.CAUSAL_LM, **options))
    adapted(input_ids=ROW, labels=ROW).loss.backward()
    trained = {name for name, one in adapted.named_parameters() if one.grad is not None}
    assert any("generation_projector.modules_to_save" in name for name in trained)
    assert torch.equal(draw(adapted.eval()), expected)


def test_an_adapter_of_the_head_draws() -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    adapted: Any = get_peft_model(tiny.model(), config).eval()
    found = generate(adapted, {"input_ids": PROMPT["input_ids"]}, [GEN_START], pixel_values=PROMPT["pixel_values"])
    sequence = found.sequences[0]
    (start,) = tiny.starts_of(sequence)
    logits = tiny.visual_logits(adapted, sequence, start, pixel_values=PROMPT["pixel_values"])
    assert torch.equal(logits.argmax(-1), sequence[start + 1 : start + 1 + T] - FIRST_VISUAL)
    with adapted.disable_adapter():
        without = tiny.visual_logits(adapted, sequence, start, pixel_values=PROMPT["pixel_values"])
    assert not torch.equal(logits.argmax(-1), without.argmax(-1))


@pytest.mark.parametrize("visual_loss", ["token", "scale"])
def test_labels_of_pictures_need_ids(visual_loss: str) -> None:
    net, sizes = tiny.model(visual_loss=visual_loss), {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
    tuned = get_peft_model(net, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2, **sizes))
    with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds.*LoRA does not"):
        tuned(input_ids=ROW, labels=ROW)
    words = stream(CAT, SURE, DONE)
    assert torch.isfinite(tuned(input_ids=words, labels=words).loss)


def test_labels_of_pictures_where_there_is_none() -> None:
    labels = ROW.clone()
    with pytest.raises(ValueError, match="labels are input_ids, or -100"):
        tiny.model(visual_loss="scale")(ROW * 0 + CAT, attention_mask=(ROW != PAD).long(), labels=labels)
