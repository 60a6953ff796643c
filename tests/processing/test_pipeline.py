"""`pipeline("image-segmentation")` with text prompts, on a toy model that has learned one photograph."""

import copy
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from toy import BOTH, REQUESTS
from transformers import (
    AutoModelForImageSegmentation,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationConfig,
    ImageSegmentationPipeline,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

from modeling_argenseg import ARGenSegForConditionalGeneration, ARGenSegPipeline
from processing import pipeline_argenseg

SQUARE, BALL = REQUESTS
WHALE = "the whale"


@pytest.fixture(scope="module")
def pipe(toy_folder: Path) -> Any:
    return pipeline("image-segmentation", model=str(toy_folder))


@pytest.fixture
def photograph(toy_image: Path) -> Image.Image:
    return Image.open(toy_image)


@pytest.fixture
def expected(pipe: Any, toy_masks: list[np.ndarray]) -> list[np.ndarray]:
    """What the tokens of the true masks, which the model has learned, decode to."""
    return pipe.processor.decode_masks(pipe.processor.encode_masks(toy_masks), [mask.shape for mask in toy_masks])[1]


@pytest.fixture
def encoded(pipe: Any) -> Iterator[list[int]]:
    """How many images went through the vision tower, call by call."""
    counts: list[int] = []
    tower = pipe.model.model.vlm.vision_tower
    hook = tower.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    yield counts
    hook.remove()


def simple(answers: Any) -> Any:
    """Answers with masks as bytes and rounded scores, to be compared."""
    if isinstance(answers, dict):
        return answers["label"], round(answers["score"], 4), answers["mask"].size, answers["mask"].tobytes()
    return [simple(one) for one in answers]


def test_one_prompt(pipe: Any, toy_image: Path, expected: list[np.ndarray]) -> None:
    answers = pipe(str(toy_image), text=SQUARE)
    assert isinstance(pipe, ARGenSegPipeline) and [set(one) for one in answers] == [{"label", "score", "mask"}]
    assert answers[0]["label"] == SQUARE and 0.5 < answers[0]["score"] <= 1
    assert answers[0]["mask"].mode == "L"
    np.testing.assert_array_equal(np.asarray(answers[0]["mask"]), expected[0] * 255)


def test_nothing_there_is_an_empty_list(pipe: Any, photograph: Image.Image) -> None:
    assert pipe(photograph, text=WHALE) == []
    assert pipe(photograph, text=[]) == []
    assert pipe([photograph, photograph], text=WHALE) == [[], []]
    assert pipe([]) == []


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_several_prompts_encode_the_image_once(
    pipe: Any, photograph: Image.Image, expected: list[np.ndarray], encoded: list[int], batch_size: int
) -> None:
    answers = pipe(photograph, text=[BALL, WHALE, SQUARE], batch_size=batch_size)
    assert encoded == [1]
    assert [one["label"] for one in answers] == [BALL, SQUARE]
    for answer, mask in zip(answers, expected[::-1], strict=True):
        np.testing.assert_array_equal(np.asarray(answer["mask"]), mask * 255)


@pytest.mark.parametrize(("batch_size", "calls"), [(1, [1, 1, 1]), (2, [1, 2]), (3, [2, 1]), (9, [3])])
def test_batch_is_single(
    pipe: Any, photograph: Image.Image, toy_image: Path, encoded: list[int], batch_size: int, calls: list[int]
) -> None:
    """Requests are packed across images of any size; each image is encoded once, with those it is first needed with."""
    images = [toy_image, photograph.resize((90, 50)), np.asarray(photograph)]
    texts = [[BALL, SQUARE], WHALE, [SQUARE, BOTH]]
    single = [pipe(image, text=text) for image, text in zip(images, texts, strict=True)]
    encoded.clear()
    assert simple(pipe(images, text=texts, batch_size=batch_size)) == simple(single)
    assert encoded == calls
    assert [len(one) for one in single] == [2, 0, 2]


@pytest.mark.parametrize(
    ("batch_size", "rows"), [(None, [8, 1, 1]), (1, [1] * 10), (4, [4, 4, 2])], ids=["image by image", "one", "four"]
)
def test_prompts_of_an_image_are_answered_together(
    pipe: Any, photograph: Image.Image, monkeypatch: pytest.MonkeyPatch, batch_size: int | None, rows: list[int]
) -> None:
    """The language model reads the image once, for all prompts on it."""
    texts = [[BALL, WHALE, SQUARE] * 3, SQUARE]
    alone = [[pipe(photograph, text=one, batch_size=1) for one in prompts] for prompts in (texts[0], [SQUARE])]
    seen, read = [], []
    generate, encode_image = pipe.model.generate, pipe.model.encode_image
    monkeypatch.setattr(pipe.model, "generate", lambda **kw: (seen.append(len(kw["input_ids"])), generate(**kw))[1])
    monkeypatch.setattr(pipe.model, "encode_image", lambda *a, **kw: (read.append(1), encode_image(*a, **kw))[1])
    options = {} if batch_size is None else {"batch_size": batch_size}
    found = pipe([photograph, photograph], text=texts, **options)
    assert seen == rows and read == [1]
    assert simple(found) == simple([[one for answer in answers for one in answer] for answers in alone])


@pytest.mark.parametrize("zoom", [False, True])
def test_options_are_prepared_once_a_batch(
    pipe: Any, photograph: Image.Image, monkeypatch: pytest.MonkeyPatch, zoom: bool
) -> None:
    prepare, calls = pipe._prepare_generate_kwargs, []
    monkeypatch.setattr(pipe, "_prepare_generate_kwargs", lambda *a, **kw: (calls.append(1), prepare(*a, **kw))[1])
    pipe(photograph, text=[BALL, WHALE, SQUARE], batch_size=2, zoom=zoom, max_new_tokens=30)
    assert len(calls) == 2


def test_the_words_are_read_with_the_prompt(pipe: Any, photograph: Image.Image) -> None:
    passes: list[int] = []
    hook = pipe.model.model.language_model.register_forward_hook(lambda *args: passes.append(1))
    pipe(photograph, text=SQUARE)
    hook.remove()
    assert len(passes) == 4  # the prompt and three scales after the first
    always = pipe(photograph, text=WHALE, picture_prefill="always")
    assert all(one["label"] == WHALE for one in always) and pipe(photograph, text=WHALE) == []


def test_preview(pipe: Any, photograph: Image.Image, expected: list[np.ndarray]) -> None:
    whole, coarse = pipe(photograph, text=SQUARE), pipe(photograph, text=SQUARE, picture_stop_at_scale=3)
    assert coarse[0]["mask"].size == whole[0]["mask"].size and simple(coarse) != simple(whole)
    assert simple(pipe(photograph, text=SQUARE, picture_stop_at_scale=4)) == simple(whole)


def test_several_pictures_for_one_prompt(pipe: Any, photograph: Image.Image, expected: list[np.ndarray]) -> None:
    union = pipe(photograph, text=BOTH)
    instances = pipe(photograph, text=BOTH, multi_mask="instances")
    assert [one["label"] for one in union + instances] == [BOTH] * 3
    np.testing.assert_array_equal(np.asarray(union[0]["mask"]) > 0, expected[0] | expected[1])
    assert union[0]["score"] == pytest.approx(np.mean([one["score"] for one in instances]))
    for answer, mask in zip(instances, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(answer["mask"]) > 0, mask)


def test_every_kind_of_input(pipe: Any, photograph: Image.Image, toy_image: Path) -> None:
    one = simple(pipe(photograph, text=SQUARE))
    table = datasets.Dataset.from_dict(
        {"image": [str(toy_image)] * 2, "text": [SQUARE, BALL], "number": [0, 1]}
    ).cast_column("image", datasets.Image())
    two = [one, simple(pipe(photograph, text=BALL))]
    item = {"image": photograph, "text": SQUARE}
    assert simple(pipe(toy_image, text=SQUARE)) == one  # a Path
    assert simple(pipe(images=photograph, text=SQUARE)) == one
    assert simple(pipe(item)) == one
    assert simple(pipe(torch.from_numpy(np.array(photograph)), text=SQUARE)) == one
    assert simple(pipe([item, item], batch_size=2)) == [one, one]
    assert simple(pipe(np.stack([photograph, photograph]), text=SQUARE)) == [one, one]
    assert simple(pipe((path for path in [toy_image, toy_image]), text=(text for text in [SQUARE, BALL]))) == two
    assert simple(pipe(table["image"], text=table["text"], batch_size=2)) == two
    assert simple(pipe(KeyDataset(table, "image"), text=SQUARE)) == [one, one]
    assert simple(pipe(table)) == two
    assert simple(pipe(table.to_iterable_dataset(), batch_size=2)) == two


def test_url(pipe: Any, toy_image: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(toy_image.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        answers = pipe(f"http://127.0.0.1:{server.server_port}/{toy_image.name}", text=SQUARE)
    finally:
        server.shutdown()
        server.server_close()
    assert simple(answers) == simple(pipe(toy_image, text=SQUARE))


def test_streams_are_consumed_as_they_are_asked_for(pipe: Any, photograph: Image.Image) -> None:
    taken = []

    def endless() -> Iterator[Image.Image]:
        while True:
            taken.append(1)
            yield photograph

    answers = pipe(endless(), text=SQUARE, batch_size=2)
    assert next(answers)[0]["label"] == SQUARE
    assert len(taken) <= 3


def test_options(pipe: Any, photograph: Image.Image, toy_folder: Path) -> None:
    score = pipe(photograph, text=SQUARE)[0]["score"]
    assert len(pipe(photograph, text=SQUARE, threshold=score - 1e-3)) == 1
    assert pipe(photograph, text=SQUARE, threshold=min(score + 1e-3, 1.1)) == []
    areas = [np.count_nonzero(pipe(photograph, text=SQUARE, mask_threshold=at)[0]["mask"]) for at in (0.4, 0.5, 0.6)]
    assert areas[0] > areas[1] > areas[2]
    assert pipe(photograph, text=SQUARE, mask_threshold=0.999) == []  # drawn, but all black
    assert pipe(photograph, text=SQUARE, max_new_tokens=1) == []  # the answer ends before its picture
    assert pipe(photograph, text=SQUARE, generate_kwargs={"max_new_tokens": 1}) == []
    assert pipe(photograph, text=SQUARE, picture_do_sample=True, picture_top_k=1)[0]["score"] == pytest.approx(score)
    made = pipeline(
        "image-segmentation", model=str(toy_folder), text=BOTH, multi_mask="instances", batch_size=2, max_new_tokens=30
    )
    assert simple(made(photograph)) == simple(pipe(photograph, text=BOTH, multi_mask="instances"))


def test_masks_follow_edges_if_they_shall(pipe: Any, photograph: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, edges = (simple(pipe(photograph, text=BOTH, follow_edges=follow)) for follow in (False, True))
    assert plain != edges and plain == simple(pipe(photograph, text=BOTH))
    monkeypatch.setattr(pipe.processor, "follow_edges", True)
    assert simple(pipe(photograph, text=BOTH)) == edges
    assert simple(pipe([photograph, photograph], text=BOTH, follow_edges=False)) == [plain, plain]


def test_half_precision(toy_folder: Path, photograph: Image.Image) -> None:
    pipe = pipeline("image-segmentation", model=str(toy_folder), dtype=torch.bfloat16)
    assert pipe.model.dtype == torch.bfloat16 and pipe.processor.visual_tokenizer.dtype == torch.float32
    assert [one["label"] for one in pipe(photograph, text=[SQUARE, WHALE])] == [SQUARE]


def test_mistakes(pipe: Any, photograph: Image.Image) -> None:
    cases: list[tuple[Any, dict, type[Exception], str]] = [
        (None, {"text": SQUARE}, ValueError, "needs an image"),
        (photograph, {}, ValueError, "say what to segment"),
        (photograph, {"text": "  "}, ValueError, "prompt is empty"),
        (photograph, {"text": [SQUARE, ""]}, ValueError, "prompt is empty"),
        (photograph, {"text": SQUARE, "multi_mask": "all"}, ValueError, "multi_mask must be one of"),
        (photograph, {"text": SQUARE, "treshold": 0.1}, TypeError, "unknown options \\['treshold'\\]"),
        ([photograph] * 2, {"text": [SQUARE] * 3}, ValueError, "got 2 images and 3 texts"),
        (np.stack([photograph] * 2), {"text": [SQUARE]}, ValueError, "got 2 images and 1 texts"),
        ("nowhere.png", {"text": SQUARE}, ValueError, "nowhere.png"),
        (photograph, {"text": SQUARE, "mask_threshold": 127}, ValueError, "from 0 to below 1"),
        (photograph, {"text": SQUARE, "threshold": 2}, ValueError, "from 0 to 1; got 2"),
        (photograph, {"text": SQUARE, "num_return_sequences": 2, "do_sample": True}, ValueError, "one answer to each"),
        ({"picture": photograph}, {}, ValueError, "needs the key 'image'"),
        (
            photograph,
            {"text": SQUARE, "picture_guidance_scale": 1.5},
            ValueError,
            "guidance needs unconditional prompts",
        ),
    ]
    for inputs, options, error, message in cases:
        with pytest.raises(error, match=message):
            pipe(inputs, **options)


def test_a_stream_is_read_once_whatever_the_workers(pipe: Any, photograph: Image.Image) -> None:
    one = simple(pipe(photograph, text=SQUARE))
    found = pipe((photograph for _ in range(3)), text=SQUARE, num_workers=2)
    assert simple(found) == [one] * 3


def test_the_text_of_an_item_comes_before_that_of_the_pipeline(pipe: Any, photograph: Image.Image) -> None:
    made: Any = pipeline("image-segmentation", model=pipe.model, processor=pipe.processor, text=BALL)
    square = simple(pipe(photograph, text=SQUARE))
    assert simple(made({"image": photograph, "text": SQUARE})) == square
    assert simple(pipe({"image": photograph, "text": SQUARE}, text=BALL)) == square
    assert simple(made({"image": photograph})) == simple(pipe(photograph, text=BALL))


def test_the_batch_size_of_the_pipeline(pipe: Any, photograph: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = pipeline("image-segmentation", model=pipe.model, processor=pipe.processor, batch_size=2)
    rows, generate = [], pipe.model.generate
    monkeypatch.setattr(pipe.model, "generate", lambda **kw: (rows.append(len(kw["input_ids"])), generate(**kw))[1])
    made(photograph, text=[BALL, WHALE, SQUARE])
    made(photograph, text=[BALL, WHALE, SQUARE], batch_size=3)
    assert rows == [2, 1, 3]


def test_streams_of_unlike_length(pipe: Any, photograph: Image.Image) -> None:
    for images, texts, message in ((2, 1, "got 1 texts, and more images"), (1, 2, "got more texts than images")):
        with pytest.raises(ValueError, match=message + ".*for each image its prompt"):
            list(pipe((photograph for _ in range(images)), text=[SQUARE] * texts))


def test_previews_that_a_configuration_asks_for(
    pipe: Any, toy_folder: Path, photograph: Image.Image, expected: list[np.ndarray]
) -> None:
    config = copy.deepcopy(pipe.model.generation_config)
    config.picture_stop_at_scale = 2
    seen = simple(pipe(photograph, text=SQUARE, picture_stop_at_scale=2))
    assert seen != simple(pipe(photograph, text=SQUARE))
    assert simple(pipe(photograph, text=SQUARE, generation_config=config)) == seen
    other = pipeline("image-segmentation", model=str(toy_folder))
    other.model.generation_config.picture_stop_at_scale = 2
    assert simple(other(photograph, text=SQUARE)) == seen
    assert simple(other(photograph, text=SQUARE, generation_config=GenerationConfig(max_new_tokens=20))) == seen


def test_an_answer_that_was_cut_is_warned_of(
    pipe: Any, photograph: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks like that of a thing that is not there."""
    told: list[str] = []
    monkeypatch.setattr(pipeline_argenseg.logger, "warning", told.append)
    assert len(pipe(photograph, text=[SQUARE, WHALE])) == 1 and not told
    assert pipe(photograph, text=[SQUARE, WHALE], max_new_tokens=2) == [] and len(told) == 2
    assert all(prompt in line and "max_new_tokens" in line for prompt, line in zip([SQUARE, WHALE], told, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the <mask> of the man", "the prompt 'the <mask> of the man' holds <mask>"),
        ([SQUARE, "the <gen_start>"], "the prompt 'the <gen_start>' holds <gen_start>"),
        (["<visual token 000001>"], "holds <visual token 000001>"),
        (3, "a prompt or a list of prompts; got 3, a int"),
        ([SQUARE, None], "got None, a NoneType"),
    ],
)
def test_prompts_that_are_none(pipe: Any, photograph: Image.Image, text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(photograph, text=text)


def test_files_as_servers_get_them(pipe: Any, toy_image: Path) -> None:
    answer = simple(pipe(toy_image, text=SQUARE))
    assert simple(pipe(toy_image.read_bytes(), text=SQUARE)) == answer
    with toy_image.open("rb") as file:
        assert simple(pipe(file, text=SQUARE)) == answer


def test_in_half_precision_it_can_be_saved(toy_folder: Path, photograph: Image.Image, tmp_path: Path) -> None:
    half = pipeline("image-segmentation", model=str(toy_folder), dtype=torch.float16)
    half.save_pretrained(tmp_path)
    again = pipeline("image-segmentation", model=str(tmp_path), dtype=torch.float16)
    assert simple(again(photograph, text=SQUARE)) == simple(half(photograph, text=SQUARE))


def test_model_objects(pipe: Any, toy_folder: Path, photograph: Image.Image) -> None:
    answers = simple(pipe(photograph, text=SQUARE))
    model = AutoModelForImageTextToText.from_pretrained(toy_folder)
    assert simple(pipeline("image-segmentation", model=model)(photograph, text=SQUARE)) == answers
    processor = AutoProcessor.from_pretrained(toy_folder)
    made = pipeline("image-segmentation", model=model, processor=processor)
    assert made.processor is processor and simple(made(photograph, text=SQUARE)) == answers
    nameless = ARGenSegForConditionalGeneration(model.config)
    nameless.name_or_path = ""
    with pytest.raises(ValueError, match="needs a processor"):
        pipeline("image-segmentation", model=nameless)
    processor._vq_model = None
    with pytest.raises(ValueError, match="no visual tokenizer"):
        pipeline("image-segmentation", model=model, processor=processor)


def test_saved_pipeline(pipe: Any, photograph: Image.Image, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = pipeline("image-segmentation", model=str(tmp_path))
    assert simple(again(photograph, text=[SQUARE, BALL])) == simple(pipe(photograph, text=[SQUARE, BALL]))
    for auto in (AutoModelForImageSegmentation, AutoModelForMultimodalLM):
        assert type(auto.from_pretrained(tmp_path)) is ARGenSegForConditionalGeneration


def test_other_models_keep_their_pipeline(pipe: Any, photograph: Image.Image, tmp_path: Path) -> None:
    config = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=3
    )
    model = SegformerForSemanticSegmentation(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no image processor"):
        pipeline("image-segmentation", model=str(tmp_path))
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    other = pipeline("image-segmentation", model=str(tmp_path))
    assert type(other) is ImageSegmentationPipeline
    stock = ImageSegmentationPipeline(model.eval(), image_processor=other.image_processor, task="image-segmentation")
    drawn = [[{**segment, "score": 0.0} for segment in made(photograph)] for made in (other, stock)]
    assert drawn[0] and simple(drawn[0]) == simple(drawn[1])
    assert pipe(photograph, text=SQUARE)
