"""What the rows of a batch are doing while `generate` runs, and the columns that their cache holds.

Shapes: B rows asked for, R rows run (2 B under guidance: conditional rows, then unconditional), V codebook entries.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


@dataclass
class Rows:
    """State of the loop of `generate`.

    `ids` are in the caller's order. The cache may hold the columns of the prompt in another one (`EncodedImage` puts
    the padding behind what is shared); `mask` is in the order of the cache, and both have as many columns.
    """

    ids: torch.Tensor  # (R, columns)
    mask: torch.Tensor  # (R, columns), 0 where nobody attends
    prompt_length: int
    padding: int  # columns that longer unconditional prompts put before the prompts
    budget: torch.Tensor  # (B,) text tokens left
    running: torch.Tensor  # (B,) writes text
    waiting: torch.Tensor  # (B,) has emitted <gen_start>
    first_logits: torch.Tensor  # (R, V) logits of v_1 of the waiting rows
    model_kwargs: dict[str, Any]
    pad_id: int
    draft_after: torch.Tensor  # (m,) text that is expected to follow a picture
    prefix: torch.Tensor  # (B, t) codes of the first scales of each row's first picture, that need not be drawn
    logprobs: list[list[torch.Tensor]] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def copies(self) -> int:
        """2 under guidance, else 1."""
        return self.ids.shape[0] // self.running.shape[0]

    @property
    def streams(self) -> torch.Tensor:
        """The rows asked for (B, columns) as the caller knows them, gaps included."""
        return self.ids[: self.running.shape[0], self.padding :]

    def for_all(self, per_row: torch.Tensor) -> torch.Tensor:
        """A value per row asked for (B, ...) to one per row run (R, ...)."""
        return per_row.repeat(self.copies, *[1] * (per_row.ndim - 1))

    def with_prefix(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Tokens chosen for one scale (B, l), which begins at token `start` of its picture, or those of the prefix."""
        end = start + tokens.shape[1]
        if end > self.prefix.shape[1]:
            return tokens
        first = torch.tensor([not pictures for pictures in self.logprobs], device=tokens.device)
        return torch.where(first[:, None], self.prefix[:, start:end], tokens)

    def append(self, ids: torch.Tensor, active: torch.Tensor) -> None:
        """New columns `ids` (R, l); rows that are not `active` (B,) will not attend to them."""
        self.ids = torch.cat([self.ids, ids], dim=1)
        self.extend_mask(active, ids.shape[1])

    def extend_mask(self, active: torch.Tensor, length: int) -> None:
        columns = self.for_all(active).to(self.mask.dtype)[:, None].expand(-1, length)
        self.mask = torch.cat([self.mask, columns], dim=1)

    def keep(self, kept: torch.Tensor) -> None:
        """Of the last l columns only those `kept` (B, l) count; the others become gaps."""
        if kept.shape[1] == 0:
            return
        kept, count = self.for_all(kept), kept.shape[1]
        self.ids = torch.cat([self.ids[:, :-count], self.ids[:, -count:].masked_fill(~kept, self.pad_id)], dim=1)
        self.mask = torch.cat([self.mask[:, :-count], self.mask[:, -count:] * kept], dim=1)

    def compact_cache(self, cache: Any) -> Any:
        """The cache with the columns of `answers`, cropped to what every row has read.

        Waiting rows, and drafts that were not kept, leave gaps that only `mask` knows of. These are removed, and so are
        the rows of unconditional prompts. None if that cannot be done: of a static cache with gaps, or one that does
        not have its keys at hand.
        """
        batch, count = self.running.shape[0], cache.get_seq_length()
        used, unread = self.mask[:batch, :count].bool(), self.mask[:batch, count:].any(-1)
        pads = self.prompt_length - self.padding - used[:, : self.prompt_length].sum(-1)
        lengths = pads + used.sum(-1)
        length = int(lengths[unread].min() if bool(unread.any()) else lengths.max())
        order = torch.zeros(batch, length, dtype=torch.long, device=self.mask.device)
        for row, (kept, pad) in enumerate(zip(used, pads.tolist(), strict=True)):
            columns = kept.nonzero()[: max(length - pad, 0), 0]
            order[row, pad : pad + len(columns)] = columns
        filled = order > 0  # nobody attends to the others
        stays = order == torch.arange(length, device=order.device)
        if self.copies == 1 and length == count and bool((stays | ~filled).all()):
            return cache
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            return None
        for layer in cache.layers:
            at = order.to(layer.keys.device)[:, None, :, None]
            layer.keys = layer.keys[:batch].take_along_dim(at, 2)
            layer.values = layer.values[:batch].take_along_dim(at, 2)
        return cache

    def answers(self) -> torch.Tensor:
        """Whole streams (B, L), right-padded: closes the gaps that waiting left, so that every row is plain again."""
        batch, prompt = self.running.shape[0], self.prompt_length
        written = zip(self.ids[:batch, prompt:], self.mask[:batch, prompt:].bool(), strict=True)
        answers = torch.nn.utils.rnn.pad_sequence(
            [row[kept] for row, kept in written], batch_first=True, padding_value=self.pad_id
        )
        return torch.cat([self.ids[:batch, self.padding : prompt], answers], dim=1)


def stack_left_padded(first: torch.Tensor, second: torch.Tensor, value: int) -> torch.Tensor:
    """Rows of both (B, L) and (B, L'), left-padded to the same length."""
    length = max(first.shape[1], second.shape[1])
    return torch.cat([torch.nn.functional.pad(t, (length - t.shape[1], 0), value=value) for t in (first, second)])


__all__ = ["Rows", "stack_left_padded"]
