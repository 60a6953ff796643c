"""One self-contained HTML page with the worst and the best answers of a run."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw

from processing.mask_inputs import load_mask

from ..metrics.vqa import parse_box
from ..tasks import Sample, Samples
from .predictions import load_image
from .scoring import Scores, overlay_classes
from .store import PredictionStore

SIDE = 320  # longest side of a picture, in pixels
RIGHT, MISSED, EXTRA = (67, 160, 71), (30, 136, 229), (230, 25, 75)
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; color: #222; }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1.2rem; }
figure { margin: 0; } img { max-width: 100%; border: 1px solid #ccc; }
figcaption b { font-size: 1.05rem; } .said { color: #666; } .id { color: #999; font-size: 0.8rem; }
.key span { display: inline-block; width: 0.9em; height: 0.9em; margin: 0 0.3em 0 1em; }
"""


def write_gallery(
    path: Any, title: str, summary: Sequence[str], scores: Scores, samples: Samples, store: PredictionStore, count: int
) -> None:
    """Writes the page: `count` of the worst and as many of the best answers; of equals, a choice that is always the
    same and not all of one image."""
    ranked = sorted(scores.values, key=lambda pair: (pair[1], crc32(pair[0].encode())))
    place = {name: i for i, name in enumerate(samples.ids)}
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in summary), _key(scores)]
    half = min(count, (len(ranked) + 1) // 2)
    for name, chosen in (("Worst", ranked[:half]), ("Best", ranked[::-1][:half])):
        figures = [_figure(scores, samples, store, place[one], value) for one, value in chosen]
        parts.append(f"<h2>{name}</h2>\n<section>\n" + "\n".join(figures) + "\n</section>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    path.write_text(
        f"<!DOCTYPE html>\n<html><head>{head}</head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n",
        encoding="utf-8",
    )


def _key(scores: Scores) -> str:
    if scores.task.answer == "text" and scores.main != "vqa":
        return ""
    colours = [(RIGHT, "right"), (MISSED, "missed"), (EXTRA, "too much")]
    if scores.main == "vqa":
        colours = [(RIGHT, "true box"), (EXTRA, "box in the answer")]
    spans = [f'<span style="background: rgb{colour}"></span>{words}' for colour, words in colours]
    return f'<p class="key">{"".join(spans)}</p>'


def _figure(scores: Scores, samples: Samples, store: PredictionStore, place: int, value: float) -> str:
    sample, prediction = samples[place], store[samples.ids[place]]
    if scores.task.answer == "classes":
        last = place
        while last < len(samples) and samples[last].group == sample.group:
            last += 1
        picture = _shown_labels(sample, [store[samples.ids[i]] for i in range(place, last)])
        words, said = f"image {sample.group}", f"{value:.0%} of the pixels right"
    else:
        picture = _shown(sample, prediction)
        expected = f" (expected: {sample.answer})" if sample.answer else ""
        words, said = sample.text, (prediction["text"] or "(no words)") + expected
        if scores.main == "vqa":
            picture = with_boxes(picture, sample.answer or "", prediction["text"])
            said += "; a mask was drawn" if prediction["mask"] else ""
    kind = f", {html.escape(sample.kind)}" if sample.kind else ""
    caption = (
        f"<b>{html.escape(words)}</b><br>{value:.3f}{kind}<br>"
        f'<span class="said">{html.escape(said)}</span> <span class="id">{html.escape(sample.id)}</span>'
    )
    return f'<figure><img src="{_as_url(picture)}" alt=""><figcaption>{caption}</figcaption></figure>'


def _shown(sample: Sample, prediction: dict[str, Any]) -> Image.Image:
    """The image; where there is a true mask, with pixels tinted by whether they were drawn and should have been."""
    image = load_image(sample)
    if sample.load_mask is None and sample.box is None:
        return image
    shape = (image.height, image.width)
    drawn = load_mask(prediction["mask"]) if prediction["mask"] else np.zeros(shape, bool)
    truth = load_mask(sample.load_mask()) if sample.load_mask else drawn
    return _tinted(image, drawn & truth, truth & ~drawn, drawn & ~truth)


def with_boxes(image: Image.Image, answer: str, said: str) -> Image.Image:
    """The image with the outlines of two boxes in words, in hundredths of its sides: the true one and the one said."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    if parse_box(answer) is None:
        return image
    for text, colour in ((said, EXTRA), (answer, RIGHT)):
        box = parse_box(text)
        if box is not None:
            edges = [value * side / 100 for value, side in zip(box, image.size * 2, strict=True)]
            draw.rectangle(edges, outline=colour, width=max(1, max(image.size) // 128))
    return image


def _shown_labels(sample: Sample, predictions: list[dict[str, Any]]) -> Image.Image:
    assert sample.load_labels is not None
    truth = sample.load_labels()
    found = overlay_classes(predictions, truth.shape)
    known = truth >= 0
    right, missed = known & (found == truth), known & (found < 0)
    return _tinted(load_image(sample), right, missed, known & ~right & ~missed)


def _tinted(image: Image.Image, right: np.ndarray, missed: np.ndarray, extra: np.ndarray) -> Image.Image:
    pixels = np.asarray(image).astype(np.float32)
    for where, colour in ((right, RIGHT), (missed, MISSED), (extra, EXTRA)):
        pixels[where] = 0.45 * pixels[where] + 0.55 * np.array(colour, np.float32)
    return Image.fromarray(pixels.astype(np.uint8))


def _as_url(picture: Image.Image) -> str:
    picture = picture.copy()
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
