"""A determinantal point process over a stream: quality, redundancy and recency in one number (Kulesza and Taskar 2012).

Kept is a set S with a large det L_S, where L_ij = q_i q_j k(x_i, x_j). Without member i that is smaller by

    log det L_S − log det L_(S∖i) = log q_i² + log 1 / [K_S⁻¹]_ii

whose last term is the logarithm of what the others leave of x_i's variance: near −7 for a copy, near 0 for what is
like nothing else. k is Gaussian in the whitened space of `whitened-kcenter`, as wide as the space's dimensions. The
decomposition q_i² k is the book's; what stands for q here is ours:

    log q_i² = recency · rank_i / B − quality · z_i

rank is the place in the order of arrival, from 0 to B for the newcomer; z is how many deviations a prompt's NLL was
above the stream's mean when it came, so that noise counts against a text. Not covered: sampling from the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from florilegium.client.selection.entry import Vectors
from florilegium.client.selection.stream_memory import StreamMemory, covariance, rounded

if TYPE_CHECKING:
    from florilegium.client.selection.entry import BufferEntry

NUGGET = 1e-3  # of variance that is a text's own, so that two copies leave something to invert
FIRST = 4  # arrivals after which a deviation means something


@dataclass(frozen=True)
class Terms:
    """How much each of the three counts; chosen on development people. 0 leaves one out."""

    quality: float = 0.25
    redundancy: float = 1.0
    recency: float = 1.0


ALL_TERMS = Terms()


def surprise(newcomer: BufferEntry, memory: StreamMemory) -> tuple[BufferEntry, StreamMemory]:
    """As `covariance`, and nll_mean, nll_squares of the values (Welford 1962); the newcomer's becomes its z."""
    newcomer, after = covariance(newcomer, memory)
    seen, old = float(after["seen"]), float(memory.get("nll_mean", np.float64(0)))
    mean = old + (newcomer.value - old) / seen
    squares = float(memory.get("nll_squares", np.float64(0))) + (newcomer.value - old) * (newcomer.value - mean)
    deviation = (squares / seen) ** 0.5
    z = (newcomer.value - mean) / deviation if seen > FIRST and deviation > 0 else 0.0
    more = {"nll_mean": np.float64(mean), "nll_squares": np.float64(squares)}
    return replace(newcomer, value=rounded(z)), {**after, **more}


def log_marginals(white: Vectors, z: Sequence[float], terms: Terms) -> Vectors:
    """(N,) log det L − log det L without each, of whitened vectors (N, D) in the order of arrival."""
    count, dimensions = white.shape
    squares = (white * white).sum(1)
    distance = np.maximum(squares[:, None] + squares - 2 * white @ white.T, 0)  # (N, N)
    kernel = np.exp(-distance / (2 * dimensions)) + NUGGET * np.eye(count)
    left = -np.log(np.diag(np.linalg.inv(kernel)))
    age = np.arange(count) / max(1, count - 1)
    found: Vectors = terms.redundancy * left + terms.recency * age - terms.quality * np.asarray(z)
    return found
