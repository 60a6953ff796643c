"""What may move when adapters are trained, and what must not."""

import torch
from torch import nn

from trl_recipes.adapters import new_token_rows, target_names

NEW_PARTS = ("generation_projector", "scale_embedding", "position_embedding")


def check_what_moved(before: dict[str, torch.Tensor], model: nn.Module, new_parts: bool, tied: bool = False) -> None:
    """Adapted layers of a merged model moved, new parts if they train; all else is the same bit for bit.

    Args:
        before: the state of the model before training.
        new_parts: whether the new tokens' rows and the parts that make queries were trained.
        tied: whether embedding and head are one matrix.
    """
    after, layers = model.state_dict(), set(target_names(model, "all"))
    assert after.keys() == before.keys()
    rows = {"model.vlm.language_model.embed_tokens.weight": "embed_tokens", "lm_head.weight": "lm_head"}
    for name, tensor in after.items():
        moved = (tensor != before[name]).nonzero()
        if name.removesuffix(".weight") in layers:
            assert len(moved), f"{name} has an adapter and did not move"
        elif name in rows and new_parts:
            assert moved[:, 0].unique().tolist() == new_token_rows(model)["embed_tokens" if tied else rows[name]]
        elif name.split(".")[1] in NEW_PARTS and new_parts:
            assert len(moved), f"{name} did not move"
        else:
            assert not len(moved), f"{name} moved"
