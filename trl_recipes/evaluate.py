"""Measures a model on a task, with any number of processes; a run that was stopped goes on where it was.

    accelerate launch -m trl_recipes.evaluate --model MODEL --task refcoco --split testA --data DATA
    accelerate launch --num_processes 8 -m trl_recipes.evaluate --model MODEL --task reasonseg --data DATA
    accelerate launch -m trl_recipes.evaluate --model MODEL --task scenes --data BANK
    accelerate launch -m trl_recipes.evaluate --model MODEL --task real --data PHOTOGRAPHS

Without a GPU `accelerate launch` starts several processes only with `--multi_gpu` (sic):

    accelerate launch --multi_gpu --num_processes 2 -m trl_recipes.evaluate --model MODEL --task real --data PHOTOGRAPHS

`python -m trl_recipes.tasks list` tells which tasks there are; without its data a task says what it needs and where to
get it. What a run leaves in its output folder:

  result.json               metrics with confidence intervals, the protocol in words, settings, commit and versions that
                            answered (in `went_on_with` those of a run that went on after a change) and that scored
  scores.jsonl              the score of every sample
  gallery.html              the worst and the best answers
  predictions-*.jsonl       every answer, its mask as COCO RLE: one file a process
  run.json                  what the predictions depend on (model, processor, data, settings), and the code they are of

The same command again goes on with a run that was stopped, with as many processes as you like, and on a run that is
complete only computes the scores again. The numbers do not depend on the number of processes, bit for bit: batches are
formed by the order of sample ids, whoever answers them, and scores are computed from the stored predictions.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from modeling_argenseg import ARGenSegForConditionalGeneration
from processing import ARGenSegProcessor

from .command_line import loading
from .evaluation.gallery import write_gallery
from .evaluation.predictions import ModelPredictor, predict
from .evaluation.report import (
    answered_by,
    check_answers,
    code,
    hash_samples,
    model_settings,
    processor_settings,
    start_answers,
)
from .evaluation.scoring import EXTRA, Scores, score
from .evaluation.store import PATTERN, PredictionStore
from .settings_files import hash_files, hash_texts, write_whole
from .tasks import Samples, Source, load_task, open_source, read_samples, semantic, task_names

DTYPES = ("auto", "float32", "bfloat16", "float16")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl_recipes.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_task_arguments(parser)
    add = parser.add_argument
    add("--protocol", help="such as per-expression or merged; default: the task's first one")
    add("--limit", type=int, metavar="N", help="only the first N samples (of closed vocabularies: images), for a try")
    add("--batch-size", type=int, default=16, metavar="N", help="samples answered together (default: 16)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, as saved)")
    add("--zoom", action="store_true", help="draw every mask again from nearer: finer, slower, and not the paper's way")
    add(
        "--follow-edges", action=argparse.BooleanOptionalAction, help="masks follow the edges of their image, which is "
        "not the paper's way either (default: as the model's processor says)",
    )  # fmt: skip
    add("--max-new-tokens", type=int, metavar="N", help="text tokens an answer may have; pictures do not count")
    add(
        "--cpu-threads", type=int, default=1, metavar="N", help="threads of each process on a CPU (default: 1; sums of "
        "several threads can differ in their last bits, so use more processes to go faster)",
    )  # fmt: skip
    add("--metrics", nargs="+", default=[], choices=EXTRA, help="metrics beside the task's own, for masks")
    add("--bootstrap", type=int, default=1000, metavar="N", help="repeats for confidence intervals (default: 1000)")
    add("--seed", type=int, default=0, help="of the confidence intervals; answers are greedy (default: 0)")
    add("--gallery", type=int, default=12, metavar="N", help="worst and best answers to show (default: 12, 0: no page)")
    add("--output", type=Path, metavar="DIR", help="default: outputs/evaluation/MODEL/TASK-SPLIT-PROTOCOL...")
    add("--overwrite", action="store_true", help="begin anew, and delete the predictions in the output folder")
    return parser


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and which samples: what `open_task` reads."""
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub name of a model with its processor")
    add("--task", required=True, choices=task_names(), metavar="TASK", help=", ".join(task_names()))
    add("--data", required=True, type=Path, metavar="DIR", help="folder of the task's data")
    add("--images", type=Path, metavar="DIR", help="folder of its images, if they lie elsewhere")
    add("--split", help="default: the task's first one")
    add(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="another setting of the task's reader, "
        "such as preset=easy or preset=easy+full for scenes; results say so (may be given several times)",
    )  # fmt: skip


