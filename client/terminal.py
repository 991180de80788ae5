"""How commands speak, whatever the terminal: an encoding that lacks a character, few columns, square brackets."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

PLAINER = "plainer"  # how a character is written that an encoding lacks
PLAIN = {
    "−": "-", "–": "-", "—": "-", "…": "...", "±": "+/-", "×": "x", "·": "*", "≤": "<=", "≥": ">=", "≈": "~",
    "→": "->", "←": "<-", "∞": "inf", "ε": "epsilon", "δ": "delta", "σ": "sigma", "μ": "mu", "‖": "||", "√": "sqrt",
    "‘": "'", "’": "'", "“": '"', "”": '"', "•": "*", "○": "o", "●": "o", "✓": "v", "━": "-", "╸": "-", "╺": "-",
}  # fmt: skip
SPINNING = range(0x2800, 0x2900)  # Braille, of which a spinner is made


def speak_plainly() -> None:
    """Lets nothing that is printed fail: what an encoding lacks is written in other characters."""
    codecs.register_error(PLAINER, _plainer)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAINER)


def _plainer(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_plain(c) for c in lacking), error.end


def _plain(character: str) -> str:
    if ord(character) in SPINNING:
        return "*"
    return PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode("ascii")


def wide(console: Console, columns: int) -> Console:
    """The console, with so many columns at least where it writes to no terminal and nobody has said how many."""
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(width=max(console.width, columns), markup=False)


@contextmanager
def telling(start: str) -> Iterator[Callable[[str], None]]:
    """What is being done, on stderr: a line that changes on a terminal, else one more line for each part of the work.

    A phase of a part is told as `part: phase`.
    """
    told, part = Console(stderr=True, markup=False), ""

    def tell(text: str) -> None:
        nonlocal part
        before, part = part, text.rpartition(": ")[0] or text
        if part != before:
            told.print(part, soft_wrap=True)

    if not told.is_terminal:
        yield tell
        return
    with told.status(Text(start)) as status:
        yield lambda text: status.update(Text(text))


class Figures(Table):
    """A table of which no figure is ever cut: headings are wrapped first, then each row becomes lines of its own."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width
        if self.__rich_measure__(console, options.update(width=10_000)).maximum <= room:
            yield from super().__rich_console__(console, options)
            return
        for lines in (2, room):
            narrow = self._narrowed(console, lines)
            if narrow.__rich_measure__(console, options.update(width=10_000)).maximum <= room:
                yield from Table.__rich_console__(narrow, console, options)
                return
        yield from self._listed(console, room)

    def _narrowed(self, console: Console, lines: int) -> Table:
        """With columns as narrow as their cells, and as their headings in so many lines."""
        narrow = copy(self)
        narrow.columns = [_narrowed(column, lines, console) for column in self.columns]
        return narrow

    def _listed(self, console: Console, room: int) -> Iterator[Text]:
        """The first cell of each row, and beneath it `heading: figure`, in two lines where one is too short."""
        if self.title:
            yield _text(self.title, console)
        names = [_text(column.header, console).plain for column in self.columns]
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            first, *others = (_text(cell, console) for cell in cells)
            yield first
            for name, found in zip(names[1:], others, strict=True):
                if found.plain:
                    fits = cell_len(f"  {name}: {found.plain}") <= room
                    yield Text(f"  {name}: " if fits else f"  {name}:\n    ") + found


def _narrowed(column: Column, lines: int, console: Console) -> Column:
    narrow, heading = copy(column), _text(column.header, console)
    cells = [cell_len(_text(cell, console).plain) for cell in column.cells]
    widths = range(max((*cells, *map(cell_len, heading.plain.split())), default=1), cell_len(heading.plain) + 1)
    narrow.width = next((w for w in widths if len(heading.wrap(console, w)) <= lines), widths.start)
    return narrow


def _text(cell: object, console: Console) -> Text:
    return cell.copy() if isinstance(cell, Text) else console.render_str(str(cell))
