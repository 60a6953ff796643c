"""Segments an image by asking for things in words, one answer for each prompt.

    python examples/segment.py IMAGE "prompt" ["prompt" ...] --output outputs/

What it writes into the output folder (pictures of an earlier run are removed first):
  mask_<i>.png   white where the thing of prompt i (from 0) is, of the size of the image; none if nothing was drawn
  overlay.png    the image with every mask in a colour of its own, and which colour is what
  scales.png     how every mask came about, from the coarsest scale to the finest; none if nothing was drawn
                 (with --zoom: before the model looked closer)
  result.json    answers, scores, seconds and file names, to go on with

Prompts are asked one after another, so that the seconds of each are its own: they count from the request to the
finished mask. The first prompt also pays for what is set up only once.
"""

import argparse
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: beside other work, threads that spin make it crawl

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_argenseg  # noqa: F401 (registers the Auto classes)
from processing import load_image, zoom_in
from trl_recipes.command_line import HUB_NAME

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_MODEL = "hub_cards/argenseg-tiny"
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLOURS = ("#e6194b", "#1e88e5", "#ffb300", "#43a047", "#8e24aa", "#00acc1", "#f4511e", "#d81b9c")
OVERLAY_SIDES = (480, 1600)  # shortest and longest allowed longest side of the shown photograph, in pixels
TINT = 0.45  # how much of its colour lies over a mask
SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf")  # names that Pillow looks up
TILE = 168  # longest side of a picture in scales.png, in pixels
GAP = 16  # space around things, in pixels
EPILOG = """examples:
  one thing, with the small model of this checkout:
    python examples/segment.py examples/sheep.jpg "the sheep" --output outputs/
  several things; what is not there gets words instead of a mask:
    python examples/segment.py examples/sheep.jpg "the sheep" "the airplane" --output outputs/
  finer outlines, above all of small things, in about three times the time:
    python examples/segment.py examples/sheep.jpg "the sheep" --zoom
  another model (a folder, or a name on the Hub), on a GPU:
    python examples/segment.py photo.jpg "the left dog" --model FOLDER --device cuda --dtype bfloat16

Results go to standard output, everything else to standard error. Exit code 2: the input is at fault.
"""


class InputError(Exception):
    """Something that the user gave cannot be used; the message says what, in one line."""


@dataclass
class Answer:
    """What the model said to one prompt.

    Attributes:
        prompt: what was asked for.
        text: the answer without its pictures.
        mask: (H, W) bool of the size of the image, the union if several were drawn; None if none was.
        score: in [0, 1], the mean over the pictures drawn; None without one.
        seconds: from the request to the mask.
        scales: (K, side, side) in [0, 1], the map after every scale of the first picture drawn; None without one.
    """

    prompt: str
    text: str
    mask: np.ndarray | None
    score: float | None
    seconds: float
    scales: np.ndarray | None


# ---------------------------------------------------------------------- the model


def load(model_name: str, device: str, dtype: str) -> tuple[Any, Any]:
    """Model and processor of a folder or of a name on the Hub.

    Raises:
        InputError: there is no such model, it cannot be read, or it cannot go to that device.
    """
    path = find_model(model_name)
    try:
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot load a model from {model_name!r}: {one_line(error)}") from error
    if getattr(processor, "visual_tokenizer", None) is None:
        raise InputError(f"{model_name!r} has no visual_tokenizer folder, which turns what is drawn into masks")
    try:
        return model.to(device).eval(), processor
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"cannot use the device {device!r}: {one_line(error)}") from error


def find_model(name: str) -> str:
    """The folder `name`, here or in the checkout; what has the form OWNER/NAME and is no folder stands for the Hub.

    Raises:
        InputError: `name` can only be a folder, and there is none.
    """
    for folder in (Path(name), ROOT / name):
        if folder.is_dir():
            return str(folder)
    if not HUB_NAME.fullmatch(name) or (ROOT / name).parent.is_dir():
        raise InputError(f"no model folder {name!r}; name one with --model")
    return name


