"""Masks that follow the edges of their image."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.nn import functional as F

from processing import ARGenSegProcessor, segmentation_processing
from processing.edges import LARGEST, LEAST_VARIANCE, RADIUS, EdgeGuide, without_specks

CELLS = 16


def disc(size: tuple[int, int], thing: str = "orange", ground: str = "navy") -> tuple[Image.Image, np.ndarray]:
    """An image of `size` (width, height) with an ellipse, and its mask."""
    image, mask = Image.new("RGB", size, ground), Image.new("L", size)
    box = [0.22 * size[0], 0.31 * size[1], 0.68 * size[0], 0.83 * size[1]]
    ImageDraw.Draw(image).ellipse(box, fill=thing)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return image, np.asarray(mask) > 0


def in_cells(mask: np.ndarray, side: int = 128) -> torch.Tensor:
    """What a tokenizer with cells of one value would keep of a mask, as a map (side, side)."""
    cells = F.adaptive_avg_pool2d(torch.from_numpy(mask).float()[None, None], CELLS)
    return F.interpolate(cells.round(), size=(side, side))[0, 0]


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


@pytest.mark.parametrize("size", [(256, 256), (480, 320), (200, 520), (64, 64)])
def test_outlines_of_cells_become_those_of_the_thing(size: tuple[int, int]) -> None:
    image, mask = disc(size)
    cells = in_cells(mask)
    before = np.asarray(Image.fromarray(cells.numpy()).resize(size)) > 0.5
    after = EdgeGuide(image, CELLS)(cells)
    assert after.shape == mask.shape and float(after.min()) >= 0 and float(after.max()) <= 1
    assert iou(before, mask) < 0.9 and iou(after.numpy() > 0.5, mask) > 0.97


def test_it_is_the_guided_filter() -> None:
    """Against the definition, window by window, where nothing is resized."""
    side = 4 * 3
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
    white = generator.random((side, side))
    colours = pixels / 255
    windows = {
        (y, x): (slice(max(y - RADIUS, 0), y + RADIUS + 1), slice(max(x - RADIUS, 0), x + RADIUS + 1))
        for y in range(side)
        for x in range(side)
    }
    lines = {}
    for place, window in windows.items():  # the best linear function of the colours in each window
        inside, values = colours[window].reshape(-1, 3), white[window].ravel()
        covariance = np.cov(inside.T, bias=True) + LEAST_VARIANCE * np.eye(3)
        slope = np.linalg.solve(covariance, (inside * values[:, None]).mean(0) - inside.mean(0) * values.mean())
        lines[place] = np.append(slope, values.mean() - slope @ inside.mean(0))
    expected = np.empty((side, side))
    for (y, x), (rows, columns) in windows.items():  # and of all windows that a pixel is in the mean
        around = [lines[i, j] for i in range(side)[rows] for j in range(side)[columns]]
        expected[y, x] = np.mean(around, axis=0) @ np.append(colours[y, x], 1)
    found = EdgeGuide(Image.fromarray(pixels), 3)(torch.from_numpy(white).float())
    np.testing.assert_allclose(found.numpy(), expected.clip(0, 1), atol=2e-4)


def test_whatever_the_default_dtype_and_under_autocast() -> None:
    image, mask = disc((90, 70))
    expected = EdgeGuide(image, CELLS).follow(mask, 0.5)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        np.testing.assert_array_equal(EdgeGuide(image, CELLS).follow(mask, 0.5), expected)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_array_equal(EdgeGuide(image, CELLS).follow(mask, 0.5), expected)
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_empty_and_full_maps_stay(value: float) -> None:
    image, mask = disc((100, 80))
    found = EdgeGuide(image, CELLS)(torch.full((128, 128), value))
    np.testing.assert_allclose(found.numpy(), np.full(mask.shape, value), atol=1e-4)


def test_where_the_image_shows_no_edge_the_mask_stays_about_where_it_is() -> None:
    _, mask = disc((256, 256))
    found = EdgeGuide(Image.new("RGB", (256, 256), "grey"), CELLS)(in_cells(mask)).numpy() > 0.5
    cells = np.asarray(Image.fromarray(in_cells(mask).numpy()).resize((256, 256))) > 0.5
    assert iou(found, cells) > 0.93


def test_large_images() -> None:
    image, mask = disc((3000, 1500))
    guide = EdgeGuide(image, CELLS)
    assert guide(in_cells(mask)).shape == (LARGEST // 2, LARGEST)
    found = guide.follow(in_cells(mask).numpy(), 0.5, mask.shape)
    assert found.shape == mask.shape and found.dtype == np.float32 and iou(found > 0.5, mask) > 0.97


def test_long_images() -> None:
    image, mask = disc((5000, 3))
    found = EdgeGuide(image, CELLS).follow(mask, 0.5)
    assert found.shape == mask.shape


def test_what_would_vanish_stays() -> None:
    """A line on grey, which is too thin for the windows, beside a thing that has edges."""
    image, mask = disc((256, 256), ground="grey")
    thin = np.zeros_like(mask)
    thin[:, 10:13] = True
    found = EdgeGuide(image, CELLS).follow(mask | thin, 0.5) > 0.5
    assert iou(found, mask | thin) > 0.95 and (found & thin).sum() > 0.95 * thin.sum()
    alone = EdgeGuide(Image.new("RGB", (256, 256), "grey"), CELLS).follow(thin, 0.5) > 0.5
    np.testing.assert_array_equal(alone, thin)


@pytest.mark.parametrize(("size", "width"), [((256, 200), 3), ((300, 512), 5), ((100, 90), 1)])
def test_specks_go_as_by_a_median_filter(size: tuple[int, int], width: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8)
    found = without_specks(torch.from_numpy(values).float() / 255, 0.401).numpy()
    expected = np.asarray(Image.fromarray(values).filter(ImageFilter.MedianFilter(width))) / 255 > 0.401
    inner = np.s_[width:-width, width:-width]  # at the borders Pillow repeats pixels, where windows are cut here
    np.testing.assert_array_equal((found > 0.401)[inner], expected[inner])
    kept = (found > 0.401) == (values / 255 > 0.401)
    np.testing.assert_allclose(found[kept], values[kept] / 255, atol=1e-6)
    assert kept.all() == (width == 1)


def test_a_textured_image_gives_no_specks() -> None:
    image, mask = disc((512, 384))
    noise = np.random.default_rng(0).normal(0, 40, (384, 512, 3))
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    found = EdgeGuide(image, CELLS).follow(in_cells(mask).numpy(), 0.5, mask.shape) > 0.5
    opened = Image.fromarray(found).convert("L").filter(ImageFilter.MinFilter(3)).filter(ImageFilter.MaxFilter(3))
    assert iou(found, mask) > 0.9 and (found & ~(np.asarray(opened) > 0)).mean() < 1e-3


class TestProcessor:
    """Its visual tokenizer draws 4 x 4 cells of 8 greys, code 7 being white."""

    @pytest.fixture
    def image(self) -> Image.Image:
        """Its thing covers a little more than the left half."""
        image = Image.new("RGB", (64, 40), (20, 40, 90))
        image.paste((230, 120, 30), (0, 0, 37, 40))
        return image

    @pytest.fixture
    def ids(self) -> torch.Tensor:
        left = torch.tensor([7, 7, 0, 0]).repeat(4)
        return torch.cat([torch.zeros(5, dtype=torch.long), left])[None]

    def test_sizes_of_images(self, processor: ARGenSegProcessor, image: Image.Image, ids: torch.Tensor) -> None:
        images = [image, None, image.rotate(90, expand=True)]
        masks = processor.decode_masks(ids.expand(3, -1), images=images)[1]
        assert [mask.shape for mask in masks] == [(40, 64), (16, 16), (64, 40)]
        masks = processor.decode_masks(ids.expand(2, -1), [None, (5, 6)], images=images[:2])[1]
        assert [mask.shape for mask in masks] == [(40, 64), (5, 6)]

    def test_edges(self, processor: ARGenSegProcessor, image: Image.Image, ids: torch.Tensor) -> None:
        plain, guided = (
            processor.decode_masks(ids, images=[image], follow_edges=follow)[1][0] for follow in (False, True)
        )
        assert plain[:, :32].all() and not plain[:, 32:].any()
        assert guided[:, :37].all() and not guided[:, 37:].any()
        assert (processor.decode_masks(ids, images=[image])[1][0] == plain).all()  # not unless the processor says so
        processor.follow_edges = True
        assert (processor.decode_masks(ids, images=[image])[1][0] == guided).all()
        assert (processor.decode_masks(ids, [(40, 64)])[1][0] == plain).all()  # there is no image to follow
        (large,) = processor.decode_masks(ids, [(80, 128)], images=[image])[1]
        assert large[:, :73].all() and not large[:, 75:].any()

    def test_images_as_people_have_them(
        self, processor: ARGenSegProcessor, image: Image.Image, ids: torch.Tensor, tmp_path: Any
    ) -> None:
        """Upright, as `load_image` makes them: paths, arrays, and what a camera turned."""
        processor.follow_edges = True
        expected = processor.decode_masks(ids, images=[image])[0][0]
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
        assert ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")).size == image.size
        for given in (np.asarray(image), str(tmp_path / "turned.png")):
            np.testing.assert_array_equal(processor.decode_masks(ids, images=[given])[0][0], expected)

    def test_answers(self, processor: ARGenSegProcessor, image: Image.Image, ids: torch.Tensor) -> None:
        sequence = [processor.gen_start_token_id, *(ids[0] + processor.visual_token_offset).tolist()]
        outputs = SimpleNamespace(sequences=torch.tensor([sequence + sequence, sequence + sequence]))
        narrower = image.copy()
        narrower.paste((20, 40, 90), (30, 0, 64, 40))
        rows = processor.post_process_segmentation(outputs, images=[image, narrower], follow_edges=True)
        for row, width in zip(rows, (37, 30), strict=True):
            assert len(row["segments"]) == 2
            for segment in row["segments"]:
                assert segment["mask"][:, :width].all() and not segment["mask"][:, width:].any()

    def test_previews_are_as_they_were_drawn(
        self, processor: ARGenSegProcessor, image: Image.Image, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(processor.visual_tokenizer), "decode", lambda self, ids: torch.ones(len(ids), 3, 8, 8))
        processor.follow_edges = True
        monkeypatch.setattr(segmentation_processing, "EdgeGuide", None)  # nobody asks for it
        assert processor.decode_masks(ids[:, :5], images=[image])[1][0].all()

    def test_the_edges_of_an_image_are_found_once(
        self, processor: ARGenSegProcessor, image: Image.Image, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found: list[Image.Image] = []

        def listening(image: Image.Image, cells: int) -> EdgeGuide:
            found.append(image)
            return EdgeGuide(image, cells)

        monkeypatch.setattr(segmentation_processing, "EdgeGuide", listening)
        other = image.resize((50, 30))
        processor.decode_masks(ids.expand(5, -1), images=[image, image, None, image, other], follow_edges=True)
        assert [one.size for one in found] == [image.size, other.size]

    def test_a_mask_is_never_emptied(self, processor: ARGenSegProcessor, image: Image.Image) -> None:
        ids = torch.zeros(1, 21, dtype=torch.long)
        ids[0, 5 + 6] = 4  # one cell, hardly above the threshold
        grey = Image.new("RGB", image.size, "grey")
        plain, guided = (
            processor.decode_masks(ids, images=[grey], follow_edges=follow)[1][0] for follow in (False, True)
        )
        assert guided.any() and (guided == plain).all()

    def test_mistakes(self, processor: ARGenSegProcessor, image: Image.Image, ids: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="follow the edges of images: pass images="):
            processor.decode_masks(ids, follow_edges=True)
        with pytest.raises(ValueError, match="follow the edges of images: pass images="):
            processor.post_process_segmentation(torch.zeros(1, 0), images=[None], follow_edges=True)
        for images in (image, [image, image], []):
            with pytest.raises(ValueError, match="images needs a list of 1, one for each row or mask; got"):
                processor.decode_masks(ids, images=images)
        with pytest.raises(TypeError, match="an image must be"):
            processor.decode_masks(ids, images=[7])

    def test_the_setting_is_saved(self, processor: ARGenSegProcessor, tmp_path: Any) -> None:
        assert not processor.follow_edges
        for follow in (True, False):
            processor.follow_edges = follow
            processor.save_pretrained(tmp_path)
            assert ARGenSegProcessor.from_pretrained(tmp_path).follow_edges is follow
        assert ARGenSegProcessor.from_pretrained(tmp_path, follow_edges=True).follow_edges
