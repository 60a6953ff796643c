"""Measures the evaluation itself: a stub answers at once, and everything else is what `trl_recipes.evaluate` runs.

    python examples/evaluation_dry_run.py
    python examples/evaluation_dry_run.py --samples 5000 --metrics boundary_iou calibration

Masks of 480x640 pixels, blobs with ragged edges, go through storing (COCO RLE, one line each, forced to the disk batch
by batch), scoring from the stored lines, and confidence intervals. Prints the milliseconds of each for one mask and the
peak of memory, after a fifth of the samples and after all of them: it does not grow with their number.

It is a program beside the command, not an option of it: what a user runs holds nothing that is not for use.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from trl_recipes.evaluation.predictions import predict
from trl_recipes.evaluation.scoring import EXTRA, score
from trl_recipes.evaluation.store import PredictionStore
from trl_recipes.metrics import to_rle
from trl_recipes.tasks import Sample, Samples, load_task

HEIGHT, WIDTH = 480, 640
POOL = 64  # different masks


def blob(rng: np.random.Generator) -> np.ndarray:
    """A random mask (480, 640) with a ragged outline, of 1 to 40 % of the picture."""
    noise = Image.fromarray(rng.integers(256, size=(HEIGHT, WIDTH), dtype=np.uint8))
    smooth = np.asarray(noise.filter(ImageFilter.GaussianBlur(6))).astype(float)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(x - rng.uniform(150, WIDTH - 150), y - rng.uniform(120, HEIGHT - 120))
    return distance + 4 * (smooth - smooth.mean()) < rng.uniform(35, 200)


class Stub:
    """Answers with masks that lie ready, every tenth time with words alone."""

    def __init__(self, masks: list[np.ndarray]) -> None:
        self.masks, self.number = masks, 0

    def __call__(self, samples: Any) -> list[dict[str, Any]]:
        found = []
        for sample in samples:
            self.number += 1
            mask = None if self.number % 10 == 0 else self.masks[(7 * self.number) % POOL]
            text = "There is none." if mask is None else "Sure, the segmentation result: ."
            found.append({"id": sample.id, "text": text, "mask": mask, "score": None if mask is None else 0.5})
        return found


def peak_megabytes() -> float:
    """Largest memory of this process so far."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def measure(count: int, masks: list[np.ndarray], batch_size: int, extra: list[str]) -> dict[str, float]:
    """Milliseconds a mask of every step, and the peak of memory, for a run over `count` samples."""
    truths = [to_rle(mask) for mask in masks]

    def make(place: int) -> Sample:
        truth = truths[place % POOL]
        load_image = partial(Image.new, "RGB", (WIDTH, HEIGHT))
        kind, group = ("small", "medium", "large")[place % 3], f"{place // 3}"
        return Sample(f"{place:06d}", "a thing", load_image, lambda: truth, kind=kind, group=group)

    samples, task = Samples([f"{place:06d}" for place in range(count)], make), load_task("grefcoco")
    with tempfile.TemporaryDirectory() as folder:
        store = PredictionStore(Path(folder)).read()
        store.open_for(0)
        clock = [time.perf_counter()]
        predict(Stub(masks), samples, store, batch_size, progress=False)
        clock.append(time.perf_counter())
        store.close()
        scores = score(task, samples, PredictionStore(Path(folder)).read(), extra, progress=False)
        clock.append(time.perf_counter())
        result = scores.result(1000, 0)
        clock.append(time.perf_counter())
    assert result["answers"]["total"] == count
    storing, scoring, intervals = (1000 * (b - a) / count for a, b in zip(clock, clock[1:], strict=False))
    whole = 1000 * (clock[-1] - clock[0]) / count
    return {"storing": storing, "scoring": scoring, "intervals": intervals, "together": whole, "peak": peak_megabytes()}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5000, metavar="N", help="default: 5000")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--metrics", nargs="+", default=[], choices=EXTRA, help="metrics beside the task's own")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    if args.samples < 5:
        raise SystemExit("error: --samples must be at least 5")
    rng = np.random.default_rng(0)
    masks = [blob(rng) for _ in range(POOL)]
    measure(min(args.samples, 200), masks, args.batch_size, args.metrics)  # what is set up only once
    for count in (args.samples // 5, args.samples):
        found = measure(count, masks, args.batch_size, args.metrics)
        steps = ", ".join(f"{name} {found[name]:.2f}" for name in ("storing", "scoring", "intervals", "together"))
        print(f"{count} masks of {HEIGHT}x{WIDTH}: {steps} ms a mask; peak of memory {found['peak']:.0f} MB")


if __name__ == "__main__":
    main()