def open_task(args: argparse.Namespace, protocol: str | None = None) -> Source:
    """The source that `add_task_arguments` named. Raises ValueError, OSError: there is none like it."""
    options = dict(_option(one) for one in args.option)
    return open_source(load_task(args.task), args.data, args.split, protocol, args.images, options)


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    for name in ("batch_size", "cpu_threads", "limit", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SystemExit(f"error: --{name.replace('_', '-')} must be at least 1")
    for name in ("bootstrap", "gallery", "seed"):
        if getattr(args, name) < 0:
            raise SystemExit(f"error: --{name} must be at least 0")
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # a process that is done waits for the others, however long they take
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))
    try:
        run(args, state)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        state.destroy_process_group()


def run(args: argparse.Namespace, state: PartialState) -> None:
    """Predictions of this process, then, in the first one, scores of all.

    Raises:
        ValueError, OSError: the input is at fault.
    """
    started = time.time()
    source = open_task(args, args.protocol)
    task = source.task
    if args.zoom and task.reader == "interactive":
        raise ValueError("--zoom: what is marked in an image, or told in its coordinates, is not so in its parts")
    samples, class_names, cut = load_samples(source, args.limit)
    if task.reader == "masks" and source.format != "split" and state.is_main_process:
        print(
            f"these data have no splits: all {len(samples)} rows are asked, also what training has seen",
            file=sys.stderr,
        )
    Scores.for_task(task, args.metrics, class_names)  # says now, not at the end, what cannot be
    folder = args.output or default_output(args.model, source, args.zoom, args.follow_edges)
    if state.device.type == "cpu":
        torch.set_num_threads(args.cpu_threads)
    model, processor = load_model(args.model, args.dtype, state.device)
    settings = run_settings(args, source, samples, model, processor, state.device)
    if state.is_main_process:
        start_folder(folder, args.overwrite)
        start_answers(folder / "run.json", settings)
    state.wait_for_everyone()
    check_answers(folder / "run.json", settings)
    store = PredictionStore(folder).read()
    state.wait_for_everyone()  # everybody has read: nobody writes before
    if state.is_main_process:
        if len(store):
            print(f"going on: {len(store)} predictions are there already", file=sys.stderr)
        if any(name not in store for name in samples.ids) and len(answered_by(folder / "run.json", code())) > 1:
            print("going on with another commit or other versions than before; the result says so", file=sys.stderr)
    store.open_for(state.process_index)
    options = {"zoom": args.zoom, "follow_edges": settings["follow_edges"]}
    options |= {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    predictor = ModelPredictor.for_task(model, processor, task, source.protocol, **options)
    rank, processes = state.process_index, state.num_processes
    predict(predictor, samples, store, args.batch_size, rank, processes, progress=state.is_main_process)
    store.close()
    state.wait_for_everyone()
    if state.is_main_process:
        store = PredictionStore(folder).read()
        scores = score(task, samples, store, args.metrics, class_names)
        about = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - started, 1),
            "processes": processes,
            "duplicates": store.duplicates,
        }
        codes = answered_by(folder / "run.json")
        report(args, source, settings, codes, scores, samples, store, folder, about, cut)


def load_samples(source: Source, limit: int | None) -> tuple[Samples, list[str], bool]:
    """The samples to be answered, the vocabulary of a closed-vocabulary task, every name once, and whether there are
    more samples than the limit."""
    samples = read_samples(source)
    names: list[str] = []
    if source.task.answer == "classes":
        for name in semantic.vocabulary(source)[1]:
            names.append(f"{name} ({len(names)})" if name in names else name)
    kept = samples if limit is None else samples.first(limit * max(1, len(names)))
    return kept, names, len(kept) < len(samples)


