"""What every data format is read into, and the one error of a sample that cannot be used."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

ALIASES = {
    "image": ("image", "file_name", "image_path"),
    "prompt": ("prompt", "text", "caption", "expression"),
    "mask": ("mask", "masks", "segmentation", "mask_path"),
}
MASK_MARKER, IMAGE_MARKER = "<mask>", "<image>"  # in the text of conversations

RLE_FEATURE = {"size": List(Value("int32")), "counts": Value("string")}
COLUMNS = Features(
    {
        "sample": Value("string"),
        "image_id": Value("string"),
        "image_size": List(Value("int32")),
        "prompt": Value("string"),
        "masks": List(RLE_FEATURE),
        "conversation": List({"role": Value("string"), "content": Value("string")}),
    }
)


class BadSample(ValueError):
    """A sample that cannot be used. The message says where it stands, which field is wrong and how to mend it.

    Attributes:
        where: file and line, or row, of the sample.
        field: name of the field, empty where the whole sample is meant.
    """

    def __init__(self, where: str, field: str, problem: Any) -> None:
        self.where, self.field, self.problem = where, field, str(problem)
        super().__init__(f"{where}{f', field {field!r}' if field else ''}: {problem}")


@dataclass
class RawSample:
    """One request as a file tells it, before anything is opened or checked.

    Attributes:
        where: for errors and pictures, e.g. "train.jsonl line 3".
        image: a path, or the image itself.
        prompt: what to segment; in a conversation the last thing that is asked.
        masks: raw values, see `mask_values.read_mask`; none: what is asked for is not there.
        conversation: turns of `role` (user, assistant, system) and `content` (text with `<mask>` markers), if the data
            give their own wording.
        fields: names that the data have for "image", "prompt" and "mask".
        root: folder that relative paths start from.
        row: in `Source.images`, where the image is not a path.
        told_size: (height, width) of the image as the data tell them, if they do; polygons are in these pixels.
        told_by: for errors, what tells them.
    """

    where: str
    image: Any
    prompt: str
    masks: list[Any]
    conversation: list[dict[str, str]] | None = None
    fields: dict[str, str] = field(default_factory=dict)
    root: Path = Path()
    row: int = -1
    told_size: tuple[int, int] | None = None
    told_by: str = ""

    def name(self, part: str) -> str:
        """The data's own name of "image", "prompt" or "mask"."""
        return self.fields.get(part, part)


@dataclass
class Source:
    """What a reader found: samples (an error in the place of one that is broken), and how many there are.

    `images` has the column `image` if the images lie in a `datasets` table and not in files.
    """

    samples: Iterable["RawSample | BadSample"]
    total: int | None = None
    images: Dataset | None = None


@dataclass
class ReaderOptions:
    """How to read what a file leaves open.

    Attributes:
        image_root: folder that relative image and mask paths start from; default: the file's own. Of a folder with
            prompts: where its images and masks lie.
        prompt: what to segment where the data hold no prompts at all.
        columns: the data's names of "image", "prompt" and "mask", where they are unusual.
        coco_prompts: "categories", "captions", or "auto": captions where annotations have them.
        absent_per_image: for COCO categories, requests for each image of things that are not in it.
    """

    image_root: str | Path | None = None
    prompt: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    coco_prompts: str = "auto"
    absent_per_image: int = 0

    def find(self, row: dict[str, Any], part: str) -> str | None:
        """The name that a row has for "image", "prompt" or "mask"; None if it has none of the usual."""
        names = (self.columns[part],) if part in self.columns else ALIASES[part]
        return next((name for name in names if name in row), None)
