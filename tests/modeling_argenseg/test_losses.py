"""The loss that never holds all logits is the plain one, gradients included."""

from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tiny import CAT, DOG, DONE, GEN_START, IMAGE, SURE
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_argenseg import losses_argenseg
from modeling_argenseg.losses_argenseg import cross_entropy, token_losses


def batch() -> dict[str, torch.Tensor]:
    """Two rows with a picture each, prompt and padding without labels, and an image."""
    pictures = tiny.pictures(2)
    rows = [
        tiny.stream(IMAGE, CAT, SURE, GEN_START, pictures[0], DONE),
        tiny.stream(DOG, 7, 8, SURE, GEN_START, pictures[1], DONE, CAT),
    ]
    padded = tiny.left_padded(rows)
    labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    labels[:, :5] = -100
    return {**padded, "labels": labels, "pixel_values": tiny.images(1)}


def gradients(net: Any, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    net.zero_grad()
    outputs = net(**batch(), **options)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


class LargestTensor(TorchDispatchMode):
    """The most elements that any result has while this is entered."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.parametrize("at_once", [1, 400, 2**24])
@pytest.mark.parametrize("visual_loss", ["token", "scale"])
def test_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, at_once: int, visual_loss: str) -> None:
    monkeypatch.setattr(losses_argenseg, "LOGITS_AT_ONCE", at_once)
    net = tiny.model(visual_loss=visual_loss).train()
    plain, expected = gradients(net, skip_logits=False)
    parts, found = gradients(net)
    assert plain.logits is not None and parts.logits is None
    for name in ("loss", "text_loss", "visual_loss"):
        torch.testing.assert_close(parts[name], plain[name], rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys() and "lm_head.weight" in found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_head_with_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_argenseg, "LOGITS_AT_ONCE", 400)
    net = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).train()
    plain, expected = gradients(net, skip_logits=False)
    parts, found = gradients(net)
    torch.testing.assert_close(parts.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert len(found) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_argenseg, "LOGITS_AT_ONCE", 5000)
    head, hidden = torch.nn.Linear(4, 1000, bias=False), torch.randn(64, 4, requires_grad=True)
    targets = torch.randint(1000, (64,))
    with LargestTensor() as plain:
        cross_entropy(head(hidden), targets).sum().backward()
    with LargestTensor() as parts:
        token_losses(head, hidden, targets, 1000).sum().backward()
    assert plain.elements == 64 * 1000 and parts.elements <= 5000


def test_logits_are_there_in_evaluation_and_when_asked_for() -> None:
    net = tiny.model()
    with torch.no_grad():
        assert net(**batch()).logits is not None
        assert net.train()(**batch(), skip_logits=False).logits is not None
        assert net.eval()(**batch(), skip_logits=True).logits is None


def test_a_batch_without_labels() -> None:
    net, rows = tiny.model().train(), batch()
    outputs = net(**{**rows, "labels": torch.full_like(rows["labels"], -100)})
    outputs.loss.backward()
    assert outputs.loss.item() == 0
