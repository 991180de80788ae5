"""Replies as they grow, token by token; each text has its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

WORTH_DROPPING = 0.75  # of the rows still running, below which the finished ones leave the batch


class Decoding:
    """R replies of up to `most` tokens: greedy at temperature 0, else sampled by one uniform number a token."""

    def __init__(
        self, seeds: Sequence[int], most: int, temperature: float, stop: Sequence[int], device: torch.device
    ) -> None:
        """A reply ends before the tokens of `stop`, in this order; without any it never does."""
        self.temperature, self.stop = temperature, list(stop)
        self.ids = torch.zeros((len(seeds), most), dtype=torch.long, device=device)  # (R, most)
        self.rows = torch.arange(len(seeds), device=device)  # the texts that are still in the batch
        self._running = torch.ones(len(seeds), dtype=torch.bool, device=device)
        self._lengths = torch.full((len(seeds),), most, device=device)  # of the replies that have ended, else `most`
        self._end = torch.tensor(self.stop, dtype=torch.long, device=device)
        self._uniform = _uniform(seeds, most, temperature).to(device)  # (R, most)
        self._step = 0

    @property
    def running(self) -> bool:
        return self._step < self.ids.shape[1] and bool(self._running.any())

    @property
    def steady(self) -> bool:
        """Whether most of the batch still runs."""
        return self.running and float(self._running.float().mean()) > WORTH_DROPPING

    @property
    def last(self) -> torch.Tensor:
        """The newest token of each text of the batch."""
        return self.ids[self.rows, self._step - 1]

    def take(self, logits: torch.Tensor) -> None:
        """Chooses the next token of each text from its logits (R', V)."""
        uniform = self._uniform[self.rows, self._step]
        filler = self.stop[-1] if self.stop else 0
        token = torch.where(self._running, _choose(logits.float(), uniform, self.temperature), filler)
        self.ids[self.rows, self._step] = token
        self._step += 1
        before = self._step - len(self.stop)
        if self.stop and before >= 0:
            newest = self.ids[self.rows, before : self._step]  # (R', tokens of `stop`)
            ended = self._running & (newest == self._end).all(1)
            self._lengths[self.rows] = torch.where(ended, before, self._lengths[self.rows])
            self._running = self._running & ~ended

    def drop_finished(self) -> torch.Tensor:
        """Takes finished texts out; the places in the batch that stay."""
        kept = self._running.nonzero().flatten()
        self.rows, self._running = self.rows[kept], self._running[kept]
        return kept

    @property
    def replies(self) -> list[list[int]]:
        """The ids of each reply so far, without what ends it, and without what may be the beginning of that."""
        rows: list[list[int]] = self.ids.tolist()
        most = self.ids.shape[1]
        lengths = [min(length, self._step) for length in self._lengths.tolist()]
        return [
            row[: n if n < self._step or n == most else n - self._begun(row[:n])]
            for row, n in zip(rows, lengths, strict=True)
        ]

    def _begun(self, row: list[int]) -> int:
        """How many of the last tokens are the first ones of `stop`."""
        return next((n for n in range(len(self.stop) - 1, 0, -1) if row[-n:] == self.stop[:n]), 0)


def _uniform(seeds: Sequence[int], most: int, temperature: float) -> torch.Tensor:
    if temperature == 0:
        return torch.zeros(len(seeds), most)
    draws = [np.random.Generator(np.random.Philox(key=seed)).random(most) for seed in seeds]
    return torch.from_numpy(np.stack(draws)).float()


def _choose(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """The most likely token, or the inverse of the cumulative distribution at `uniform` (R,)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits / temperature, -1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None]).squeeze(1)
    return drawn.clamp(max=logits.shape[-1] - 1)
