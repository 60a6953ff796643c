"""Pushes a folder to the Hub: a model, a metric or a Space. Looks first; nothing leaves the machine without `--push`.

    python -m trl_recipes.publish hub_cards/argenseg-tiny owner/argenseg-tiny
    python -m trl_recipes.publish hub_cards/argenseg-tiny owner/argenseg-tiny --push
    python -m trl_recipes.publish hub_cards/metrics/giou owner/giou --kind metric --push
    python -m trl_recipes.publish hub_cards/space owner/demo --kind space --variable MODEL=owner/argenseg-tiny --push

What is looked for: files that the kind needs, a card with a licence and no gaps, pickles (they run code when they are
loaded), leftovers of training, paths of this machine and tokens in texts, files above the limits. A folder with a
problem is not pushed. `hf auth login` (or HF_TOKEN) says who you are; HF_ENDPOINT names another Hub.
"""

import argparse
import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import HfApi, RepoCard
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import LocalTokenNotFoundError
from safetensors import SafetensorError, safe_open

from .adapters import refuse_adapters

KINDS = ("model", "metric", "space")
NEEDED = {
    "model": [
        "README.md",
        "config.json",
        "*.safetensors",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "visual_tokenizer/config.json",
        "visual_tokenizer/*.safetensors",
        "modeling_argenseg.py",
        "processing_argenseg.py",
        "pipeline_argenseg.py",
    ],
    "metric": ["README.md", "{name}.py"],
    "space": ["README.md", "app.py", "requirements.txt"],
}
LARGEST = {"model": 50e9, "metric": 10e6, "space": 10e6}  # bytes of a file
LEFT_OUT = ["__pycache__/*", "*/__pycache__/*", "*.pyc", ".DS_Store", "*/.DS_Store", ".cache/*"]
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".msgpack", ".h5"}
LEFTOVERS = ("checkpoint-*", "runs", "*.part", "*.log", "trainer_state.json", "events.out.tfevents.*", ".git")
TEXTS = {".md", ".json", ".jsonl", ".py", ".txt", ".yaml", ".yml", ".jinja", ".cfg", ".toml", ".csv", ".html"}
PLACES = re.compile(r"(?<![\w.:/])(?:/(?:home|Users|root|tmp|mnt|scratch|data|work|opt)/[\w.-]+|[A-Z]:\\\\?[\w.-]+)")
SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
GAPS = re.compile(r"\bTODO\b|\{\{|\[More Information Needed\]")
SHOWN = 3  # places in one file that are named


@dataclass
class Inspection:
    """What would be pushed (path in the repository: bytes), and what is wrong with it."""

    files: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{size / 1e6:12.3f} MB  {name}" for name, size in self.files.items()]
        lines.append(f"{sum(self.files.values()) / 1e6:12.3f} MB  in {len(self.files)} files")
        return "\n".join(lines + [f"PROBLEM: {problem}" for problem in self.problems])


