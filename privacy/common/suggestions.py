"""What somebody may have meant by a name that there is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """`did you mean 'x'?` for the one known name that is most like it; "" where none is as like as that, of 1.

    >>> did_you_mean("smolm2", ["nano", "smollm2"]), did_you_mean("gpt", ["nano"])
    ("did you mean 'smollm2'?", '')
    """
    near = get_close_matches(name, list(known), n=1, cutoff=likeness)
    return f"did you mean {near[0]!r}?" if near else ""
