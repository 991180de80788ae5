"""Many texts in one pass without padding: their tokens lie one after the other.

Norms, the base's matrix products and the loss do not care whose a token is. Two operations do: an adapter needs the
tokens of its device, attention those of its text. For them the tokens are copied into rectangles, and back.

Sizes are rounded up a little, with fillers that nothing looks at: the library that multiplies bfloat16 matrices on a
CPU makes code for each new shape, which takes longer than the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt in its template and of the reply that follows, the end mark included."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    words: tuple[int, int] = (0, 0)  # the first and the one past the last token of the user's words within `prompt`
    truncated: bool = False

    @property
    def length(self) -> int:
        """Tokens of prompt and reply."""
        return len(self.prompt) + len(self.reply)

    @property
    def targets(self) -> int:
        """How many tokens of the reply have something before them that can predict them."""
        return max(0, min(len(self.reply), self.length - 1))


def rounded(size: int) -> int:
    """The next size of which there are few: a sixteenth to an eighth of it apart, at least 8."""
    step = max(8, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


class Rectangle:
    """N tokens of S owners, one owner after the other, as a rectangle (S, T): T is the longest owner's number.

    Tokens after the N-th are nobody's and stay what they are.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.rows, self.tokens, self.device, self.lengths = len(lengths), sum(lengths), device, lengths
        self.even = min(lengths) == max(lengths)
        self.width = max(lengths) if self.even else rounded(max(lengths))
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

    def owners(self, count: int) -> torch.Tensor:
        """Whose each of the first `count` tokens is, (count,); of those after the N-th, the first owner."""
        own = torch.arange(self.rows).repeat_interleave(torch.tensor(self.lengths))
        return nn.functional.pad(own, (0, count - self.tokens)).to(self.device)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (N, C) → (S, T, C). What is filled up repeats the owner's last token: nobody sees another's."""
        x = x[: self.tokens] if self.even else x.index_select(0, self._token)
        return x.view(self.rows, self.width, -1)

    def spread_zero(self, x: torch.Tensor) -> torch.Tensor:
        """Like `spread`, with zeros in what is filled up, so that it adds nothing to a sum."""
        spread = self.spread(x)
        if not self.even:
            spread.view(self.rows * self.width, -1).index_fill_(0, self._filler, 0)
        return spread

    def add_product(self, y: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """y (N, C) += left (S, T, r) @ right (S, r, C), owner by owner."""
        own = y[: self.tokens]
        if self.even:
            own.view(self.rows, self.width, -1).baddbmm_(left, right)
        else:
            own.add_(torch.bmm(left, right).view(self.rows * self.width, -1).index_select(0, self._place))


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
            more = rounded(len(members)) - len(members) if len(members) > LEAST_BAND else 0
            texts = torch.tensor(members + members[:1] * more)
            own, width = count[texts][:, None, None], rounded(max(self.lengths[i] for i in members))
            column, head = torch.arange(width)[None, None], torch.arange(heads)[None, :, None]
            token = start[texts][:, None, None] + torch.minimum(column, own - 1)  # (texts, 1, T)
            pick = (token * heads + head).flatten()
            real = (column < own).repeat(1, heads, 1)
            real[len(members) :] = False
            real = real.flatten()
            back[pick[real]] = offset + real.nonzero().flatten()
            filler = (~real).nonzero().flatten()
            bands.append(Band(len(texts), width, pick.to(self.device), filler.to(self.device)))
            offset += pick.numel()
        return bands, back.to(self.device)


LEAST_BAND = 8


def _like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Texts by length, cut where the rounded length changes and the band is not small."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bands: list[list[int]] = [[]]
    for i in order:
        if len(bands[-1]) >= LEAST_BAND and rounded(lengths[i]) < rounded(lengths[bands[-1][0]]):
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


LEAST_WIDTH = 16  # tokens
OWN_TOKENS = 512  # of a pass of private examples at most, fillers included
OWN_PIECE = 32  # targets of private examples that go through the head together


def own_width(length: int) -> int:
    """The width that a text of so many tokens gets where it must follow from the text alone: 16, 24, 32, 48, 64, …"""
    width = LEAST_WIDTH
    while width < length:
        width += width // 2 if width.bit_count() == 1 else width // 3
    return width


def own_rows(examples: int, most: int) -> int:
    """Rows of the next pass of so many private examples of a width: a power of two, at most a quarter fillers."""
    power = 1 << max(0, min(examples, most).bit_length() - 1)
    return 2 * power if 2 * power <= most and examples >= 1.5 * power else power


class OwnPack:
    """Examples of one width, each its own owner, for gradients that must not depend on the company, not by a bit.

    The pass is a rectangle: rows are filled up with examples that do not count, their tokens to the width with ones
    that nothing before them looks at; targets go through the head in pieces of one size. Then what stands in the other
    rows cannot reach an example's numbers, and how many rows there are does not where the kernels' order of sums is
    the same (`client.lm.engine.Engine.rows_apart` tries that on this machine).
    """

    def __init__(self, examples: Sequence[Example], rows: int, device: torch.device) -> None:
        """All of the examples, at most `rows`, must have the same `own_width`."""
        width, filler = own_width(examples[0].length), rows - len(examples)
        self.examples, self.rows = examples, rows
        tokens = [[*e.prompt, *e.reply, *[0] * (width - e.length)] for e in examples] + [[0] * width] * filler
        self.ids = torch.tensor(tokens, device=device).view(1, -1)  # (1, R T)
        self.positions = torch.arange(width, device=device).repeat(rows)[None]
        self.owned = Rectangle([width] * rows, device)
        self.texts = Texts([width] * rows, device)
        places, targets = list[int](), list[int]()
        for row, example in enumerate(examples):
            end = row * width + example.length
            places += range(end - example.targets - 1, end - 1)
            targets += example.reply[len(example.reply) - example.targets :]
        self.places = torch.tensor(places, dtype=torch.long, device=device)  # (M,), before each target
        self.targets = torch.tensor(targets, dtype=torch.long, device=device)  # (M,)

    def summed(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses of the targets (M,) → of each example (n,), in an order that follows from its own places."""
        of_all = torch.zeros(self.ids.shape[1], device=losses.device).index_put((self.places,), losses)
        return of_all.view(self.rows, -1).sum(1)[: len(self.examples)]


class Pack:
    """Examples, each of a device, as one row of tokens."""

    def __init__(
        self, examples: Sequence[Example], slots: Sequence[int], device: torch.device, *, filled: bool = False
    ) -> None:
        """Examples of one device must follow each other. `filled`: up to a rounded size, with nobody's tokens."""
        self.examples, self.slots, self.device = examples, slots, device
        lengths = [e.length for e in examples]
        filler, longest = rounded(sum(lengths)) - sum(lengths) if filled else 0, max(lengths)
        fillers = [min(longest, filler - start) for start in range(0, filler, longest)]  # no longer than a real text
        ids = [i for e in examples for i in (*e.prompt, *e.reply)] + [0] * filler
        positions = [i for length in (*lengths, *fillers) for i in range(length)]
        self.ids, self.positions = (torch.tensor([x], device=device) for x in (ids, positions))  # (1, N)
        self.owners, self.owned = owned_by(slots, device, lengths)
        self.texts = Texts([*lengths, *fillers], device)

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
