"""The loss of a stream: one softmax over the whole vocabulary, text and visual labels averaged apart.

Shapes: B batch, L stream length, N positions that have a label.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24  # 64 MiB in fp32; the backward pass holds about three times as much


def token_losses(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Cross-entropy (N,) of each target (N,) under `head(hidden)`, hidden (N, width), in fp32.

    The logits (N, vocabulary) never exist at once: they are made in parts, and again in the backward pass. Any head
    will do, also one with an adapter around it.
    """
    rows = max(1, LOGITS_AT_ONCE // vocab_size)  # sharded heads have no weights here, and wrappers no out_features
    if hidden.shape[0] <= rows:
        return cross_entropy(head(hidden), targets)

    def part(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(hidden), targets)

    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(part, *one, use_reentrant=False) for one in parts])


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (N,) of logits (N, vocabulary); 0 where a target is -100."""
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="none")


class LossMixin:
    """How the model weighs the labels of a stream."""

    def scale_of_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, L): the scale (0-based) of every visual id of the stream, -1 for text."""
        order = torch.arange(self.config.picture_length, device=input_ids.device)
        starts = torch.tensor(self.config.scale_starts, device=input_ids.device)
        scales = torch.full_like(input_ids, -1)
        rows, columns = self.model.find_pictures(input_ids)
        scales[rows[:, None], columns[:, None] + 1 + order] = torch.bucketize(order, starts, right=True) - 1
        return scales

    def split_loss(
        self, losses: torch.Tensor, targets: torch.Tensor, input_ids: torch.Tensor | None, keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss of text labels and of visual labels (as released). Either is zero where there is no such label.

        With `visual_loss="scale"` the visual mean is over the tokens of each scale, then over the scales.

        Args:
            losses: (N,) at the N positions that `keep` (B, L) marks.
            targets: (N,) what these positions are to predict; -100 for nothing.

        Raises:
            ValueError: labels of visual tokens without `input_ids`, or where the stream has no picture.
        """
        is_visual = self.config.is_visual(targets)
        is_text = (targets != -100) & ~is_visual
        zero = losses.sum() * 0.0
        text_loss = losses[is_text].mean() if bool(is_text.any()) else zero
        if not bool(is_visual.any()):
            return text_loss, zero
        if input_ids is None:
            raise ValueError(
                "labels hold visual tokens, but pictures are found by their ids: pass input_ids, not inputs_embeds. "
                "(Prompt tuning and prefix embeddings pass inputs_embeds; LoRA does not.)"
            )
        if self.config.visual_loss == "token":
            return text_loss, losses[is_visual].mean()
        scales = F.pad(self.scale_of_tokens(input_ids)[:, 1:], (0, 1), value=-1)[keep]
        drawn = [is_visual & (scales == scale) for scale in range(len(self.config.patch_nums))]
        means = [losses[where].mean() for where in drawn if bool(where.any())]
        if not means:
            raise ValueError("labels hold visual tokens where input_ids hold no picture; labels are input_ids, or -100")
        return text_loss, torch.stack(means).mean()


__all__ = ["LossMixin", "cross_entropy", "token_losses"]
