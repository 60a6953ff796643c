"""How fast masks are drawn, side by side with what people would use instead, on the same weights.

    python examples/benchmark.py                    # the small published model, on this machine's CPU
    python examples/benchmark.py --size reference   # a size at which every part weighs something; minutes
    python examples/benchmark.py --size reference --modes released ours "ours fast" --repeats 3
    python examples/benchmark.py --size 8b --device cuda --dtype bfloat16 --static

Modes (one row of the table each):
  released        the released procedure, rebuilt: the answer token by token, logits of the whole vocabulary at every
                  position, ten passes for a picture, the decoder after every scale, one prompt at a time
  sequential      256 visual tokens, one a pass, as single-scale models draw (no decoder)
  ours            one prompt
  images          as many images as --count says, one prompt each, as one batch
  prompts         so many prompts on one image, which is read once
  ... fast        the same with the decoder in bfloat16, which leaves every token as it is

A run is from pixels and token ids to a mask of the image's size. "rest" is what no part of the model accounts for. All
sizes but tiny have random weights; the text of the answer is then given, and costs what it would cost. Each repeat runs
all modes in turn, so that other load meets all of them; what is printed are medians.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads make small operations crawl

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import CompileConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmarks.cases import ROOT, SIZES, TINY, build
from benchmarks.floors import floors
from benchmarks.modes import modes, ours, released
from benchmarks.stopwatch import PARTS, Stopwatch, peak_memory

MODES = ("released", "sequential", "ours", "ours fast", "images", "images fast", "prompts", "prompts fast")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
START_UP = """
import time
begin = time.perf_counter()
import os; os.environ.setdefault("OMP_WAIT_POLICY", "passive")
from transformers import pipeline
import modeling_argenseg
pipe = pipeline("image-segmentation", model=MODEL)
loaded = time.perf_counter()
for _ in range(4):
    last = time.perf_counter()
    found = pipe(IMAGE, text="the sheep")
    now = time.perf_counter()
