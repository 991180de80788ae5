"""What a data set holds, for `florilegium data list` and `florilegium data describe NAME`.

Figures are of the users that an experiment with the same settings draws from: eligible, of one split, capped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from florilegium.client.dialogue import Dialogue
from florilegium.client.words import count
from florilegium.privacy.common.registry import is_extension, resolve
from florilegium.simulation.data.conversations import READERS, locate
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.formats.opened import ZIP, start_of
from florilegium.simulation.data.formats.reading import Reading
from florilegium.simulation.data.formats.recognise import OURS_TOLD, ROW_FORMATS
from florilegium.simulation.data.partition_table import Share, as_table, listed, shares
from florilegium.simulation.data.population import (
    HUB,
    DataConfig,
    collect,
    cut,
    met_before,
    reading_of,
    streams,
    users_of,
)
from florilegium.simulation.data.problems import problems_of

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
Quantiles = tuple[int, ...]


class Listed(NamedTuple):
    """A line of `florilegium data list`."""

    name: str
    about: str
    available: bool


@dataclass(frozen=True)
class Description:
    """Counts of one half of a data set. Quantiles are at `SHARES`: least, quarter, median, three quarters, most.

    Of an anonymous data set, `users_eligible` is the number of devices dealt: `data.users` at most.
    """

    name: str
    about: str
    split: str
    anonymous: bool
    users_found: int
    users_eligible: int
    pairs: int
    pairs_per_user: Quantiles
    words_per_prompt: Quantiles
    words_per_response: Quantiles
    domains: tuple[tuple[str, int], ...]
    example: Dialogue | None
    dropped_empty: int
    dropped_repeated: int
    dropped_broken: int  # with half a character
    silent: int  # users of whom nothing is left
    held_out: int
    held_out_met: int  # word for word in the same user's stream
    read_as: str = ""  # what a file was taken for
    problems: tuple[str, ...] = ()  # the commonest reasons for leaving something out of it, with places
    partition: str = ""  # how users were made of it
    users: tuple[Share, ...] = ()  # of the split, also those with too few replies
    min_pairs: int = 0


def names() -> list[Listed]:
    """Every data set known by name, the first line about it, and whether it could be read here and now."""
    return [Listed(name, _about(name).splitlines()[0], _available(name)) for name in READERS]


def describe(config: DataConfig, seed: int) -> Description:
    """Reads the data set and counts. Too few users is no error here: that is what one came to see."""
    reading = reading_of(config)
    try:
        replies = collect(config, reading)
    except DataError as error:
        raise DataError("\n".join([str(error), *_all_problems(config, reading)])) from None
    eligible = streams(replies, config, seed)
    pairs = [reply for said in eligible.values() for reply in said]
    cuts = [cut(said, config) for said in eligible.values()]
    return Description(
        name=config.name,
        about=_about(config.name),
        split=config.split,
        anonymous=replies.anonymous,
        users_found=0 if replies.anonymous else len(replies.by_user),
        users_eligible=len(eligible),
        pairs=len(pairs),
        pairs_per_user=quantiles(len(said) for said in eligible.values()),
        words_per_prompt=quantiles(count(pair.prompt) for pair in pairs),
        words_per_response=quantiles(count(pair.response) for pair in pairs),
        domains=tuple(Counter(pair.domain for pair in pairs if pair.domain).most_common()),
        example=pairs[seed % len(pairs)] if pairs else None,
        dropped_empty=replies.empty,
        dropped_repeated=replies.repeated,
        dropped_broken=replies.broken,
        silent=replies.silent,
        held_out=sum(len(held_out) for _, held_out in cuts),
        held_out_met=sum(met_before(stream, held_out) for stream, held_out in cuts),
        read_as=reading.told() if reading.read_as else "",
        problems=tuple(reading.problems()),
        partition=config.partition.told(),
        users=shares(users_of(replies, config, seed)),
        min_pairs=config.min_pairs,
    )


def _all_problems(config: DataConfig, ended: Reading) -> list[str]:
    """Those of a file whose first problem has ended its reading; [] where rows cannot be tried one by one."""
    path = Path(config.name).expanduser()
    of_rows = ended.read_as in ("", OURS_TOLD, *(form.told for form in ROW_FORMATS.values()))
    found = (
        problems_of(path, reading_of(config))
        if of_rows and path.is_file() and not start_of(path).startswith(ZIP)
        else []
    )
    return ["the commonest problems of its lines:", *found] if found else []


def quantiles(counts: Iterable[int]) -> Quantiles:
    """The counts nearest to each of `SHARES` in rank; nothing of nothing.

    >>> quantiles([5, 1, 2, 4, 3])
    (1, 2, 3, 4, 5)
    """
    ranked = sorted(counts)
    return tuple(ranked[round(share * (len(ranked) - 1))] for share in SHARES) if ranked else ()


def render(description: Description) -> RenderableType:
    """A table of the figures, and one exchange."""
    d = description
    dealt = f"none known: replies are {'parted' if d.partition else 'dealt to devices'}"
    users = dealt if d.anonymous else f"{d.users_found:,} in both halves"
    table = Table.grid(padding=(0, 2))
    for label, value in (
        ("data set", d.name),
        ("about", d.read_as or d.about),
        ("users", users),
        (f"eligible ({d.split})", f"{d.users_eligible:,} {'devices' if d.anonymous else 'users'}, {d.pairs:,} pairs"),
        *((("partition", _partition(d)),) if d.partition else ()),
        ("pairs per user", _spread(d.pairs_per_user)),
        ("words per prompt", _spread(d.words_per_prompt)),
        ("words per response", _spread(d.words_per_response)),
        ("domains", listed(d.domains, 8)),
        ("held out", told_before(d.held_out, d.held_out_met)),
        ("left out", _left_out(d)),
        *(("", problem) for problem in d.problems),
    ):
        table.add_row(Text(label, style="bold"), Text(value))
    parts = (Text(), as_table(d.users, d.min_pairs), Text()) if d.partition else ()
    if d.example is None:
        return Group(table, *parts, Text("No user is eligible: lower data.min_pairs.", style="yellow"))
    exchange = Text.assemble((_start(d.example.prompt), "cyan"), "\n", (_start(d.example.response), "green"))
    return Group(table, *parts, Panel(exchange, title="a prompt and the user's reply", title_align="left"))


def told_before(held_out: int, met: int) -> str:
    """How many replies are held out and which share of them the devices have met, for people."""
    share = f"{met / held_out:.0%}" if held_out else "none"
    return f"{held_out:,} pairs; {met:,} of them ({share}) stand word for word in the same user's stream"


def _partition(d: Description) -> str:
    few = sum(user.replies < d.min_pairs for user in d.users)
    told = f", {few:,} of them with fewer than min_pairs = {d.min_pairs} replies" if few else ""
    return f"{d.partition}: {len(d.users):,} users{told}"


def _left_out(d: Description) -> str:
    silent = f" ({d.silent:,} users have no others)" if d.silent else ""
    broken = f", {d.dropped_broken:,} with half a character" if d.dropped_broken else ""
    return f"{d.dropped_empty:,} empty pairs{silent}, {d.dropped_repeated:,} recorded twice{broken}"


def _start(text: str, characters: int = 600) -> str:
    return text if len(text) <= characters else f"{text[:characters].rstrip()} …"


def _about(name: str) -> str:
    if name.startswith(HUB):
        return "A data set of the Hugging Face hub; its licence stands on its page there."
    if not Path(name).expanduser().is_file() and (name in READERS or is_extension(name)):
        return getdoc(resolve(name, READERS, Callable)) or name
    return "A file or a folder of the user's own."


def _available(name: str) -> bool:
    try:
        return locate(name).exists()
    except DataError:
        return False


def _spread(values: Quantiles) -> str:
    if not values:
        return "none"
    least, quarter, median, three_quarters, most = values
    return f"median {median:,} (half of them {quarter:,} to {three_quarters:,}; all {least:,} to {most:,})"