@torch.no_grad()
def ask(
    model: Any,
    processor: Any,
    image: Image.Image,
    prompt: str,
    max_new_tokens: int | None = None,
    zoom: bool = False,
    follow_edges: bool | None = None,
) -> Answer:
    """Ask for a mask of `prompt`. `max_new_tokens` counts text; None leaves it, and `follow_edges`, to the model's own
    setting.

    Raises:
        InputError: the prompt does not fit into the model's context.
    """
    start = time.perf_counter()
    conversation = processor.build_segmentation_conversation(image, prompt)
    try:
        inputs = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, add_generation_prompt=True
        ).to(model.device, model.dtype)
    except ValueError as error:
        raise InputError(f"cannot ask for {shorten(prompt)!r}: {one_line(error)}") from error
    length = inputs["input_ids"].shape[1]
    options = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    outputs = model.generate(**inputs, do_sample=False, return_dict_in_generate=True, **options)
    results = processor.post_process_segmentation(
        outputs,
        images=[image],
        labels=[prompt],
        prompt_length=length,
        follow_edges=False if zoom else follow_edges,
    )
    if zoom:
        asked = [conversation]
        results = zoom_in(model, processor, asked, results, follow_edges=follow_edges, do_sample=False, **options)
    result = results[0]
    seconds = time.perf_counter() - start
    masks = [segment["mask"] for segment in result["segments"]]
    scores = [segment["score"] for segment in result["segments"]]
    return Answer(
        prompt=prompt,
        text=result["text"],
        mask=np.logical_or.reduce(masks) if masks else None,
        score=float(np.mean(scores)) if scores else None,
        seconds=seconds,
        scales=scale_maps(processor, processor.read_pictures(outputs, prompt_length=length)[0]),
    )


@torch.no_grad()
def scale_maps(processor: Any, pictures: list[torch.Tensor]) -> np.ndarray | None:
    """The first of an answer's pictures (T,) after every scale: (K, side, side) in [0, 1]; None without one."""
    if not pictures:
        return None
    tokenizer = processor.visual_tokenizer
    pictures_K3HW = tokenizer.decode_scales(pictures[0][None].to(tokenizer.device))[0]
    return pictures_K3HW.float().mean(1).div(2).add(0.5).clamp(0, 1).cpu().numpy()


# ---------------------------------------------------------------------- pictures


