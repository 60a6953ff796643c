"""Command-line options of recipes that train on one's own masks."""

from dataclasses import dataclass, field
from typing import Any

from .samples import ReaderOptions

COCO_PROMPTS = ("auto", "categories", "captions")


@dataclass
class MaskDataArguments:
    """One's own masks, and how validation uses them."""

    data: str = field(metadata={"help": "your masks: folder, .jsonl, COCO .json, or a datasets data set"})
    eval_data: str | None = field(default=None, metadata={"help": "validation data; default: DATA's own, or a share"})
    validation_share: float = field(
        default=0.1, metadata={"help": "share of the images set aside where there is no validation data"}
    )
    eval_samples: int = field(default=200, metadata={"help": "requests drawn at every evaluation, at most"})
    shown_samples: int = field(default=12, metadata={"help": "of these, how many are in the pictures"})
    image_root: str | None = field(default=None, metadata={"help": "folder that paths start from; default: the file's"})
    prompt: str | None = field(default=None, metadata={"help": "what all masks show, if the data have no prompts"})
    columns: list[str] = field(
        default_factory=list, metadata={"help": "names of your columns, e.g. --columns image=photo prompt=query"}
    )
    coco_prompts: str = field(
        default="auto",
        metadata={"help": "COCO: categories, captions, or auto", "choices": list(COCO_PROMPTS)},
    )
    absent_per_image: int = field(
        default=0, metadata={"help": "COCO: requests per image for categories that are not in it, answered in words"}
    )
    skip_bad_samples: bool = field(
        default=False, metadata={"help": "leave out samples that cannot be used and count them; default: stop"}
    )
    leave_out: str | None = field(
        default=None,
        metadata={
            "help": "images that training must not see: a list of COCO ids, as `trl_recipes.tasks leakage` writes"
        },
    )
    search_steps: int | None = field(
        default=None,
        metadata={
            "help": "how long to try out visual tokens for each mask (VARTokenizer.encode): closer outlines, and slow "
            "without a GPU, but cached; 0: the nearest codes; default: as the visual tokenizer's configuration says"
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "of tokenised masks; default: that of datasets"})
    overwrite: bool = field(
        default=False, metadata={"help": "begin anew, and delete what an earlier run left in the output folder"}
    )

    def set_search_steps(self, processor: Any) -> None:
        """Makes `search_steps`, if given, the setting of the processor's visual tokenizer: it is saved with it."""
        if self.search_steps is not None:
            processor.visual_tokenizer.config.search_steps = self.search_steps

    def reader_options(self) -> ReaderOptions:
        """Raises ValueError: `--columns` is not a list of part=name, or one of the others is none of its choices."""
        if self.coco_prompts not in COCO_PROMPTS:
            raise ValueError(f"coco_prompts must be one of {', '.join(COCO_PROMPTS)}, not {self.coco_prompts!r}")
        if not isinstance(self.absent_per_image, int) or self.absent_per_image < 0:
            raise ValueError(f"absent_per_image must be a whole number from 0, not {self.absent_per_image!r}")
        pairs = [text.partition("=") for text in self.columns]
        columns = {part: name for part, _, name in pairs}
        if not all(columns.values()) or not columns.keys() <= {"image", "prompt", "mask"}:
            raise ValueError(f"--columns takes image=NAME, prompt=NAME and mask=NAME, not {' '.join(self.columns)}")
        return ReaderOptions(self.image_root, self.prompt, columns, self.coco_prompts, self.absent_per_image)
