"""`Release`: the only thing that goes from a device to a server.

It holds the noised change of the shared adapter, by layer, the version it belongs to, and the head of the ledger that
paid for it. What it cannot hold:
texts, losses, counts, timings, personal adapters, error messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PROTOCOL = 1
Array = npt.NDArray[np.float32]


class ReleaseRefusedError(Exception):
    """Something that is not a release of the agreed form was about to be sent or was received."""


@dataclass(frozen=True)
class Schema:
    """Names and shapes of the shared adapter's arrays; all are float32.

    In round 1, 2, … a release has those whose names end as `turns` say, one after the other.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    turns: tuple[str, ...] = ("",)

    def of_round(self, number: int) -> Schema:
        """Of what travels in this round."""
        ending = self.turns[(number - 1) % len(self.turns)]
        return Schema(tuple((name, shape) for name, shape in self.shapes if name.endswith(ending)))

    def places(self, number: int) -> npt.NDArray[np.bool_]:
        """(P,): which numbers of a row travel in this round."""
        names = {name for name, _ in self.of_round(number).shapes}
        return np.concatenate([np.full(int(np.prod(shape)), name in names) for name, shape in self.shapes])

    @property
    def size_bytes(self) -> int:
        return sum(4 * int(np.prod(shape)) for _, shape in self.shapes)

    def split(self, row: Array) -> dict[str, Array]:
        """The arrays of a flat row (P,)."""
        arrays, start = {}, 0
        for name, shape in self.shapes:
            size = int(np.prod(shape))
            arrays[name] = np.ascontiguousarray(row[start : start + size].reshape(shape))
            start += size
        if start != row.size:
            raise ReleaseRefusedError(f"a row of {row.size} numbers does not fill the schema's {start}")
        return arrays

    def join(self, arrays: Mapping[str, Array]) -> Array:
        """The flat row (P,) of arrays that must fit this schema exactly."""
        self.check(arrays)
        return np.concatenate([arrays[name].reshape(-1) for name, _ in self.shapes])

    def check(self, arrays: Mapping[str, Array]) -> None:
        """Raises `ReleaseRefusedError` unless names, shapes and dtypes agree and every number is finite."""
        expected = dict(self.shapes)
        if set(arrays) != set(expected):
            odd = sorted(set(arrays) ^ set(expected))
            raise ReleaseRefusedError(f"arrays {odd[:4]} are missing or not in the schema")
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise ReleaseRefusedError(f"{name} is not an array")
            if array.dtype != np.float32 or array.shape != expected[name]:
                raise ReleaseRefusedError(f"{name} is {array.dtype}{array.shape}, expected float32{expected[name]}")
            if not np.isfinite(array).all():
                raise ReleaseRefusedError(f"{name} holds a number that is not finite")


@dataclass(frozen=True)
class Release:
    """A noised change of the shared adapter of version `version`."""

    version: int
    head: str
    arrays: Mapping[str, Array]
    protocol: int = PROTOCOL

    @property
    def size_bytes(self) -> int:
        """Of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @classmethod
    def of(cls, row: Array, version: int, head: str, schema: Schema) -> Release:
        """The release of a flat change (P,), checked against the schema."""
        release = cls(version, head, schema.split(row))
        schema.check(release.arrays)
        return release