def overlay(image: Image.Image, answers: list[Answer]) -> Image.Image:
    """The photograph with every mask tinted and outlined, and a legend below it. Small images are enlarged."""
    shown = image.resize(shown_size(image.size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    drawn = [(answer.mask, colour) for answer, colour in zip(answers, colours(len(answers)), strict=True)]
    areas = [(fit(mask, shown.size), colour) for mask, colour in drawn if mask is not None]
    for area, colour in areas:
        shown = Image.composite(Image.blend(shown, Image.new("RGB", shown.size, colour), TINT), shown, area)
    for area, colour in areas:
        shown = outline(shown, area, colour)
    key = legend(answers, max(shown.width, OVERLAY_SIDES[0]))
    canvas = Image.new("RGB", (key.width, shown.height + key.height), "white")
    canvas.paste(shown, ((canvas.width - shown.width) // 2, 0))
    canvas.paste(key, (0, shown.height))
    return canvas


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the photograph in the overlay: the longest side within OVERLAY_SIDES."""
    longest = max(size)
    factor = min(max(longest, OVERLAY_SIDES[0]), OVERLAY_SIDES[1]) / longest
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def fit(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A mask (H, W) as a black and white picture of `size` (width, height)."""
    area = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return area.point(lambda value: 255 * (value > 127))


def outline(shown: Image.Image, area: Image.Image, colour: str) -> Image.Image:
    """`shown` with a line in `colour`, and a white one around it, along the outside of a black and white `area`."""
    width = max(1, round(max(shown.size) / 400))
    nothing = Image.new("L", shown.size, 0)
    for grown, ink in ((2 * width, "white"), (width, colour)):
        rim = Image.composite(nothing, grow(area, grown), area)
        shown = Image.composite(Image.new("RGB", shown.size, ink), shown, rim)
    return shown


def grow(area: Image.Image, radius: int) -> Image.Image:
    """A black and white picture whose white parts reach `radius` pixels farther."""
    return area.filter(ImageFilter.BoxBlur(radius)).point(lambda value: 255 * (value > 0))


def legend(answers: list[Answer], width: int) -> Image.Image:
    """One entry for each prompt on white: a square in its colour, the prompt in bold words, the score or the answer."""
    size = max(16, width // 48)
    indent, step = GAP + 2 * size, round(size * 1.4)
    texts = [entry(answer) for answer in answers]
    font = font_for("".join(texts), size)
    entries = [wrap(text, font, width - indent - GAP) for text in texts]
    picture = Image.new("RGB", (width, 2 * GAP + step * sum(map(len, entries))), "white")
    draw, top = ImageDraw.Draw(picture), GAP
    for answer, lines, colour in zip(answers, entries, colours(len(answers)), strict=True):
        square = (GAP, top + size // 6, GAP + size, top + size // 6 + size)
        draw.rectangle(square, fill=None if answer.mask is None else colour, outline=colour, width=max(1, size // 8))
        for line in lines:
            draw.text((indent, top), line, fill="#222222", font=font)
            top += step
    return picture


def entry(answer: Answer) -> str:
    """Line of the legend: the prompt with its score, or with what the model said instead of drawing."""
    prompt = shorten(answer.prompt, 120)
    if answer.mask is None:
        return f"{prompt} - not drawn: {answer.text or '(no answer)'}"
    score = "" if answer.score is None else f"  ({answer.score:.2f})"
    return f"{prompt}{score}" + ("" if answer.mask.any() else " - drawn, but empty")


def font_for(text: str, size: int) -> Any:
    """Pillow's own font, which has English letters; for others one of the system's, if there is one."""
    if not text.isascii():
        for name in SYSTEM_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size=size)


def wrap(text: str, font: Any, width: int, most: int = 3) -> list[str]:
    """`text` in at most `most` lines of at most `width` pixels; words that are too long are broken."""
    lines = [""]
    for word in re.findall(r"\S+\s*|\s+", text):
        if lines[-1] and font.getlength((lines[-1] + word).rstrip()) > width:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width and not letter.isspace():
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1].rstrip()[:-3] + "..."]
    return [line.rstrip() for line in lines]


def scales(image: Image.Image, answers: list[Answer], sides: list[int]) -> Image.Image:
    """A row for each mask drawn: the photograph, then the map after every scale (of `sides` cells), coarse to fine."""
    drawn = [answer for answer in answers if answer.scales is not None]
    thumb = image.copy()
    thumb.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    factor = TILE / max(thumb.size)  # a small photograph is enlarged
    thumb = thumb.resize((max(8, round(thumb.width * factor)), max(8, round(thumb.height * factor))))
    font = font_for("".join(answer.prompt for answer in drawn), 16)
    column, row = max(thumb.width, 96) + GAP, thumb.height + 64
    labels = ["photograph", *(f"{side}x{side}" for side in sides)]
    sheet = Image.new("RGB", (GAP + column * len(labels), GAP + row * len(drawn)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, answer in enumerate(drawn):
        top = GAP + row * number
        draw.text((GAP, top), wrap(answer.prompt, font, sheet.width - 2 * GAP, most=1)[0], fill="#222222", font=font)
        assert answer.scales is not None
        tiles = [thumb, *(map_tile(one, thumb.size) for one in answer.scales)]
        for place, (tile, label) in enumerate(zip(tiles, labels, strict=False)):
            left = GAP + place * column
            sheet.paste(tile, (left, top + 24))
            draw.rectangle((left - 1, top + 23, left + tile.width, top + 24 + tile.height), outline="#bbbbbb")
            draw.text((left, top + 26 + tile.height), label, fill="#666666", font=font)
    return sheet


def map_tile(white: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A map (side, side) in [0, 1] as a grey picture in the photograph's shape, as the mask will be stretched."""
    grey = Image.fromarray((white * 255).round().astype(np.uint8))
    return grey.resize(size, Image.Resampling.BILINEAR).convert("RGB")


def colours(count: int) -> list[str]:
    """A colour for each prompt; they start again after eight."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


# ---------------------------------------------------------------------- files


def prepare_folder(folder: Path) -> None:
    """Make the output folder and remove what an earlier run of this program left in it; other files stay.

    Raises:
        InputError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if re.fullmatch(r"mask_\d+\.png|overlay\.png|scales\.png|result\.json", path.name):
                path.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the folder {str(folder)!r}: {one_line(error)}") from error


def write(folder: Path, image: Image.Image, answers: list[Answer], about: dict[str, Any], sides: list[int]) -> None:
    """Write all files that the help names. `about` goes to the head of result.json."""
    for index, answer in enumerate(answers):
        if answer.mask is not None:
            Image.fromarray(answer.mask.astype(np.uint8) * 255).save(folder / mask_name(index))
    overlay(image, answers).save(folder / "overlay.png")
    if any(answer.scales is not None for answer in answers):
        scales(image, answers, sides).save(folder / "scales.png")
    result = {**about, "prompts": [describe(index, answer) for index, answer in enumerate(answers)]}
    (folder / "result.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(index: int, answer: Answer) -> dict[str, Any]:
    """What result.json says of one prompt. `area` is the share of the image's pixels in the mask."""
    drawn = answer.mask is not None
    return {
        "prompt": answer.prompt,
        "answer": answer.text,
        "drawn": drawn,
        "score": None if answer.score is None else round(answer.score, 4),
        "seconds": round(answer.seconds, 3),
        "file": mask_name(index) if drawn else None,
        "area": round(float(answer.mask.mean()), 4) if answer.mask is not None else None,
    }


def mask_name(index: int) -> str:
    return f"mask_{index}.png"


def report(index: int, answer: Answer) -> str:
    """The lines on standard output about one prompt."""
    lines = [f"[{index}] {answer.prompt}", f"    answer   {answer.text or '(nothing)'}"]
    if answer.mask is None:
        lines.append("    mask     none drawn")
    else:
        score = "" if answer.score is None else f", score {answer.score:.2f}"
        lines.append(f"    mask     {mask_name(index)}, {answer.mask.mean():.1%} of the image{score}")
    return "\n".join([*lines, f"    seconds  {answer.seconds:.2f}"])


# ---------------------------------------------------------------------- command line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("image", metavar="IMAGE", help="picture file (or URL); turned upright, transparent parts become white")
    add("prompts", metavar="prompt", nargs="+", help='what to segment, such as "the left dog"')
    add("--model", default=DEFAULT_MODEL, help=f"folder or Hub name (default: {DEFAULT_MODEL})")
    add("--output", type=Path, default=Path("outputs"), metavar="DIR", help="folder to write into (default: outputs/)")
    add("--device", help="cpu, cuda, cuda:1, mps ... (default: the GPU, if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, as saved)")
    add("--zoom", action="store_true", help="draw every mask again from nearer: finer, and slower")
    add(
        "--follow-edges", action=argparse.BooleanOptionalAction, help="masks follow the edges of the image (default: "
        "as the model's processor says)",
    )  # fmt: skip
    add("--max-new-tokens", type=int, metavar="N", help="text tokens an answer may have; pictures do not count")
    return parser


def check(arguments: argparse.Namespace) -> Image.Image:
    """The image, once everything that can be checked without the model has been.

    Raises:
        InputError: a prompt is empty, the number is not positive, the image cannot be read.
    """
    for number, prompt in enumerate(arguments.prompts):
        if not prompt.strip():
            raise InputError(f'prompt {number} is empty; say what to segment, such as "the left dog"')
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    try:
        return load_image(arguments.image)
    except ValueError as error:
        raise InputError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    return shorten(" ".join(str(error).split()) or type(error).__name__, 300)


def shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> None:
    """Everything between the command line and the files.

    Raises:
        InputError: the input is at fault.
    """
    image = check(arguments)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = arguments.device or (accelerator.type if accelerator else "cpu")
    say(f"loading {arguments.model} ...")
    model, processor = load(arguments.model, device, arguments.dtype)
    prepare_folder(arguments.output)
    say(f"{arguments.image}: {image.width}x{image.height} pixels; {len(arguments.prompts)} prompt(s) on {device}")
    answers = []
    for index, prompt in enumerate(arguments.prompts):
        how = {name: getattr(arguments, name) for name in ("max_new_tokens", "zoom", "follow_edges")}
        answers.append(ask(model, processor, image, prompt.strip(), **how))
        print(report(index, answers[-1]), flush=True)
    about = {"model": arguments.model, "image": arguments.image, "width": image.width, "height": image.height}
    write(arguments.output, image, answers, about, model.config.patch_nums)
    print(f"wrote {arguments.output / 'overlay.png'}")


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 if the input is at fault."""
    parsed = make_parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        run(parsed)
    except InputError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