def load_model(name: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """Model and processor of a folder or Hub name; checkpoints as released are read as they are.

    Raises:
        ValueError: there is no such model, see `loading`.
    """
    with loading(name):
        model = ARGenSegForConditionalGeneration.from_pretrained(name, dtype=dtype)
        processor = ARGenSegProcessor.from_pretrained(name)
    if processor.visual_tokenizer is not None:
        processor.visual_tokenizer.to(device)
    return model.to(device).eval(), processor


def _option(text: str) -> tuple[str, Any]:
    """`name=value`, the value as YAML reads it. Raises ValueError without an equals sign."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option takes NAME=VALUE, not {text!r}")
    return name, yaml.safe_load(value)


def default_output(model: str, source: Source, zoom: bool = False, follow_edges: bool | None = None) -> Path:
    name = Path(model).name if Path(model).is_dir() else model.replace("/", "--")
    run_name = f"{source.task.name}-{source.split}-{source.protocol}" + ("-zoom" if zoom else "")
    asked = {None: "", True: "-edges", False: "-no-edges"}[follow_edges]
    return Path("outputs/evaluation") / name / (run_name + asked)


def start_folder(folder: Path, overwrite: bool) -> None:
    """Makes the output folder; with `overwrite`, what an earlier run left in it goes, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for pattern in (PATTERN, "run.json", "result.json", "scores.jsonl", "gallery.html"):
            for path in folder.glob(pattern):
                path.unlink()


def run_settings(
    args: argparse.Namespace, source: Source, samples: Samples, model: Any, processor: Any, device: torch.device
) -> dict[str, Any]:
    """What predictions depend on. A run goes on only under the settings that it began with."""
    task = source.task
    return {
        "task": task.name,
        "version": task.version,
        "split": source.split,
        "protocol": source.protocol,
        "prompt": task.prompts[source.protocol],
        "options": source.options,
        "prompts_of_kinds": task.prompts_of_kinds,
        "data_format": source.format,
        "data_files": hash_files([path for paths in source.files for path in paths]),
        "samples": len(samples),
        "sample_ids": hash_texts(samples.ids),
        "sample_contents": hash_samples(samples),
        "images": None if args.images is None else str(args.images),
        "model": args.model,
        **model_settings(model),
        "processor": processor_settings(processor),
        "hub_commit": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "zoom": args.zoom,
        "follow_edges": task.answer != "text"
        and (processor.follow_edges if args.follow_edges is None else args.follow_edges),
        "device": device.type,
        "cpu_threads": args.cpu_threads if device.type == "cpu" else None,
    }


def report(
    args: argparse.Namespace,
    source: Source,
    settings: dict[str, Any],
    codes: list[dict[str, Any]],
    scores: Scores,
    samples: Samples,
    store: PredictionStore,
    folder: Path,
    about: dict[str, Any],
    cut: bool,
) -> None:
    """Writes result.json, scores.jsonl and gallery.html, and prints what counts; `codes` made the predictions, and
    `cut` says that there are more samples."""
    task, expected = source.task, source.task.counts.get(source.split, {}).get(source.protocol)
    result = {
        "task": task.name,
        "version": task.version,
        "split": source.split,
        "protocol": source.protocol,
        "protocol_in_words": task.protocols[source.protocol],
        "complete": not cut and expected in (None, len(samples)),
        "expected_samples": expected,
        **scores.result(args.bootstrap, args.seed),
        "settings": settings,
        "code": {name: value for name, value in codes[0].items() if name != "versions"},
        "versions": codes[0]["versions"],
        "went_on_with": codes[1:],
        "scored_by": code(),
        "run": about,
    }
    write_whole(folder / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    lines = [json.dumps({"id": name, "score": value}) + "\n" for name, value in scores.values]
    write_whole(folder / "scores.jsonl", "".join(lines))
    title = f"{args.model} on {task.name}, {source.split}, {source.protocol}" + (", zooming in" if args.zoom else "")
    title += ", masks following edges" if settings["follow_edges"] else ""
    summary = summarise(result)
    print("\n".join([title, *("  " + line for line in summary), f"  written to {folder / 'result.json'}"]))
    if args.gallery:
        write_gallery(folder / "gallery.html", title, summary, scores, samples, store, args.gallery)


def summarise(result: dict[str, Any]) -> list[str]:
    """The result in a few lines for people: metrics with intervals, a table of kinds, counts, warnings."""
    lines = []
    for metric, numbers in result["metrics"].items():
        intervals = result["confidence"]["intervals"].get(metric, {})
        shown = {name: value for name, value in numbers.items() if not _is_detail(name, result["kinds"])}
        for name, value in shown.items():
            low_high = "" if name not in intervals or name == "count" else "  [{:.4f}, {:.4f}]".format(*intervals[name])
            number = f"{value}" if isinstance(value, int) else f"{value:.4f}"
            lines.append(f"{metric + ' ' + name:32s} {number:>8s}{low_high}")
    for kind, numbers in result["kinds"].items():
        told = [f"{name} {value:.4f}" for name, value in numbers.items() if name != "count" and "@" not in name]
        lines.append(f"of kind {kind} ({numbers['count']}): {', '.join(told)}")
    answers = result["answers"]
    lines.append(f"invalid answers: {answers['invalid']} of {answers['total']} ({answers['invalid_means']})")
    if not result["complete"]:
        expected = result["expected_samples"]
        of = f" of {expected}" if expected else ""
        lines.append(f"NOT THE WHOLE TASK: {answers['total']}{of} answers; not to be compared with published numbers")
    return lines


def _is_detail(name: str, kinds: dict[str, Any]) -> bool:
    """Numbers of one class or one kind: they are in result.json, and kinds in their own table."""
    return name.startswith("iou_") or any(name.endswith(f"_{kind}") for kind in kinds)


if __name__ == "__main__":
    main()
