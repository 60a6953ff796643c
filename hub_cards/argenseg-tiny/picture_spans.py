"""Where pictures stand in a token stream: `<gen_start>` and exactly T visual ids after it. Everything else is text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VISUAL_TOKEN = "<visual token {:06d}>"  # of each codebook index


@dataclass(frozen=True)
class PictureSpan:
    """One picture of a row: the position of its `<gen_start>` and its T codebook indices."""

    start: int
    codes: np.ndarray


@dataclass(frozen=True)
class PictureVocabulary:
    """The ids that pictures are written with: `<gen_start>`, and V visual ids from `offset` on."""

    gen_start_id: int
    offset: int
    size: int
    pad_id: int | None = None

    def is_visual(self, ids: np.ndarray) -> np.ndarray:
        return (ids >= self.offset) & (ids < self.offset + self.size)

    def is_text(self, ids: np.ndarray) -> np.ndarray:
        return ~self.is_visual(ids) & (ids != self.gen_start_id)

    def find_pictures(
        self,
        ids: np.ndarray,
        num_tokens: int | None,
        open_end: bool = False,
        previews: Sequence[int] = (),
    ) -> list[PictureSpan]:
        """Find the pictures of one row.

        Args:
            ids: int array (L,). Padding is looked through, wherever it stands.
            num_tokens: T, the tokens of one picture; `None` if unknown.
            open_end: whether a `<gen_start>` may end the row, as in a prompt that opens a picture.
            previews: numbers of tokens that a picture may also have which ends the row.

        Raises:
            ValueError: a picture is cut short, or visual ids stand outside any picture.
        """
        positions = np.flatnonzero(ids != self.pad_id) if self.pad_id is not None else np.arange(len(ids))
        ids = ids[positions]
        visual = self.is_visual(ids)
        if num_tokens is None and visual.any():
            raise ValueError("the stream holds a picture, but this processor was loaded without a visual tokenizer")
        if num_tokens is None:
            return []
        spans = []
        for start in np.flatnonzero(ids == self.gen_start_id):
            if open_end and start == len(ids) - 1:
                continue
            end = start + 1 + num_tokens
            drawn = int(visual[start + 1 : end].cumprod().sum())
            at_end = start + 1 + drawn == len(ids)
            if drawn < num_tokens and not (at_end and drawn in previews):
                raise ValueError(_short_picture(drawn, num_tokens, at_end))
            spans.append(PictureSpan(int(positions[start]), ids[start + 1 : start + 1 + drawn] - self.offset))
        outside = int(visual.sum()) - sum(len(span.codes) for span in spans)
        if outside:
            raise ValueError(
                f"{outside} visual tokens stand outside any picture: a picture is <gen_start> and exactly {num_tokens} "
                "visual tokens. Pass whole sequences (with prompt_length=, if the prompt ends in <gen_start>)."
            )
        return spans


def _short_picture(drawn: int, num_tokens: int, at_end: bool) -> str:
    if at_end:
        return (
            f"the sequence was cut after {drawn} of {num_tokens} tokens of a picture. Of a preview "
            "(picture_stop_at_scale), pass its stop_at_scale; otherwise generate again with room for a whole picture: "
            "raise max_new_tokens or max_length"
        )
    return f"a <gen_start> is followed by {drawn} visual tokens where a picture has {num_tokens}"
