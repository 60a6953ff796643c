"""Evaluation tasks: what there is, whether a download is complete, and which images training must leave out.

python -m trl_recipes.tasks list
python -m trl_recipes.tasks show refcoco
python -m trl_recipes.tasks prepare refcoco --data DATA            # every split, every image, every mask
python -m trl_recipes.tasks leakage --data DATA --output held_out.txt --training train.jsonl
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from processing.mask_inputs import load_mask

from . import MissingData, Sample, Source, Task, load_task, open_source, read_samples, task_names, verify_archives
from .leakage import find_leaks, held_out_images, splits_not_read, write_exclusions
from .task import DEFINITIONS


def prepare(task: Task, source: Source) -> dict[str, Any]:
    """Reads every sample of a split under a protocol, image and truth, and says what it found.

    Raises:
        ValueError: an image is missing or broken, or a truth has another size than its image; the sample is named.
    """
    samples = read_samples(source)
    kinds: Counter[str] = Counter()
    empty, groups = 0, set()
    for place in tqdm(range(len(samples)), desc=f"reading {source.split}", unit="sample", leave=False):
        sample = samples[place]
        kinds[sample.kind or "-"] += 1
        if task.answer == "classes" and sample.group in groups:
            continue  # the same image and label map
        groups.add(sample.group)
        empty += _check(sample)
    expected = task.counts.get(source.split, {}).get(source.protocol)
    return {
        "samples": len(samples),
        "expected": expected,
        "images": len(groups),
        "empty_truths": empty,
        "kinds": dict(sorted(kinds.items())),
        "complete": expected in (None, len(samples)),
    }


def _check(sample: Sample) -> bool:
    """Whether there is nothing to segment. Raises ValueError for what cannot be read or does not fit."""
    try:
        size = sample.load_image().size[::-1]
        if sample.load_mask is None and sample.load_labels is None:
            return False
        truth = load_mask(sample.load_mask()) if sample.load_mask else sample.load_labels()  # type: ignore[misc]
    except (ValueError, OSError) as error:
        raise ValueError(f"sample {sample.id}: {error}") from error
    if truth.shape != size:
        raise ValueError(f"sample {sample.id}: the truth is {truth.shape}, the image {size} (height, width)")
    return sample.load_mask is not None and not truth.any()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl_recipes.tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|show|prepare|leakage")
    commands.add_parser("list", help="the tasks, in a line each")
    show = commands.add_parser("show", help="a task's definition: protocol, prompt, files, where to get them")
    show.add_argument("task", choices=task_names(), metavar="TASK")
    check = commands.add_parser("prepare", help="check the files of a task, with checksums where they are known")
    check.add_argument("task", choices=task_names(), metavar="TASK")
    check.add_argument("--data", required=True, type=Path, metavar="DIR")
    check.add_argument("--images", type=Path, metavar="DIR", help="folder of the images, if they lie elsewhere")
    check.add_argument("--split", nargs="+", help="default: all that are there")
    leak = commands.add_parser("leakage", help="list COCO images that training must leave out, and look for them")
    leak.add_argument("--data", required=True, type=Path, metavar="DIR", help="RefCOCO's annotations")
    leak.add_argument("--output", required=True, type=Path, metavar="FILE", help="the list, one COCO id a line")
    leak.add_argument("--training", nargs="*", default=[], type=Path, metavar="FILE", help="files that name images")
    return parser


def _prepare(args: argparse.Namespace) -> None:
    task = load_task(args.task)
    for name in verify_archives(task, args.data):
        print(f"{name}: the checksum is right")
    read, missing = 0, None
    for split in args.split or task.splits:
        try:
            for protocol in task.protocols:
                source = open_source(task, args.data, split, protocol, args.images)
                print(f"{split}, {protocol} ({source.format}): {json.dumps(prepare(task, source))}")
                read += 1
        except MissingData as error:
            if args.split:
                raise
            missing = missing or error
            print(f"{split}: not there")
    if not read and missing:
        raise missing


def _leakage(args: argparse.Namespace) -> None:
    images, read = held_out_images(args.data)
    write_exclusions(args.output, images, read)
    print(f"{len(images)} images of {', '.join(read)} are in {args.output}")
    if others := splits_not_read(read):
        print(f"not read, and not in it: {', '.join(others)}")
    leaks = {path: find_leaks(path, images) for path in args.training}
    for path, found in leaks.items():
        print(f"{path}: {len(found)} of them" + (f", such as {sorted(found)[:3]}" if found else ""))
    if any(leaks.values()):
        raise ValueError(
            f"training data names images of validation or test splits: train with --leave_out {args.output}"
        )


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    try:
        if args.command == "list":
            for name in task_names():
                task = load_task(name)
                print(f"{name:22s} v{task.version}  {task.title} ({', '.join(task.splits)})")
        elif args.command == "show":
            print((DEFINITIONS / f"{args.task}.yaml").read_text(encoding="utf-8"), end="")
        elif args.command == "prepare":
            _prepare(args)
        else:
            _leakage(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
