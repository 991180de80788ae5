"""What the commands share: the program, the console that they print to, and how one of them is stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
import typer.core
from rich.console import Console

typer.core.HAS_RICH = False  # with it the Typer that Flower takes shows `[` as `\[`
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # `main` tells of errors; values can hold what people said
    rich_markup_mode=None,  # with it `[bench]` would be a style, and not be shown
    help="Private, personal language models in simulated federations. Begin with: florilegium run quickstart",
)
console = Console(markup=False)  # what is told may hold square brackets


@contextmanager
def interruptible(text: str = "stopped") -> Iterator[None]:
    """Ctrl-C or `kill` ends what is being done in here, with all that it has started.

    The text is for an end of which nothing else is told.
    """
    from florilegium.simulation.runs.stopping import Stopped, stoppable

    try:
        with stoppable():
            try:
                yield
            except KeyboardInterrupt as interrupted:
                text = text if isinstance(interrupted, Stopped) else str(interrupted) or text
                raise
    except Stopped as stopped:
        console.print(text)
        raise typer.Exit(stopped.exit_code) from None
