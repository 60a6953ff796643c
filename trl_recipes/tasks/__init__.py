"""Evaluation tasks: versioned definitions (YAML) and readers of data sets as their authors published them.

    task = load_task("refcoco")
    source = open_source(task, "DATA", split="testA", protocol="per-expression")  # MissingData says what is not there
    samples = read_samples(source)
    samples[0].text, samples[0].load_image(), samples[0].load_mask()

`python -m trl_recipes.tasks` lists the tasks, checks a download and writes the images to keep out of training. A new
task is one file in `definitions/`, and a reader only where its files have a form that no reader knows.
"""

from collections.abc import Callable

from . import interactive, mvtec, own, pope, reasonseg, refcoco, semantic
from .samples import Sample, Samples
from .task import Layout, MissingData, Source, Task, load_task, open_source, read_task, task_names, verify_archives

READERS: dict[str, Callable[[Source], Samples]] = {
    "interactive": interactive.read,
    "masks": own.read_masks,
    "mvtec": mvtec.read,
    "photographs": own.read_photographs,
    "pope": pope.read,
    "reasonseg": reasonseg.read,
    "refcoco": refcoco.read,
    "scene_questions": own.read_scene_questions,
    "scenes": own.read_scenes,
    "semantic": semantic.read,
}


def read_samples(source: Source) -> Samples:
    """All samples of a task, in the order of their ids.

    Raises:
        ValueError: a file does not hold what its format says.
    """
    samples = READERS[source.task.reader](source)
    if not len(samples):
        raise ValueError(f"{source.task.name} has no samples in the split {source.split!r} of {source.root}")
    return samples


__all__ = [
    "READERS",
    "Layout",
    "MissingData",
    "Sample",
    "Samples",
    "Source",
    "Task",
    "load_task",
    "open_source",
    "read_samples",
    "read_task",
    "task_names",
    "verify_archives",
]
