"""The code that is saved with a processor, so that its folder loads where this package is not installed."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.dynamic_module_utils import get_relative_import_files

if TYPE_CHECKING:  # what is imported by name, here too, counts as needed: the pipeline goes along
    from .pipeline_argenseg import ARGenSegPipeline  # noqa: F401

PROCESSOR_CODE = {"auto_map": {"AutoProcessor": "processing_argenseg.ARGenSegProcessor"}}


def save_code(folder: str | os.PathLike, module_file: str, subfolder: str) -> None:
    """Copies a module with all that it imports by name into `folder`, flat, as `trust_remote_code` looks for it.

    Args:
        subfolder: where another part was saved with its code, which transformers looks for in `folder` as well.
    """
    for code in Path(folder, subfolder).glob("*.py"):
        code.replace(Path(folder, code.name))
    for file in {module_file, *get_relative_import_files(module_file)}:
        shutil.copyfile(file, Path(folder, Path(file).name))
