"""Arrays as Flower carries them, turned into bytes when they go onto a wire and not before."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message


class Numbers(Array):
    """An array that is still numbers: where server and devices share a machine nothing is written or parsed.

    On a wire, or read by its `data`, it is what `Array(numbers)` is.
    """

    numbers: npt.NDArray[Any]

    def __init__(self, numbers: npt.NDArray[Any]) -> None:
        kept = np.asarray(numbers, order="C")
        # Past Array.__setattr__, which marks what was changed after it was sent.
        self.__dict__.update(numbers=kept, dtype=_name(kept.dtype), shape=kept.shape, stype="numpy.ndarray")

    @property
    def data(self) -> bytes:  # type: ignore[override]
        return Array(self.numbers).data

    def numpy(self) -> npt.NDArray[Any]:
        """Read only: it is the sender's own."""
        view = self.numbers.view()
        view.flags.writeable = False
        return view

    def __reduce__(self) -> tuple[Any, ...]:
        return Numbers, (self.numbers,)


def on_a_wire(message: Message) -> Message:
    """With arrays of Flower's own class, which is the only one that its processes know by name."""
    for record in message.content.array_records.values():
        for name, array in list(record.items()):
            if isinstance(array, Numbers):
                record[name] = Array(array.numbers)
    return message


@lru_cache(maxsize=16)
def _name(dtype: np.dtype[Any]) -> str:
    return str(dtype)


def to_record(arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Arrays by name. Filled one by one: a record that is made of a mapping turns its arrays into bytes."""
    record = ArrayRecord()
    for name, numbers in arrays.items():
        record[name] = Numbers(numbers)
    return record
