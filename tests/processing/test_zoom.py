"""Masks that are drawn again from nearer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import AutoProcessor, GenerationConfig, pipeline

from modeling_argenseg import ARGenSegForConditionalGeneration
from processing import ARGenSegProcessor, zoom_in
from processing.zoom import SMALLEST, WIDER, _answer_with, boxes_around, check_zoom_options
from trl_recipes.evaluation.answers import answer, draw, evaluate_expressions, union

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "hub_cards" / "argenseg-tiny"
SHEEP, WHALE = "the sheep", "the whale"


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, ARGenSegProcessor]:
    """The default model: what a toy draws of a view says nothing."""
    return ARGenSegForConditionalGeneration.from_pretrained(MODEL), AutoProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def near() -> Image.Image:
    return Image.open(ROOT / "examples" / "sheep.jpg").convert("RGB")


@pytest.fixture(scope="module")
def photograph(near: Image.Image) -> Image.Image:
    """The sheep from far enough that there is something to zoom into."""
    return on_grass(near, (near.width // 3 * 2, near.height // 3 * 2), near.size)[0]


def on_grass(picture: Image.Image, size: tuple[int, int], whole: tuple[int, int]) -> tuple[Image.Image, Any]:
    """The picture, of `size`, near the middle of an image of size `whole`; and the slices where it is."""
    image = Image.new("RGB", whole, picture.getpixel((10, 10)))
    left, top = 2 * (whole[0] - size[0]) // 5, 2 * (whole[1] - size[1]) // 5
    image.paste(picture.resize(size), (left, top))
    return image, (slice(top, top + size[1]), slice(left, left + size[0]))


@pytest.fixture(scope="module")
def first(tiny: tuple[Any, ARGenSegProcessor], photograph: Image.Image) -> dict[str, Any]:
    """The answer to SHEEP, as `zoom_in` takes it."""
    return draw(*tiny, requests(photograph, SHEEP), follow_edges=False)[0]


@pytest.fixture
def prefixes(tiny: tuple[Any, ARGenSegProcessor], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The coarse scales that `generate` is given, call by call."""
    model, given = tiny[0], []
    generate = model.generate

    def listening(**inputs: Any) -> Any:
        given.extend([inputs["picture_prefix"]] if "picture_prefix" in inputs else [])
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", listening)
    return given


def requests(photograph: Image.Image, *texts: str) -> list[dict[str, Any]]:
    return [{"image": photograph, "text": text} for text in texts]


def conversations(processor: ARGenSegProcessor, photograph: Image.Image, *texts: str) -> list[list[dict[str, Any]]]:
    return [processor.build_segmentation_conversation(photograph, text) for text in texts]


