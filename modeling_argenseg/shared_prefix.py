"""One image, many prompts: what all prompts on an image begin with is read once, and its cache is handed to each."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache


@dataclass(frozen=True)
class EncodedImage:
    """An image as the language model has read it, from the first token of the prompt to the last of the image.

    Attributes:
        input_ids: the tokens that were read (P,); every prompt that uses this begins with them.
        layers: keys and values (1, heads, P, width) of each layer of the language model.
        pixel_values: the image itself, to notice another one; None if it was given as features.
    """

    input_ids: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    pixel_values: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """P, the tokens that need not be read again."""
        return self.input_ids.shape[0]

    @classmethod
    def from_cache(
        cls, input_ids: torch.Tensor, cache: Cache, pixel_values: torch.Tensor | None = None
    ) -> "EncodedImage":
        """
        Raises:
            ValueError: a layer does not keep all that it has read (sliding or linear attention).
        """
        layers = []
        for layer in cache.layers:
            if layer.is_sliding or layer.get_seq_length() != input_ids.shape[0]:
                raise ValueError("encode_image needs a language model whose every layer attends to the whole prompt")
            layers.append((layer.keys, layer.values))
        return cls(input_ids, tuple(layers), pixel_values)

    def check_images(self, pixel_values: torch.Tensor | None) -> None:
        """
        Raises:
            ValueError: `pixel_values` (prompts * tiles, 3, H, W) are not the encoded image once for each prompt.
        """
        if pixel_values is None or self.pixel_values is None:
            return
        own = self.pixel_values.to(pixel_values.device, pixel_values.dtype)
        fits = pixel_values.shape[1:] == own.shape[1:] and pixel_values.shape[0] % own.shape[0] == 0
        if not fits or not bool((pixel_values.unflatten(0, (-1, own.shape[0])) == own).all()):
            raise ValueError(
                "pixel_values show something else than encoded_image: encode that image, or leave encoded_image out"
            )

    def fill(self, cache: Cache, rows: int) -> None:
        """Puts a copy for each of `rows` rows into an empty cache of any kind."""
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)

    def move_padding_behind(self, input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompts and their mask (R, L), with the padding moved behind the shared tokens.

        Raises:
            ValueError: a prompt does not begin with the shared tokens, or nothing follows them.
        """
        shared, length = self.input_ids.to(input_ids.device), self.length
        ids_rows, mask_rows = [], []
        for number, (ids, used) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            pad = int((~used).sum())
            begins = torch.equal(ids[pad : pad + length], shared) and not bool(used[:pad].any())
            if not begins or ids.shape[0] == pad + length:
                raise ValueError(
                    f"prompt {number} does not begin with the {length} tokens of encoded_image and go on after them: "
                    "it must be left-padded, and made by the same processor and template, with the same image first"
                )
            order = torch.arange(ids.shape[0], device=ids.device)
            order = torch.cat([order[pad : pad + length], order[:pad], order[pad + length :]])
            ids_rows.append(ids[order])
            mask_rows.append(mask[number, order])
        return torch.stack(ids_rows), torch.stack(mask_rows)


__all__ = ["EncodedImage"]
