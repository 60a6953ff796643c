"""Makes an ARGenSeg model of a plain vision-language model: a folder to train from.

    python -m trl_recipes.from_vlm --vlm OpenGVLab/InternVL3-1B-hf --output out/start \\
        --visual_tokenizer hub_cards/argenseg-tiny/visual_tokenizer
    python -m trl_recipes.sft --config trl_recipes/configs/sft_from_vlm.yaml \\
        --model_name_or_path out/start --data my_masks/ --output_dir out/sft

What it says in words stays as it was; that is checked on an image, and a vision-language model of a kind that cannot be
built on is refused. It draws nothing sensible yet: the rows of its new tokens start as the mean of the old ones, what
makes queries at zero. Training teaches it, all of it or adapters and the new parts.

The processor squashes images to one size (no tiles, no cut-out of the middle), so that images and masks have the same
geometry, and writes conversations in the chat format of the vision-language model. InternVL (`...-hf` repositories),
LLaVA 1.5 and the Qwen-VL family (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) are of the kind that is needed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    PreTrainedModel,
    ProcessorMixin,
)

from modeling_argenseg import ARGenSegForConditionalGeneration
from modeling_argenseg.from_vlm import NEEDED
from modeling_argenseg.image_grid import MODEL_TYPES, patchify
from processing import ARGenSegProcessor
from processing.chat_template import adds_bos, make_chat_template
from processing.picture_spans import VISUAL_TOKEN

from .chat_format import read_chat_format
from .command_line import errors_in_a_line, loading
from .export import set_picture_options
from .visual_tokenizers import load_visual_tokenizer

GIVE_ONE = "give a template with --chat_template, which writes masks as <mask> and marks answers as generation"
LARGEST_DIFFERENCE = 0.02  # of logits, as a share of their norm; rounding in bf16 is below that
MAX_NEW_TOKENS = 256  # of text
TOKENS_A_SIDE = 16
QUESTION = "What is in this image?"


def start_from_vlm(
    vlm: str,
    visual_tokenizer: str,
    chat_template: str | None = None,
    dtype: str = "auto",
    image_size: int | None = None,
    **config_changes: Any,
) -> tuple[ARGenSegForConditionalGeneration, ARGenSegProcessor]:
    """Model and processor, ready to be trained.

    Args:
        vlm: folder or Hub name of an image-text-to-text model with its tokenizer and image processor.
        visual_tokenizer: as in `load_visual_tokenizer`.
        chat_template: Jinja that writes masks as `<mask>` and marks answers as generation; default: the chat format of
            the vision-language model, as `read_chat_format` finds it.
        dtype: of the weights, such as "bfloat16"; "auto": as they are stored.
        image_size: side of images in pixels, for the Qwen-VL family, whose vision tower takes any; default: that of
            16 x 16 tokens.
        config_changes: fields of `ARGenSegConfig`, such as `scale_attention="block"`.

    Raises:
        ValueError: something is not there, the model is of a kind that cannot be built on, or its chat format cannot
            be read off its template.
    """
    pictures = load_visual_tokenizer(visual_tokenizer)
    with loading(vlm):
        plain = AutoModelForImageTextToText.from_pretrained(vlm, dtype=dtype).eval()
        images = AutoImageProcessor.from_pretrained(vlm)
        tokenizer = load_tokenizer(vlm, plain.config, pictures.config.vocab_size)
    first = tokenizer.convert_tokens_to_ids(tokenizer.gen_start_token)
    (height, width), image_grid = image_geometry(plain.config, image_size)
    model = ARGenSegForConditionalGeneration.from_vlm(
        plain, pictures, first, image_grid=image_grid, **config_changes
    ).eval()
    processor = ARGenSegProcessor(
        GotOcr2ImageProcessorPil(
            size={"height": height, "width": width}, image_mean=images.image_mean, image_std=images.image_std
        ),
        tokenizer,
        pictures,
        chat_template=chat_template or own_chat_template(vlm, tokenizer, _ends(plain.generation_config)),
        image_seq_length=count_image_tokens(model, height, width),
        num_scales=model.config.num_scales,
    )
    check_words(plain, model, processor)
    model.generation_config = _generation_config(model.generation_config, tokenizer)
    set_picture_options(model, picture_answer_ids=processor.picture_answer_ids)
    return model, processor


def load_tokenizer(vlm: str, config: Any, num_codes: int) -> Any:
    """The text tokenizer of a vision-language model with the tokens of pictures at its end, ids one after another.

    Raises:
        ValueError: the tokenizer has no token for images or for the end of an answer.
    """
    image = AutoTokenizer.from_pretrained(vlm).convert_ids_to_tokens(config.image_token_id)
    if image is None:
        raise ValueError(f"its tokenizer has no token of the id {config.image_token_id}, which stands for images")
    names = {"image_token": image, "gen_start_token": "<gen_start>", "gen_end_token": "<gen_end>"}
    tokenizer = AutoTokenizer.from_pretrained(vlm, **names)
    if tokenizer.eos_token is None:
        raise ValueError("its tokenizer has no eos_token, and nothing would end an answer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens([VISUAL_TOKEN.format(code) for code in range(num_codes)], special_tokens=True)
    tokenizer.padding_side = "left"
    context = config.get_text_config(decoder=True).max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    return tokenizer


def image_geometry(config: Any, image_size: int | None = None) -> tuple[tuple[int, int], list[int] | None]:
    """Height and width of images in pixels and, for the Qwen-VL family, rows and columns of their tokens.

    Raises:
        ValueError: the vision tower has no size of its own, or one other than asked for, or cannot be given that size.
    """
    vision = config.to_dict().get("vision_config", {})
    if config.model_type in MODEL_TYPES:
        token = vision["spatial_merge_size"] * vision["patch_size"]
        side = TOKENS_A_SIDE * token if image_size is None else image_size
        if side % token or side < token:
            raise ValueError(
                f"--image_size {side}: one image token of this model covers {token} pixels; take a multiple"
            )
        return (side, side), [side // token, side // token]
    side = vision.get("image_size")
    if side is None:
        raise ValueError(f"{config.model_type} cannot be built on: its vision_config has no image_size")
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    if image_size is not None and (height, width) != (image_size, image_size):
        raise ValueError(f"--image_size {image_size}: the vision tower of this model is made for {height} x {width}")
    return (height, width), None


def own_chat_template(vlm: str, tokenizer: Any, ends: list[int]) -> str:
    """The chat format of a vision-language model with a place for masks.

    Args:
        ends: ids of tokens that end an answer, beside the tokenizer's own.

    Raises:
        ValueError: it has no template, or one that this cannot be read off.
    """
    # that of the processor, which may differ from its tokenizer's and alone knows images then
    template = ProcessorMixin.get_processor_dict(vlm)[0].get("chat_template") or tokenizer.chat_template
    if template is None:
        raise ValueError(f"{vlm} has no chat template: {GIVE_ONE}")
    start, end = (getattr(tokenizer, name, None) or "" for name in ("start_image_token", "end_image_token"))
    image = tokenizer.image_token
    try:
        end_tokens = [tokenizer.eos_token, *filter(None, tokenizer.convert_ids_to_tokens(ends))]
        chat = read_chat_format(tokenizer, template, image, start + image + end, end_tokens)
    except (TemplateError, TypeError, ValueError) as error:  # a TypeError where texts are not read in blocks
        raise ValueError(f"the chat format of {vlm} cannot be read off its template ({error}): {GIVE_ONE}") from error
    # some templates write it, for others the tokenizer does
    bos = tokenizer.bos_token
    written = bos is not None and (chat.opening + chat.before["user"]).startswith(bos)
    return make_chat_template(chat, with_bos=adds_bos(tokenizer) and not written)


@torch.no_grad()
def count_image_tokens(model: ARGenSegForConditionalGeneration, height: int, width: int) -> int:
    """Positions of the language model that an image takes."""
    blank = torch.zeros(1, 3, height, width, dtype=model.dtype, device=model.device)
    features = model.get_image_features(blank, return_dict=True).pooler_output
    return sum(one.shape[0] for one in features)


@torch.no_grad()
def check_words(plain: PreTrainedModel, model: ARGenSegForConditionalGeneration, processor: ARGenSegProcessor) -> None:
    """Whether the model goes on after an image and a question as the vision-language model did.

    Raises:
        ValueError: it does not. There is more to the vision-language model than image features among the words.
    """
    picture = Image.radial_gradient("L").convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    own = own_inputs(plain, model, inputs)
    words = model.config.gen_start_token_id
    before, after = (net(**given).logits[0, -1, :words].float() for net, given in ((plain, own), (model, inputs)))
    difference = float((after - before).norm() / before.norm())
    if not difference < LARGEST_DIFFERENCE:
        raise ValueError(
            f"{type(plain).__name__} cannot be built on: asked about an image, its logits differ by {difference:.0%} "
            f"from what they were. {NEEDED}"
        )


def own_inputs(plain: PreTrainedModel, model: ARGenSegForConditionalGeneration, inputs: Any) -> dict[str, torch.Tensor]:
    """Inputs of the model as the vision-language model takes them."""
    if model.config.image_grid is None:
        return dict(inputs)
    patches, grid = patchify(inputs["pixel_values"], plain.config.vision_config, model.config.image_grid)
    types = (inputs["input_ids"] == model.config.image_token_id).int()
    return {**inputs, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": types}


def example(processor: ARGenSegProcessor) -> str:
    """A request and its answer, as the model reads and writes them."""
    conversation = processor.build_segmentation_conversation(Image.new("RGB", (8, 8)), "the dog", mask="mask.png")
    return processor.apply_chat_template(conversation)


def text_file(name: str) -> str:
    """For options that name a file of text."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {name!r}: {error}") from error


