"""Images for vision-language models of the Qwen-VL family, which read patches and give image tokens rows and columns.

Images come as everywhere else, at one size, so that the grid of their tokens is always the same. In the language model
an image token has three rotary positions (of time, row and column), and text goes on after an image at the next number
that none of them has used: a stream of fewer positions than tokens. The position of an image token that is passed
around here, in two-dimensional `position_ids`, is that of the first token of its image plus its number in the image.

Shapes: B rows, L tokens, N images, P patches of an image, S = rows x columns tokens of an image.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .configuration_argenseg import ARGenSegConfig

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


def patchify(
    pixel_values: torch.Tensor, vision: PreTrainedConfig, grid: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W) as patches (N P, C frames patch patch), token by token, and their grids (N, 3) in patches.

    Raises:
        ValueError: the images do not make a grid of that many tokens.
    """
    merge, patch = vision.spatial_merge_size, vision.patch_size
    height, width = (side * merge * patch for side in grid)
    if pixel_values.shape[2:] != (height, width):
        raise ValueError(
            f"images must be {height} x {width} pixels (height x width) to make a grid of {grid} tokens; "
            f"got {' x '.join(map(str, pixel_values.shape[2:]))}"
        )
    count, channels = pixel_values.shape[:2]
    cut = pixel_values.reshape(count, channels, grid[0], merge, patch, grid[1], merge, patch)
    patches = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # N, token row, token column, row and column in the token, C, pixels
    frames = patches[..., None, :, :].expand(*(-1,) * 6, vision.temporal_patch_size, -1, -1)
    sizes = torch.tensor([[1, grid[0] * merge, grid[1] * merge]], device=pixel_values.device).expand(count, 3)
    return frames.reshape(-1, channels * vision.temporal_patch_size * patch**2), sizes


def plain_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, L) of tokens, one after another."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def deep_features(image: Any, places: torch.Tensor) -> dict[str, Any]:
    """What a language model of Qwen3-VL reads of images in its first layers (DeepStack); nothing for others."""
    layers = image.get("deepstack_features")
    if layers is None:
        return {}
    return {
        "visual_pos_masks": places,
        "deepstack_visual_embeds": [torch.cat(list(features)) for features in layers],
    }


class ImageGridMixin:
    """Positions of the tokens of a stream."""

    config: ARGenSegConfig

    def text_positions(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`position_ids` (B, L) of a stream.

        With an image grid an image takes as many positions as its longer side.

        Args:
            input_ids: its tokens (B, l), l <= L: as many as hold images.
            attention_mask: (B, L).
        """
        if self.config.image_grid is None:
            return plain_positions(attention_mask)
        is_image = input_ids == self.config.image_token_id
        return self._positions_after_images(is_image, attention_mask)

    def _positions_after_images(self, is_image: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        rows, columns = self.config.image_grid or (1, 1)
        size, count = rows * columns, is_image.long().cumsum(-1)
        before = torch.where(is_image, count - 1, count) // size  # whole images before a token
        more = attention_mask.shape[1] - before.shape[1]
        before = torch.cat([before, before[:, -1:].expand(-1, more)], dim=1)
        saved = before * (size - max(rows, columns))
        return (attention_mask.long().cumsum(-1) - 1 - saved).clamp(min=0)

    def rotary_positions(
        self,
        is_image: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """What the language model of an image grid is given: (3, B, L), or `position_ids` as they are without images.

        Args:
            is_image: where image tokens stand (B, L), whole images; None where there are none.
            position_ids: as `text_positions` makes them; None for a stream from its beginning.

        Raises:
            ValueError: a stream goes on, or streams are packed, and where images were is not known.
        """
        goes_on = cache is not None and cache.get_seq_length() > 0
        if position_ids is None and goes_on:
            raise ValueError("a stream that goes on needs position_ids: the last of text_positions(all ids, its mask)")
        if position_ids is not None and attention_mask is None and cache is None:
            raise ValueError("packed streams (position_ids without attention_mask) do not go with an image grid")
        if is_image is None:
            return position_ids
        if position_ids is None:
            known = attention_mask is not None and attention_mask.ndim == 2
            mask = attention_mask if known else torch.ones_like(is_image)
            position_ids = self._positions_after_images(is_image, mask)
        rows, columns = self.config.image_grid or (1, 1)
        number = torch.where(is_image, (is_image.long().cumsum(-1) - 1) % (rows * columns), 0)
        first = position_ids - number
        return torch.stack([first, first + number // columns, first + number % columns])


__all__ = ["MODEL_TYPES", "ImageGridMixin", "deep_features", "patchify", "plain_positions"]
