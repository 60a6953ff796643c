"""A page that asks for an image and a few words, and shows the masks. Needs gradio, and a model in `MODEL`."""

import os
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import pipeline

MODEL = os.environ.get("MODEL", "")
LARGEST = 2048  # pixels of the longer side; larger images are shrunk first
MOST = 8  # requests at a time
NOTHING = "Nothing was drawn: the model does not see it, or was not sure enough."


@cache
def load() -> Any:
    """The pipeline, once for all visitors.

    Raises:
        RuntimeError: no model is named.
    """
    if not MODEL:
        raise RuntimeError("which model? Set the variable MODEL to a folder or a Hub repository")
    return pipeline("image-segmentation", model=MODEL, trust_remote_code=True)


def read_prompts(text: str) -> list[str]:
    """What was asked for, one a line."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def segment(
    image: Image.Image | None, text: str, zoom: bool = False
) -> tuple[tuple[Image.Image, list[tuple[Any, str]]] | None, str]:
    """The image with its masks, as `gr.AnnotatedImage` takes them, and what is to be said about them."""
    prompts = read_prompts(text or "")
    if image is None:
        return None, "Give an image first."
    if not prompts:
        return None, "What is to be segmented? Write it down, one thing a line."
    if len(prompts) > MOST:
        return None, f"At most {MOST} things at a time; these are {len(prompts)}."
    image = ImageOps.exif_transpose(image).convert("RGB")
    image.thumbnail((LARGEST, LARGEST))
    options = {"zoom": True} if zoom else {}  # models published with older code know no such option
    found = load()(image, text=prompts, **options)
    parts = [(_shares(one["mask"]), f"{one['label']} ({one['score']:.2f})") for one in found]
    missing = [prompt for prompt in prompts if prompt not in {one["label"] for one in found}]
    said = f"{len(found)} drawn." + (f" {NOTHING} ({', '.join(missing)})" if missing else "")
    return (image, parts), said


def _shares(mask: Image.Image) -> Any:
    """A mask (255 on the thing) as an array (H, W) of 0 and 1."""
    return (np.asarray(mask) > 127).astype(float)


def build() -> Any:
    """The page."""
    import gradio as gr

    return gr.Interface(
        fn=segment,
        inputs=[
            gr.Image(type="pil", label="image"),
            gr.Textbox(lines=3, label="what to segment, one thing a line", placeholder="the left dog"),
            gr.Checkbox(label="look closer: finer outlines, about three times as long"),
        ],
        outputs=[gr.AnnotatedImage(label="masks"), gr.Textbox(label="answer")],
        title="ARGenSeg",
        description="Ask for something in an image in plain words, and the model draws its mask.",
    )


if __name__ == "__main__":
    build().launch()
