"""One dialogue as the buffer holds it: {domain, text, embedding} and its scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float16 | np.float32 | np.float64]  # rows of numbers, or one
QUANTUM = 4  # decimals of a score: rounding in a batch must not decide what is kept


@dataclass(frozen=True, slots=True)
class BufferEntry:
    """A buffered prompt with its scores. The user's reply to it is not known here."""

    id: str
    prompt: str
    domain: str
    embedding: Vectors  # (D,) float16: what the policy compares texts by
    eoe: float = 0.0
    dss: float = 0.0
    idd: float = 1.0
    value: float = 0.0  # what the policy ranks by, where it has a number of its own

    def dominates(self, other: BufferEntry) -> bool:
        """Higher on all three scores."""
        return self.eoe > other.eoe and self.dss > other.dss and self.idd > other.idd

    @property
    def size_bytes(self) -> int:
        """Of domain, text and embedding."""
        return len(self.domain.encode()) + len(self.prompt.encode()) + self.embedding.nbytes
