"""Writes the card (README.md) of a folder that is to be published, from a template and the facts of the run.

    python -m trl_recipes.hub_card --kind model --folder out/published --facts facts.yaml \\
        --results outputs/evaluation/*/*/result.json

`facts.yaml` holds what no program can know: `python -m trl_recipes.hub_card --kind model --example` prints one to fill
in. Sizes, scales and parameters are read from the folder, metrics from the `result.json` files of
`trl_recipes.evaluate`. A missing fact is an error that names it: a card without its licences is not written.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, RepoCard, SpaceCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from safetensors import safe_open

from .tasks import load_task, task_names

TEMPLATES = Path(__file__).parents[1] / "hub_cards" / "templates"
KINDS = ("model", "metric", "space")
TODO = "TODO"
TOLD = ("dtype", "max_new_tokens", "batch_size", "device")  # settings that lines of the same name are told apart by
LICENCES = {
    "model": ("code", "weights", "visual_tokenizer", "base_model", "data"),
    "metric": ("code",),
    "space": ("code", "weights"),
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "model": {
        "repo_id": "owner/name",
        "title": "name",
        "summary": f"{TODO}: what it is, in two sentences.",
        "license": "apache-2.0",
        "language": "en",
        "base_model": None,
        "limits": [f"{TODO}: what it cannot do, measured if possible."],
        "recipe": [f"{TODO}: data, steps x batch, learning rate, hardware, hours."],
        "commands": ["python -m trl_recipes.train_scenes ..."],
        "data": [{"name": f"{TODO}: data set", "licence": TODO, "note": ""}],
        "licences": dict.fromkeys(LICENCES["model"], TODO),
    },
    "metric": {
        "repo_id": "owner/name",
        "title": "name",
        "summary": f"{TODO}: what it measures.",
        "license": "apache-2.0",
        "inputs": f"{TODO}: what predictions and references are.",
        "definition": f"{TODO}: the formula, and what happens to empty masks.",
        "differences": [f"{TODO}: from whose numbers, and why."],
        "licences": {"code": "Apache-2.0"},
    },
    "space": {
        "repo_id": "owner/name",
        "title": "name",
        "summary": f"{TODO}: what a visitor can do.",
        "license": "apache-2.0",
        "model": "owner/model",
        "licences": {"code": "Apache-2.0", "weights": TODO},
    },
}


USAGE = "ema_vocab_hit_SV"  # counts of how often codes are used: no parameters


def check_facts(facts: dict[str, Any], kind: str) -> None:
    """Raises ValueError: facts are missing, or still to be filled in; names them all."""
    missing = [name for name in EXAMPLES[kind] if name not in facts]
    if isinstance(facts.get("licences"), dict):
        missing += [f"licences.{name}" for name in LICENCES[kind] if not facts["licences"].get(name)]
    empty = [name for name, value in facts.items() if TODO in json.dumps(value)]
    problems = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"still {TODO}: {', '.join(empty)}"] * bool(empty)
    if problems:
        raise ValueError(f"the facts of this {kind} are not complete ({'; '.join(problems)}); --example shows them all")


def read_folder(folder: Path) -> dict[str, Any]:
    """Parameters, bytes of all files, and the scales of a saved model.

    Raises:
        ValueError: the folder holds no model.
    """
    try:
        pictures = json.loads((folder / "config.json").read_text(encoding="utf-8"))["visual_tokenizer_config"]
    except (OSError, KeyError) as error:
        raise ValueError(f"{folder} holds no ARGenSeg model: {error!r}") from None
    parameters = 0
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not name.endswith(USAGE)]  # noqa: SIM118 (no dict)
            shapes = [file.get_slice(name).get_shape() for name in names]
        parameters += sum(_product(shape) for shape in shapes)
    scales = pictures["patch_nums"][
        : json.loads((folder / "config.json").read_text(encoding="utf-8")).get("num_scales")
    ]
    return {
        "parameters": parameters,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "scales": scales,
        "tokens": sum(side * side for side in scales),
        "picture": pictures["image_size"],
    }


def _product(shape: list[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def read_result(path: Path) -> dict[str, Any]:
    """A line of the table of results, from what `trl_recipes.evaluate` has written.

    Raises:
        ValueError: it is not such a file, or the run was not complete.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        name = f"{result['task']}, {result['split']}, {result['protocol']}" + _told_options(result)
        settings, metrics = result["settings"], result["metrics"]
        samples = settings["samples"]
        complete = result["complete"]
        commits = [one["commit"] for one in (result["code"], *result.get("went_on_with", ()))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result.json of trl_recipes.evaluate: {error!r}") from None
    if not complete:
        raise ValueError(f"{path}: the run did not answer the whole split, and a card must not hide that")
    kinds = result.get("kinds", {})
    cells: dict[str, float] = {}
    for metric, numbers in metrics.items():
        for key, value in numbers.items():
            if isinstance(value, float) and not any(key.endswith(f"_{kind}") for kind in kinds):
                cells[f"{metric}_{key}" if key in cells else key] = value  # the first metric is the task's own
    return {"name": name, "samples": samples, "cells": cells, "commits": commits, "settings": settings}


def _told_options(result: dict[str, Any]) -> str:
    """What was not as the task has it: other options of its reader, zooming in, masks that follow edges."""
    settings = result["settings"]
    usual = load_task(result["task"]).options if result["task"] in task_names() else {}
    options = settings.get("options", {})
    told = [f"{name}={value}" for name, value in options.items() if name not in usual or usual[name] != value]
    ways = {"zoom": "zooming in", "follow_edges": "masks following the edges of the image"}
    return "".join(f", {one}" for one in [*told, *(words for name, words in ways.items() if settings.get(name))])


def tell_apart(results: list[dict[str, Any]], paths: list[Path]) -> None:
    """Adds to equal names what differs in the settings of `TOLD`.

    Raises:
        ValueError: nothing of these does, so that a reader could not tell one line from the other.
    """
    for name in {result["name"] for result in results}:
        same = [result for result in results if result["name"] == name]
        values = {told: [result["settings"].get(told) for result in same] for told in TOLD}
        for told in (told for told, found in values.items() if any(value != found[0] for value in found)):
            for result, value in zip(same, values[told], strict=True):
                result["name"] += f", {told}={value}"
    names = [result["name"] for result in results]
    for place, name in enumerate(names):
        if name in names[:place]:
            first = paths[names.index(name)]
            raise ValueError(
                f"{first} and {paths[place]} are both {name!r}; give one of them, a card has one line each"
            )


def results_table(paths: list[Path]) -> dict[str, Any]:
    """`results` (cells as text), `columns` and `commits` for the template. Raises ValueError, see `tell_apart`."""
    results = [read_result(path) for path in paths]
    tell_apart(results, paths)
    columns = list(dict.fromkeys(name for result in results for name in result["cells"]))
    commits = sorted({commit[:12] for result in results for commit in result["commits"] if commit})
    shown = [result | {"cells": {name: _number(result["cells"].get(name)) for name in columns}} for result in results]
    return {"results": shown, "columns": columns, "commits": ", ".join(commits)}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def card_data(facts: dict[str, Any], kind: str) -> ModelCardData | SpaceCardData:
    """The metadata on top of the card, which the Hub reads."""
    if kind == "model":
        return ModelCardData(
            license=facts["license"],
            language=facts["language"],
            base_model=facts["base_model"],
            library_name="transformers",
            pipeline_tag="image-segmentation",
            tags=["image-segmentation", "referring-segmentation", "visual-autoregressive", "argenseg"],
        )
    common = dict(title=facts["title"], license=facts["license"], colorFrom="indigo", colorTo="green", pinned=False)
    if kind == "metric":
        return SpaceCardData(**common, emoji="📏", sdk="static", tags=["evaluate", "metric"])
    return SpaceCardData(
        **common, emoji="🖍️", sdk="gradio", app_file="app.py", models=[facts["model"]], tags=["image-segmentation"]
    )


def make_card(
    kind: str, facts: dict[str, Any], folder: Path | None = None, results: list[Path] | None = None
) -> RepoCard:
    """The card, filled in.

    Raises:
        ValueError: facts are missing, the folder is no model, or a result is no result.
    """
    check_facts(facts, kind)
    values = dict(facts, card_data=card_data(facts, kind).to_yaml(), **results_table(results or []))
    if kind == "model":
        if folder is None:
            raise ValueError("the card of a model needs its --folder")
        values["folder"] = read_folder(folder)
    if not (TEMPLATES / f"{kind}.md").is_file():
        raise ValueError("the templates are part of the repository, not of the installed package: run it in a checkout")
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True)
    try:
        text = environment.get_template(f"{kind}.md").render(values)
    except UndefinedError as error:
        raise ValueError(f"a fact is missing: {error}") from None
    return RepoCard(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", required=True, choices=KINDS, help="what the folder is")
    parser.add_argument("--folder", type=Path, help="the folder; its README.md is written")
    parser.add_argument("--facts", type=Path, help="YAML; see --example")
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="result.json of trl_recipes.evaluate")
    parser.add_argument("--example", action="store_true", help="print facts to fill in, and stop")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    if args.example:
        print(yaml.safe_dump(EXAMPLES[args.kind], sort_keys=False, allow_unicode=True), end="")
        return
    if args.folder is None or args.facts is None:
        raise SystemExit("error: give --folder and --facts (or --example, to see what facts are)")
    try:
        facts = yaml.safe_load(args.facts.read_text(encoding="utf-8"))
        card = make_card(args.kind, facts, args.folder, args.results)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise SystemExit(f"error: {error}") from error
    for path in args.results:
        measured = str(read_result(path)["settings"].get("model"))
        if Path(measured).resolve() != args.folder.resolve():
            print(f"WARNING: {path} was measured on {measured}, not on {args.folder}: is it the same model?")
    card.save(args.folder / "README.md")
    print(f"written: {args.folder / 'README.md'}")


if __name__ == "__main__":
    main()
