"""The half of the processor that knows masks: masks to codebook indices, and generated streams to text and masks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from .edges import EdgeGuide
from .image_inputs import describe, load_images, to_list
from .mask_inputs import load_mask, mask_to_picture, picture_to_map

ENCODE_BATCH = 16  # masks that go through the VQ-VAE at once, so that mapping over a data set stays in memory
DECODE_BATCH = 8  # pictures that go through its decoder at once


class SegmentationProcessingMixin:
    """Methods of `ARGenSegProcessor` around masks.

    Shapes: B rows, L tokens, N masks, T visual tokens of a picture, C channels and S side of a picture.
    """

    @torch.no_grad()
    def encode_masks(
        self,
        masks: Any,
        image_sizes: list[tuple[int, int] | None] | None = None,
        search_steps: int | None = None,
    ) -> torch.Tensor:
        """Turn masks into visual tokens.

        Args:
            masks: one mask or N of them; see `load_mask`.
            image_sizes: (height, width) of the image each mask belongs to, `None` where unknown.
            search_steps: how long to try out tokens for each mask, see `VARTokenizer.encode`; default: as the visual
                tokenizer's configuration says. Not done where the last scale is not drawn (`num_scales`).

        Returns:
            long tensor (N, T) of codebook indices; add `visual_token_offset` for token ids.

        Raises:
            ValueError: a mask is unusable or has another size than its image; there is no visual tokenizer.
        """
        model = self._require_visual_tokenizer()
        masks = [load_mask(mask) for mask in to_list(masks, "mask")]
        if image_sizes is not None and len(image_sizes) != len(masks):
            raise ValueError(f"got {len(masks)} masks, but image sizes for {len(image_sizes)}")
        for mask, size in zip(masks, image_sizes or [None] * len(masks), strict=True):
            if size is not None and mask.shape != tuple(size):
                raise ValueError(
                    f"the mask is {mask.shape[0]}x{mask.shape[1]} (height x width), its image {size[0]}x{size[1]}; "
                    "give the mask at the size of the upright image"
                )
        sizes = self.mask_resize_sizes or [model.config.image_size]
        channels = model.config.num_channels
        if self.num_scales not in (None, len(model.config.patch_nums)):
            search_steps = 0  # it is for the last scale, which is cut off
        searching = {} if search_steps is None else {"search_steps": search_steps}
        ids = [torch.empty(0, self.num_visual_tokens, dtype=torch.long)]
        for start in range(0, len(masks), ENCODE_BATCH):
            pictures = [mask_to_picture(mask, sizes, channels) for mask in masks[start : start + ENCODE_BATCH]]
            ids_NT = model.encode(torch.stack(pictures).to(model.device, model.dtype), **searching).cpu()
            ids.append(ids_NT[:, : self.num_visual_tokens])
        return torch.cat(ids)

    @torch.no_grad()
    def decode_masks(
        self,
        ids: torch.Tensor,
        target_sizes: list[tuple[int, int] | None] | None = None,
        threshold: float = 0.5,
        images: list[Any] | None = None,
        follow_edges: bool | None = None,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Turn visual tokens into masks.

        Args:
            ids: long tensor (N, T) of codebook indices, or those of the first whole scales: a coarse preview.
            target_sizes: N pairs (height, width). Default: the size of the image, or the picture's own where there is
                none.
            threshold: a pixel belongs to the object where its map is above this, from 0 to below 1. Below 0.1 and above
                0.9 masks that follow edges get halos.
            images: the N images that the masks are of, each `None` or as `load_image` takes it.
            follow_edges: whether the maps follow the edges of the images, see `EdgeGuide`. Default: where there is an
                image, as the processor says. Previews never do.

        Returns:
            N float32 maps in [0, 1] and N bool masks, of the target sizes.

        Raises:
            ValueError: ids of a wrong shape or out of the codebook, a threshold out of range; `follow_edges` without
                images; there is no visual tokenizer.
        """
        maps = list(self._decode_maps(ids, target_sizes, threshold, images, follow_edges))
        return maps, [white > threshold for white in maps]

    @torch.no_grad()
    def _decode_maps(
        self, ids: torch.Tensor, target_sizes: Any, threshold: float, images: Any, follow_edges: bool | None
    ) -> Iterator[np.ndarray]:
        """The maps of `decode_masks`, one by one: of a large image each takes much memory."""
        model = self._require_visual_tokenizer()
        check_threshold(threshold)
        ids = torch.as_tensor(ids)
        if ids.ndim != 2 or ids.shape[1] not in self.whole_scales:
            raise ValueError(
                f"ids must be (N, {self.num_visual_tokens}), or fewer columns for a preview, the first whole scales: "
                f"{self.whole_scales}; got the shape {tuple(ids.shape)}"
            )
        if len(ids) == 0:
            return
        if ids.min() < 0 or ids.max() >= self.visual_vocab_size:
            raise ValueError(
                f"ids must be codebook indices, 0 to {self.visual_vocab_size - 1}; from token ids subtract "
                f"visual_token_offset = {self.visual_token_offset}"
            )
        loaded = _load_images(images, len(ids))
        sizes = _sizes(target_sizes, loaded)
        follows = self._follows_edges(follow_edges, images) and ids.shape[1] == self.num_visual_tokens
        pictures = [picture for part in ids.split(DECODE_BATCH) for picture in model.decode(part.to(model.device))]
        last, guide = None, None
        for picture, size, image in zip(pictures, sizes, loaded, strict=True):
            if not follows or image is None:
                yield picture_to_map(picture, size)
                continue
            if guide is None or image is not last:  # masks of one image mostly stand together
                last, guide = image, self.edge_guide(image)
            yield guide.follow(picture_to_map(picture, None), threshold, size)

    def post_process_segmentation(
        self,
        outputs: Any,
        target_sizes: list[tuple[int, int] | None] | None = None,
        labels: list[str | list[str] | None] | None = None,
        threshold: float = 0.5,
        prompt_length: int | None = None,
        stop_at_scale: int | None = None,
        images: list[Any] | None = None,
        follow_edges: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Read text and masks out of generated streams.

        Args:
            outputs: what `generate` returned: `sequences` (B, L), or an object with `.sequences` and, for the scores,
                `.picture_scores` (per row one float for each picture that was drawn).
            target_sizes: (height, width) of the image of each row. Default: the size of its image, or the picture's own
                where there is none.
            labels: per row one label for all its masks, or a list of labels in the order of the masks.
            threshold: see `decode_masks`.
            prompt_length: length of the prompt, if `sequences` hold it: what stands there is no answer. A picture
                whose `<gen_start>` ends the prompt counts as part of the answer.
            stop_at_scale: the `picture_stop_at_scale` of `generate`, if it was given: the last picture of a row may
                then be a preview of so many scales.
            images: the image that each row is about, `None` or as `load_image` takes it.
            follow_edges: see `decode_masks`.

        Returns:
            per row `{"text": str, "segments": [{"label": str | None, "mask": bool (H, W), "score": float | None}]}`.
            An answer without a picture has no segments.

        Raises:
            ValueError: a sequence was cut inside a picture, or holds visual tokens outside of a picture; sizes, images,
                labels or scores do not fit the rows; `follow_edges` without images.
        """
        answers = self._read_answers(outputs, prompt_length, stop_at_scale)
        about = {
            name: [None] * len(answers) if values is None else _checked(name, values, len(answers))
            for name, values in (("target_sizes", target_sizes), ("images", images))
        }
        options = {"threshold": threshold, "follow_edges": self._follows_edges(follow_edges, images)}
        check_threshold(threshold)
        counts = [len(pictures) for _, pictures in answers]
        label_rows = _label_rows(labels, counts)
        score_rows = _score_rows(getattr(outputs, "picture_scores", None), counts)
        mask_rows = self._decode_rows([pictures for _, pictures in answers], about, **options)
        results = []
        for (text, _), *row in zip(answers, label_rows, mask_rows, score_rows, strict=True):
            segments = [{"label": label, "mask": mask, "score": score} for label, mask, score in zip(*row, strict=True)]
            results.append({"text": text, "segments": segments})
        return results

    def read_pictures(
        self, outputs: Any, prompt_length: int | None = None, stop_at_scale: int | None = None
    ) -> list[list[torch.Tensor]]:
        """The codebook indices (T,) of every picture of every row; arguments and errors as those of
        `post_process_segmentation`, which makes masks of them."""
        answers = self._read_answers(outputs, prompt_length, stop_at_scale)
        return [[torch.from_numpy(codes) for codes in pictures] for _, pictures in answers]

    def _read_answers(
        self, outputs: Any, prompt_length: int | None, stop_at_scale: int | None
    ) -> list[tuple[str, list[np.ndarray]]]:
        """Of every row its text, and the codebook indices of each picture it draws."""
        sequences = outputs if isinstance(outputs, (torch.Tensor, np.ndarray, list)) else outputs.sequences
        rows = [np.asarray(torch.as_tensor(row).cpu()) for row in sequences]
        if any(row.ndim != 1 for row in rows):
            raise ValueError("sequences must be (B, L): one row of token ids per answer")
        if stop_at_scale is not None and stop_at_scale not in range(1, len(self.whole_scales) + 1):
            raise ValueError(f"stop_at_scale must be from 1 to {len(self.whole_scales)}, got {stop_at_scale!r}")
        previews = [] if stop_at_scale is None else [self.whole_scales[stop_at_scale - 1]]
        return [self._read_answer(index, row, prompt_length or 0, previews) for index, row in enumerate(rows)]

    def _decode_rows(
        self, rows: list[list[np.ndarray]], about: dict[str, list], threshold: float, **options: Any
    ) -> list[list[np.ndarray]]:
        """The codebook indices of every picture of every row -> bool masks, decoded together. `about` are options of
        `decode_masks` with a value for each row."""
        flat = [(codes, number) for number, row in enumerate(rows) for codes in row]
        masks: list[Any] = [None] * len(flat)
        for length in {len(codes) for codes, _ in flat}:  # one, unless some are previews
            where = [i for i, (codes, _) in enumerate(flat) if len(codes) == length]
            ids = torch.from_numpy(np.stack([flat[i][0] for i in where]))
            of_masks = {name: [values[flat[i][1]] for i in where] for name, values in about.items()}
            maps = self._decode_maps(ids, **of_masks, threshold=threshold, **options)
            for i, white in zip(where, maps, strict=True):
                masks[i] = white > threshold
        ordered = iter(masks)
        return [[next(ordered) for _ in row] for row in rows]

    def edge_guide(self, image: Image.Image) -> EdgeGuide:
        """The edges of an image (upright RGB), for masks of this processor to follow."""
        return EdgeGuide(image, self._require_visual_tokenizer().config.patch_nums[len(self.whole_scales) - 1])

    def _follows_edges(self, asked: bool | None, images: list[Any] | None) -> bool:
        if asked and (images is None or all(image is None for image in images)):
            raise ValueError("masks follow the edges of images: pass images=, one for each row or mask")
        return images is not None and (self.follow_edges if asked is None else asked)

    def _read_answer(
        self, index: int, ids: np.ndarray, prompt_length: int, previews: list[int]
    ) -> tuple[str, list[np.ndarray]]:
        """One row (L,) -> its text, and the codebook indices of each picture it draws."""
        try:
            spans = self._pictures.find_pictures(ids, self.num_visual_tokens, previews=previews)
        except ValueError as error:
            raise ValueError(f"answer {index}: {error}") from None
        answer = ids[prompt_length:]
        text = self.tokenizer.decode(answer[self._pictures.is_text(answer)], skip_special_tokens=True).strip()
        # a <gen_start> that ends the prompt opens a picture of the answer
        return text, [span.codes for span in spans if not prompt_length or span.start >= prompt_length - 1]


def check_threshold(threshold: float) -> None:
    """
    Raises:
        ValueError: a threshold that every pixel, or none, is above.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"a mask's threshold is from 0 to below 1, as its map in [0, 1] is; got {threshold!r}")


