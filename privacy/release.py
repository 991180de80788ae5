"""`Release`: the only thing that goes from a device to a server.

It holds the noised change of the shared adapter, by layer, the version it belongs to, and the head of the ledger that
paid for it. What it cannot hold:
texts, losses, counts, timings, personal adapters, error messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import numpy as np
import numpy.typing as npt

from florilegium.privacy.common.errors import FlorilegiumError

PROTOCOL = 1
WEIGHT = ".weight"  # ends the names of changes of frozen weights
Array = npt.NDArray[np.float32]


class ReleaseRefusedError(FlorilegiumError):
    """Something that is not a release of the agreed form was about to be sent or was received."""


@dataclass(frozen=True)
class Schema:
    """Names and shapes of the shared adapter's arrays; all are float32.

    In round 1, 2, … a release has those whose names end as `turns` say, one after the other.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    turns: tuple[str, ...] = ("",)
    encoding: str = "fp32"  # of a release on its way (`privacy.encoding`)

    @lru_cache(maxsize=4096)  # noqa: B019 (frozen, and few)
    def of_round(self, number: int, rank: int = 0) -> Schema:
        """Of what travels in this round, of a device with adapters of a lower rank, if one is given."""
        ending = self.turns[(number - 1) % len(self.turns)]
        shapes = tuple((name, _of_rank(name, shape, rank)) for name, shape in self.shapes if name.endswith(ending))
        return Schema(shapes, encoding=self.encoding)

    def places(self, number: int, rank: int = 0) -> npt.NDArray[np.bool_]:
        """(P,): which numbers of a row travel in this round.

        >>> Schema((("q.lora_A", (2, 3)), ("q.lora_B", (1, 2)))).places(1, rank=1).tolist()
        [True, True, True, False, False, False, True, False]
        """
        travelling = dict(self.of_round(number, rank).shapes)
        parts = []
        for name, shape in self.shapes:
            here = np.zeros(shape, dtype=np.bool_)
            if name in travelling:
                here[tuple(slice(size) for size in travelling[name])] = True
            parts.append(here.reshape(-1))
        return np.concatenate(parts)

    def rank_of(self, arrays: Mapping[str, object], number: int) -> int:
        """That of a release's arrays, 0 for the full one; raises `ReleaseRefusedError` where there is none."""
        name, full = self.of_round(number).shapes[0]
        array = arrays.get(name)
        if not isinstance(array, np.ndarray) or array.ndim != 2:
            raise ReleaseRefusedError(f"{name} is missing or no matrix")
        rank = min(array.shape[0 if name.endswith(".lora_A") else 1], max(full))
        return 0 if _of_rank(name, full, rank) == full else rank

    def with_weights(self) -> Schema:
        """With a change of the frozen weight of each layer, (out, in), as a server may send it beside A and B."""
        shapes = dict(self.shapes)
        layers = dict.fromkeys(name.rpartition(".")[0] for name in shapes)
        weights = [(f"{n}{WEIGHT}", (shapes[f"{n}.lora_B"][0], shapes[f"{n}.lora_A"][1])) for n in layers]
        return Schema((*self.shapes, *weights))

    @cached_property
    def width(self) -> int:
        """P."""
        return sum(prod(shape) for _, shape in self.shapes)

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays in float32."""
        return 4 * self.width

    def split(self, row: Array) -> dict[str, Array]:
        """The arrays of a flat row (P,)."""
        if row.size != self.width:
            raise ReleaseRefusedError(f"a row of {row.size} numbers does not fill the schema's {self.width}")
        arrays, start = {}, 0
        for name, shape in self.shapes:
            size = prod(shape)
            arrays[name] = np.ascontiguousarray(row[start : start + size].reshape(shape))
            start += size
        return arrays

    def join(self, arrays: Mapping[str, Array]) -> Array:
        """The flat row (P,) of arrays that must fit this schema exactly."""
        self._check_form(arrays)
        row = np.concatenate([arrays[name].reshape(-1) for name, _ in self.shapes])
        if not np.isfinite(row).all():
            self.check(arrays)  # which names it
        return row

    def check(self, arrays: Mapping[str, Array]) -> None:
        """Raises `ReleaseRefusedError` unless names, shapes and dtypes agree and every number is finite."""
        self._check_form(arrays)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ReleaseRefusedError(f"{name} holds a number that is not finite")

    @cached_property
    def _expected(self) -> dict[str, tuple[int, ...]]:
        return dict(self.shapes)

    def _check_form(self, arrays: Mapping[str, Array]) -> None:
        expected = self._expected
        if arrays.keys() != expected.keys():
            odd = sorted(set(arrays) ^ set(expected))
            raise ReleaseRefusedError(f"arrays {odd[:4]} are missing or not in the schema")
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise ReleaseRefusedError(f"{name} is not an array")
            if array.dtype != np.float32 or array.shape != expected[name]:
                raise ReleaseRefusedError(f"{name} is {array.dtype}{array.shape}, expected float32{expected[name]}")


def _of_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape of a factor's part: the first `rank` rows of A (r, in), columns of B (out, r)."""
    if not rank:
        return shape
    if name.endswith(".lora_A"):
        return (min(rank, shape[0]), *shape[1:])
    return (*shape[:-1], min(rank, shape[-1]))


@dataclass(frozen=True)
class Release:
    """A noised change of the shared adapter of version `version`."""

    version: int
    head: str
    arrays: Mapping[str, Array]
    protocol: int = PROTOCOL

    @classmethod
    def of(cls, row: Array, version: int, head: str, schema: Schema) -> Release:
        """The release of a flat change (P,), checked against the schema."""
        release = cls(version, head, schema.split(row))
        schema.check(release.arrays)
        return release
