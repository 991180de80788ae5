"""Many texts in one pass without padding: their tokens lie one after the other.

Norms, the base's matrix products and the loss do not care whose a token is. Two operations do: an adapter needs the
tokens of its device, attention those of its text. For them the tokens are copied into rectangles, and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt in its template and of the reply that follows, the end mark included."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    words: tuple[int, int]  # the first and the one past the last token of the user's words within `prompt`
    truncated: bool

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.reply)

    @property
    def targets(self) -> int:
        """How many tokens of the reply have something before them that can predict them."""
        return max(0, min(len(self.reply), self.length - 1))


class Rectangle:
    """N tokens of S owners, one owner after the other, as a rectangle (S, T): T is the longest owner's number."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.rows, self.width, self.tokens, self.device = len(lengths), max(lengths), sum(lengths), device
        self.even = min(lengths) == self.width
        if not self.even:
            count = torch.tensor(lengths)[:, None]  # (S, 1)
            column = torch.arange(self.width)[None]  # (1, T)
            last = count.cumsum(0) - 1
            filler = (column >= count).flatten()
            self._token = (last - count + 1 + torch.minimum(column, count - 1)).flatten().to(device)  # (S * T,)
            self._place = (~filler).nonzero().flatten().to(device)  # (N,)
            self._filler = filler.nonzero().flatten().to(device)

    @property
    def together(self) -> Rectangle:
        """The same tokens, all of one owner."""
        return Rectangle([self.tokens], self.device)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (N, C) → (S, T, C). What is filled up repeats the owner's last token: nobody sees another's."""
        if not self.even:
            x = x.index_select(0, self._token)
        return x.view(self.rows, self.width, -1)

    def spread_zero(self, x: torch.Tensor) -> torch.Tensor:
        """Like `spread`, with zeros in what is filled up, so that it adds nothing to a sum."""
        spread = self.spread(x)
        if not self.even:
            spread.view(self.rows * self.width, -1).index_fill_(0, self._filler, 0)
        return spread

    def collect(self, y: torch.Tensor) -> torch.Tensor:
        """(S, T, C) → tokens (N, C)."""
        flat = y.reshape(self.rows * self.width, -1)
        return flat if self.even else flat.index_select(0, self._place)


@dataclass(frozen=True)
class Band:
    """Texts of like length, as rows of (heads · texts, T)."""

    texts: int
    width: int
    pick: torch.Tensor  # (texts * heads * T,) which (token, head) stands in each place
    filler: torch.Tensor  # places that hold no token


class Texts:
    """Which tokens are of one text: the structure that attention needs."""

    def __init__(self, lengths: Sequence[int], device: torch.device, *, ordered: bool = False) -> None:
        """`ordered` keeps all texts in one band and in their order, as a cache wants them."""
        self.lengths, self.device = lengths, device
        self._bands = [list(range(len(lengths)))] if ordered else _like_lengths(lengths)
        self._by_heads: dict[int, tuple[list[Band], torch.Tensor]] = {}

    def heads(self, heads: int) -> tuple[list[Band], torch.Tensor]:
        """Bands of the (token, head) pairs, and for each pair its place in the bands one after the other."""
        if heads not in self._by_heads:
            self._by_heads[heads] = self._index(heads)
        return self._by_heads[heads]

    def _index(self, heads: int) -> tuple[list[Band], torch.Tensor]:
        count = torch.tensor(self.lengths)
        start = count.cumsum(0) - count
        back = torch.empty(int(count.sum()) * heads, dtype=torch.long)
        bands, offset = [], 0
        for members in self._bands:
            own, width = count[members][:, None, None], max(self.lengths[i] for i in members)
            column, head = torch.arange(width)[None, None], torch.arange(heads)[None, :, None]
            token = start[members][:, None, None] + torch.minimum(column, own - 1)  # (texts, 1, T)
            pick = (token * heads + head).flatten()
            real = (column < own).expand(-1, heads, -1).flatten()
            back[pick[real]] = offset + real.nonzero().flatten()
            filler = (~real).nonzero().flatten()
            bands.append(Band(len(members), width, pick.to(self.device), filler.to(self.device)))
            offset += pick.numel()
        return bands, back.to(self.device)


def _like_lengths(lengths: Sequence[int], shrink: float = 0.75, least: int = 8) -> list[list[int]]:
    """Texts by length, cut where they have become much shorter than the longest of their band."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bands: list[list[int]] = [[]]
    for i in order:
        if len(bands[-1]) >= least and lengths[i] < shrink * lengths[bands[-1][0]]:
            bands.append([])
        bands[-1].append(i)
    return bands


def owned_by(
    slots: Sequence[int], device: torch.device, lengths: Sequence[int] | None = None
) -> tuple[list[int], Rectangle]:
    """The devices in their order, and their tokens: `lengths` of each text, or one a text."""
    tokens = dict.fromkeys(slots, 0)
    for slot, length in zip(slots, lengths or [1] * len(slots), strict=True):
        tokens[slot] += length
    return list(tokens), Rectangle(list(tokens.values()), device)


class Pack:
    """Examples, each of a device, as one row of tokens."""

    def __init__(self, examples: Sequence[Example], slots: Sequence[int], device: torch.device) -> None:
        """Examples of one device must follow each other."""
        self.examples, self.slots, self.device = examples, slots, device
        lengths = [e.length for e in examples]
        self.owners, self.owned = owned_by(slots, device, lengths)
        self.texts = Texts(lengths, device)
        ids = [i for e in examples for i in (*e.prompt, *e.reply)]
        positions = [i for length in lengths for i in range(length)]
        self.ids, self.positions = (torch.tensor([x], device=device) for x in (ids, positions))  # (1, N)

    @cached_property
    def targets(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each reply token that can be predicted: the place before it, its id, its example; (M,) each."""
        places: list[int] = []
        ids: list[int] = []
        rows: list[int] = []
        end = 0
        for row, example in enumerate(self.examples):
            end += example.length
            places += range(end - example.targets - 1, end - 1)
            ids += example.reply[len(example.reply) - example.targets :]
            rows += [row] * example.targets
        return tuple(torch.tensor(x, dtype=torch.long, device=self.device) for x in (places, ids, rows))  # type: ignore[return-value]
