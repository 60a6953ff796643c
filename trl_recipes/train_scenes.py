"""Trains a small ARGenSeg on composed scenes, from scratch but for the vision trunk's ImageNet weights.

    python -m trl_recipes.train_scenes --bank BANK --visual_tokenizer out/visual_tokenizer --output_dir out/model \\
        --schedule easy easy+medium medium+full full+medium+full+easy --max_steps 5000 --learning_rate 2e-3 \\
        --per_device_train_batch_size 8

On a GPU, give it scenes enough, one shape of batch, and processes that compose:

    ... --per_device_train_batch_size 66 --bf16 True --compile_layers True --rows_multiple 64 --length_multiple 328 \\
        --dataloader_num_workers 15 --minutes 10

A killed run goes on from its last checkpoint when the same command is given again: exactly, but for `--minutes`, which
it has anew, and schedule and learning rate with them. `--num_scales 4` draws coarse pictures only, of 85 tokens instead
of 341; `--start_from` goes on from such a run with all scales. `--overfit 16` trains on 16 fixed expressions, the first
thing to try after any change.

All of `TrainingArguments` can be given but what concerns the optimizer (Muon for matrices of transformer layers, AdamW
for the rest) and the form of the learning rate (up in `--warmup_steps`, then down to zero in a straight line).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import HfArgumentParser, TrainingArguments

from modeling_argenseg import (
    ARGenSegForConditionalGeneration,
)
from processing import ARGenSegProcessor

from .clock import Clock
from .command_line import errors_in_a_line, loading, needing
from .drawing_trainer import DrawingTrainer
from .evaluation.answers import evaluate_expressions
from .help_format import Help
from .mask_regions import MaskRegions, shares_of_queries
from .pretrained_vision import find_weights
from .resume import train_or_go_on, where_to_go_on
from .scene_samples import PictureEncoder, SceneCollator, SceneSamples, unpack
from .scenes import FlatExpressions, SceneBank, SceneConfig, SceneDataset, flat_expressions
from .tiny_model import adopt_visual_tokenizer, build_model, build_processor, look_closer
from .training_options import (
    check_minutes,
    check_numbers,
    options_that_differ,
    refuse_ignored,
    refuse_many_processes,
)
from .unfamiliar import make_unfamiliar
from .word_regions import WordList, WordRegions, token_side

with needing("train", __name__):
    from .optimizers import muon_and_adamw  # Muon came with torch 2.9

IGNORED = (  # of TrainingArguments
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "label_smoothing_factor",
    "num_train_epochs",
    "per_device_eval_batch_size",
    "train_sampling_strategy",
)
FIRST = ("pretrained_trunk", "text_vocab_size", "text_tokenizer", "text_scenes")  # of a model from scratch alone
LEAST = {
    "expressions_per_scene": 1,
    "questions_per_scene": 0,
    "eval_expressions": 1,
    "overfit": 0,
    "search_steps": 0,
    "text_scenes": 1,
    "num_layers": 1,
    "vision_layers": 0,
    "length_multiple": 1,
    "rows_multiple": 1,
}


@dataclass
class SceneArguments:
    bank: str = field(metadata={"help": "folder with sprites.parquet, backgrounds.parquet and vocabulary.json"})
    visual_tokenizer: str = field(metadata={"help": "folder of a trained VAR tokenizer"})
    start_from: str | None = field(default=None, metadata={"help": "model folder to go on from; default: from scratch"})
    num_scales: int | None = field(default=None, metadata={"help": "draw only the first scales; default: all"})
    schedule: list[str] = field(
        default_factory=lambda: ["easy", "medium", "full"],
        metadata={
            "help": "presets, in equal parts of the run, or of its --minutes; joined by + (easy+full) they take turns, "
            "scene by scene"
        },
    )
    expressions_per_scene: int = field(default=4, metadata={"help": "requests for each image"})
    questions_per_scene: int = field(default=2, metadata={"help": "most questions answered in words for each image"})
    eval_expressions: int = field(default=96, metadata={"help": "validation expressions drawn at every evaluation"})
    eval_preset: str = field(default="full", metadata={"help": "preset of the validation scenes"})
    overfit: int = field(default=0, metadata={"help": "train and evaluate on this many fixed expressions"})
    scale_attention: str | None = field(
        default=None,
        metadata={
            "help": "who sees whom within a scale; default: as start_from has it, or block",
            "choices": ["causal", "block"],
        },
    )
    visual_loss: str = field(
        default="scale",
        metadata={"help": "what counts alike: every token or every scale", "choices": ["token", "scale"]},
    )
    visual_loss_weight: float = field(default=1.0, metadata={"help": "factor on the loss of the visual tokens"})
    word_region_weight: float = field(
        default=0.3,
        metadata={"help": "factor on the loss that brings image features near the words for what they show"},
    )
    mask_region_weight: float = field(
        default=0.0,
        metadata={
            "help": "factor on the loss by which the queries know what the mask covers; it teaches to find things"
        },
    )
    slips: float = field(
        default=0.0, metadata={"help": "share of the pictures with wrong coarse tokens, which finer ones have to mend"}
    )
    search_steps: int = field(
        default=0,
        metadata={"help": "how long to try out tokens of the last scale for each mask: outlines closer to the mask"},
    )
    unfamiliar: float = field(
        default=0.0,
        metadata={"help": "share of the things that the language model sees as if nobody had ever seen their like"},
    )
    warp: float = field(
        default=0.0, metadata={"help": "how far the corners of cut-outs are pulled about, as a share of their sides"}
    )
    hidden_size: int = field(default=256, metadata={"help": "width of the language model"})
    num_layers: int = field(default=6, metadata={"help": "layers of the language model"})
    vision_layers: int = field(default=2, metadata={"help": "transformer layers on the vision trunk"})
    image_tokens: int = field(default=256, metadata={"help": "tokens of an image in the stream", "choices": [256, 64]})
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "pixels of the image's side in the vision tower, e.g. 384; default: that of start_from, or 256"
        },
    )
    feature_strides: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32], metadata={"help": "features of the vision trunk that make the tokens"}
    )
    pretrained_trunk: bool = field(default=True, metadata={"help": "begin with ImageNet weights in the vision trunk"})
    freeze_trunk: bool = field(default=False, metadata={"help": "keep the vision trunk's ImageNet weights as they are"})
    freeze_vision: bool = field(
        default=False, metadata={"help": "keep all that makes the image tokens as it is, and train the language model"}
    )
    trunk_lr_scale: float = field(
        default=0.1, metadata={"help": "learning rate of the vision trunk, times the others'"}
    )
    text_vocab_size: int = field(default=2000, metadata={"help": "size of the text vocabulary"})
    text_tokenizer: str | None = field(
        default=None, metadata={"help": "folder of a text tokenizer of an earlier run, in place of learning one"}
    )
    text_scenes: int = field(default=4000, metadata={"help": "scenes whose expressions the text tokenizer learns from"})
    minutes: float | None = field(
        default=None,
        metadata={"help": "end the run, its learning rate at zero, after so long, if max_steps comes later"},
    )
    compile_layers: bool = field(
        default=False,
        metadata={"help": "compile the transformer layers once for each shape of batch, for a GPU"},
    )
    length_multiple: int = field(default=16, metadata={"help": "streams are padded to a multiple of this length"})
    rows_multiple: int = field(
        default=1, metadata={"help": "batches are filled up to a multiple of so many streams: compiled layers need it"}
    )


class SceneTrainer(DrawingTrainer):
    """Makes tokens of masks in batches, has an optimizer for training from scratch, and evaluates by drawing the
    requests of validation scenes."""

    def __init__(
        self,
        *args: Any,
        processor: ARGenSegProcessor,
        validation: FlatExpressions,
        recipe: SceneArguments,
        words: WordList | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.processor, self.validation, self.recipe = processor, validation, recipe
        self.encoder = PictureEncoder(processor, recipe.slips, recipe.search_steps).to(self.args.device)
        self.word_regions = None
        if words is not None and recipe.word_region_weight > 0:
            self.word_regions = WordRegions(words, processor.tokenizer).to(self.args.device)
        elif recipe.unfamiliar > 0:
            raise ValueError("--unfamiliar needs the words for what each cell shows: give --word_region_weight above 0")
        self.mask_regions = None
        if recipe.mask_region_weight > 0:
            width = self.model.config.text_config.hidden_size
            self.mask_regions = MaskRegions(width, self.encoder.patch_nums).to(self.args.device)
        self.clock = Clock(recipe.minutes)
        self.add_callback(self.clock)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named = (self.model if model is None else model).named_parameters()
            self.optimizer = muon_and_adamw(
                named, self.args.learning_rate, self.args.weight_decay, self.recipe.trunk_lr_scale
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Up in `warmup_steps`, then down to zero in a straight line, at the end of the run: of its time, too, if
        `warmup_steps` is a share."""
        warm_up, is_share = self.args.get_warmup_steps(num_training_steps), self.args.warmup_steps < 1

        def factor(step: int) -> float:
            place = self.clock.place(step, num_training_steps) if is_share else step
            return min((place + 1) / (warm_up + 1), 1.0) * (1.0 - self.clock.progress(step, num_training_steps))

        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        encoded = self.encoder(inputs)
        if self.mask_regions is not None and "masks" in inputs:
            encoded["mask_shares"] = shares_of_queries(unpack(inputs["masks"]), self.encoder.patch_nums)
        return super().compute_loss(model, encoded, return_outputs, **kwargs)

    def extra_loss(self, model: Any, image: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        cells = {name: inputs.pop(f"cell_{name}", None) for name in ("nouns", "colors")}
        if self.word_regions is None:
            return None
        embedding = self.accelerator.unwrap_model(model).get_input_embeddings().weight
        loss = self.recipe.word_region_weight * self.word_regions(image.pooler_output, embedding, **cells)
        if self.recipe.unfamiliar > 0:  # only after the loss: what makes the features shall name things rightly
            names = self.word_regions.embed(self.word_regions.nouns, embedding.detach())[:-1]
            image.pooler_output = make_unfamiliar(image.pooler_output, cells["nouns"], names, self.recipe.unfamiliar)
        return loss

    def query_loss(self, hidden: torch.Tensor, images: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        assert self.mask_regions is not None  # nobody asks otherwise
        return self.recipe.mask_region_weight * self.mask_regions(hidden, shares, images)

    def evaluate_drawing(self) -> dict[str, float]:
        with torch.compiler.set_stance("force_eager"):  # drawing has many shapes: each would be compiled
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
        if recipe.pretrained_trunk:
            find_weights()  # whether they are there is said before thousands of scenes are read
        processor = build_processor(recipe, scenes)
        model = build_model(recipe, processor)
    else:
        refuse_ignored(recipe, FIRST, "the model of --start_from has its text tokenizer and its trunk")
        with loading(recipe.start_from):
            processor = ARGenSegProcessor.from_pretrained(recipe.start_from)
            model = ARGenSegForConditionalGeneration.from_pretrained(recipe.start_from, dtype=torch.float32)
        model, processor = adopt_visual_tokenizer(model, processor, recipe.visual_tokenizer)
        model.config.vlm_config.vision_config.freeze_trunk = recipe.freeze_trunk
        model.model.vlm.vision_tower.trunk.requires_grad_(not recipe.freeze_trunk)
        refuse_other_sizes(recipe, model, processor)
        if recipe.image_size is not None:
            look_closer(model, processor, recipe.image_size)
        if recipe.scale_attention is not None:
            model.config.scale_attention = recipe.scale_attention
        model.config.visual_loss, model.config.visual_loss_weight = recipe.visual_loss, recipe.visual_loss_weight
    if recipe.freeze_vision:
        model.model.vlm.vision_tower.requires_grad_(False)
        model.model.vlm.multi_modal_projector.requires_grad_(False)
    scales = len(model.config.visual_tokenizer_config.patch_nums)
    if recipe.num_scales is not None and recipe.num_scales not in range(1, scales + 1):
        raise ValueError(f"--num_scales {recipe.num_scales}: the visual tokenizer has {scales}, give 1 to {scales}")
    processor.num_scales = model.config.num_scales = recipe.num_scales
    model.config.check()  # its fields were set after it was made
    return model, processor


def refuse_other_sizes(
    recipe: SceneArguments, model: ARGenSegForConditionalGeneration, processor: ARGenSegProcessor
) -> None:
    """Raises ValueError: a size is given, and the model that is gone on from has another."""
    text, vision = model.config.text_config, model.config.vlm_config.vision_config
    own = {
        "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "vision_layers": vision.num_hidden_layers,
        "image_tokens": processor.image_seq_length,
        "feature_strides": vision.feature_strides,
    }
    usual = SceneArguments(bank=recipe.bank, visual_tokenizer=recipe.visual_tokenizer)
    for name, _, value in options_that_differ(recipe, usual, own):
        raise ValueError(f"--{name} would change nothing: the model of --start_from has {value}; leave it out")


def prepare(recipe: SceneArguments, training: TrainingArguments) -> SceneTrainer:
    """Scenes, model and trainer.

    Raises:
        ValueError: the bank, a folder or an option is at fault.
    """
    refuse_many_processes(training)
    refuse_ignored(
        training, IGNORED, "the optimizer is Muon and AdamW, its rate falls in a straight line, scenes come in order"
    )
    check_minutes(recipe.minutes)
    where_to_go_on(training)  # or it says why not
    check_numbers(recipe, LEAST, ("slips", "unfamiliar"))
    training.remove_unused_columns = False
    training.train_sampling_strategy = "sequential"  # the curriculum is in the order; scenes never repeat anyway
    torch.manual_seed(training.seed)
    bank = SceneBank.from_folder(recipe.bank, "train")
    if training.dataloader_num_workers:
        bank.preload()  # once, for all workers
    total = training.max_steps * training.train_batch_size * training.gradient_accumulation_steps
    length, stages = max(total, recipe.text_scenes), curriculum(recipe.schedule, total)
    per_scene = recipe.expressions_per_scene
    scenes = SceneDataset(
        bank, SceneConfig(warp=recipe.warp), training.seed, length, per_scene, stages, recipe.questions_per_scene
    )
    model, processor = load_or_build(recipe, scenes)
    if recipe.compile_layers:
        compile_layers(model)
    words = WordList(bank, token_side(processor.image_seq_length)) if recipe.word_region_weight > 0 else None
    samples: Any = SceneSamples(scenes, processor, words)
    # read once for each image; compiled layers would be compiled one by one if they had a cache
    shared_length = 0 if recipe.compile_layers else len(samples.writer.head)
    if recipe.overfit:
        validation = flat_expressions(scenes, recipe.overfit)
        samples = Repeated(samples, -(-recipe.overfit // per_scene))
    else:
        test = SceneBank.from_folder(recipe.bank, "val")
        held_out = SceneDataset(test, SceneConfig.preset(recipe.eval_preset), 1, recipe.eval_expressions, per_scene)
        validation = flat_expressions(held_out, recipe.eval_expressions)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {processor.num_visual_tokens} visual tokens a picture")
    trainer = SceneTrainer(
        model=model,
        args=training,
        train_dataset=samples,
        eval_dataset=samples,  # evaluation draws masks for `validation`
        data_collator=SceneCollator(
            processor.tokenizer.pad_token_id, recipe.length_multiple, recipe.rows_multiple, shared_length
        ),
        processor=processor,
        validation=validation,
        recipe=recipe,
        words=words,
    )
    if recipe.minutes is not None and not recipe.overfit:
        scenes.hurry(trainer.clock.share, total)
    return trainer


def main(recipe: SceneArguments, training: TrainingArguments) -> None:
    output = Path(training.output_dir)
    with errors_in_a_line():
        trainer = prepare(recipe, training)
    train_or_go_on(trainer)
    trainer.encoder.to("cpu")  # and with it the processor's visual tokenizer
    trainer.save_model(output)
    trainer.processor.save_pretrained(output)


def compile_layers(model: ARGenSegForConditionalGeneration) -> None:
    """Compiles each transformer layer by itself: layers of one kind share the result."""
    tower = model.model.vlm.vision_tower
    for layer in (*model.model.language_model.layers, *tower.layers):
        layer.compile(dynamic=False)


def make_parser() -> HfArgumentParser:
    return HfArgumentParser((SceneArguments, TrainingArguments), description=__doc__, formatter_class=Help)


if __name__ == "__main__":
    main(*make_parser().parse_args_into_dataclasses())
