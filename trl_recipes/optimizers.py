"""Muon for the matrices of transformer layers, AdamW for everything else, as one optimizer for `Trainer`.

Muon (Jordan et al., 2024) orthogonalises the momentum of a matrix; with steps of AdamW's size (`match_rms_adamw`, Liu
et al., "Muon is scalable for LLM training", 2025) both parts share one learning rate.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class Together(Optimizer):
    """Several optimizers that step as one; a scheduler sees the groups of all."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers
        groups = [group for one in optimizers for group in one.param_groups]
        super().__init__(groups, {})
        self.param_groups = groups  # the same dicts: a change of lr reaches the optimizer whose group it is

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            raise ValueError("several optimizers cannot share a closure")
        for one in self.optimizers:
            one.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in self.optimizers:
            one.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for one, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            one.load_state_dict(state)
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]


def muon_and_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    trunk_lr_scale: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> Together:
    """The optimizer of a small model from scratch.

    Args:
        named_parameters: of the model; those that need no gradient are left out.
        lr: of everything but the pretrained vision trunk.
        weight_decay: of matrices; embeddings, norms and biases have none.
        trunk_lr_scale: times `lr` for the trunk.
        betas: of AdamW.
    """
    matrices, trunk, rest = [], [], []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if ".trunk." in name:
            trunk.append(parameter)
        elif parameter.ndim == 2 and (".layers." in name or ".multi_modal_projector." in name):
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups = [{"params": rest, "lr": lr}, {"params": trunk, "lr": lr * trunk_lr_scale}]
    adamw = AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, weight_decay=0.0)
    parts: list[Optimizer] = [adamw]
    if matrices:
        parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return Together(parts)
