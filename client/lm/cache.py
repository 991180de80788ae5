"""Keys and values of texts that are being continued, each at its own length, in memory taken once."""

from __future__ import annotations

import torch

from florilegium.client.lm.packing import Texts


class KeyValues:
    """A cache for R texts: row r holds the keys of its `lengths[r]` tokens, and room for `more`."""

    def __init__(self, lengths: torch.Tensor, more: int) -> None:
        self.lengths, self.more, self.decoding = lengths, more, False
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # (R, g, room, d) each

    def keep(self, layer: int, k: torch.Tensor, v: torch.Tensor, texts: Texts) -> None:
        """Takes over the prompts' keys and values (N, g, d)."""
        groups, size = k.shape[1:]
        (band,), _ = texts.heads(groups)
        made = []
        for x in (k, v):
            buffer = x.new_zeros(len(self.lengths), groups, band.width + self.more, size)
            picked = x.reshape(-1, size).index_select(0, band.pick)
            buffer[:, :, : band.width] = picked.view(band.texts, groups, band.width, size)[: len(self.lengths)]
            made.append(buffer)
        self._layers[layer] = (made[0], made[1])

    def advance(self) -> None:
        """The next token of each text is about to come."""
        if self.decoding:
            self.lengths = self.lengths + 1
        self.decoding = True

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Adds one token of each text, k and v (R, g, d), and looks back with q (R, h, d); (R, h, d)."""
        keys, values = self._layers[layer]
        (rows, groups, _, size), heads = keys.shape, q.shape[1]
        every = torch.arange(rows, device=k.device)
        keys[every, :, self.lengths], values[every, :, self.lengths] = k, v
        queries = q.reshape(rows * groups, heads // groups, size)
        scores = torch.bmm(queries, keys.view(rows * groups, -1, size).mT).mul_(scale)
        if softcap:
            scores.div_(softcap).tanh_().mul_(softcap)
        age = self.lengths[:, None] - torch.arange(keys.shape[2], device=k.device)[None]  # (R, room)
        unseen = (age < 0) | (age >= (window or keys.shape[2]))
        scores.view(rows, heads, -1).masked_fill_(unseen[:, None], -torch.inf)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights, values.view(rows * groups, -1, size)).view(rows, heads, size)

    def drop_to(self, rows: torch.Tensor) -> None:
        """Keeps these texts only."""
        self.lengths = self.lengths[rows]
        self._layers = {i: (k.index_select(0, rows), v.index_select(0, rows)) for i, (k, v) in self._layers.items()}
