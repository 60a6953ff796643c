"""Fine-tunes an ARGenSeg model on your own masks with LoRA, in one command.

    python -m trl_recipes.lora --model hub_cards/argenseg-tiny --data my_masks/ --output out/my_masks

DATA is a folder of images with PNG masks of the same names and a `prompts.csv` (or `metadata.jsonl`), JSONL with
`image`, `prompt` and `mask` (PNG path, COCO RLE, polygons, or null where the thing is not there), COCO instances JSON,
a `datasets` data set (folder or name on the Hub), or JSONL with `conversations` and `mask`. Splits `train` and
`validation` inside of it are used; without them, a share of the images is set aside.

What OUTPUT gets: `check_masks.png` (three training masks as the visual tokenizer sees them: look at it first),
`drawn-<step>.png` and `metrics.jsonl` at every evaluation, `learning_curve.png`, checkpoints, `adapter/` (for peft) and
`merged/`, a whole model that `pipeline("image-segmentation", model="OUTPUT/merged")` loads. A run that was stopped goes
on from its last checkpoint when the same command is given again; `run.json` holds what it depends on, and other data or
options need another OUTPUT, or `--overwrite`.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, TrainingArguments, set_seed

import modeling_argenseg  # registers the Auto classes

from .adapters import (
    AdapterSizes,
    add_adapters,
    dtype_to_load,
    is_adapter,
    is_quantised,
    known_everywhere,
    lora_config,
    refuse_adapters,
    without_adapters,
)
from .command_line import errors_in_a_line, loading
from .drawing_trainer import DrawingEvaluation, DrawingTrainer
from .export import set_picture_options
from .help_format import Help
from .learning_curve import learning_curve
from .mask_data import MaskCollator, check_requests, has_split, load_mask_data, split_by_image, tokenise_masks
from .mask_data.arguments import MaskDataArguments
from .mask_data.mask_values import union_of
from .mask_data.tokenising import target_masks
from .mask_evaluation import evaluate_rows
from .metrics import SegmentationMetrics
from .picture_grid import picture_grid, save_picture
from .resume import train_or_go_on, where_to_go_on
from .run_settings import run_settings, start_run
from .settings_files import write_whole
from .sharded import adjust_fsdp, refuse_zero3, save_adapter, whole_adapted
from .tasks.leakage import leave_out
from .training_options import refuse_ignored, refuse_several_gpus

RESULTS = ("adapter", "merged")  # of a run
COARSE = 0.7  # reconstruction IoU of training masks below which a warning is given


@dataclass
class LoraArguments(MaskDataArguments):
    model: str = field(kw_only=True, metadata={"help": "ARGenSeg model: folder or Hub name"})
    lora_rank: int = field(default=16, metadata={"help": "largest rank; lower where the adapters would be too large"})
    lora_alpha: int | None = field(default=None, metadata={"help": "default: twice the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapters"})
    lora_targets: str = field(
        default="all", metadata={"help": "layers of the language model to adapt", "choices": ["all", "attention"]}
    )
    max_adapter_share: float = field(default=0.01, metadata={"help": "the adapters stay below this share of the model"})
    new_parts: str = field(
        default="auto",
        metadata={
            "help": "train the new tokens' rows and the parts that make queries, too: auto (if they never were, as "
            "after from_vlm), yes or no",
            "choices": ["auto", "yes", "no"],
        },
    )
    picture_logit_adjustment: float | None = field(
        default=None,
        metadata={"help": "for validation and the merged model; default: the model's own generation configuration"},
    )


@dataclass
class LoraTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for adapters on a few hundred masks."""

    output_dir: str | None = field(default=None, metadata={"help": "folder to write", "aliases": ["--output"]})
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps; -1: as --num_train_epochs says"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    warmup_steps: float = field(default=0.03, metadata={"help": "steps of warm-up; below 1: share of the run"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "see transformers.SchedulerType"})
    eval_strategy: str = field(default="steps", metadata={"help": "no, steps or epoch"})
    eval_steps: float = field(default=0.125, metadata={"help": "steps between evaluations; below 1: share of the run"})
    save_strategy: str = field(default="steps", metadata={"help": "no, steps or epoch"})
    save_steps: float = field(default=0.125, metadata={"help": "steps between checkpoints; below 1: share of the run"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints that are kept"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "merge the checkpoint of the best gIoU"})
    metric_for_best_model: str | None = field(default="giou", metadata={"help": "giou, ciou, n_acc or t_acc"})
    logging_steps: float = field(default=10, metadata={"help": "steps between logged losses"})
    report_to: str = field(default="none", metadata={"help": "e.g. tensorboard"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "stays false: the collator opens images"})

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("where shall the results go? Give --output DIR")
        try:
            super().__post_init__()
        except ValueError as error:
            if "load_best_model_at_end" not in str(error):
                raise
            raise ValueError(
                "the best checkpoint is merged, so each must have been evaluated: give --save_steps as a multiple of "
                f"--eval_steps (both as steps or both as shares of the run; e.g. --save_steps {self.eval_steps:g}) and "
                "--save_strategy as --eval_strategy, or --load_best_model_at_end False to merge the last one"
            ) from None


class MaskEvaluation(DrawingEvaluation):
    """Draws validation requests; writes the metrics and a grid of pictures to the output folder."""

    def __init__(self, *args: Any, processor: Any, validation: Dataset, shown: int = 12, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.processor, self.validation, self.shown = processor, validation, shown
        adjust_fsdp(self, evaluates(self.args))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: what trainers know is not what this model is; `trl_recipes.hub_card` writes one."""

    def evaluate_drawing(self) -> dict[str, float]:
        metrics, grid = evaluate_rows(
            self.model,
            self.processor,
            self.validation,
            batch_size=self.args.eval_batch_size,
            shown=self.shown,
            progress=not self.args.disable_tqdm,
            synced_gpus=False,  # every process answers the same requests, so that sharded weights meet
        )
        if not self.is_world_process_zero():
            return metrics
        output, step = Path(self.args.output_dir), self.state.global_step
        save_picture(grid, output / f"drawn-{step:06d}.png")
        rounded = {name: round(value, 4) for name, value in metrics.items()}
        record = [entry for entry in read_metrics(output) if entry["step"] < step] + [{"step": step} | rounded]
        write_whole(output / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in record))
        return metrics


class MaskTrainer(MaskEvaluation, DrawingTrainer):
    """Learns the tokens of masks, and evaluates by drawing."""


def read_metrics(output: Path) -> list[dict[str, float]]:
    """What was measured so far, in the order of the steps."""
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


# ---------------------------------------------------------------------- before the first step


def check_model(name: str, model: Any, processor: Any) -> None:
    """Raises ValueError: another kind of model, or one without its visual tokenizer."""
    if not isinstance(model, modeling_argenseg.ARGenSegForConditionalGeneration):
        raise ValueError(
            f"{name} is a {type(model).__name__}: make an ARGenSeg model of it first, by python -m trl_recipes.from_vlm"
        )
    if processor.visual_tokenizer is None:
        raise ValueError(f"{name} has no visual_tokenizer/ folder: masks cannot be tokenised")


def load_model(recipe: LoraArguments, on_cpu: bool) -> tuple[Any, Any]:
    """Model in single precision, and its processor.

    Raises:
        ValueError: there is no such model, it is of another kind, or without its visual tokenizer.
    """
    name = known_everywhere(recipe.model)
    with loading(recipe.model):
        refuse_adapters(name)
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype_to_load(name, torch.float32))
    check_model(recipe.model, model, processor)
    recipe.set_search_steps(processor)
    if recipe.picture_logit_adjustment is not None:
        set_picture_options(model, picture_logit_adjustment=recipe.picture_logit_adjustment)
    # on a CPU the backward pass of sdpa costs a third of a step more than that of plain attention
    model.model.language_model.set_attn_implementation("eager" if on_cpu else "sdpa")
    return model, processor


def evaluates(training: TrainingArguments) -> bool:
    return training.eval_strategy != "no" or training.eval_on_start


def load_data(
    recipe: MaskDataArguments, seed: int, progress: bool = True, with_validation: bool = True
) -> tuple[Dataset, Dataset]:
    """Training and validation rows; see `load_mask_data`. Without validation, all are for training.

    Raises:
        ValueError: data that cannot be read, a sample that cannot be used, or images that cannot be left out.
    """
    options, skip = recipe.reader_options(), recipe.skip_bad_samples
    if recipe.eval_samples < 1:
        raise ValueError(
            f"--eval_samples {recipe.eval_samples}: give at least 1; to train without validation, give "
            "--eval_strategy no --load_best_model_at_end False"
        )

    def load(data: str, split: str) -> Dataset:
        return load_mask_data(data, split, options, skip, progress)

    train = load(recipe.data, "train")
    if recipe.leave_out is not None:
        train = leave_out(train, Path(recipe.leave_out), progress)
    if not with_validation:
        return train, train.select([])
    if recipe.eval_data is not None:
        named = has_split(recipe.eval_data, "validation")
        validation = load(recipe.eval_data, "validation" if named else "train")
    elif has_split(recipe.data, "validation"):
        validation = load(recipe.data, "validation")
    else:
        train, validation = split_by_image(train, recipe.validation_share, seed)
    if len(validation) > recipe.eval_samples:
        chosen = np.random.default_rng(seed).permutation(len(validation))[: recipe.eval_samples]
        validation = validation.select(sorted(chosen.tolist()))
    return train, validation


def check_masks(rows: Dataset, processor: Any, output: Path, count: int = 3) -> list[float]:
    """Decodes the tokens of some training masks again, writes `check_masks.png` and prints how much of them is left.

    Returns:
        IoU of each with its true mask: about the best that any answer can reach before it follows edges.
    """
    with_mask = [i for i, conversation in enumerate(rows["masks"]) if conversation and target_masks(rows[i])]
    if not with_mask:
        print("no training sample has a mask: the model will only learn to say that things are not there")
        return []
    if 2 * len(with_mask) < len(rows):
        print(
            f"WARNING: {len(rows) - len(with_mask)} of {len(rows)} training samples have no mask, or an empty one, and "
            "teach that things are not there: are their masks as they should be?"
        )
    if len(with_mask) == len(rows):
        print(
            "WARNING: every training sample has a mask: the model will forget to say that something is not there, and "
            "draw whatever it is asked for. Add samples without a mask (null or []), of COCO --absent_per_image 1"
        )
    metrics, lines, ious = SegmentationMetrics(), [], []
    for place in np.linspace(0, len(with_mask) - 1, min(count, len(with_mask))).round().astype(int).tolist():
        row = rows[with_mask[place]]
        size = row["image_size"]
        drawn = [id_ - processor.visual_token_offset for id_ in row["labels"] if id_ >= processor.visual_token_offset]
        drawn = [code for code in drawn if code < processor.visual_vocab_size]
        codes = torch.tensor(drawn).view(-1, processor.num_visual_tokens)[-len(target_masks(row)) :]
        _, decoded = processor.decode_masks(codes, [size] * len(codes))
        truth, mask = union_of(target_masks(row), size), np.logical_or.reduce(decoded)
        ious.append(metrics.add(mask, truth))
        lines.append((row["image"], row["prompt"], truth, mask, f"from its tokens, IoU {ious[-1]:.2f}"))
        print(f"  {row['sample']}: {row['prompt']!r}, IoU after tokenising {ious[-1]:.2f}")
    if PartialState().is_main_process:
        save_picture(picture_grid(lines, columns=1), output / "check_masks.png")
    print(f"look at {output / 'check_masks.png'}: these are the masks that the model will learn to draw")
    if np.mean(ious) < COARSE:
        print("WARNING: much of these masks is lost; are things too thin or small for the visual tokenizer?")
    return ious


def prepare(recipe: LoraArguments, training: LoraTrainingArguments) -> tuple[MaskTrainer, AdapterSizes]:
    """Everything before the first step: data, the look at them, model and adapters.

    Raises:
        ValueError: with what is wrong, and how to mend it.
    """
    refuse_ignored(training, ("label_smoothing_factor",), "the loss is the model's own")
    refuse_several_gpus(training)
    refuse_zero3()
    where_to_go_on(training)  # or it says why not
    output = Path(training.output_dir or ".")
    output.mkdir(parents=True, exist_ok=True)
    set_seed(training.seed)
    model, processor = load_model(recipe, on_cpu=training.device.type == "cpu")
    processor.visual_tokenizer.to(training.device)
    rows, validation = load_data(recipe, training.seed, not training.disable_tqdm, evaluates(training))
    validation = check_requests(validation, processor, recipe.skip_bad_samples)
    rows = tokenise_masks(rows, processor, recipe.cache_dir, recipe.skip_bad_samples)
    print(
        f"{len(rows)} training samples, {len(validation)} for validation, {processor.num_visual_tokens} visual tokens"
    )
    new_parts = {"auto": None, "yes": True, "no": False}[recipe.new_parts]
    config = lora_config(
        model,
        recipe.lora_rank,
        recipe.lora_alpha,
        recipe.lora_dropout,
        recipe.lora_targets,
        recipe.max_adapter_share,
        new_parts,
    )
    settings = run_settings(training, model, rows, validation) | lora_settings(recipe, config)
    start_run(output, settings, recipe.model, recipe.overwrite, RESULTS)
    check_masks(rows, processor, output)
    adapted, sizes = add_adapters(model, config, recipe.max_adapter_share)
    print(f"rank {config.r}, {sizes}")
    trainer = MaskTrainer(
        model=adapted,
        args=training,
        train_dataset=rows,
        eval_dataset=validation,  # evaluation draws its masks
        data_collator=MaskCollator(processor),
        processor=processor,
        validation=validation,
        shown=recipe.shown_samples,
    )
    return trainer, sizes


def lora_settings(recipe: LoraArguments, config: LoraConfig) -> dict[str, Any]:
    """What else the result depends on than `run_settings` tells."""
    return {
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_targets": recipe.lora_targets,
        "new_parts": bool(config.modules_to_save),
        "picture_logit_adjustment": recipe.picture_logit_adjustment,
    }


# ---------------------------------------------------------------------- training and what is left of it


def train(trainer: MaskTrainer) -> Path:
    """Trains, goes on where a run was stopped, and writes adapters and the merged model. Returns the merged folder."""
    output = train_and_draw_curve(trainer)
    save_adapter(trainer, output / "adapter")
    return merge_adapters(trainer, output / "adapter")


def train_and_draw_curve(trainer: MaskEvaluation) -> Path:
    """Trains, or goes on (see `where_to_go_on`); in a new output the model is evaluated before.

    Returns:
        the output folder, in which the first process has drawn the learning curve.
    """
    output = Path(trainer.args.output_dir)
    if where_to_go_on(trainer.args) is None and trainer.args.eval_strategy != "no":
        found = trainer.evaluate()
        if trainer.is_world_process_zero():
            print("before training:", show_metrics(found))
        with errors_in_a_line():
            check_best(trainer.args, found)
    train_or_go_on(trainer)
    if trainer.is_world_process_zero():
        losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        save_picture(learning_curve(losses, read_metrics(output)), output / "learning_curve.png")
    return output


def check_best(training: TrainingArguments, found: dict[str, float]) -> None:
    """
    Raises:
        ValueError: the checkpoint to be kept is to be the best by a metric that evaluation does not give.
    """
    name = f"eval_{(training.metric_for_best_model or '').removeprefix('eval_')}"
    if training.load_best_model_at_end and name not in found:
        names = ", ".join(one.removeprefix("eval_") for one in found)
        raise ValueError(f"--metric_for_best_model {name.removeprefix('eval_')}: these validation data give {names}")


def merge_adapters(trainer: MaskEvaluation, adapter: Path) -> Path:
    """`merged/` in the output folder, with the adapters that were saved in `adapter`. Quantised weights would round
    them away: there the adapters stay what they are, and get the processor. Returns the folder to load."""
    if not is_quantised(trainer.accelerator.unwrap_model(trainer.model)):
        return save_merged(
            whole_adapted(trainer, adapter), trainer.processor, Path(trainer.args.output_dir or ".") / "merged"
        )
    if trainer.is_world_process_zero():
        trainer.processor.save_pretrained(adapter)
        options = without_adapters(trainer.accelerator.unwrap_model(trainer.model)).generation_config
        options._from_model_config = False  # or options of ours would not be read back
        options.save_pretrained(adapter)
    PartialState().wait_for_everyone()
    return adapter


def save_merged(adapted: Any, processor: Any, folder: Path) -> Path:
    """The model with its adapters worked in, and its processor: a folder like any other model's, whole or not there.

    Of several processes the main one writes, and the others wait for it.
    """
    state, problem = PartialState(), None
    if state.is_main_process:
        part, before = (folder.with_name(folder.name + end) for end in (".part", ".before"))
        shutil.rmtree(part, ignore_errors=True)
        model = adapted.merge_and_unload()
        model.save_pretrained(part, save_original_format=False)
        processor.save_pretrained(part)
        shutil.rmtree(before, ignore_errors=True)
        try:
            if folder.exists():
                folder.replace(before)
            part.replace(folder)
        except OSError as error:  # as on Windows, where another program has it open
            problem = error
            if before.exists() and not folder.exists():
                before.replace(folder)
        shutil.rmtree(before, ignore_errors=True)
    state.wait_for_everyone()
    if problem is not None:
        raise ValueError(f"{folder} cannot be replaced ({problem}); the new model is in {part}") from problem
    return folder


def show_metrics(metrics: dict[str, float]) -> str:
    names = {"giou": "gIoU", "ciou": "cIoU", "n_acc": "N-acc", "t_acc": "T-acc"}
    values = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return ", ".join(f"{label} {values[name]:.3f}" for name, label in names.items() if name in values)


def report(trainer: MaskEvaluation, folder: Path) -> None:
    """Prints how validation went, and how to go on."""
    if not trainer.is_world_process_zero():
        return
    measured = read_metrics(Path(trainer.args.output_dir))
    for entry in measured:
        print(f"step {entry['step']:6.0f}: {show_metrics(entry)}")
    best = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best:
        print(f"kept: {Path(best).name}, the best on validation")
    if is_adapter(folder):
        print("adapters on quantised weights; this makes a whole model of them:")
        print(f"python -m trl_recipes.export --model {folder} --output {folder}-whole")
        return
    print(f'use it: pipeline("image-segmentation", model="{folder}")')


def make_parser() -> HfArgumentParser:
    return HfArgumentParser((LoraArguments, LoraTrainingArguments), description=__doc__, formatter_class=Help)


def main(arguments: list[str] | None = None) -> None:
    with errors_in_a_line():
        trainer, _ = prepare(*make_parser().parse_args_into_dataclasses(arguments))
    report(trainer, train(trainer))


if __name__ == "__main__":
    main()
