"""`pipeline("image-segmentation")` with text prompts.

    pipe = pipeline("image-segmentation", model=path)
    pipe(image, text="the red mug")             # [{"label", "score", "mask"}], empty where nothing is drawn
    pipe(image, text=["the mug", "the spoon"])  # the image is encoded once; labels tell the prompts apart
    pipe(image, text="the red mug", zoom=True)  # finer, for more time
    pipe([image, other], text=["the mug", ["the cup", "the spoon"]], batch_size=8)  # prompts image by image

A request is one image with one prompt; `batch_size` counts requests. Image features are kept until the last request of
their image is answered. Requests on one image that are answered together also share what the language model has read of
that image.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sized
from os import PathLike
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import AutoProcessor, GenerationConfig, Pipeline
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils import logging

from .edges import shrink
from .image_inputs import is_file, load_image
from .segmentation_processing import check_threshold
from .zoom import check_zoom_options, generate_option, zoom_in

MULTI_MASK = ("union", "instances")
PROMPTS_TOGETHER = 8  # prompts of one image that are answered at once where no batch size is given
IMAGE_BY_IMAGE = 0  # a batch size
EACH_ITS_TEXT = (
    "For several images, text is one prompt for all of them, or a list that has for each image its prompt or its list "
    "of prompts"
)
logger = logging.get_logger(__name__)
# `pipeline` hands these on, although it has consumed them itself
NOT_FOR_GENERATE = ("local_files_only",)


class ARGenSegPipeline(Pipeline):
    """Text prompts to masks, in the format of transformers' own image segmentation pipeline.

    Args:
        model: an `ARGenSegForConditionalGeneration`.
        processor: its `ARGenSegProcessor`; by default loaded from where the model came from.
        kwargs: as for any pipeline (`device`, `batch_size`, `num_workers`, options of `generate`), and defaults for the
            options of a call.

    Raises:
        ValueError: there is no processor, or it has no visual tokenizer.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False
    _pipeline_calls_generate = True

    def __init__(self, model: Any, processor: Any = None, **kwargs: Any) -> None:
        if processor is None:
            if not model.name_or_path:
                raise ValueError("the pipeline needs a processor: pass processor=AutoProcessor.from_pretrained(...)")
            processor = AutoProcessor.from_pretrained(model.name_or_path)
        if processor.visual_tokenizer is None:
            raise ValueError("the processor has no visual tokenizer, which turns what is drawn into masks")
        super().__init__(model, processor=processor, **kwargs)
        processor.visual_tokenizer.to(self.device)
        self._generation_defaults.setdefault("pad_token_id", processor.tokenizer.pad_token_id)
        if getattr(model.generation_config, "picture_answer_ids", None) is None:
            self._generation_defaults.setdefault("picture_answer_ids", processor.picture_answer_ids)

    def _sanitize_parameters(
        self,
        text: str | list[str] | None = None,
        multi_mask: str | None = None,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        zoom: bool | None = None,
        follow_edges: bool | None = None,
        generate_kwargs: dict | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        if multi_mask is not None and multi_mask not in MULTI_MASK:
            raise ValueError(f"multi_mask must be one of {MULTI_MASK}, got {multi_mask!r}")
        options = {name: value for name, value in kwargs.items() if name not in NOT_FOR_GENERATE}
        known = {*vars(GenerationConfig()), "generation_config"}
        unknown = [name for name in options if name not in known and not name.startswith("picture_")]
        if unknown:
            raise TypeError(f"unknown options {unknown}; options of generate go by their names or in generate_kwargs")
        forward = {**options, **(generate_kwargs or {})}
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a score, from 0 to 1; got {threshold!r}")
        if mask_threshold is not None:
            check_threshold(mask_threshold)
            forward["mask_threshold"] = mask_threshold
        if follow_edges is not None:
            forward["follow_edges"] = follow_edges
        postprocess = {"multi_mask": multi_mask, "threshold": threshold}
        given = {name: value for name, value in postprocess.items() if value is not None}
        preprocess = {"text": text, "zoom": zoom}
        return {name: value for name, value in preprocess.items() if value is not None}, forward, given

    def __call__(self, inputs: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Segment images by prompts.

        Args:
            inputs: an image (`PIL.Image`, path, URL, bytes, array, tensor), or several: a list, a generator, a data set
                or a column of one. Items may also be `{"image": ..., "text": ...}`, which need no `text` beside them.
            text: for one image, a prompt or a list of prompts. For several images a prompt for all of them, or a list
                (or column, or generator) that has for each image its prompt or its list of prompts.
            multi_mask: if the model draws several pictures for one prompt, `"union"` (the default) makes one mask of
                them, its score their mean; `"instances"` returns each.
            threshold: masks with a lower score are left out. Default 0: none is.
            mask_threshold: a pixel belongs to the mask where its map in [0, 1] is above this. Default 0.5.
            zoom: draw every mask again from nearer, which makes it finer and takes about three times as long; see
                `zoom_in`. Default False.
            follow_edges: whether masks follow the edges of the image, see `decode_masks`; previews
                (`picture_stop_at_scale`) never do. Default: as the processor says.
            generate_kwargs: options of `generate`; they may also be given by their names (`max_new_tokens=64`).
            batch_size: requests (image and prompt) that are answered together. Default: the prompts of one image, at
                most 8 at once.

        Returns:
            for an image a list of `{"label": the prompt, "score": float in [0, 1], "mask": PIL "L", 255 on the object,
            of the size of the upright image}` in the order of the prompts. A prompt for which nothing, or an all-black
            picture, is drawn has no entry. For a list of images a list of such lists; for generators and data sets an
            iterator over them, which works as it is consumed.

        An answer that a limit (`max_new_tokens`, `max_time`) cut before it drew is warned of.

        Raises:
            ValueError: no text, an empty prompt or one with a marker of an image or a mask in it, images and texts that
                differ in number, an unreadable image.
            TypeError: an unknown option.
        """
        inputs = kwargs.pop("images", inputs)
        if inputs is None:
            raise ValueError("the pipeline needs an image, or several")
        kwargs["batch_size"] = kwargs.get("batch_size") or self._batch_size or IMAGE_BY_IMAGE
        if _is_one(inputs):
            return super().__call__([_item(inputs, text)], **kwargs)[0]
        if isinstance(inputs, (list, tuple)):
            items = list(_items(inputs, text))
            return super().__call__(items, **kwargs) if items else []
        if isinstance(inputs, Sized) and hasattr(inputs, "__getitem__"):
            return super().__call__(_ItemsOf(inputs, text), **kwargs)
        return super().__call__(_items(inputs, text), **kwargs)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Iterator[list[dict]]:
        """Answers image by image. Requests are batched across images, which transformers' own iterator cannot do."""
        if isinstance(inputs, Sized):
            images: Any = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:
            images = PipelineIterator(inputs, self.preprocess, preprocess_params)
            num_workers = min(num_workers, 1)  # each worker would run through the whole stream
        loader = DataLoader(images, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is)
        pending: deque[dict] = deque()  # images, in order, whose requests are not all answered
        requests: list[tuple[dict, int]] = []
        for picture in loader:
            pending.append(picture)
            prompts = len(picture["labels"])
            for number in range(prompts):
                requests.append((picture, number))
                ends = batch_size == IMAGE_BY_IMAGE and number == prompts - 1
                if ends or len(requests) == (batch_size or PROMPTS_TOGETHER):
                    self._answer(requests, forward_params)
                    requests = []
            while pending and len(pending[0]["answers"]) == len(pending[0]["labels"]):
                yield self.postprocess(pending.popleft(), **postprocess_params)
        if requests:
            self._answer(requests, forward_params)
        for picture in pending:
            yield self.postprocess(picture, **postprocess_params)

    def preprocess(self, item: Mapping, text: str | list[str] | None = None, zoom: bool = False) -> dict[str, Any]:
        """One image and its prompts.

        Returns:
            `pixel_values` (tiles, 3, H, W), `input_ids` (one tensor (L,) for each prompt), `labels` (the prompts),
            `size` (height, width) and `image`, upright, no larger than edges need it, and `answers`, empty, to be
            filled in the order of the prompts. To zoom in also `conversations`, one for each prompt.
        """
        prompts = text if item.get("text") is None else item["text"]
        if prompts is None:
            raise ValueError('say what to segment: pipe(image, text="the red mug")')
        prompts = _prompts(prompts)
        for prompt, markers in ((prompt, self.processor.markers_in(prompt)) for prompt in prompts):
            if markers:
                raise ValueError(f"the prompt {prompt!r} holds {markers[0]}, which stands for an image or a mask")
        image = load_image(item["image"])
        picture: dict[str, Any] = {
            "labels": prompts,
            "size": image.size[::-1],
            "image": shrink(image),
            "answers": [],
        }
        if not prompts:
            return picture
        conversations = [self.processor.build_segmentation_conversation(image, prompt) for prompt in prompts]
        inputs = self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        input_ids = [ids[kept] for ids, kept in rows]
        tiles = len(inputs["pixel_values"]) // len(prompts)  # every conversation has brought its own, all the same
        picture |= {"input_ids": input_ids, "pixel_values": inputs["pixel_values"][:tiles]}
        return picture | {"conversations": conversations} if zoom else picture

    def _answer(self, requests: list[tuple[dict, int]], forward_params: dict) -> None:
        """Answers requests (image, number of its prompt) together; appends to each image's `answers`. The options of
        `generate` are prepared here, once."""
        self._encode([picture for picture, _ in requests])
        options = dict(forward_params)
        threshold, follow_edges = options.pop("mask_threshold", 0.5), options.pop("follow_edges", None)
        options = self._prepare_generate_kwargs(options, return_dict_in_generate=True)
        if generate_option(self.model, options, "num_return_sequences") not in (None, 1):
            raise ValueError("the pipeline gives one answer to each prompt; for several samples call model.generate")
        if generate_option(self.model, options, "picture_guidance_scale"):
            raise ValueError(
                "guidance needs unconditional prompts, which the pipeline does not make: call model.generate with "
                "picture_guidance_scale, negative_input_ids and negative_attention_mask"
            )
        zoom = "conversations" in requests[0][0]
        if zoom:
            check_zoom_options(self.model, options)
        inputs = self.processor.tokenizer.pad(
            {"input_ids": [picture["input_ids"][number] for picture, number in requests]},
            padding_side="left",
            return_tensors="pt",
        )
        outputs = self.forward({**inputs, "image": self._image_inputs(requests)}, **options)
        self._warn_of_cut_answers(requests, outputs["sequences"][:, inputs["input_ids"].shape[1] :], options)
        answers = self.processor.post_process_segmentation(
            SimpleNamespace(**outputs),
            target_sizes=[picture["size"] for picture, _ in requests],
            images=[picture["image"] for picture, _ in requests],
            labels=[picture["labels"][number] for picture, number in requests],
            threshold=threshold,
            prompt_length=inputs["input_ids"].shape[1],
            stop_at_scale=generate_option(self.model, options, "picture_stop_at_scale"),
            follow_edges=False if zoom else follow_edges,
        )
        if zoom:
            options |= {"threshold": threshold, "follow_edges": follow_edges}
            answers = self._zoom_in(requests, answers, **options)
        for (picture, _), answer in zip(requests, answers, strict=True):
            picture["answers"].append(answer["segments"])

    def _warn_of_cut_answers(
        self, requests: list[tuple[dict, int]], answers: torch.Tensor, options: dict[str, Any]
    ) -> None:
        """Tells of answers (B, L) that neither draw nor end: what they would have gone on with is not known."""
        ends = generate_option(self.model, options, "eos_token_id")
        last = [self.processor.tokenizer.eos_token_id] if ends is None else ends if isinstance(ends, list) else [ends]
        whole = torch.isin(answers, torch.tensor([*last, self.processor.gen_start_token_id])).any(1)
        for (picture, number), ids in ((requests[row], answers[row]) for row in (~whole).nonzero()[:, 0].tolist()):
            said = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
            logger.warning(
                f"the answer to {picture['labels'][number]!r} was cut at {said!r}, before it drew anything or ended: "
                "give it more room (max_new_tokens) or time (max_time)"
            )

    def _zoom_in(self, requests: list[tuple[dict, int]], answers: list[dict], **options: Any) -> list[dict]:
        conversations = [picture["conversations"][number] for picture, number in requests]
        with self.device_placement(), self.get_inference_context()():
            return zoom_in(self.model, self.processor, conversations, answers, **options)

    def _encode(self, pictures: list[dict]) -> None:
        """Image `features`, one output a tile (see `_tiles_of`), for those images that have none yet, all at once."""
        new = list({id(picture): picture for picture in pictures if "features" not in picture}.values())
        if not new:
            return
        counts = [len(picture["pixel_values"]) for picture in new]
        with self.device_placement(), self.get_inference_context()():
            pixel_values = torch.cat([picture.pop("pixel_values") for picture in new]).to(self.device, self.dtype)
            tiles = _tiles_of(self.model.get_image_features(pixel_values, return_dict=True))
        for picture, count in zip(new, counts, strict=True):
            picture["features"] = [next(tiles) for _ in range(count)]

    def _image_inputs(self, requests: list[tuple[dict, int]]) -> dict[str, Any]:
        """The images of some requests, as `generate` takes them: as read by the language model, if there is but one."""
        picture, number = requests[0]
        if len(picture["labels"]) == 1 or any(other is not picture for other, _ in requests):
            return _as_inputs([tile for other, _ in requests for tile in other["features"]])
        if "encoded" not in picture:
            with self.device_placement(), self.get_inference_context()():
                input_ids = picture["input_ids"][number][None].to(self.device)
                picture["encoded"] = self.model.encode_image(input_ids, **_as_inputs(picture["features"]))
        return {"encoded_image": picture["encoded"]}

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        image = model_inputs.pop("image")
        outputs = self.model.generate(**model_inputs, **image, **options)
        return {"sequences": outputs.sequences, "picture_scores": outputs.picture_scores}

    def postprocess(self, picture: dict[str, Any], multi_mask: str = "union", threshold: float = 0.0) -> list[dict]:
        """The answers of one image in the pipeline's format."""
        results = []
        for label, segments in zip(picture["labels"], picture["answers"], strict=True):
            masks, scores = [one["mask"] for one in segments], [one["score"] for one in segments]
            if multi_mask == "union" and masks:
                masks, scores = [np.logical_or.reduce(masks)], [float(np.mean(scores))]
            for mask, score in zip(masks, scores, strict=True):
                if mask.any() and score >= threshold:
                    white = Image.fromarray(mask.astype(np.uint8) * 255)
                    results.append({"label": label, "score": score, "mask": white})
        return results

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Model and processor, with the code that loads this pipeline from the folder."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


class SegmentationPipelineDispatch(ImageSegmentationPipeline):
    """What `pipeline("image-segmentation")` calls once ARGenSeg is registered: makes the pipeline of a model's kind.

    Parts are optional here, because the kinds need different ones; each kind's own pipeline misses what it needs.
    """

    _load_processor = None
    _load_image_processor = None

    def __new__(cls, model: Any, processor: Any = None, **kwargs: Any) -> Any:
        if model.config.model_type == "argenseg":
            for part in ("tokenizer", "image_processor", "feature_extractor"):  # the processor has its own
                kwargs.pop(part, None)
            return ARGenSegPipeline(model, processor, **kwargs)
        if kwargs.get("image_processor") is None and kwargs.get("feature_extractor") is None:
            raise ValueError(f"no image processor could be loaded for {model.name_or_path!r}: pass image_processor=")
        return ImageSegmentationPipeline(model, **kwargs)


def _as_it_is(picture: dict) -> dict:
    return picture


def _tiles_of(image: Any) -> Iterator[Any]:
    """Image features tile by tile: `pooler_output` (tokens, hidden) and, of Qwen3-VL, `deepstack_features`, the same of
    several layers, which the first layers of its language model read."""
    layers = image.get("deepstack_features")
    for number, features in enumerate(image.pooler_output):
        deep = {} if layers is None else {"deepstack_features": [layer[number] for layer in layers]}
        yield type(image)(pooler_output=features, **deep)


def _as_inputs(tiles: list[Any]) -> dict[str, Any]:
    """Image features, one output a tile, as an input of the model."""
    whole = {"pooler_output": torch.cat([tile.pooler_output for tile in tiles])[None]}
    if tiles[0].get("deepstack_features") is not None:
        layers = zip(*(tile.deepstack_features for tile in tiles), strict=True)
        whole["deepstack_features"] = [torch.cat(layer)[None] for layer in layers]
    return {"mm_encoder_outputs": {"image": type(tiles[0])(**whole)}}


def _is_one(inputs: Any) -> bool:
    """Whether `inputs` is one image (or one item with its text), not several."""
    if isinstance(inputs, (np.ndarray, torch.Tensor)):
        return inputs.ndim < 4
    return isinstance(inputs, (Image.Image, Mapping)) or is_file(inputs)


def _prompts(text: Any) -> list[str]:
    """
    Raises:
        ValueError: neither a prompt nor several.
    """
    several = [text] if isinstance(text, str) or not isinstance(text, Iterable) else list(text)
    for one in several:
        if not isinstance(one, str):
            raise ValueError(f"text must be a prompt or a list of prompts; got {one!r}, a {type(one).__name__}")
    return several


def _item(image: Any, text: Any) -> dict[str, Any]:
    """One image and its text (None: the pipeline's default), from an image or an item that has both."""
    if not isinstance(image, Mapping):
        return {"image": image, "text": text}
    if "image" not in image:
        raise ValueError(f"an item needs the key 'image', and 'text' unless text= is given; got {sorted(image)}")
    return {"image": image["image"], "text": image.get("text", text)}


def _items(images: Iterable, text: Any) -> Iterator[dict[str, Any]]:
    """Images with their texts, one by one.

    Raises:
        ValueError: images and texts differ in number.
    """
    if text is None or isinstance(text, str):
        yield from (_item(image, text) for image in images)
        return
    _check_lengths(images, text)
    texts = iter(text)
    for number, image in enumerate(images):
        try:
            one = next(texts)
        except StopIteration:
            raise ValueError(f"got {number} texts, and more images. {EACH_ITS_TEXT}") from None
        yield _item(image, one)
    if any(True for _ in texts):
        raise ValueError(f"got more texts than images. {EACH_ITS_TEXT}")


def _check_lengths(images: Any, text: Any) -> None:
    if isinstance(images, Sized) and isinstance(text, Sized) and len(images) != len(text):
        raise ValueError(f"got {len(images)} images and {len(text)} texts. {EACH_ITS_TEXT}")


class _ItemsOf(Dataset):
    """Images that can be asked for by number (a data set, a column), with their texts."""

    def __init__(self, images: Any, text: Any) -> None:
        self.images = images
        self.text = text
        self.shared = text is None or isinstance(text, str)
        if not self.shared:
            _check_lengths(images, text)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _item(self.images[index], self.text if self.shared else self.text[index])