print(loaded - begin, now - last, len(found))
"""


def measure(case: Any, watch: Stopwatch, chosen: dict[str, Any], repeats: int) -> dict[str, dict[str, float]]:
    """Mode -> medians of the seconds of each part, and what follows from them."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    memory: dict[str, float] = {}
    bar = tqdm(total=(repeats + 1) * len(chosen), desc=case.name, unit="run")
    for repeat in range(repeats + 1):  # the first run of each mode warms up, and is where memory is taken
        for name, (_, run) in chosen.items():
            with peak_memory(case.model.device) as peak:
                found = watch.time(run)
            if repeat:
                runs[name].append(found)
            else:
                memory[name] = peak[0]
            bar.update()
    bar.close()
    results = {}
    for name, (masks, _) in chosen.items():
        median = {part: statistics.median(run[part] for run in runs[name]) for part in (*PARTS, "total")}
        totals = [run["total"] for run in runs[name]]
        results[name] = median | {
            "masks": masks,
            "per_mask": median["total"] / masks,
            "fastest": min(totals),
            "slowest": max(totals),
            "peak_mb": memory[name],
        }
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """The results in Markdown; milliseconds for one run, then what one mask costs and how much faster that is."""
    base = results.get("released")
    lines = ["| mode | masks | " + " | ".join(PARTS) + " | total ms | ms a mask | times released | peak MB |"]
    lines.append("|---" * (len(PARTS) + 6) + "|")
    for name, found in results.items():
        parts = " | ".join(f"{1000 * found[part]:.1f}" for part in PARTS)
        faster = f"{base['per_mask'] / found['per_mask']:.2f}" if base and name != "sequential" else "-"
        total, one = f"{1000 * found['total']:.1f}", f"{1000 * found['per_mask']:.1f}"
        lines.append(
            f"| {name} | {found['masks']:.0f} | {parts} | {total} | {one} | {faster} | {found['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


def ratios(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the table is read for."""
    found = {}
    for name in results:
        if name not in ("released", "sequential") and "released" in results:
            found[f"{name}: times the released masks per second"] = (
                results["released"]["per_mask"] / results[name]["per_mask"]
            )
    if "ours" in results and "sequential" in results:
        drawing = {name: results[name]["scales"] + results[name]["visual head"] for name in ("ours", "sequential")}
        found["drawing in the language model: share of 256 sequential steps"] = drawing["ours"] / drawing["sequential"]
    return found


def describe(case: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Shapes, types, threads and versions, without which figures mean nothing."""
    config = case.model.config
    text, vision = config.text_config, config.vlm_config.vision_config
    pictures = config.visual_tokenizer_config
    return {
        "size": case.name,
        "language_model": f"{text.num_hidden_layers} x {text.hidden_size}, vocabulary {text.vocab_size}",
        "vision": f"{vision.num_hidden_layers} x {vision.hidden_size}, {tuple(case.pixel_values.shape[2:])} px",
        "decoder": f"{pictures.base_channels} channels, {pictures.image_size} px",
        "scales": list(config.patch_nums),
        "prompt": [len(prompt) for prompt in case.prompts[: args.count]],
        "answer": len(case.answer_ids),
        "parameters": case.model.num_parameters(),
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device,
        "threads": torch.get_num_threads(),
        "attention": case.model.model.language_model.config._attn_implementation,
        "cache": "static" if args.static else "dynamic",
        "compiled": args.static and (args.compile or args.device != "cpu"),
        "repeats": args.repeats,
        "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def same_ids(case: Any, watch: Stopwatch, options: dict[str, Any]) -> int:
    """How many visual tokens of one picture differ between the released procedure and ours."""
    return int((released(case, watch) != ours(case, **options)).sum())


def start_up() -> dict[str, float]:
    """A fresh process: seconds to import and load the small model, and for a mask of the photograph after that."""
    places = {"MODEL": str(ROOT / TINY), "IMAGE": str(ROOT / "examples" / "sheep.jpg")}
    code = "\n".join(f"{name} = {value!r}" for name, value in places.items()) + START_UP
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    load, mask, count = map(float, done.stdout.split())
    return {"import_and_load_s": load, "mask_s": mask, "masks_found": count}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", *SIZES], default="tiny", help="which model (default: tiny)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="which rows (default: all)")
    parser.add_argument("--count", type=int, default=8, help="images, or prompts on one image (default: 8)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each mode, after one to warm up")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of the model; the tokenizer is float32"
    )
    parser.add_argument("--static", action="store_true", help="static cache; on a GPU also compiled, with CUDA graphs")
    parser.add_argument(
        "--compile", action="store_true", help="with --static: compile on a CPU, too (needs a compiler)"
    )
    parser.add_argument("--floors", action="store_true", help="also what one prompt would take at the memory's speed")
    parser.add_argument("--start-up", action="store_true", help="also import, load and a mask in a fresh process")
    parser.add_argument("--quick", action="store_true", help="one repeat, two images or prompts: does everything run?")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.quick:
        args.repeats, args.count = 1, 2
    if min(args.count, args.repeats, args.threads) < 1:
        parser.error("--count, --repeats and --threads must be at least 1")
    if args.compile and not args.static:
        parser.error("--compile needs --static")
    torch.set_num_threads(args.threads)
    try:
        case = build(args.size, args.device, DTYPES[args.dtype])
    except ValueError as error:
        parser.error(str(error))
    options: dict[str, Any] = {"cache_implementation": "static"} if args.static else {}
    if args.compile:
        options["compile_config"] = CompileConfig(mode="default", dynamic=False)
        options["compile_config"]._compile_all_devices = True
    setup = describe(case, args)
    watch = Stopwatch(case, compiled=bool(setup["compiled"]))
    available = modes(case, watch, args.count, **options)
    print("\n".join(f"{name}: {value}" for name, value in setup.items()))
    report: dict[str, Any] = {"setup": setup}
    if "released" in args.modes and args.dtype == "float32":
        report["ids_that_differ"] = same_ids(case, watch, options)
        print(f"ids that differ between released and ours: {report['ids_that_differ']}")
    report["modes"] = measure(case, watch, {name: available[name] for name in args.modes}, args.repeats)
    print(f"\n{table(report['modes'])}\n")
    report["ratios"] = ratios(report["modes"])
    print("\n".join(f"{name}: {value:.3f}" for name, value in report["ratios"].items()))
    if args.floors:
        report["floors"] = floors(case, report["modes"])
        print("\n" + "\n".join(f"{name}: {value:.4g}" for name, value in report["floors"].items()))
    if args.start_up:
        report["start_up"] = start_up()
        print("\n" + "\n".join(f"{name}: {value:.3g}" for name, value in report["start_up"].items()))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
