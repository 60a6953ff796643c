"""What matters in the recipe of the small model: short runs that differ in one thing, and what each has learned.

    python -m trl_recipes.ablations --bank BANK --visual_tokenizer hub_cards/argenseg-tiny/visual_tokenizer
    python -m trl_recipes.ablations ... --only "recipe" "no word regions" --use_cpu True --bf16 True

Takes all options of `train_scenes`, for all runs. Every run sees the same scenes in the same order. What is compared is
the loss on validation scenes, of sprites that are in no training scene: that of the visual tokens with faultless coarse
scales, that of the last scale when all coarse ones have missed the thing (so that it must be found at that scale), and
that of the words; and how many things the image features name among all names, and find by name among those in the
image, by themselves (see `naming`). Finished runs are kept in the output folder and not made again; a run that was
stopped goes on. The table is printed and written to OUTPUT_DIR/ablations.md.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser, TrainingArguments

from modeling_argenseg import ARGenSegForConditionalGeneration
from processing import ARGenSegProcessor

from .command_line import errors_in_a_line
from .drawing_trainer import before_labels
from .help_format import Help
from .naming import naming
from .scene_samples import MissingEncoder, PictureEncoder, SceneCollator, SceneSamples, model_inputs
from .scenes import SceneBank, SceneConfig, SceneDataset
from .settings_files import check_settings, write_settings
from .train_scenes import SceneArguments
from .word_regions import WordList, token_side

VARIANTS = {
    "recipe": "",
    "vision trunk from scratch": "--pretrained_trunk False --trunk_lr_scale 1",
    "vision trunk frozen": "--freeze_trunk True",
    "one stride of the trunk (16)": "--feature_strides 16",
    "64 image tokens": "--image_tokens 64",
    "no word regions": "--word_region_weight 0",
    "slips": "--slips 0.5",
    "mask regions": "--slips 0.5 --mask_region_weight 1",
    "causal within a scale": "--scale_attention causal",
    "loss per token, not per scale": "--visual_loss token",
    "width 128": "--hidden_size 128",
}
SETTINGS = "ablation.json"
LOSSES = ("visual", "last scale alone", "text")
COLUMNS = (*LOSSES, "named", "found")


@dataclass
class AblationArguments:
    only: list[str] = field(
        default_factory=lambda: list(VARIANTS), metadata={"help": "which runs", "choices": list(VARIANTS)}
    )
    validation_scenes: int = field(default=100, metadata={"help": "scenes that the losses are measured on"})


@torch.no_grad()
def held_out(folder: Path, recipe: SceneArguments, count: int) -> dict[str, float]:
    """What is compared, on `count` validation scenes of the schedule's last preset; see the top."""
    processor = ARGenSegProcessor.from_pretrained(folder)
    model = ARGenSegForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.visual_loss = "scale"  # that of all runs is measured alike
    bank, preset = SceneBank.from_folder(recipe.bank, "val"), SceneConfig.preset(recipe.schedule[-1].split("+")[0])
    scenes = SceneDataset(bank, preset, 1, count, recipe.expressions_per_scene, (), recipe.questions_per_scene)
    samples, collator = SceneSamples(scenes, processor), SceneCollator(processor.tokenizer.pad_token_id)
    faultless, missing, found = PictureEncoder(processor), MissingEncoder(processor), []
    for start in tqdm(range(0, count, 4), desc=folder.name):
        part = [samples[i] for i in range(start, min(start + 4, count))]
        batch = model_inputs(part, collator, faultless)
        out = model(**batch, logits_to_keep=before_labels(batch["labels"]))
        batch = model_inputs(part, collator, missing)
        visual = batch["labels"] >= processor.visual_token_offset
        coarse = int(processor.num_visual_tokens) - model.config.patch_nums[-1] ** 2
        batch["labels"][~visual | (visual.cumsum(1) <= coarse)] = -100
        alone = model(**batch, logits_to_keep=before_labels(batch["labels"]))
        found.append((float(out.visual_loss), float(alone.visual_loss), float(out.text_loss)))
    words = WordList(SceneBank.from_folder(recipe.bank, "train"), token_side(processor.image_seq_length))
    losses = dict(zip(LOSSES, torch.tensor(found).mean(0).tolist(), strict=True))
    return losses | naming(model, processor, scenes, words)


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    rows = [["what is different", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    rows += [[name, *(f"{losses[column]:.3f}" for column in COLUMNS)] for name, losses in found.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main(options: list[str], ablations: AblationArguments, recipe: SceneArguments, training: TrainingArguments) -> None:
    """Runs what is not finished.

    Args:
        options: the command line as it was given, for `train_scenes`.
    """
    output, found = Path(training.output_dir), {}
    settings = {"options": options, "validation_scenes": ablations.validation_scenes}
    for name in ablations.only:
        folder = output / name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        write_settings(folder / SETTINGS, settings)
        check_settings(folder / SETTINGS, settings, mend="Give another --output_dir, or delete it")
        if not (folder / "processor_config.json").exists():  # the last that a run writes
            print(f"== {name}", flush=True)
            command = [sys.executable, "-m", "trl_recipes.train_scenes", *options, "--output_dir", str(folder)]
            if subprocess.run([*command, *VARIANTS[name].split()], check=False).returncode:
                raise SystemExit(f"error: the run {name!r} failed; mend that and give the command again, which goes on")
        result = folder / "held_out.json"
        if not result.exists():
            result.write_text(json.dumps(held_out(folder, recipe, ablations.validation_scenes)), encoding="utf-8")
        found[name] = json.loads(result.read_text(encoding="utf-8"))
        (output / "ablations.md").write_text(table(found), encoding="utf-8")
    print(table(found), flush=True)


def make_parser() -> HfArgumentParser:
    kinds = (AblationArguments, SceneArguments, TrainingArguments)
    return HfArgumentParser(kinds, description=__doc__, formatter_class=Help)


def options_of_runs(words: list[str]) -> list[str]:
    """The command line without what is for this command alone."""
    kept, mine = [], False
    for word in words:
        if word.startswith("--"):
            mine = word.split("=")[0] in ("--only", "--validation_scenes", "--output_dir")
        if not mine:
            kept.append(word)
    return kept


if __name__ == "__main__":
    with errors_in_a_line():
        main(options_of_runs(sys.argv[1:]), *make_parser().parse_args_into_dataclasses())
