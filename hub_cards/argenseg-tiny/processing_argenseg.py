"""ARGenSegProcessor: images, text and masks to model inputs, and the model's token stream back to text and masks.

    processor = AutoProcessor.from_pretrained(path)
    conversation = processor.build_segmentation_conversation(image, "the left dog")
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)
    outputs = model.generate(**inputs)
    answers = processor.post_process_segmentation(
        outputs, images=[image], prompt_length=inputs["input_ids"].shape[1]
    )

A mask becomes visual tokens here, once: `<gen_start>` and T ids `visual_token_offset + codebook index` in `input_ids`.

Shapes: B rows, L tokens, N masks, T visual tokens of a picture, H and W of an image or its mask.
"""

import copy
import os
import re
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, BatchFeature, GotOcr2ImageProcessorPil, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import cached_file

from .chat_template import (
    END_IMAGE_TOKEN,
    IMAGE_TOKEN,
    START_IMAGE_TOKEN,
    adds_bos,
    internvl_format,
    make_chat_template,
)
from .conversation_argenseg import collect_contents, segmentation_conversation
from .image_inputs import load_images, split_rows
from .picture_spans import VISUAL_TOKEN, PictureVocabulary
from .released_processor import find_released_folder, released_processor_parts
from .saved_code import PROCESSOR_CODE, save_code
from .segmentation_processing import SegmentationProcessingMixin

VISUAL_TOKENIZER_FOLDER = "visual_tokenizer"
VISUAL_TOKEN_PATTERN = r"<visual token \d{6}>"
HUB_KWARGS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
# settings of a released checkpoint that a caller may change
RELEASED_CHANGES = (
    "image_processor", "chat_template", "mask_resize_sizes", "segmentation_prompt", "segmentation_answer", "num_scales",
    "follow_edges",
)  # fmt: skip
# transformers' `sanitize_control_tokens` puts this character before a marker that a user wrote: then it is plain text
UNMARKED = "(?<!\U000f0000)"


def _special_token(tokenizer: Any, name: str, *defaults: str) -> str:
    vocabulary = tokenizer.get_vocab()
    for token in (getattr(tokenizer, name, None), *defaults):
        if token is not None and token in vocabulary:
            return token
    raise ValueError(f"the tokenizer has no {name}; pass extra_special_tokens={{'{name}': '{defaults[0]}'}}")


