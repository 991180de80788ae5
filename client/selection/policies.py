"""What a device keeps of its stream: one function and one line of the table each.

A policy gets the bins in the order of arrival, the newcomer, what the policy remembers of the stream and the
device's own random generator; it returns the index of the bin that leaves, or None to turn the newcomer away. It is
asked when the buffer is full. What it remembers is kept up by its `meet` (`client.selection.stream_memory`), which
sees every arrival once.
Vectors are compared as the policy's reading (`client.lm.features`) gives them. Where a method was published for
batches, it is restated for a buffer that meets one text at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from florilegium.client.selection import stream_memory
from florilegium.client.selection.determinantal import ALL_TERMS, Terms, log_marginals, surprise
from florilegium.client.selection.entry import Vectors
from florilegium.client.selection.scores import unit
from florilegium.client.selection.stream_memory import StreamMemory, Update, nearest, nothing_to_remember, whitening

if TYPE_CHECKING:
    from florilegium.client.selection.entry import BufferEntry

READINGS = ("mean", "weighted", "likelihood", "nuclear", "gradient")  # of `client.lm.features`
Decide = Callable[[Sequence["BufferEntry"], "BufferEntry", StreamMemory, np.random.Generator], int | None]


@dataclass(frozen=True)
class Policy:
    """How one method decides, what it reads of a text and what it remembers of the stream.

    `decide` is to be a function of its arguments: it is asked for many devices, in other processes, and again.
    """

    decide: Decide
    reading: str = "mean"
    meet: Update = nothing_to_remember
    bins: float | None = None  # in place of the configured number: for the bounds

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise ValueError(f"reading = {self.reading!r} must be one of {', '.join(READINGS)}")

    def capacity(self, bins: int) -> float:
        """How many bins there are."""
        return bins if self.bins is None else self.bins


# -- the paper's scores, and its baselines ------------------------------------------------------------------------


def quality(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """A random one of those that the newcomer beats on all three scores (Qin et al. 2024, §3.2)."""
    return _any_of([i for i, k in enumerate(bins) if newcomer.dominates(k)], rng)


def eoe(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """A random one of those with a lower entropy of embedding."""
    return _any_of([i for i, k in enumerate(bins) if newcomer.eoe > k.eoe], rng)


def dss(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """A random one of those with a lower domain-specific score."""
    return _any_of([i for i, k in enumerate(bins) if newcomer.dss > k.dss], rng)


def idd(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """A random one of those with a lower in-domain dissimilarity."""
    return _any_of([i for i, k in enumerate(bins) if newcomer.idd > k.idd], rng)


def random(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """Any of the old ones and the newcomer, each as likely to be left out."""
    return _not_the_newcomer(int(rng.integers(len(bins) + 1)), bins)


def fifo(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """The oldest."""
    return 0


def kcenter(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """One of the two most similar, the later one: what is kept stays spread out in the embedding space."""
    points = unit(_vectors(bins, newcomer))
    return _not_the_newcomer(_most_crowded(1 - points @ points.T), bins)


# -- samples of the stream ----------------------------------------------------------------------------------------


def reservoir(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """A uniform sample of all that came (Vitter 1985, algorithm R)."""
    return _not_the_newcomer(int(rng.integers(int(memory["seen"]))), bins)


def balanced(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """As many of each cluster as can be, within one a uniform sample (Chrysakis and Moens 2020, there of classes).

    A newcomer takes the place of one of the largest cluster. If its own is as large, but for one, it takes that of a
    random one of its own with probability m / n, m of the n that the cluster has met being kept.
    """
    own = int(memory["newest"])
    of_bin = nearest(unit(_vectors(bins)), memory["centres"])
    sizes = np.bincount(of_bin, minlength=len(memory["centres"]))
    if sizes[own] < sizes.max() - 1:
        largest = int(rng.choice(np.flatnonzero(sizes == sizes.max())))
        return int(rng.choice(np.flatnonzero(of_bin == largest)))
    if rng.random() >= sizes[own] / memory["met"][own]:
        return None
    return int(rng.choice(np.flatnonzero(of_bin == own)))


def herding(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """The one without whom the mean of the rest is nearest to the mean of all that came (after Welling 2009)."""
    points = unit(_vectors(bins, newcomer))  # (B + 1, H)
    without = (points.sum(0) - points) / len(bins)  # (B + 1, H)
    return _not_the_newcomer(_lowest(np.linalg.norm(without - memory["mean"], axis=1)), bins)


def whitened_kcenter(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """As `kcenter`, in directions that vary alike over the stream: a few loud dimensions do not decide."""
    white = _vectors(bins, newcomer) @ whitening(memory)  # (B + 1, D)
    squares = (white * white).sum(1)
    return _not_the_newcomer(_most_crowded(squares[:, None] + squares - 2 * white @ white.T), bins)


def leverage(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """The one whose direction the others cover best: with the lowest leverage xᵀ (XᵀX + I)⁻¹ x of all X (B + 1, D).

    Streaming exchange for a D-optimal design (Fedorov 1972) in the whitened space of `whitened-kcenter`: kept is what
    pins down a linear model of the stream best.
    """
    white = _vectors(bins, newcomer) @ whitening(memory)
    information = white.T @ white + np.eye(white.shape[1])
    return _not_the_newcomer(_lowest((white * np.linalg.solve(information, white.T).T).sum(1)), bins)


def dpp(
    bins: Sequence[BufferEntry],
    newcomer: BufferEntry,
    memory: StreamMemory,
    rng: np.random.Generator,
    *,
    terms: Terms = ALL_TERMS,
) -> int | None:
    """The one whose loss costs the determinant least: a copy, an old one, noise (`client.selection.determinantal`)."""
    white = _vectors(bins, newcomer) @ whitening(memory)
    return _not_the_newcomer(_lowest(log_marginals(white, [k.value for k in (*bins, newcomer)], terms)), bins)


# -- what the model finds hard ------------------------------------------------------------------------------------


def perplexity(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """The one that the model finds least surprising."""
    return _not_the_newcomer(_lowest([k.value for k in (*bins, newcomer)]), bins)


def middle_perplexity(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """The one whose NLL is farthest from the stream's mean: neither trivial nor noise."""
    middle = float(memory["mean"])
    return _not_the_newcomer(_lowest([-abs(k.value - middle) for k in (*bins, newcomer)]), bins)


