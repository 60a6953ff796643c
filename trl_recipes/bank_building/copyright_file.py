"""Authors and licences out of a Debian package's machine-readable copyright file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True)
class CopyrightFile:
    """`paragraphs` are (patterns, author, licence) in the file's order: the last that fits a file holds for it."""

    paragraphs: tuple[tuple[tuple[str, ...], str, str], ...]

    @classmethod
    def read(cls, path: Path) -> CopyrightFile:
        """Reads the file; what it does not say, or a file that is missing, becomes "not stated"."""
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        found = []
        for paragraph in re.split(r"\n\s*\n", text):
            fields = dict(
                re.findall(r"^(Files|Copyright|License):[ \t]*(.*(?:\n[ \t].*)*)", paragraph, flags=re.MULTILINE)
            )
            if "Files" in fields:
                author = "; ".join(line.strip() for line in fields.get("Copyright", "").splitlines() if line.strip())
                licence = fields.get("License", "").split("\n")[0].strip()
                found.append((tuple(fields["Files"].split()), author, licence))
        return cls(tuple(found))

    def of(self, file: str) -> tuple[str, str]:
        """Author and licence of an installed file. Patterns are of the source tree: the file's end has to fit."""
        author, licence = "", ""
        ends = [file[place:] for place in (0, *(found.end() for found in re.finditer("/", file)))]
        for patterns, someone, something in self.paragraphs:
            if any(_fits(end, pattern) for pattern in patterns for end in ends):
                author, licence = someone, something
        return author or "not stated", licence or "not stated"


def _fits(end: str, pattern: str) -> bool:
    if pattern == "*":
        return True
    # The source tree may have a folder that the package lacks: "16.04/life.jpg" is installed as "backgrounds/life.jpg".
    return fnmatchcase(end, pattern) or ("*" not in pattern and end == pattern.rpartition("/")[2])
