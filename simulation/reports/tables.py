"""The tables of a page as files: CSV and LaTeX, cell for cell what the page shows.

They are read off the page, so that nothing is rounded twice. Not covered: what a page draws.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from florilegium.simulation.runs.errors import RunError

MARK = ".made-by-florilegium"  # in a folder that may be written anew
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "∞": r"$\infty$",
    "ε": r"$\varepsilon$", "δ": r"$\delta$", "×": r"$\times$", "–": "--", "…": r"\dots{}",
}  # fmt: skip


@dataclass
class PageTable:
    """One table: its name on the page, what it says of itself, its rows, the first of them headings."""

    name: str
    caption: str = ""
    rows: list[list[str]] = field(default_factory=list)

    @property
    def file(self) -> str:
        """A name of a file without its ending."""
        return re.sub(r"\W+", "-", self.name.lower()).strip("-")


class _Reader(HTMLParser):
    """Keeps tables that stand in a region with a name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[PageTable] = []
        self.name, self.text, self.inside = "", "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div" and dict(attrs).get("role") == "region":
            self.name = dict(attrs).get("aria-label") or ""
        elif tag == "table" and self.name:
            self.found.append(PageTable(self.name))
            self.inside = True
        elif self.inside and tag == "tr":
            self.found[-1].rows.append([])
        elif tag in ("th", "td", "caption"):
            self.text = ""
        elif tag == "br":
            self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.inside, self.name = False, ""
        elif self.inside and tag == "caption":
            self.found[-1].caption = " ".join(self.text.split())
        elif self.inside and tag in ("th", "td"):
            self.found[-1].rows[-1].append(" ".join(self.text.split()))


def tables_of(page: str) -> list[PageTable]:
    """The named tables of a page."""
    reader = _Reader()
    reader.feed(page)
    return reader.found


def write_tables(page: Path, folder: Path) -> list[Path]:
    """Writes each table of a page as CSV and LaTeX; raises `RunError` for a folder with files of others."""
    own_folder(folder)
    found = []
    for table in tables_of(page.read_text(encoding="utf-8")):
        found += [folder / f"{table.file}.csv", folder / f"{table.file}.tex"]
        with found[-2].open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows(table.rows)
        found[-1].write_text(as_latex(table), encoding="utf-8")
    return found


def own_folder(folder: Path) -> None:
    """Makes a folder for exports, or takes that of an earlier one. Raises `RunError` where others' files lie."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise RunError(f"{folder} holds files that are not of an export; they are left alone: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def as_latex(table: PageTable) -> str:
    """With the commands of booktabs; the first column is of names."""
    head, *rows = table.rows
    lines = [
        rf"% {table.caption}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        _line(head),
        r"\midrule",
        *map(_line, rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return " & ".join("".join(LATEX.get(c, c) for c in cell) for cell in cells) + r" \\"