def _ends(config: GenerationConfig) -> list[int]:
    return [] if config.eos_token_id is None else torch.tensor(config.eos_token_id).flatten().tolist()


def _generation_config(own: GenerationConfig, tokenizer: Any) -> GenerationConfig:
    """Text ends where the chat format ends it; without a limit of its own it is not cut after 20 tokens. Whether a mask
    is drawn is not left to chance: sampling and penalties, as Qwen-VL has them, are not taken over."""
    return GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted({*_ends(own), tokenizer.eos_token_id}),
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=own.max_new_tokens or MAX_NEW_TOKENS,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", required=True, help="folder or Hub name of an image-text-to-text model")
    parser.add_argument(
        "--visual_tokenizer",
        required=True,
        help="what masks are drawn with: a folder that train_visual_tokenizer wrote, that of a model "
        "(hub_cards/argenseg-tiny/visual_tokenizer: 341 tokens, 128 px), or VAR's vae_ch160v4096z32.pth (680 tokens, "
        "256 px)",
    )
    parser.add_argument("--output", required=True, help="folder of the new model and its processor")
    parser.add_argument(
        "--scale_attention",
        choices=["block", "causal"],
        default="block",
        help="whether tokens of one scale see each other (as in VAR; the default) or only those before them (as in the "
        "released model; works with flash attention)",
    )
    parser.add_argument(
        "--visual_loss",
        choices=["scale", "token"],
        default="scale",
        help="mean over the tokens of each scale, then over scales (the default), or over all tokens (as released)",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        help="side of images in pixels, for the Qwen-VL family; default: 16 x 16 tokens (448, or 512 for Qwen3-VL). "
        "The vision towers of others have a size of their own",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights; default: as they are stored",
    )
    parser.add_argument(
        "--chat_template",
        type=text_file,
        help="Jinja file that writes masks as <mask> and marks answers as generation; default: made of the model's own",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    with errors_in_a_line():
        output = Path(args.output)
        if output.is_dir() and any(output.iterdir()):
            raise ValueError(f"--output {output} is not empty: choose another folder")
        changes = {name: getattr(args, name) for name in ("scale_attention", "visual_loss")}
        model, processor = start_from_vlm(
            args.vlm, args.visual_tokenizer, args.chat_template, args.dtype, args.image_size, **changes
        )
        model.save_pretrained(output)
        processor.save_pretrained(output)
    print(f"{output}: {model.num_parameters() / 1e6:,.0f} M parameters. A request, as the model reads it:\n")
    print(example(processor))
    config = "trl_recipes/configs/sft_from_vlm.yaml"
    print(f"\nNow train it: python -m trl_recipes.sft --config {config} --model_name_or_path {output} ...")


if __name__ == "__main__":
    main()
