"""What policies remember of a stream beside the bins: each function meets one arrival and returns the new memory.

A memory is arrays and numpy's numbers by name, stored with the device's other state. A function may also change what
is kept of the newcomer, where its number or its vector depends on what came before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from florilegium.client.selection.entry import Vectors
from florilegium.client.selection.scores import unit

if TYPE_CHECKING:
    from florilegium.client.selection.entry import BufferEntry

StreamMemory = Mapping[str, Any]
Update = Callable[["BufferEntry", StreamMemory], tuple["BufferEntry", StreamMemory]]

CLUSTERS = 8
WHITENED = 32  # dimensions of the random projection
UDS_ALPHA, UDS_QUEUE = 2.5e-3, 1024  # as published (arXiv 2510.16882)
OASIS_MEMORY = 0.9  # of the running mean and variance


def nothing_to_remember(newcomer: BufferEntry, memory: StreamMemory) -> tuple[BufferEntry, StreamMemory]:
    """For policies that look at the buffer alone."""
    return newcomer, memory


def count(newcomer: BufferEntry, memory: StreamMemory) -> tuple[BufferEntry, StreamMemory]:
    """seen: how many came."""
    return newcomer, {"seen": memory.get("seen", np.int64(0)) + np.int64(1)}


def cluster(newcomer: BufferEntry, memory: StreamMemory) -> tuple[BufferEntry, StreamMemory]:
    """centres (k, H), running means (MacQueen 1967) that begin as the first arrivals; met (k,); newest, its cluster."""
    point = unit(newcomer.embedding)
    if len(memory.get("centres", ())) < CLUSTERS:
        centres = np.vstack([*memory.get("centres", ()), point])
        met = np.append(memory.get("met", np.empty(0, np.int64)), 1)
        return newcomer, {"centres": centres, "met": met, "newest": np.int64(len(met) - 1)}
    own = int(nearest(point[None], memory["centres"])[0])
    centres, met = memory["centres"].copy(), memory["met"].copy()
    met[own] += 1
    centres[own] += (point - centres[own]) / met[own]
    return newcomer, {"centres": centres, "met": met, "newest": np.int64(own)}


def mean_vector(newcomer: BufferEntry, memory: StreamMemory) -> tuple[BufferEntry, StreamMemory]:
    """seen, and the mean (H,) of all that came, each at length 1."""
    return newcomer, _running_mean(unit(newcomer.embedding), memory)


def mean_value(newcomer: BufferEntry, memory: StreamMemory) -> tuple[BufferEntry, StreamMemory]:
    """seen, and the mean of the values of all that came."""
    return newcomer, _running_mean(np.float64(newcomer.value), memory)


def covariance(newcomer: BufferEntry, memory: StreamMemory) -> tuple[BufferEntry, StreamMemory]:
    """seen, mean (D,) and sum of squares about it (D, D) of the projected vectors (Welford 1962), which are kept."""
    newcomer = replace(newcomer, embedding=_projected(newcomer.embedding).astype(np.float16))
    point = newcomer.embedding.astype(np.float64)
    old = memory.get("mean", np.zeros_like(point))
    new = _running_mean(point, memory)
    squares = memory.get("squares", np.zeros((len(point), len(point))))
    return newcomer, {**new, "squares": squares + np.outer(point - old, point - new["mean"])}


def queue(newcomer: BufferEntry, memory: StreamMemory) -> tuple[BufferEntry, StreamMemory]:
    """queue (≤ 1,024, D) of the newest projected logits; their mean distance goes into the newcomer's value."""
    point = newcomer.embedding.astype(np.float32)
    before = memory.get("queue", np.empty((0, len(point)), np.float32))
    apart = float(np.linalg.norm(before - point, axis=1).mean()) if len(before) else 0.0
    newcomer = replace(newcomer, value=rounded(newcomer.value) + rounded(UDS_ALPHA * apart))
    return newcomer, {"queue": np.vstack([before, point])[-UDS_QUEUE:]}


def standing(newcomer: BufferEntry, memory: StreamMemory) -> tuple[BufferEntry, StreamMemory]:
    """mean and variance, exponential, of the gradients' norms; the newcomer's value becomes its place among them."""
    norm = newcomer.value
    mean, variance = float(memory.get("mean", np.float64(norm))), float(memory.get("variance", np.float64(0)))
    z = (norm - mean) / math.sqrt(variance) if variance > 0 else 0.0
    apart = norm - mean
    after = {
        "mean": np.float64(mean + (1 - OASIS_MEMORY) * apart),
        "variance": np.float64(OASIS_MEMORY * (variance + (1 - OASIS_MEMORY) * apart * apart)),
    }
    return replace(newcomer, value=rounded(1 / (1 + math.exp(-max(-6.0, min(6.0, z)))))), after


def whitening(memory: StreamMemory) -> Vectors:
    """L^(−T) (D, D) of the covariance L Lᵀ, which is shrunk towards a multiple of the identity while few have come."""
    d, seen = len(memory["mean"]), int(memory["seen"])
    covariance = memory["squares"] / max(1, seen - 1)
    trust = seen / (seen + d)
    shrunk = trust * covariance + ((1 - trust) * np.trace(covariance) / d + 1e-9) * np.eye(d)
    inverse: Vectors = np.linalg.inv(np.linalg.cholesky(shrunk))
    return inverse.T


def rounded(value: float) -> float:
    """To four digits: the order of sums in a batch must not decide."""
    return float(f"{value:.4g}")


def nearest(points: Vectors, centres: Vectors) -> Vectors:
    """The index (N,) of the centre (k, H) with the largest cosine to each point (N, H)."""
    nearest: Vectors = np.round(points @ unit(centres).T, 4).argmax(axis=1)
    return nearest


def _running_mean(value: Vectors | np.float64, memory: StreamMemory) -> dict[str, Any]:
    seen = memory.get("seen", np.int64(0)) + np.int64(1)
    mean = memory.get("mean", np.zeros_like(value))
    return {"seen": seen, "mean": mean + (value - mean) / seen}


def _projected(vector: Vectors) -> Vectors:
    """(H,) → (min(H, 32),) by a fixed random projection of the vector at length 1."""
    point = unit(vector)
    return point if len(point) <= WHITENED else point @ _basis(len(point))


@lru_cache(maxsize=4)
def _basis(width: int) -> Vectors:
    """(H, 32), the same on every device and after every restart."""
    basis = np.random.Generator(np.random.Philox(key=width)).standard_normal((width, WHITENED))
    return (basis / math.sqrt(WHITENED)).astype(np.float32)
