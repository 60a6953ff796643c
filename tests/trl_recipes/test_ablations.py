"""Short runs that differ in one thing, and what is compared."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import tiny_scenes
import torch

from trl_recipes import ablations, train_scenes
from trl_recipes.ablations import VARIANTS, held_out, options_of_runs
from trl_recipes.scene_samples import MissingEncoder, PictureEncoder, SceneCollator

RUNS = ["recipe", "vision trunk from scratch"]


@pytest.mark.parametrize("name", VARIANTS)
def test_each_difference_is_an_option_of_the_recipe(name):
    words = ["--bank", "b", "--visual_tokenizer", "t", "--output_dir", "o"]
    plain, changed = (train_scenes.make_parser().parse_args_into_dataclasses([*words, *extra.split()])[0]
                      for extra in ("", VARIANTS[name]))  # fmt: skip
    differs = {key for key in vars(plain) if getattr(plain, key) != getattr(changed, key)}
    assert len(differs) == len([word for word in VARIANTS[name].split() if word.startswith("--")])


def test_the_runs_are_told_all_but_what_is_for_the_comparison():
    words = ["--only", "recipe", "slips", "--bank", "b", "--validation_scenes=3", "--schedule", "easy", "full"]
    assert options_of_runs(words) == ["--bank", "b", "--schedule", "easy", "full"]


def test_all_coarse_scales_miss_the_thing(parts, samples):
    processor = parts[1]
    masks = SceneCollator(processor.tokenizer.pad_token_id)([samples[0], samples[1]])["masks"]
    quantizer, faultless = processor.visual_tokenizer.quantize, PictureEncoder(processor).encode(masks)[0]
    drawn, right = MissingEncoder(processor).encode(masks)
    usual = [quantizer.log_frequency(k).argmax().expand(n) for k, n in enumerate((1, 4, 16))]
    assert (drawn[:, :21] == torch.cat(usual)).all() and torch.equal(drawn[:, 21:], right[:, 21:])
    assert not torch.equal(drawn[:, 21:], faultless[:, 21:])  # it says all by itself


def test_a_table_of_finished_runs(bank_folder, tokenizer_folder, tmp_path, monkeypatch, capsys):
    words = f"""--bank {bank_folder} --visual_tokenizer {tokenizer_folder} --output_dir {tmp_path} --max_steps 2
        --hidden_size 64 --num_layers 1 --vision_layers 1 --text_vocab_size 300 --text_scenes 20 --num_scales 3
        --image_tokens 64 --schedule easy --per_device_train_batch_size 1 --use_cpu True --report_to none
        --validation_scenes 6 --disable_tqdm True""".split()
    given = ["--only", *RUNS, *words]

    def run() -> str:
        ablations.main(options_of_runs(given), *ablations.make_parser().parse_args_into_dataclasses(given))
        return capsys.readouterr().out

    printed = run()
    table = (tmp_path / "ablations.md").read_text()
    assert table in printed and [line.split(" | ")[0][2:] for line in table.splitlines()[2:]] == RUNS
    numbers = [float(word) for line in table.splitlines()[2:] for word in line.strip("| ").split(" | ")[1:]]
    assert len(numbers) == 10 and all(0 <= number < 20 for number in numbers) and len(set(numbers)) > 3
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a finished run was made again"))
    monkeypatch.setattr(ablations, "held_out", lambda *args: pytest.fail("a finished run was measured again"))
    assert table in run()


def test_finished_runs_of_other_options_are_not_mixed_in(tmp_path):
    asked = ablations.AblationArguments(only=["recipe"], validation_scenes=7)
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "processor_config.json").touch()
    (folder / "held_out.json").write_text(json.dumps(dict.fromkeys(ablations.COLUMNS, 1.0)))
    training = SimpleNamespace(output_dir=str(tmp_path))
    ablations.main(["--bank", "here"], asked, None, training)
    with pytest.raises(ValueError, match="holds a run with other settings: options was .* another --output_dir"):
        ablations.main(["--bank", "there"], asked, None, training)


def test_what_the_last_scale_says_alone_is_apart_from_the_rest(learned_folder, bank_folder, tokenizer_folder):
    """A model that knows its scenes by heart, but has hardly seen coarse scales fail."""
    recipe = tiny_scenes.scene_arguments(bank_folder, tokenizer_folder, schedule=["easy"])
    losses = held_out(learned_folder, recipe, 2)
    assert losses["last scale alone"] > losses["visual"] and 0 < losses["text"] < 20
