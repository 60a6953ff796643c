"""Fine-tunes an ARGenSeg model on your own masks with TRL's `SFTTrainer`.

    # full: everything but the vision tower
    python -m trl_recipes.sft --config trl_recipes/configs/sft_full.yaml \\
        --model_name_or_path hub_cards/argenseg-tiny --data my_masks/ --output_dir out/sft

    # LoRA: adapters on the language model
    python -m trl_recipes.sft --config trl_recipes/configs/sft_lora.yaml \\
        --model_name_or_path hub_cards/argenseg-tiny --data my_masks/ --output_dir out/sft-lora

The options are those of TRL (`SFTConfig`, `ModelConfig`), and those of `trl_recipes.lora` for the data; a YAML file
holds any of them, and the command line goes before it. More processes: `accelerate launch --config_file ... -m
trl_recipes.sft ...`. A run that was stopped goes on from its last checkpoint when the same command is given again;
`run.json` holds what it depends on, and other data or options need another output, or `--overwrite`.

What this trainer changes, and why: TRL computes a cross-entropy of its own from the head's weights and never asks the
model for its loss, so that the weights of text and of the scales of a picture would be lost. Here the loss is the
model's. Rows are tokenised before training (masks become visual tokens once), so that TRL's chat templating, packing
and truncation do not take part; its token accuracy and entropy are not logged. LoRA goes to the language model alone,
where `--lora_target_modules` does not say otherwise: names such as q_proj would hit the vision tower, too.
"""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments, set_seed

from .adapters import dtype_to_load, is_quantised, known_everywhere, lora_config, refuse_adapters
from .command_line import errors_in_a_line, loading, needing
from .lora import (
    MaskEvaluation,
    MaskTrainer,
    check_masks,
    check_model,
    evaluates,
    load_data,
    merge_adapters,
    report,
    train_and_draw_curve,
)
from .mask_data import MaskCollator, check_requests, tokenise_masks
from .mask_data.arguments import MaskDataArguments
from .resume import where_to_go_on
from .run_settings import run_settings, start_run
from .sharded import refuse_zero3, save_whole
from .training_options import refuse, refuse_ignored, refuse_several_gpus

with needing("train", __name__):
    from trl import (
        ModelConfig,
        SFTConfig,
        SFTTrainer,
        TrlParser,
        get_peft_config,
        get_quantization_config,
    )

RESULTS = ("model*.safetensors*", "adapter_model.safetensors", "adapter_config.json", "merged")  # of a run
REFUSED = ("packing", "padding_free", "assistant_only_loss", "use_liger_kernel")
IGNORED = ("loss_type", "label_smoothing_factor", "completion_only_loss")
ADAPTER_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora")


@dataclass
class SFTMaskArguments(MaskDataArguments):
    train_vision_tower: bool = field(
        default=False, metadata={"help": "full fine-tuning: train the vision tower, too; default: it stays as it is"}
    )