def _load_images(images: Any, count: int) -> list[Image.Image | None]:
    return [None] * count if images is None else load_images(_checked("images", images, count))


def _checked(name: str, values: Any, count: int) -> Any:
    """The values of an option, one for each row or mask."""
    several = isinstance(values, (list, tuple)) or (name != "images" and hasattr(values, "__len__"))
    if not several or len(values) != count:
        found = len(values) if several else describe(values)
        raise ValueError(f"{name} needs a list of {count}, one for each row or mask; got {found}")
    return values


def _sizes(target_sizes: Any, images: list[Image.Image | None]) -> list[tuple[int, int] | None]:
    """(height, width) of every mask: as asked for, or of its image."""
    own = [None if image is None else image.size[::-1] for image in images]
    if target_sizes is None:
        return own
    sizes = _checked("target_sizes", target_sizes, len(own))
    asked: list = [None if size is None else tuple(int(side) for side in size) for size in sizes]
    if any(size is not None and (len(size) != 2 or min(size) < 1) for size in asked):
        raise ValueError(f"target_sizes must be pairs (height, width) of at least 1; got {asked}")
    return [size or of_image for size, of_image in zip(asked, own, strict=True)]


def _label_rows(labels: Any, counts: list[int]) -> list[list[str | None]]:
    """One label per picture; a list shorter than the row's pictures leaves the last ones without."""
    if labels is None:
        return [[None] * count for count in counts]
    if isinstance(labels, str) or len(labels) != len(counts):
        raise ValueError(f"labels needs one entry for each of the {len(counts)} rows")
    rows = []
    for row, count in zip(labels, counts, strict=True):
        row = [row] * count if row is None or isinstance(row, str) else list(row)
        rows.append((row + [None] * count)[:count])
    return rows


def _score_rows(scores: Any, counts: list[int]) -> list[list[float | None]]:
    """One score per picture. Pictures of a prompt come first and have none."""
    if scores is None:
        return [[None] * count for count in counts]
    found = [len(row) for row in scores]
    if len(found) != len(counts) or any(n > count for n, count in zip(found, counts, strict=True)):
        raise ValueError(f"picture_scores do not fit: the rows hold {counts} pictures and {found} scores")
    return [
        [None] * (count - len(row)) + [float(score) for score in row] for row, count in zip(scores, counts, strict=True)
    ]