def in_two(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer with its one mask as two, the upper and the lower half."""
    (segment,), rows = answer["segments"], np.arange(len(answer["segments"][0]["mask"]))[:, None]
    upper = segment["mask"] & (rows < len(rows) / 2)
    return answer | {"segments": [segment | {"mask": upper}, segment | {"mask": segment["mask"] & ~upper}]}


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


class TestViews:
    @given(
        size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
        corners=st.tuples(*[st.floats(0, 1, exclude_max=True) for _ in range(4)]),
    )
    def test_they_lie_in_the_image_around_the_mask(self, size: tuple[int, int], corners: tuple[float, ...]) -> None:
        (height, width), (a, b, c, d) = size, corners
        mask = np.zeros(size, bool)
        top, bottom = sorted((int(a * height), int(b * height)))
        left, right = sorted((int(c * width), int(d * width)))
        mask[top : bottom + 1, left : right + 1] = True
        boxes = boxes_around(mask)
        assert len(boxes) == len(set(boxes)) <= len(WIDER)
        for x, y, x_end, y_end in boxes:
            assert 0 <= x <= left and right < x_end <= width and 0 <= y <= top and bottom < y_end <= height
            assert (x_end - x, y_end - y) != (width, height)
            assert x_end - x == y_end - y or x_end - x == width or y_end - y == height
            assert max(x_end - x, y_end - y) >= min(round(SMALLEST * max(size)), height, width)

    def test_sides(self) -> None:
        mask = np.zeros((400, 600), bool)
        mask[190:210, 250:350] = True
        assert boxes_around(mask) == [(230, 130, 370, 270), (215, 115, 385, 285)]
        small = np.zeros((400, 600), bool)
        small[399, 0] = True
        assert boxes_around(small) == [(0, 400 - 112, 112, 400)]

    def test_none(self) -> None:
        assert boxes_around(np.zeros((8, 8), bool)) == []
        assert boxes_around(np.ones((8, 8), bool)) == []


class TestAnswers:
    def test_only_masks_change(self, tiny: Any, photograph: Image.Image, first: dict[str, Any]) -> None:
        model, processor = tiny
        nothing = {"text": "There is no whale.", "segments": []}
        answers, asked = [first, nothing, in_two(first)], conversations(processor, photograph, SHEEP, WHALE, SHEEP)
        finer = zoom_in(model, processor, asked, answers)
        assert finer[1] == nothing and [len(one["segments"]) for one in finer] == [1, 0, 2]
        for before, after in zip(answers, finer, strict=True):
            assert before["text"] == after["text"]
            for old, new in zip(before["segments"], after["segments"], strict=True):
                assert (old["label"], old["score"]) == (new["label"], new["score"])
                assert new["mask"].shape == photograph.size[::-1] and new["mask"].dtype == np.bool_
        old, new = first["segments"][0]["mask"], finer[0]["segments"][0]["mask"]
        assert 0.8 < iou(old, new) < 1

    def test_views_begin_with_the_coarse_scales_of_the_mask(
        self, tiny: Any, photograph: Image.Image, first: dict[str, Any], prefixes: list[torch.Tensor]
    ) -> None:
        model, processor = tiny
        two = in_two(first)
        zoom_in(model, processor, conversations(processor, photograph, SHEEP), [two])
        crops = []
        for mask in (segment["mask"] for segment in two["segments"]):
            crops += [mask[top:bottom, left:right] for left, top, right, bottom in boxes_around(mask)]
        (given,) = prefixes
        assert given.shape == (len(crops), 1 + 4 + 16) and len(crops) >= 4  # up to a quarter of 16x16
        assert torch.equal(given, processor.encode_masks(crops, search_steps=0)[:, :21])

    def test_what_the_views_say_is_averaged(
        self, tiny: Any, photograph: Image.Image, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, processor = tiny
        drawn: list[np.ndarray] = []
        decode = processor.decode_masks

        def listening(*args: Any, **options: Any) -> Any:
            decoded = decode(*args, **options)
            drawn.extend(decoded[0])
            return decoded

        monkeypatch.setattr(processor, "decode_masks", listening)
        asked = conversations(processor, photograph, SHEEP)
        (finer,) = zoom_in(model, processor, asked, [first], threshold=0.4)
        mask = first["segments"][0]["mask"]
        boxes, total, count = boxes_around(mask), np.zeros(mask.shape), np.zeros(mask.shape)
        assert len(boxes) == len(drawn) >= 2
        for (left, top, right, bottom), white in zip(boxes, drawn, strict=True):
            total[top:bottom, left:right] += white
            count[top:bottom, left:right] += 1
        np.testing.assert_array_equal(finer["segments"][0]["mask"], total / np.maximum(count, 1) > 0.4)

    def test_a_mask_may_grow_beyond_the_first_view(self, tiny: Any, near: Image.Image) -> None:
        """Of the sheep only the right quarter was found: what only the wider view shows belongs to it as well."""
        whole = union(draw(*tiny, requests(near, SHEEP))[0])
        part = whole.copy()
        columns = np.flatnonzero(whole.any(axis=0))
        part[:, : columns[3 * len(columns) // 4]] = False
        first = {"text": "", "segments": [{"label": SHEEP, "mask": part, "score": 1.0}]}
        (found,) = zoom_in(*tiny, conversations(tiny[1], near, SHEEP), [first])
        (inner, _), grown = boxes_around(part), found["segments"][0]["mask"]
        outside = np.ones_like(part)
        outside[inner[1] : inner[3], inner[0] : inner[2]] = False
        assert (grown & whole & outside).any() and iou(grown, whole) > iou(part, whole) + 0.4

    def test_batches(
        self, tiny: Any, photograph: Image.Image, first: dict[str, Any], prefixes: list[torch.Tensor]
    ) -> None:
        model, processor = tiny
        asked = conversations(processor, photograph, SHEEP, SHEEP)
        together = zoom_in(model, processor, asked, [first, first])
        (count,) = (len(one) for one in prefixes)
        alone = zoom_in(model, processor, asked, [first, first], batch_size=1)
        assert [len(one) for one in prefixes[1:]] == [1] * count and count >= 4
        for one, other in zip(together, alone, strict=True):
            assert iou(one["segments"][0]["mask"], other["segments"][0]["mask"]) > 0.999

    def test_views_of_something_else_change_nothing(self) -> None:
        mask = np.zeros((10, 10), bool)
        mask[:5] = True
        first = {"text": "Sure.", "segments": [{"label": "a", "mask": mask, "score": 0.5}]}
        tenth, fifth = ~mask, ~mask
        tenth[0] = fifth[:2] = True  # by their IoU with the mask
        everything, nothing = np.ones_like(mask), np.zeros_like(mask)
        for other, kept in ((~mask, True), (tenth, True), (fifth, False), (everything, False), (nothing, True)):
            (segment,) = _answer_with({(0, 0): other}, 0, first)["segments"]
            np.testing.assert_array_equal(segment["mask"], mask if kept else other)

    def test_mistakes(self, tiny: Any, photograph: Image.Image, first: dict[str, Any]) -> None:
        model, processor = tiny
        (asked,) = conversations(processor, photograph, SHEEP)
        two = [{"role": "user", "content": [*asked[0]["content"], {"type": "image", "image": photograph}]}]
        with pytest.raises(ValueError, match="one image each, and no masks; got one with 2$"):
            zoom_in(model, processor, [two], [first])
        nothing = {"text": "There is no whale.", "segments": []}
        assert zoom_in(model, processor, [two], [nothing]) == [nothing]
        drawn = {"role": "assistant", "content": [{"type": "mask", "mask": first["segments"][0]["mask"]}]}
        with pytest.raises(ValueError, match="got one with 1 and masks"):
            zoom_in(model, processor, [[*asked, drawn, {"role": "user", "content": "and the grass"}]], [first])
        smaller = [{**asked[0], "content": [{"type": "image", "image": photograph.resize((30, 20))}]}]
        with pytest.raises(
            ValueError, match=r"a mask of \(371, 512\) .* an image of \(20, 30\); pass images= and follow_edges=False"
        ):
            zoom_in(model, processor, [smaller], [first])
        previews = GenerationConfig(picture_stop_at_scale=2)
        for options in ({"picture_stop_at_scale": 2}, {"generation_config": previews}):
            with pytest.raises(ValueError, match="leave out picture_stop_at_scale"):
                zoom_in(model, processor, [asked], [first], **options)
        whole = processor.apply_chat_template([asked], tokenize=True, return_dict=True, add_generation_prompt=True)
        with pytest.raises(ValueError, match="encoded_image cannot be used to zoom in"):  # would show the whole image
            zoom_in(model, processor, [asked], [first], encoded_image=model.encode_image(**whole))
        for name in ("picture_guidance_scale", "num_return_sequences"):
            with pytest.raises(ValueError, match=f"{name} cannot be used to zoom in"):
                zoom_in(model, processor, [asked], [first], **{name: 2})

    @pytest.mark.parametrize(
        "name",
        ["encoded_image", "pixel_values", "mm_encoder_outputs", "negative_input_ids", "prefill_chunk_size", "streamer"],
    )
    def test_options_of_the_whole_image(self, tiny: Any, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} cannot be used to zoom in"):
            check_zoom_options(tiny[0], {name: object()})

    @pytest.mark.parametrize(
        "name, message",
        [("picture_stop_at_scale", "leave out picture_stop_at_scale"), ("picture_guidance_scale", "cannot be used")],
    )
    def test_options_that_the_model_is_set_to(
        self, tiny: Any, monkeypatch: pytest.MonkeyPatch, name: str, message: str
    ) -> None:
        monkeypatch.setattr(tiny[0].generation_config, name, 2, raising=False)
        with pytest.raises(ValueError, match=message):
            zoom_in(*tiny, [], [])
        zoom_in(*tiny, [], [], **{name: None})  # a call overrides the model

    def test_mistakes_are_told_before_anything_is_drawn(
        self, tiny: Any, photograph: Image.Image, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, processor = tiny
        pipe: Any = pipeline("image-segmentation", model=model, processor=processor)
        monkeypatch.setattr(model, "generate", lambda **_: pytest.fail("drawn in vain"))
        with pytest.raises(ValueError, match="leave out picture_stop_at_scale"):
            pipe(photograph, text=SHEEP, zoom=True, picture_stop_at_scale=2)
        with pytest.raises(ValueError, match="leave out picture_stop_at_scale"):
            draw(model, processor, requests(photograph, SHEEP), zoom=True, picture_stop_at_scale=2)

    def test_options_that_leave_the_words_out(self, tiny: Any, photograph: Image.Image, first: dict[str, Any]) -> None:
        model, processor = tiny
        asked = conversations(processor, photograph, SHEEP)
        plain = zoom_in(model, processor, asked, [first])[0]["segments"][0]["mask"]
        for options in ({"picture_answer_ids": None}, {"picture_prefill": "never"}, {"num_return_sequences": 1}):
            found = zoom_in(model, processor, asked, [first], **options)[0]["segments"][0]["mask"]
            np.testing.assert_array_equal(found, plain)

    def test_images_that_are_turned(self, tiny: Any, photograph: Image.Image, tmp_path: Path) -> None:
        model, processor = tiny
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned by 90 degrees
        photograph.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
        for image in (Image.open(tmp_path / "turned.png"), tmp_path / "turned.png"):
            (found,) = draw(model, processor, requests(image, SHEEP), zoom=True)
            assert union(found).shape == photograph.size[::-1]

    def test_a_model_of_one_scale(self, photograph: Image.Image) -> None:
        """It has no coarser scale to give: the views are drawn from the words alone."""
        model, processor = toy.build()
        model.config.num_scales = processor.num_scales = 1
        mask = np.zeros(photograph.size[::-1], bool)
        mask[100:150, 100:150] = True
        first = {"text": "", "segments": [{"label": SHEEP, "mask": mask, "score": 1.0}]}
        (found,) = zoom_in(model, processor, conversations(processor, photograph, SHEEP), [first])
        assert found["segments"][0]["mask"].shape == mask.shape


class TestOptions:
    def test_pipeline(self, tiny: Any, photograph: Image.Image, first: dict[str, Any]) -> None:
        (expected,) = zoom_in(*tiny, conversations(tiny[1], photograph, SHEEP), [first])
        pipe: Any = pipeline("image-segmentation", model=str(MODEL))
        texts = [WHALE, SHEEP]
        plain, finer = (pipe(photograph, text=texts, **how) for how in ({"follow_edges": False}, {"zoom": True}))
        assert [one["label"] for one in finer] == [one["label"] for one in plain]
        assert [one["score"] for one in finer] == [one["score"] for one in plain]
        before, after = (np.asarray(answers[-1]["mask"]) > 0 for answers in (plain, finer))
        assert iou(before, first["segments"][0]["mask"]) > 0.999 > iou(before, after)
        assert iou(after, expected["segments"][0]["mask"]) > 0.999
        set_before: Any = pipeline("image-segmentation", model=str(MODEL), zoom=True)
        for answers in set_before([photograph, photograph], text=[SHEEP, texts], batch_size=2):
            assert iou(np.asarray(answers[-1]["mask"]) > 0, after) > 0.999

    def test_threshold_of_a_pipeline(self, tiny: Any, near: Image.Image) -> None:
        pipe: Any = pipeline("image-segmentation", model=tiny[0], processor=tiny[1], zoom=True)
        areas = [np.count_nonzero(pipe(near, text=SHEEP, mask_threshold=at)[0]["mask"]) for at in (0.2, 0.8)]
        assert areas[0] > 1.1 * areas[1]

    def test_recipes(self, tiny: Any, photograph: Image.Image, first: dict[str, Any]) -> None:
        model, processor = tiny
        asked = conversations(processor, photograph, SHEEP)
        expected = union(zoom_in(model, processor, asked, [first])[0])
        (found,) = answer(model, processor, asked, [photograph], [SHEEP], zoom=True, do_sample=False)
        np.testing.assert_array_equal(union(found), expected)
        truth = union(first)
        samples = [{**one, "kind": "noun", "mask": truth} for one in requests(photograph, SHEEP)]
        measured = evaluate_expressions(model, processor, samples, zoom=True)
        assert measured["giou"] == pytest.approx(iou(expected, truth))


def test_small_things_get_finer_outlines(tiny: Any, near: Image.Image) -> None:
    """The sheep on a fifth of an image's sides; the truth is what is drawn of it from near."""
    size = (near.width // 2, near.height // 2)
    far, there = on_grass(near, size, (5 * size[0], 5 * size[1]))
    truth = np.zeros(far.size[::-1], bool)
    truth[there] = np.asarray(Image.fromarray(union(draw(*tiny, requests(near, SHEEP))[0])).resize(size))
    for follow_edges, gain in ((False, 0.1), (True, 0.03)):
        options = {"follow_edges": follow_edges}
        plain, finer = (union(draw(*tiny, requests(far, SHEEP), zoom=zoom, **options)[0]) for zoom in (False, True))
        assert iou(finer, truth) > iou(plain, truth) + gain


def test_requests_of_several_images_are_answered_by_their_own(tiny: Any, near: Image.Image) -> None:
    """In one batch, although each image alone would be read once for all its prompts."""
    pipe: Any = pipeline("image-segmentation", model=tiny[0], processor=tiny[1])
    images, texts = [near, ImageOps.mirror(near)], [[WHALE, SHEEP], [SHEEP, WHALE]]
    single = [pipe(image, text=text) for image, text in zip(images, texts, strict=True)]
    masks = []
    for alone, found in zip(single, pipe(images, text=texts, batch_size=3), strict=True):
        assert [one["label"] for one in found] == [one["label"] for one in alone] == [SHEEP]
        masks.append(np.asarray(found[0]["mask"]) > 0)
        assert iou(masks[-1], np.asarray(alone[0]["mask"]) > 0) > 0.999
    assert iou(*masks) < 0.9