def inspect(folder: Path, kind: str, repo_id: str | None = None) -> Inspection:
    """Looks at a folder as it would be pushed.

    Raises:
        ValueError: there is no such folder, or a model's holds nothing but adapters.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}")
    if kind == "model":
        refuse_adapters(folder)
    found = Inspection()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(fnmatch(name.as_posix(), pattern) for pattern in LEFT_OUT) or "__pycache__" in name.parts:
            continue
        if path.is_symlink():
            found.problems.append(f"{name}: a link; put the file itself there")
        elif path.is_file():
            found.files[name.as_posix()] = path.stat().st_size
            found.problems += [f"{name}: {problem}" for problem in check_file(path, name, kind)]
    names = [Path(name) for name in found.files]
    for pattern in NEEDED[kind]:
        wanted = pattern.format(name=folder.resolve().name)
        if not any(name.match(wanted) and len(name.parts) == len(Path(wanted).parts) for name in names):
            found.problems.append(f"{wanted} is missing: {_how_to_get(wanted)}")
    name_there = (repo_id or "").rpartition("/")[2]
    if kind == "metric" and repo_id and name_there != folder.resolve().name:
        found.problems.append(f"`evaluate.load` looks for {name_there}.py: call the repository {folder.resolve().name}")
    if "README.md" in found.files:
        found.problems += [f"README.md: {problem}" for problem in check_card(folder / "README.md")]
    return found


def _how_to_get(wanted: str) -> str:
    if wanted == "README.md":
        return "python -m trl_recipes.hub_card writes it"
    if wanted.endswith((".safetensors", ".json")) or "argenseg" in wanted:
        return "python -m trl_recipes.export writes a whole folder"
    return "this kind of repository needs it"


def check_file(path: Path, name: Path, kind: str) -> list[str]:
    """What is wrong with one file."""
    if path.suffix.lower() in PICKLES:
        return ["may hold a pickle, which runs code when it is loaded; publish safetensors"]
    if any(part.startswith("checkpoint-") or Path(part).match(one) for part in name.parts for one in LEFTOVERS):
        return ["a leftover of training; move it elsewhere"]
    size, problems = path.stat().st_size, []
    if size == 0:
        problems.append("empty")
    if size > LARGEST[kind]:
        problems.append(f"{size / 1e6:.0f} MB, and the limit for a {kind} is {LARGEST[kind] / 1e6:.0f} MB a file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                text = str(file.metadata())
        except SafetensorError as error:
            return [*problems, f"broken: {error}"]
    elif path.suffix.lower() in TEXTS or path.suffix == "":
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        return problems
    for what, pattern in (("a path of a machine", PLACES), ("an access token", SECRETS)):
        lines = [number for number, line in enumerate(text.splitlines(), start=1) if pattern.search(line)]
        if lines:
            hidden = "" if pattern is SECRETS else f" ({pattern.search(text)[0]})"  # type: ignore[index]
            problems.append(f"{what} in line {', '.join(map(str, lines[:SHOWN]))}{hidden}")
    return problems


def check_card(path: Path) -> list[str]:
    """What is wrong with a card."""
    text, problems = path.read_text(encoding="utf-8"), []
    try:
        if not RepoCard(text, ignore_metadata_errors=False).data.to_dict().get("license"):
            problems.append("its metadata (the YAML on top) name no license")
    except (ValueError, yaml.YAMLError) as error:
        problems.append(f"its metadata cannot be read: {error}")
    if gaps := GAPS.findall(text):
        problems.append(f"still to be filled in: {gaps[0]}")
    return problems


def push(
    folder: Path,
    repo_id: str,
    kind: str,
    private: bool = False,
    message: str | None = None,
    variables: dict | None = None,
) -> str:
    """Makes the repository if it is not there yet, and pushes the folder as one commit. Returns its address.

    Raises:
        ValueError: the folder has problems; nothing was pushed.
    """
    found = inspect(folder, kind, repo_id)
    if found.problems:
        raise ValueError(f"{len(found.problems)} problems, nothing was pushed:\n  " + "\n  ".join(found.problems))
    api, repo_type = HfApi(), "model" if kind == "model" else "space"
    sdk = {"model": None, "metric": "static", "space": "gradio"}[kind]
    made = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True, space_sdk=sdk)
    for name, value in (variables or {}).items():
        api.add_space_variable(made.repo_id, name, value)
    api.upload_folder(
        repo_id=made.repo_id,
        folder_path=folder,
        repo_type=repo_type,
        commit_message=message or f"Upload {kind} {folder.resolve().name}",
        ignore_patterns=LEFT_OUT,
    )
    return str(made)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what is pushed: all of it")
    parser.add_argument("repo_id", help="owner/name")
    parser.add_argument("--kind", choices=KINDS, default="model", help="default: model")
    parser.add_argument("--push", action="store_true", help="really push; without it the folder is only looked at")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument(
        "--variable",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="variable of a Space, e.g. MODEL=owner/name",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    variables = dict(pair.split("=", 1) for pair in args.variable if "=" in pair)
    if len(variables) != len(args.variable) or (variables and args.kind != "space"):
        raise SystemExit("error: --variable takes NAME=VALUE, each name once, and goes with --kind space")
    try:
        found = inspect(args.folder, args.kind, args.repo_id)
        print(found)
        if found.problems:
            raise SystemExit(f"{len(found.problems)} problems: this folder is not ready")
        if not args.push:
            print(f"dry run: {args.repo_id} was not touched. To push, add --push")
            return
        print(f"pushed: {push(args.folder, args.repo_id, args.kind, args.private, args.message, variables)}")
    except (ValueError, LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