class MaskSFTTrainer(MaskTrainer, SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` with the model's own loss, that evaluates by drawing masks (both are `MaskTrainer`'s).

    Rows are those of `tokenise_masks`, batched by `MaskCollator`.
    """


def load_model(args: ModelConfig) -> tuple[Any, Any]:
    """Model and processor.

    Raises:
        ValueError: no name is given, there is no such model, it is of another kind, or without its visual tokenizer.
    """
    name = args.model_name_or_path
    if name is None:
        raise ValueError("which model? Give --model_name_or_path, a folder or a Hub name")
    name = known_everywhere(name)
    quantization = get_quantization_config(args)  # None would hide that of the folder
    with loading(name):
        refuse_adapters(name, args.model_revision)
        processor = AutoProcessor.from_pretrained(name, revision=args.model_revision)
        model = AutoModelForImageTextToText.from_pretrained(
            name,
            revision=args.model_revision,
            dtype=dtype_to_load(
                name, args.dtype if args.dtype in (None, "auto") else getattr(torch, args.dtype), args.model_revision
            ),
            attn_implementation=args.attn_implementation,
            **({} if quantization is None else {"quantization_config": quantization}),
        )
    check_model(name, model, processor)
    return model, processor


def adapters(model: Any, args: ModelConfig) -> PeftConfig | None:
    """What `--use_peft` asks for, None without it. Left open by the command line: adapters go to all linear layers of
    the language model, and in a model that `from_vlm` has just made the new parts train whole beside them."""
    config = get_peft_config(args)
    if config is None:
        return None
    config.revision = args.model_revision  # of what they are put on
    usual = lora_config(model, args.lora_r, args.lora_alpha, args.lora_dropout, max_share=1.0)
    if config.target_modules is None:
        config.target_modules = usual.target_modules
    if config.modules_to_save is None:
        config.modules_to_save = usual.modules_to_save
        config.trainable_token_indices = usual.trainable_token_indices
    return config


def freeze(model: Any, train_vision_tower: bool) -> None:
    """For full fine-tuning: the vision tower does not train (but for Qwen-VL's projectors, the mergers in it), and the
    codebook never does.

    Raises:
        ValueError: the weights are quantised, and only adapters on them can train.
    """
    if is_quantised(model):
        raise ValueError("quantised weights cannot train whole: add --use_peft")
    if not train_vision_tower:
        tower = model.model.vlm.get_encoder("image")
        for name, parameter in tower.named_parameters():
            parameter.requires_grad_(name.startswith(("merger.", "deepstack_merger_list.")))


def begin(
    recipe: SFTMaskArguments, training: TrainingArguments, model_args: ModelConfig
) -> tuple[Any, Any, PeftConfig | None]:
    """Makes the output folder. Returns the model, of which just what is to train does, its processor, and the adapters
    that are still to be put on it.

    Raises:
        ValueError: with what is wrong, and how to mend it.
    """
    refuse_several_gpus(training)
    refuse_zero3()
    where_to_go_on(training)  # or it says why not
    training.remove_unused_columns = False  # images are opened late
    Path(training.output_dir).mkdir(parents=True, exist_ok=True)
    set_seed(training.seed)
    model, processor = load_model(model_args)
    recipe.set_search_steps(processor)
    processor.visual_tokenizer.to(training.device)
    config = adapters(model, model_args)
    if config is None:
        freeze(model, recipe.train_vision_tower)
    return model, processor, config


def prepare(recipe: SFTMaskArguments, training: SFTConfig, model_args: ModelConfig) -> MaskSFTTrainer:
    """Everything before the first step.

    Raises:
        ValueError: with what is wrong, and how to mend it.
    """
    refuse(training, REFUSED, "does not go with rows that are tokenised before training")
    refuse_ignored(training, IGNORED, "the loss is the model's own, on answers alone")
    if training.max_length is not None:
        refuse(training, ("max_length",), "would cut pictures")
    training.max_length = None
    model, processor, config = begin(recipe, training, model_args)
    output = Path(training.output_dir)
    rows, validation = load_data(recipe, training.seed, not training.disable_tqdm, evaluates(training))
    validation = check_requests(validation, processor, recipe.skip_bad_samples)
    rows = tokenise_masks(rows, processor, recipe.cache_dir, recipe.skip_bad_samples)
    settings = run_settings(training, model, rows, validation) | sft_settings(recipe, config)
    start_run(output, settings, str(model_args.model_name_or_path), recipe.overwrite, RESULTS)
    check_masks(rows, processor, output)
    trainer = MaskSFTTrainer(
        model=model,
        args=training,
        train_dataset=rows,
        eval_dataset=validation,  # evaluation draws its masks
        data_collator=MaskCollator(processor),
        processing_class=processor,
        peft_config=config,
        processor=processor,
        validation=validation,
        shown=recipe.shown_samples,
    )
    if config is not None:
        restore_dtypes(trainer.model)
    tell_sizes(trainer)
    return trainer


def restore_dtypes(adapted: PeftModel) -> None:
    """On quantised weights TRL makes bf16 of all that trains. Adapters, and rows of new tokens, are to be in single
    precision, or small updates are lost, and what trains whole as the weights that it stands for."""
    usual = adapted.get_base_model().get_input_embeddings().weight.dtype
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            is_adapter = "lora_" in name or "token_adapter" in name
            parameter.data = parameter.data.to(torch.float32 if is_adapter else usual)


def tell_sizes(trainer: MaskEvaluation) -> None:
    """Prints how many samples and parameters train."""
    every = list(trainer.model.parameters())
    count, total = (sum(p.numel() for p in some) for some in ([p for p in every if p.requires_grad], every))
    samples = f"{len(trainer.train_dataset)} training samples, {len(trainer.validation)} for validation"
    print(f"{samples}; {count:,} of {total:,} parameters train")


def sft_settings(recipe: SFTMaskArguments, config: PeftConfig | None) -> dict[str, Any]:
    """What else the result depends on than `run_settings` tells."""
    if config is None:
        return {"use_peft": False, "train_vision_tower": recipe.train_vision_tower}
    values = {name: getattr(config, name) for name in ADAPTER_SETTINGS}
    plain = {name: sorted(value) if isinstance(value, (set, list)) else value for name, value in values.items()}
    return {"use_peft": True, "lora": plain}


def train(trainer: MaskEvaluation) -> Path:
    """Trains, goes on where a run was stopped, and saves: the whole model, or the adapters and, where the weights are
    not quantised, `merged/`. Returns the folder to load."""
    output = train_and_draw_curve(trainer)
    save_whole(trainer, output)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel):
        return merge_adapters(trainer, output)
    return output


def make_parser() -> TrlParser:
    kinds: Any = (SFTMaskArguments, SFTConfig, ModelConfig)
    return TrlParser(kinds, description=__doc__, formatter_class=RawDescriptionHelpFormatter)


def run(parser: TrlParser, prepare: Callable[..., MaskEvaluation], arguments: list[str] | None) -> None:
    """What the command line says: prepares a trainer, trains and reports."""
    with errors_in_a_line():
        recipe, training, model_args = parser.parse_args_and_config(arguments)
        trainer = prepare(recipe, training, model_args)
    report(trainer, train(trainer))


def main(arguments: list[str] | None = None) -> None:
    run(make_parser(), prepare, arguments)


if __name__ == "__main__":
    main()