def _joined(values: list[Any]) -> Any:
    """What an image processor made of images one by one, as it makes it of all at once."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return np.concatenate(values) if isinstance(values[0], np.ndarray) else [one for value in values for one in value]


class ARGenSegProcessor(SegmentationProcessingMixin, ProcessorMixin):
    """Image processor, text tokenizer, chat template and visual tokenizer of ARGenSeg.

    Args:
        image_processor: any transformers image processor that gives `pixel_values` of a fixed size. Default: squash to
            448x448 (bicubic), ImageNet mean and std.
        tokenizer: a fast tokenizer with the visual tokens `<visual token 000000>`... added, ids consecutive, and named
            special tokens `image_token`, `gen_start_token`, `gen_end_token`, and for the default chat template
            `start_image_token`, `end_image_token`.
        vq_model: the visual tokenizer, as `AutoModel` loads it. Without it only text can be handled. (No parameter may
            be called `visual_tokenizer`: transformers takes any name with "tokenizer" for a text tokenizer.)
        chat_template: default is the InternVL 2.5 format.
        image_seq_length: language model positions per image (per tile, if the image processor makes tiles).
        mask_resize_sizes: sides a mask is squashed to, one after another; the last is the picture's. Default: only
            that one. (The released checkpoint was trained with [512, 256].)
        segmentation_prompt: wording of a request; holds `{prompt}`.
        segmentation_answer: wording of the answer; holds `{mask}`.
        num_scales: pictures hold only their first scales, as in the model's configuration; None for all.
        mask_marker: where a mask stands in text. It is replaced before tokenization, so it need not be a token, and the
            tokenizer's `mask_token`, which in other models means masked language modelling, is left alone.
        follow_edges: whether masks follow the edges of their image where it is at hand, see `decode_masks`. Not in the
            paper; where a model's own outlines are good it may have nothing to add.
    """

    text_kwargs = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    images_kwargs = {"return_tensors": "pt"}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        vq_model=None,
        chat_template=None,
        image_seq_length: int = 256,
        mask_resize_sizes: list[int] | None = None,
        segmentation_prompt: str = "Please segment {prompt} in this image.",
        segmentation_answer: str = "Sure, the segmentation result: {mask}.",
        mask_marker: str = "<mask>",
        num_scales: int | None = None,
        follow_edges: bool = False,
    ):
        if tokenizer is None:
            raise ValueError("ARGenSegProcessor needs a tokenizer")
        if image_processor is None:
            image_processor = GotOcr2ImageProcessorPil(
                size={"height": 448, "width": 448}, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD
            )
        self.image_seq_length = image_seq_length
        self.mask_resize_sizes = mask_resize_sizes
        self.segmentation_prompt = segmentation_prompt
        self.segmentation_answer = segmentation_answer
        self.mask_marker = mask_marker
        self.num_scales = num_scales
        self.follow_edges = follow_edges
        self._read_special_tokens(tokenizer)
        self._set_visual_tokenizer(vq_model)
        if "{prompt}" not in segmentation_prompt or "{mask}" not in segmentation_answer:
            raise ValueError("segmentation_prompt must hold {prompt}, and segmentation_answer {mask}")
        if chat_template is None:
            chat_template = make_chat_template(
                internvl_format(
                    self.image_token,
                    _special_token(tokenizer, "start_image_token", START_IMAGE_TOKEN),
                    _special_token(tokenizer, "end_image_token", END_IMAGE_TOKEN),
                ),
                mask_marker,
                with_bos=adds_bos(tokenizer),
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    # ------------------------------------------------------------------ the parts

    def _read_special_tokens(self, tokenizer) -> None:
        vocabulary = tokenizer.get_vocab()
        self.image_token = _special_token(tokenizer, "image_token", IMAGE_TOKEN)
        self.gen_start_token = _special_token(tokenizer, "gen_start_token", "<gen_start>", "<ge_start>")
        self.gen_end_token = _special_token(tokenizer, "gen_end_token", "<gen_end>", "<ge_end>")
        self.image_token_id = vocabulary[self.image_token]
        self.gen_start_token_id = vocabulary[self.gen_start_token]
        self.gen_end_token_id = vocabulary[self.gen_end_token]
        self.visual_vocab_size = 0
        while VISUAL_TOKEN.format(self.visual_vocab_size) in vocabulary:
            self.visual_vocab_size += 1
        if not self.visual_vocab_size:
            raise ValueError(f"the tokenizer has no visual tokens; add {VISUAL_TOKEN.format(0)!r} ..., one per code")
        ids = [vocabulary[VISUAL_TOKEN.format(code)] for code in range(self.visual_vocab_size)]
        self.visual_token_offset = ids[0]
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise ValueError("the ids of the visual tokens are not consecutive; add them in one call, in order")

    def _set_visual_tokenizer(self, vq_model: PreTrainedModel | None) -> None:
        self._vq_model = vq_model
        if vq_model is None:
            return
        vq_model.eval()
        config = vq_model.config
        if config.vocab_size != self.visual_vocab_size:
            raise ValueError(
                f"the tokenizer has {self.visual_vocab_size} visual tokens, "
                f"but the visual tokenizer has {config.vocab_size} codes"
            )
        if self.mask_resize_sizes is not None and self.mask_resize_sizes[-1] != config.image_size:
            raise ValueError(
                f"mask_resize_sizes must end in the visual tokenizer's image size {config.image_size}; "
                f"got {self.mask_resize_sizes}"
            )

    @property
    def visual_tokenizer(self) -> PreTrainedModel | None:
        """The VQ-VAE that turns masks into visual tokens and back; `None` if the processor came without one."""
        return self._vq_model

    @property
    def num_visual_tokens(self) -> int | None:
        """T, the visual tokens of one picture; `None` without a visual tokenizer."""
        return None if self._vq_model is None else self.whole_scales[-1]

    @property
    def whole_scales(self) -> list[int]:
        """Visual tokens of a picture after each of its scales; the last is `num_visual_tokens`."""
        sides = self._require_visual_tokenizer().config.patch_nums[: self.num_scales]
        return list(accumulate(side * side for side in sides))

    @property
    def picture_answer_ids(self) -> list[int]:
        """Token ids of the answer that comes with a mask, `<gen_start>` in its place, up to the end of the turn.

        For the option of `generate` of the same name: what is known beforehand need not be written token by token.
        """
        text = self.segmentation_answer.replace("{mask}", self.mask_marker)
        asked = [{"role": "user", "content": [{"type": "text", "text": "-"}]}]
        answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        before = super().apply_chat_template(asked, add_generation_prompt=True)
        whole = super().apply_chat_template(answered).replace(self.mask_marker, self.gen_start_token)
        read, ids = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, whole))
        ids = ids[len(read) :]
        end = self.tokenizer.eos_token_id
        return ids[: ids.index(end) + 1] if end in ids else ids

    def _require_visual_tokenizer(self) -> PreTrainedModel:
        if self._vq_model is None:
            raise ValueError(
                f"masks need a visual tokenizer, and this processor has none: load it from a checkpoint with a "
                f"{VISUAL_TOKENIZER_FOLDER}/ folder, or pass vq_model="
            )
        return self._vq_model

    @property
    def _pictures(self) -> PictureVocabulary:
        return PictureVocabulary(
            self.gen_start_token_id, self.visual_token_offset, self.visual_vocab_size, self.tokenizer.pad_token_id
        )

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_patches"]

    # ------------------------------------------------------------------ saving and loading

    def to_dict(self) -> dict[str, Any]:
        without_weights = copy.copy(self)
        without_weights._vq_model = None
        return super(ARGenSegProcessor, without_weights).to_dict() | PROCESSOR_CODE

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save everything, the visual tokenizer into the sub-folder `visual_tokenizer/`, and the code."""
        max_shard_size = kwargs.pop("max_shard_size", None) or "50GB"
        files = super().save_pretrained(save_directory, **({} if push_to_hub else kwargs))
        if self._vq_model is not None:
            folder = os.path.join(save_directory, VISUAL_TOKENIZER_FOLDER)
            self._vq_model.save_pretrained(folder, max_shard_size=max_shard_size)
        save_code(save_directory, __file__, VISUAL_TOKENIZER_FOLDER)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, **kwargs)
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a processor, with its visual tokenizer if there is one (or pass your own: `vq_model=`).

        A checkpoint as released (`config.json` of `model_type: internvl_chat`) loads as it is, with the prompts, the
        system message and the mask geometry it was trained with; keyword arguments of the class change them.
        """
        vq_model = kwargs.pop("vq_model", None)
        for name in ("dtype", "torch_dtype"):  # of models; the text tokenizer would keep it, and could not be saved
            kwargs.pop(name, None)
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
        released = find_released_folder(
            pretrained_model_name_or_path, subfolder=kwargs.get("subfolder", ""), **hub_kwargs
        )
        if released is not None:
            settings = {name: kwargs[name] for name in RELEASED_CHANGES if name in kwargs}
            return cls(**(released_processor_parts(released, vq_model) | settings))
        if vq_model is None:
            vq_model = cls._load_visual_tokenizer(pretrained_model_name_or_path, **kwargs)
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor._set_visual_tokenizer(vq_model)
        return processor

    @classmethod
    def _load_visual_tokenizer(cls, path, subfolder: str = "", **kwargs) -> PreTrainedModel | None:
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        subfolder = f"{subfolder}/{VISUAL_TOKENIZER_FOLDER}" if subfolder else VISUAL_TOKENIZER_FOLDER
        config = cached_file(
            path, "config.json", subfolder=subfolder, **hub_kwargs, _raise_exceptions_for_missing_entries=False
        )
        if config is None:
            return None
        remote_code = {name: kwargs[name] for name in ("trust_remote_code", "code_revision") if name in kwargs}
        # fp32: in bf16 the nearest codebook entries, that is the ids, come out different
        try:
            return AutoModel.from_pretrained(
                path,
                subfolder=subfolder,
                dtype=torch.float32,
                adapter_kwargs={"subfolder": subfolder},  # adapters beside it are the model's
                **hub_kwargs,
                **remote_code,
            )
        except ValueError as error:
            hint = "import modeling_argenseg first, or pass trust_remote_code=True"
            raise ValueError(f"cannot load the visual tokenizer ({hint}): {error}") from error

    # ------------------------------------------------------------------ data to model inputs

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        masks: Any = None,
        search_steps: int | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """Prepare text with images and masks for the model.

        Args:
            images: one image, a flat list in the order of the markers, or one list per row; see `load_image`.
            text: a string or B strings, with one `<IMG_CONTEXT>` per image and one `<mask>` per mask.
            masks: like `images`; see `load_mask`.
            search_steps: see `encode_masks`. In a conversation that goes on, 0 saves the time.
            kwargs: as for any processor (`padding`, `truncation`, `return_tensors`, `text_kwargs=...`).

        Returns:
            `input_ids` and `attention_mask` (B, L), padded on the left by default, and `pixel_values`
            (images, 3, H, W) if there are images.

        Raises:
            ValueError: markers and items differ in number; a picture in the text is incomplete; the text is longer
                than the model's context, or truncation would cut an image or a picture; an unusable image or mask;
                text that is no string or an empty list.
        """
        if text is None:
            raise ValueError("text is missing; masks alone: encode_masks, images alone: image_processor")
        if kwargs.pop("videos", None) is not None or kwargs.pop("audio", None) is not None:
            raise ValueError("ARGenSeg takes images, text and masks; neither videos nor audio")
        rows = list(text) if isinstance(text, (list, tuple)) else [text]
        if not rows or not all(isinstance(row, str) for row in rows):
            found = ", ".join(sorted({type(row).__name__ for row in rows})) or "an empty list"
            raise ValueError(f"text must be a string, or a list of at least one; got {found}")
        text = [str(row) for row in rows]
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        image_rows = self._rows(images, text, "image", self.image_token)
        loaded = iter(load_images(image for row in image_rows for image in row))
        image_rows = [[next(loaded) for _ in row] for row in image_rows]
        image_inputs, image_texts = self._image_texts(image_rows, merged["images_kwargs"])
        mask_texts = self._mask_texts(self._rows(masks, text, "mask", self.mask_marker), image_rows, search_steps)
        text, offsets = self._expand_markers(text, image_texts, mask_texts)
        text_inputs = self._tokenize(text, offsets, merged)
        inputs = {**text_inputs, **image_inputs}
        data = {name: value for name, value in inputs.items() if name not in self.unused_input_names}
        return BatchFeature(
            data,
            tensor_type=merged["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def _rows(self, items: Any, text: list[str], kind: str, marker: str) -> list[list]:
        counts = [len(re.findall(UNMARKED + re.escape(marker), row)) for row in text]
        return split_rows(items, counts, kind, marker)

    def _image_texts(self, image_rows: list[list], images_kwargs: dict) -> tuple[dict, list[str]]:
        flat = [image for row in image_rows for image in row]
        if not flat:
            return {}, []
        different = {id(image): image for image in flat}
        if len(different) == len(flat):
            return self._process_images(flat, **images_kwargs)
        # each once: large images take long, and much memory
        done = {key: self._process_images([image], **images_kwargs) for key, image in different.items()}
        parts = [done[id(image)] for image in flat]
        inputs = {name: _joined([one[name] for one, _ in parts]) for name in parts[0][0]}
        return inputs, [text for _, texts in parts for text in texts]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        tiles = int(image_inputs["num_patches"][image_idx]) if "num_patches" in image_inputs else 1
        return self.image_token * (self.image_seq_length * tiles)

    def _mask_texts(self, mask_rows: list[list], image_rows: list[list], search_steps: int | None) -> list[str]:
        masks, sizes = [], []
        for mask_row, image_row in zip(mask_rows, image_rows, strict=True):
            masks += mask_row
            # with several images in a row nothing says which of them a mask belongs to
            sizes += [image_row[0].size[::-1] if len(image_row) == 1 else None] * len(mask_row)
        return self.masks_to_text(masks, sizes, search_steps) if masks else []

    def masks_to_text(
        self,
        masks: Any,
        image_sizes: list[tuple[int, int] | None] | None = None,
        search_steps: int | None = None,
    ) -> list[str]:
        """Masks written out as `<gen_start><visual token ...>...`; arguments and errors as in `encode_masks`.

        For text-only data sets and caches: text that holds this needs no masks beside it any more.
        """
        ids_NT = self.encode_masks(masks, image_sizes, search_steps)
        return [self.gen_start_token + "".join(map(VISUAL_TOKEN.format, row)) for row in ids_NT.tolist()]

    def _expand_markers(self, text: list[str], images: list[str], masks: list[str]) -> tuple[list[str], list[list]]:
        """Write images and masks out. Offsets are in the form that `return_assistant_tokens_mask` needs."""
        pattern = f"{UNMARKED}(?:(?P<image>{re.escape(self.image_token)})|(?P<mask>{re.escape(self.mask_marker)}))"
        replacements = {"image": iter(images), "mask": iter(masks)}
        expanded, offsets = [], []
        for row in text:
            pieces, row_offsets, read, written = [], [], 0, 0
            for match in re.finditer(pattern, row):
                replacement = next(replacements[match.lastgroup or ""])
                before = row[read : match.start()]
                start = written + len(before)
                read, written = match.end(), start + len(replacement)
                pieces += [before, replacement]
                row_offsets.append(
                    {
                        "type": match.lastgroup,
                        "span": match.span(),
                        "new_span": (start, written),
                        "text": match.group(),
                        "replacement": replacement,
                    }
                )
            expanded.append("".join(pieces) + row[read:])
            offsets.append(row_offsets)
        return expanded, offsets

    def _tokenize(self, text: list[str], offsets: list[list], merged: dict) -> dict:
        options = merged["text_kwargs"]
        with_types = options.pop("return_mm_token_type_ids", merged["return_mm_token_type_ids"])
        with_offsets = options.pop("return_text_replacement_offsets", merged["return_text_replacement_offsets"])
        inputs = self.tokenizer(text, **options)
        truncates = options.get("truncation") not in (None, False, "do_not_truncate")
        for index, row in enumerate(text):
            ids = np.asarray(inputs["input_ids"][index])
            if "attention_mask" in inputs:
                ids = ids[np.asarray(inputs["attention_mask"][index]) == 1]
            self._check_row(row, ids, truncates)
        if with_offsets:
            inputs["text_replacement_offsets"] = offsets
        if with_types:
            inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(inputs["input_ids"])
        return inputs

    def _check_row(self, text: str, ids: np.ndarray, truncates: bool) -> None:
        """Check one tokenized row: it fits the context, and its images and pictures are whole."""
        limit = self.tokenizer.model_max_length
        if not truncates and len(ids) > limit:
            raise ValueError(
                f"the input has {len(ids)} tokens, {len(ids) - limit} more than the context of {limit} "
                "(tokenizer.model_max_length); shorten it, use fewer images or masks, or pass truncation=True"
            )
        cut = "truncation would cut an image or a picture, and only text can be cut; raise max_length"
        starts = {self.image_token: self.image_token_id, self.gen_start_token: self.gen_start_token_id}
        for token, token_id in starts.items():
            if truncates and (ids == token_id).sum() != len(re.findall(UNMARKED + re.escape(token), text)):
                raise ValueError(cut)
        try:
            self._pictures.find_pictures(ids, self.num_visual_tokens, open_end=text.endswith(self.gen_start_token))
        except ValueError as error:
            raise ValueError(f"{cut if truncates else 'the text holds a broken picture'}: {error}") from None

    def _multimodal_inputs_from_conversations(self, conversations, *args, **kwargs):
        """What `apply_chat_template` hands to `__call__`: images as usual, and masks beside them."""
        return collect_contents(conversations)

    def markers_in(self, text: str) -> list[str]:
        """What text holds of the markers that stand for images, masks and pictures. Words of users must hold none, if
        they are not escaped by `apply_chat_template(..., sanitize_control_tokens=True)`."""
        markers = map(re.escape, (self.image_token, self.mask_marker, self.gen_start_token, self.gen_end_token))
        return re.findall("|".join((*markers, VISUAL_TOKEN_PATTERN)), text)

    def build_segmentation_conversation(self, image: Any, prompt: str, mask: Any = None) -> list[dict]:
        """The conversation that asks for a mask of `prompt`, in the wording the model is trained with.

        Args:
            image: anything `load_image` takes.
            prompt: what to segment, for example "the left dog".
            mask: if given (anything `load_mask` takes), the answer is added: a training example.

        Raises:
            ValueError: the prompt is empty.
        """
        return segmentation_conversation(image, prompt, mask, self.segmentation_prompt, self.segmentation_answer)
