"""What a partition looks like: how much of which label each user has, as a table. The picture of it is a report's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from florilegium.client.dialogue import Dialogue

USERS_SHOWN, LABELS_SHOWN = 24, 6


@dataclass(frozen=True, slots=True)
class Share:
    """What one user has: how many replies, and how many of each label, the commonest first."""

    user: str
    replies: int
    labels: tuple[tuple[str, int], ...]


def shares(by_user: Mapping[str, Sequence[Dialogue]]) -> tuple[Share, ...]:
    """One for each user, in their order; a reply's label is its domain, "" where it has none."""
    return tuple(
        Share(user, len(said), tuple(Counter(reply.domain for reply in said).most_common()))
        for user, said in by_user.items()
    )


def as_table(parts: Sequence[Share], least: int) -> Table:
    """The first users, with a mark where one has fewer than `least` replies and is left out of runs."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("user", "replies", "labels"):
        table.add_column(heading, justify="right" if heading == "replies" else "left", header_style="bold")
    for part in parts[:USERS_SHOWN]:
        few = "" if part.replies >= least else "  (too few)"
        table.add_row(Text(part.user + few), f"{part.replies:,}", Text(listed(part.labels, LABELS_SHOWN)))
    if len(parts) > USERS_SHOWN:
        table.add_row(f"and {len(parts) - USERS_SHOWN:,} more", "", "")
    return table


def listed(counts: Sequence[tuple[str, int]], shown: int) -> str:
    """The commonest names with their counts.

    >>> listed((("films", 1200), ("food", 3), ("", 1)), 2)
    'films 1,200, food 3 and 1 more'
    """
    if not any(name for name, _ in counts):
        return "none named"
    rest = f" and {len(counts) - shown} more" if len(counts) > shown else ""
    return ", ".join(f"{name or 'none'} {n:,}" for name, n in counts[:shown]) + rest
