"""Teaches a model that draws well to listen to names, and keeps it drawing.

    python -m trl_recipes.listening --start_from hub_cards/argenseg-tiny --bank BANK \\
        --visual_tokenizer hub_cards/argenseg-tiny/visual_tokenizer --output_dir out/listening --max_steps 2500 \\
        --learning_rate 2e-3 --weight_decay 0.05 --warmup_steps 30 --per_device_train_batch_size 5

All requests of a batch are answered by coarse pictures whose first scales say nothing or are mistaken (`--slips`), so
that the queries have to find what is asked for by themselves (see `mask_regions`). That alone would soon cost the fine
scales, which go on from right coarse ones. So some of the requests are answered by whole pictures, too, and these are
held to what the model said that the run started from (Li and Hoiem, "Learning without forgetting", 2016). Only the
first scales of what is asked for by its name, which the words decide, are learned from the masks. What is held is the
model's choice as it draws, with its `picture_logit_adjustment`: without it most tokens are empty, and the few that say
where the thing is count for nothing.

The options are those of `train_scenes`, some with other defaults, and those that hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import HfArgumentParser, TrainingArguments

from modeling_argenseg import ARGenSegForConditionalGeneration

from . import train_scenes
from .help_format import Help
from .mask_regions import at_queries
from .scene_samples import PictureEncoder
from .train_scenes import SceneArguments, SceneTrainer


@dataclass
class ListeningArguments(SceneArguments):
    num_scales: int | None = field(default=4, metadata={"help": "scales of the coarse pictures"})
    schedule: list[str] = field(
        default_factory=lambda: ["names+full"],
        metadata={"help": "presets, in equal parts of the run; joined by + they take turns, scene by scene"},
    )
    expressions_per_scene: int = field(default=6, metadata={"help": "requests for each image"})
    questions_per_scene: int = field(default=1, metadata={"help": "most questions answered in words for each image"})
    slips: float = field(default=1.0, metadata={"help": "share of the coarse pictures with wrong first tokens"})
    mask_region_weight: float = field(
        default=3.0, metadata={"help": "factor on the loss by which the queries know what the mask covers"}
    )
    freeze_trunk: bool = field(default=True, metadata={"help": "keep the vision trunk as it is"})
    freeze_vision: bool = field(default=True, metadata={"help": "train the language model alone"})
    hold_to: str | None = field(
        default=None, metadata={"help": "model folder that they are held to; default: --start_from"}
    )
    hold_weight: float = field(
        default=2.0, metadata={"help": "factor on the loss that holds whole pictures to what they were"}
    )
    held_requests: int = field(default=1, metadata={"help": "requests for each image answered by whole pictures, too"})
    held_scales: int = field(
        default=2, metadata={"help": "how many of the last scales are held where a thing is asked for by its name"}
    )
    hold_adjustment: float = field(
        default=0.6, metadata={"help": "picture_logit_adjustment of the choice that is held"}
    )


class ListeningTrainer(SceneTrainer):
    """A run that draws the first scales only, and holds whole pictures to those of the model `before`."""

    recipe: ListeningArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.recipe.start_from is None:
            raise ValueError("give --start_from: a model that draws, for this goes on from one")
        folder = self.recipe.hold_to or self.recipe.start_from
        self.before = ARGenSegForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.before = self.before.eval().requires_grad_(False).to(self.args.device)
        self.before.config.num_scales = None
        with self.all_scales():
            self.whole_pictures = PictureEncoder(self.processor).to(self.args.device)
        self.tail = self.whole_pictures.count - self.encoder.count

    @contextmanager
    def all_scales(self) -> Iterator[None]:
        """Whole pictures meanwhile, for the model and its processor."""
        first = self.recipe.num_scales
        self.processor.num_scales = self.model.config.num_scales = None
        try:
            yield
        finally:
            self.processor.num_scales = self.model.config.num_scales = first

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if "masks" in inputs:
            with self.accelerator.autocast(), self.all_scales():
                first, gone = self.hold(self.accelerator.unwrap_model(model), self.held(inputs))
            self.note({"first_scales_loss": first, "hold_loss": gone})
            loss = loss + first + gone
        return (loss, outputs) if return_outputs else loss

    def held(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch of some requests for each image, drawn at random, answered by whole pictures."""
        index, labels = inputs["image_index"], inputs["labels"]
        drawn = torch.randperm(len(index), device=index.device)
        drawn = drawn[(labels[drawn] != -100).any(1)]  # other rows only fill up the batch
        images = index[drawn]
        turn = (images[:, None] == images).tril().sum(1)  # 1 for the first request of its image, 2 for the next
        rows = drawn[turn <= self.recipe.held_requests].sort().values
        visual = self.model.config.is_visual(inputs["input_ids"][rows])
        last = visual.cumsum(1).argmax(1, keepdim=True)
        columns = torch.arange(visual.shape[1] + self.tail, device=index.device)
        source = columns - (columns - last).clamp(0, self.tail)  # the last visual token stands `tail` times more
        batch = {name: inputs[name][rows].gather(1, source) for name in ("input_ids", "attention_mask", "labels")}
        batch |= {name: inputs[name][rows] for name in ("image_index", "masks")}
        whole = self.whole_pictures(batch | {"pixel_values": inputs["pixel_values"]})
        return whole | {"by_name": inputs["by_name"][rows], "shared_length": inputs.get("shared_length", 0)}

    def hold(self, model: ARGenSegForConditionalGeneration, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first scales have to learn from the masks, and how far all others have gone from what they were."""
        labels, by_name = batch.pop("labels"), batch.pop("by_name")
        codes = labels[model.config.is_visual(labels)].view(len(labels), -1) - model.config.visual_token_offset
        sizes = [side * side for side in model.config.patch_nums]
        logits = self.visual_logits(model, batch).split(sizes, dim=1)
        with torch.no_grad():
            before = self.visual_logits(self.before, batch).split(sizes, dim=1)
        first, others, last = [], [], []
        for scale, (now, then, right) in enumerate(zip(logits, before, codes.split(sizes, dim=1), strict=True)):
            usual = self.recipe.hold_adjustment * model.model.quantizer.log_frequency(scale)
            choice, held_to = ((one - usual).log_softmax(-1) for one in (now, then))
            far = F.kl_div(choice, held_to, reduction="none", log_target=True).sum(-1)
            if scale < len(sizes) - self.recipe.held_scales:
                first.append(mean_of(F.cross_entropy(now.transpose(1, 2), right, reduction="none"), by_name))
                others.append(mean_of(far, ~by_name))
            else:
                last.append(far.mean())
        gone = sum((torch.stack(losses).mean() for losses in (others, last) if losses), start=logits[0].sum() * 0.0)
        learned = torch.stack(first).mean() if first else gone * 0.0
        return model.config.visual_loss_weight * learned, self.recipe.hold_weight * gone

    def visual_logits(self, model: ARGenSegForConditionalGeneration, batch: dict[str, Any]) -> torch.Tensor:
        """Logits (N, T, V) over the codebook at the queries of a batch with one picture in each row."""
        rows = dict(batch)
        image = model.get_image_features(rows.pop("pixel_values"), return_dict=True)
        part = self.after_the_image(model, image, [rows], rows.pop("shared_length"))[0]
        hidden = model.base_model(**part, use_cache="past_key_values" in part).last_hidden_state
        return model.visual_logits(at_queries(model, hidden, part["input_ids"])[0]).float()

    def finish(self) -> None:
        """The model draws whole pictures after the run."""
        super().finish()
        self.processor.num_scales = self.model.config.num_scales = None


def mean_of(losses: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Mean of losses (N, tokens) over some of the rows (N,); zero where there are none."""
    return (losses * rows[:, None]).sum() / (rows.sum() * losses.shape[1]).clamp(min=1)


def main(recipe: ListeningArguments, training: TrainingArguments) -> None:
    train_scenes.main(recipe, training, ListeningTrainer)


def make_parser() -> HfArgumentParser:
    return HfArgumentParser((ListeningArguments, TrainingArguments), description=__doc__, formatter_class=Help)


if __name__ == "__main__":
    main(*make_parser().parse_args_into_dataclasses())