def uds(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """The one with the lowest ‖L‖_* + α · mean distance to what came before (UDS, arXiv 2510.16882).

    On prompts the norm follows their length: it prefers long ones.
    """
    return _not_the_newcomer(_last_of_lowest([k.value for k in (*bins, newcomer)]), bins)


def oasis(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """The one that adds least to the others (after OASIS, arXiv 2506.02011): informativeness · Π (1 − shared part).

    Informativeness is the gradient's norm against the running mean and variance when it came, through a sigmoid; what
    two share is the cosine of their gradients, if it is positive.
    """
    gradients = unit(_vectors(bins, newcomer))
    left = np.clip(1 - gradients @ gradients.T, 1e-6, 1)  # (B + 1, B + 1)
    np.fill_diagonal(left, 1)
    return _not_the_newcomer(_lowest(np.log(left).sum(1) + np.log([k.value for k in (*bins, newcomer)])), bins)


# -- bounds -------------------------------------------------------------------------------------------------------


def none(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """Nothing is kept: the model without fine-tuning."""
    return None


def full_stream(
    bins: Sequence[BufferEntry], newcomer: BufferEntry, memory: StreamMemory, rng: np.random.Generator
) -> int | None:
    """Everything is kept; never asked."""
    return None


POLICIES: dict[str, Policy] = {
    "quality": Policy(quality),
    "eoe": Policy(eoe),
    "dss": Policy(dss),
    "idd": Policy(idd),
    "random": Policy(random),
    "fifo": Policy(fifo),
    "kcenter": Policy(kcenter),
    "reservoir": Policy(reservoir, meet=stream_memory.count),
    "balanced": Policy(balanced, meet=stream_memory.cluster),
    "herding": Policy(herding, "weighted", stream_memory.mean_vector),
    "whitened-kcenter": Policy(whitened_kcenter, "weighted", stream_memory.covariance),
    "leverage": Policy(leverage, "weighted", stream_memory.covariance),
    "dpp": Policy(dpp, "likelihood", surprise),
    "perplexity": Policy(perplexity, "likelihood"),
    "perplexity-mid": Policy(middle_perplexity, "likelihood", stream_memory.mean_value),
    "uds": Policy(uds, "nuclear", stream_memory.queue),
    "oasis": Policy(oasis, "gradient", stream_memory.standing),
    "none": Policy(none, bins=0),
    "full-stream": Policy(full_stream, bins=math.inf),
}


def _any_of(beaten: list[int], rng: np.random.Generator) -> int | None:
    return int(rng.choice(beaten)) if beaten else None


def _not_the_newcomer(leaves: int, bins: Sequence[BufferEntry]) -> int | None:
    return leaves if leaves < len(bins) else None


def _vectors(bins: Sequence[BufferEntry], *more: BufferEntry) -> Vectors:
    import torch  # with the settings it would be loaded to refuse them

    kept = (*bins, *more)
    halves = torch.from_numpy(np.concatenate([k.embedding for k in kept]))
    vectors: Vectors = halves.float().numpy()  # numpy's own conversion from float16 takes ten times as long
    return vectors.reshape(len(kept), -1)


def _lowest(values: Sequence[float] | Vectors) -> int:
    """The last of the lowest, to four digits: the order of sums in a batch must not decide."""
    exact = np.asarray(values, dtype=np.float64)
    digit = 10.0 ** (np.floor(np.log10(np.maximum(np.abs(exact), 1e-300))) - 3)
    return _last_of_lowest((np.round(exact / digit) * digit).tolist())


def _last_of_lowest(values: Sequence[float]) -> int:
    lowest = min(values)
    return max(i for i, v in enumerate(values) if v == lowest)


def _most_crowded(distance: Vectors) -> int:
    """The later one of the two points that are nearest to each other, of distances (N, N)."""
    np.fill_diagonal(distance, np.inf)
    return _lowest(distance.min(axis=1))
