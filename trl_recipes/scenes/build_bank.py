"""Builds the bank of cut-outs that scenes are composed from, out of Debian and npm packages.

python -m trl_recipes.scenes.build_bank --output BANK
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..bank_building.build import build_bank
from ..bank_building.sources import SOURCES

EPILOG = """sources:
{sources}

Packages are downloaded with `apt-get download` and `npm pack`, as they are set up on this machine; root is not needed.
Where a client cannot be used, put the archives into WORK/packages by hand. A killed run goes on where it was when the
same command is given again. Files that cannot be used are listed and left out.

examples:
  python -m trl_recipes.scenes.build_bank --output bank
  without the 3-D models (no vtk needed):
    python -m trl_recipes.scenes.build_bank --output bank --skip furniture
  then look at it:
    python -m trl_recipes.scenes --bank bank --output sheet.png

The pictures stay under their authors' licences, which ATTRIBUTION.md lists: train on them, but do not publish the bank.
"""


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    listed = "\n".join(
        f"  {source.name:11} {source.kind:12} {', '.join(package.name for package in source.packages)}"
        for source in SOURCES
    )
    parser = argparse.ArgumentParser(
        prog="python -m trl_recipes.scenes.build_bank",
        description="Build the bank of cut-outs and backgrounds for composed scenes from packages.",
        epilog=EPILOG.format(sources=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for the bank")
    parser.add_argument("--work", type=Path, help="folder for downloads and stages, about 2 GB (OUTPUT/work)")
    parser.add_argument("--skip", action="append", default=[], metavar="SOURCE", help="do without it; may be repeated")
    parser.add_argument("--views", type=int, default=8, help="sides from which each 3-D model is rendered (8)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, build, and print what is in the bank."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.views < 1:
        parser.error("--views must be 1 or more")
    start = time.perf_counter()
    try:
        report = build_bank(options.output, options.work or options.output / "work", options.skip, options.views)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
    print(report)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
