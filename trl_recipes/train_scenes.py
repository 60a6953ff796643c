"""Trains a small ARGenSeg on composed scenes, from scratch but for the vision trunk's ImageNet weights.

    python -m trl_recipes.train_scenes --bank BANK --visual_tokenizer out/visual_tokenizer \\
        --output_dir out/coarse --num_scales 4 --schedule easy medium --max_steps 3000
    python -m trl_recipes.train_scenes --bank BANK --visual_tokenizer out/visual_tokenizer \\
        --output_dir out/fine --start_from out/coarse --schedule medium full --max_steps 3000

The first stage draws only the coarse scales (a quarter of the tokens): where things are is learned there, several
times faster. The second goes on from it with all scales. A killed run goes on from its last checkpoint when the same
command is given again; `--overfit 16` trains on 16 fixed expressions, the first thing to try after any change.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from modeling_argenseg import (
    ARGenSegForConditionalGeneration,
)
from processing import ARGenSegProcessor

from .drawing_trainer import DrawingTrainer
from .evaluation.answers import evaluate_expressions
from .resume import last_checkpoint
from .scene_samples import SceneCollator, SceneSamples
from .scenes import FlatExpressions, SceneBank, SceneConfig, SceneDataset, flat_expressions
from .tiny_model import adopt_visual_tokenizer, build_model, build_processor


@dataclass
class SceneArguments:
    bank: str = field(metadata={"help": "folder with sprites.parquet, backgrounds.parquet and vocabulary.json"})
    visual_tokenizer: str = field(metadata={"help": "folder of a trained VAR tokenizer"})
    start_from: str | None = field(default=None, metadata={"help": "model folder to go on from; default: from scratch"})
    num_scales: int | None = field(default=None, metadata={"help": "draw only the first scales; default: all"})
    schedule: list[str] = field(
        default_factory=lambda: ["easy", "medium", "full"], metadata={"help": "presets, in equal parts of the run"}
    )
    expressions_per_scene: int = field(default=4, metadata={"help": "requests for each image"})
    questions_per_scene: int = field(default=2, metadata={"help": "most questions answered in words for each image"})
    eval_expressions: int = field(default=96, metadata={"help": "validation expressions drawn at every evaluation"})
    eval_preset: str = field(default="full", metadata={"help": "preset of the validation scenes"})
    overfit: int = field(default=0, metadata={"help": "train and evaluate on this many fixed expressions"})
    scale_attention: str = field(default="block", metadata={"help": "causal or block"})
    visual_loss: str = field(default="scale", metadata={"help": "token or scale"})
    hidden_size: int = field(default=256, metadata={"help": "width of the language model"})
    num_layers: int = field(default=6, metadata={"help": "layers of the language model"})
    vision_layers: int = field(default=2, metadata={"help": "transformer layers on the vision trunk"})
    text_vocab_size: int = field(default=2000, metadata={"help": "size of the text vocabulary"})
    text_scenes: int = field(default=4000, metadata={"help": "scenes whose expressions the text tokenizer learns from"})


class SceneTrainer(DrawingTrainer):
    """Evaluates by drawing the requests of validation scenes."""

    def __init__(self, *args: Any, processor: ARGenSegProcessor, validation: FlatExpressions, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.processor, self.validation = processor, validation

    def evaluate_drawing(self) -> dict[str, float]:
        return evaluate_expressions(self.model, self.processor, self.validation)


class Repeated(torch.utils.data.Dataset):
    """The first `count` samples again and again, kept in memory: to overfit."""

    def __init__(self, samples: SceneSamples, count: int) -> None:
        self.samples, self.length = [samples[i] for i in range(count)], len(samples)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index % len(self.samples)]


def curriculum(presets: list[str], total: int) -> list[tuple[int, str]]:
    """(first scene, preset): each preset for an equal part of `total` scenes.

    Raises:
        ValueError: there are fewer scenes than presets.
    """
    if total < len(presets):
        raise ValueError(f"the presets {presets} share {max(total, 0)} scenes: give --max_steps, large enough for all")
    return [(i * total // len(presets), name) for i, name in enumerate(presets)]


def load_or_build(
    recipe: SceneArguments, scenes: SceneDataset
) -> tuple[ARGenSegForConditionalGeneration, ARGenSegProcessor]:
    if recipe.start_from is None:
        processor = build_processor(recipe, scenes)
        model = build_model(recipe, processor)
    else:
        processor = ARGenSegProcessor.from_pretrained(recipe.start_from)
        model = ARGenSegForConditionalGeneration.from_pretrained(recipe.start_from, dtype=torch.float32)
        model, processor = adopt_visual_tokenizer(model, processor, recipe.visual_tokenizer)
    processor.num_scales = model.config.num_scales = recipe.num_scales
    return model, processor


def main(recipe: SceneArguments, training: TrainingArguments) -> None:
    training.remove_unused_columns = False
    training.train_sampling_strategy = "sequential"  # the curriculum is in the order; scenes never repeat anyway
    output = Path(training.output_dir)
    torch.manual_seed(training.seed)
    bank = SceneBank.from_folder(recipe.bank, "train")
    total = training.max_steps * training.train_batch_size * training.gradient_accumulation_steps
    length, stages = max(total, recipe.text_scenes), curriculum(recipe.schedule, total)
    per_scene = recipe.expressions_per_scene
    scenes = SceneDataset(bank, SceneConfig(), training.seed, length, per_scene, stages, recipe.questions_per_scene)
    model, processor = load_or_build(recipe, scenes)
    # on a CPU the backward pass of sdpa costs a third of a step more than that of plain attention
    model.model.language_model.set_attn_implementation("eager" if training.use_cpu else "sdpa")
    samples: Any = SceneSamples(scenes, processor)
    if recipe.overfit:
        validation = flat_expressions(scenes, recipe.overfit)
        samples = Repeated(samples, -(-recipe.overfit // per_scene))
    else:
        test = SceneBank.from_folder(recipe.bank, "val")
        held_out = SceneDataset(test, SceneConfig.preset(recipe.eval_preset), 1, recipe.eval_expressions, per_scene)
        validation = flat_expressions(held_out, recipe.eval_expressions)
    trainer = SceneTrainer(
        model=model,
        args=training,
        train_dataset=samples,
        eval_dataset=samples,  # evaluation draws masks for `validation`
        data_collator=SceneCollator(processor.tokenizer.pad_token_id),
        processor=processor,
        validation=validation,
    )
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {processor.num_visual_tokens} visual tokens a picture")
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    trainer.save_model(output)
    processor.save_pretrained(output)


def make_parser() -> HfArgumentParser:
    return HfArgumentParser((SceneArguments, TrainingArguments), description=__doc__)


if __name__ == "__main__":
    main(*make_parser().parse_args_into_dataclasses())
