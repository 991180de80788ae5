"""What a device keeps of its stream: one function and one line of the table each.

A policy gets the bins in the order of arrival, the newcomer, what the policy remembers of the stream and the
device's own random generator; it returns the index of the bin that leaves, or None to turn the newcomer away. It is
asked when the buffer is full. What it remembers is kept up by its `meet`, which sees every arrival once.
Vectors are compared as the policy's reading (`client.lm.readings`) gives them. Where a method was published for
batches, it is restated for a buffer that meets one text at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from client.scores import unit

if TYPE_CHECKING:
    from client.buffer import Kept

Memory = Mapping[str, Any]  # what a policy remembers of the stream: arrays and numpy's numbers, by name
Decide = Callable[[Sequence["Kept"], "Kept", Memory, np.random.Generator], int | None]
Meet = Callable[["Kept", Memory], tuple["Kept", Memory]]

CLUSTERS = 8  # of `balanced`
WHITENED = 32  # dimensions in which `whitened-kcenter` measures
UDS_ALPHA, UDS_QUEUE = 2.5e-3, 1024  # as published (arXiv 2510.16882)
OASIS_MEMORY = 0.9  # of the running mean and variance


def nothing_to_remember(newcomer: Kept, memory: Memory) -> tuple[Kept, Memory]:
    """For policies that look at the buffer alone."""
    return newcomer, memory


@dataclass(frozen=True)
class Policy:
    """How one method decides, what it reads of a text and what it remembers of the stream."""

    decide: Decide
    reading: str = "mean"
    meet: Meet = nothing_to_remember
    bins: float | None = None  # in place of the configured number: for the bounds

    def capacity(self, bins: int) -> float:
        """How many bins there are."""
        return bins if self.bins is None else self.bins


# -- the paper's scores, and its baselines ------------------------------------------------------------------------


def quality(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """A random one of those that the newcomer beats on all three scores (Qin et al. 2024, §3.2)."""
    return _any_of([i for i, k in enumerate(bins) if newcomer.dominates(k)], rng)


def eoe(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """A random one of those with a lower entropy of embedding."""
    return _any_of([i for i, k in enumerate(bins) if newcomer.eoe > k.eoe], rng)


def dss(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """A random one of those with a lower domain-specific score."""
    return _any_of([i for i, k in enumerate(bins) if newcomer.dss > k.dss], rng)


def idd(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """A random one of those with a lower in-domain dissimilarity."""
    return _any_of([i for i, k in enumerate(bins) if newcomer.idd > k.idd], rng)


def random(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """Any of the old ones and the newcomer, each as likely to be left out."""
    return _not_the_newcomer(int(rng.integers(len(bins) + 1)), bins)


def fifo(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """The oldest."""
    return 0


def kcenter(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """One of the two most similar, the later one: what is kept stays spread out in the embedding space."""
    points = unit(_vectors(bins, newcomer))
    return _not_the_newcomer(_most_crowded(1 - points @ points.T), bins)


# -- samples of the stream ----------------------------------------------------------------------------------------


def reservoir(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """A uniform sample of all that came (Vitter 1985, algorithm R)."""
    return _not_the_newcomer(int(rng.integers(int(memory["seen"]))), bins)


def balanced(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """As many of each cluster as can be, within one a uniform sample (Chrysakis and Moens 2020, there of classes).

    A newcomer takes the place of one of the largest cluster; of the largest one itself, a random one of its own with
    probability m / n, m of n that it has met being kept.
    """
    own = int(memory["newest"])
    of_bin = _nearest(unit(_vectors(bins)), memory["centres"])
    sizes = np.bincount(of_bin, minlength=len(memory["centres"]))
    if sizes[own] < sizes.max():
        largest = int(rng.choice(np.flatnonzero(sizes == sizes.max())))
        return int(rng.choice(np.flatnonzero(of_bin == largest)))
    if rng.random() >= sizes[own] / memory["met"][own]:
        return None
    return int(rng.choice(np.flatnonzero(of_bin == own)))


def herding(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """The one without whom the mean of the rest is nearest to the mean of all that came (after Welling 2009)."""
    points = unit(_vectors(bins, newcomer))  # (B + 1, H)
    without = (points.sum(0) - points) / len(bins)  # (B + 1, H)
    return _not_the_newcomer(_lowest(np.linalg.norm(without - memory["mean"], axis=1)), bins)


def whitened_kcenter(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """As `kcenter`, in directions that vary alike over the stream: a few loud dimensions do not decide."""
    white = _vectors(bins, newcomer) @ whitening(memory)  # (B + 1, D)
    squares = (white * white).sum(1)
    return _not_the_newcomer(_most_crowded(squares[:, None] + squares - 2 * white @ white.T), bins)


# -- what the model finds hard ------------------------------------------------------------------------------------


def perplexity(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """The one that the model finds least surprising."""
    return _not_the_newcomer(_lowest([k.value for k in (*bins, newcomer)]), bins)


def middle_perplexity(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """The one whose NLL is farthest from the stream's mean: neither trivial nor noise."""
    middle = float(memory["mean"])
    return _not_the_newcomer(_lowest([-abs(k.value - middle) for k in (*bins, newcomer)]), bins)


def uds(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """The one with the lowest ‖L‖_* + α · mean distance to what came before (UDS, arXiv 2510.16882)."""
    return _not_the_newcomer(_lowest([k.value for k in (*bins, newcomer)]), bins)


def oasis(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """The one that is left when the others were picked by what they add (OASIS, arXiv 2506.02011).

    Informativeness is the gradient's norm against the running mean and variance when it came, through a sigmoid;
    each pick takes from the others the part of it that their gradients share.
    """
    gradients = unit(_vectors(bins, newcomer))
    shared = np.clip(np.round(gradients @ gradients.T, 4), 0, 1)
    own = np.log(np.maximum(1 - shared, 1e-30))  # (B + 1, B + 1): what a pick leaves of each, as a logarithm
    worth = np.log([k.value for k in (*bins, newcomer)])
    for _ in bins:
        best = worth.argmax()
        worth += own[best]
        worth[best] = -np.inf
    return _not_the_newcomer(int(worth.argmax()), bins)


# -- bounds -------------------------------------------------------------------------------------------------------


def none(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """Nothing is kept: the model without fine-tuning."""
    return None


def full_stream(bins: Sequence[Kept], newcomer: Kept, memory: Memory, rng: np.random.Generator) -> int | None:
    """Everything is kept; never asked."""
    return None


# -- what is remembered -------------------------------------------------------------------------------------------


def count(newcomer: Kept, memory: Memory) -> tuple[Kept, Memory]:
    """seen: how many came."""
    return newcomer, {"seen": memory.get("seen", np.int64(0)) + np.int64(1)}


def cluster(newcomer: Kept, memory: Memory) -> tuple[Kept, Memory]:
    """centres (k, H), running means (MacQueen 1967) that begin as the first arrivals; met (k,); newest, its cluster."""
    point = unit(newcomer.embedding)
    if len(memory.get("centres", ())) < CLUSTERS:
        centres = np.vstack([*memory.get("centres", ()), point])
        met = np.append(memory.get("met", np.empty(0, np.int64)), 1)
        return newcomer, {"centres": centres, "met": met, "newest": np.int64(len(met) - 1)}
    own = int(_nearest(point[None], memory["centres"])[0])
    centres, met = memory["centres"].copy(), memory["met"].copy()
    met[own] += 1
    centres[own] += (point - centres[own]) / met[own]
    return newcomer, {"centres": centres, "met": met, "newest": np.int64(own)}


def mean_vector(newcomer: Kept, memory: Memory) -> tuple[Kept, Memory]:
    """seen, and the mean (H,) of all that came, each at length 1."""
    return newcomer, _running_mean(unit(newcomer.embedding), memory)


def mean_value(newcomer: Kept, memory: Memory) -> tuple[Kept, Memory]:
    """seen, and the mean of the values of all that came."""
    return newcomer, _running_mean(np.float64(newcomer.value), memory)


def covariance(newcomer: Kept, memory: Memory) -> tuple[Kept, Memory]:
    """seen, mean (D,) and sum of squares about it (D, D) of the projected vectors (Welford 1962), which are kept."""
    newcomer = replace(newcomer, embedding=_projected(newcomer.embedding).astype(np.float16))
    point = newcomer.embedding.astype(np.float64)
    old = memory.get("mean", np.zeros_like(point))
    new = _running_mean(point, memory)
    squares = memory.get("squares", np.zeros((len(point), len(point))))
    return newcomer, {**new, "squares": squares + np.outer(point - old, point - new["mean"])}


def queue(newcomer: Kept, memory: Memory) -> tuple[Kept, Memory]:
    """queue (≤ 1,024, D) of the newest projected logits; their mean distance goes into the newcomer's value."""
    point = newcomer.embedding.astype(np.float32)
    before = memory.get("queue", np.empty((0, len(point)), np.float32))
    apart = float(np.linalg.norm(before - point, axis=1).mean()) if len(before) else 0.0
    newcomer = replace(newcomer, value=_rounded(newcomer.value + UDS_ALPHA * apart))
    return newcomer, {"queue": np.vstack([before, point])[-UDS_QUEUE:]}


def standing(newcomer: Kept, memory: Memory) -> tuple[Kept, Memory]:
    """mean and variance, exponential, of the gradients' norms; the newcomer's value becomes its place among them."""
    norm = newcomer.value
    mean, variance = float(memory.get("mean", np.float64(norm))), float(memory.get("variance", np.float64(0)))
    z = (norm - mean) / math.sqrt(variance) if variance > 0 else 0.0
    apart = norm - mean
    after = {
        "mean": np.float64(mean + (1 - OASIS_MEMORY) * apart),
        "variance": np.float64(OASIS_MEMORY * (variance + (1 - OASIS_MEMORY) * apart * apart)),
    }
    return replace(newcomer, value=_rounded(1 / (1 + math.exp(-max(-50.0, min(50.0, z)))))), after


def whitening(memory: Memory) -> np.ndarray:
    """Σ^(−1/2) (D, D), the covariance shrunk towards a multiple of the identity while few have come."""
    d, seen = len(memory["mean"]), int(memory["seen"])
    covariance = memory["squares"] / max(1, seen - 1)
    trust = seen / (seen + d)
    shrunk = trust * covariance + ((1 - trust) * np.trace(covariance) / d + 1e-9) * np.eye(d)
    values, vectors = np.linalg.eigh(shrunk)
    scaled: np.ndarray = vectors / np.sqrt(values)
    return scaled


POLICIES: dict[str, Policy] = {
    "quality": Policy(quality),
    "eoe": Policy(eoe),
    "dss": Policy(dss),
    "idd": Policy(idd),
    "random": Policy(random),
    "fifo": Policy(fifo),
    "kcenter": Policy(kcenter),
    "reservoir": Policy(reservoir, meet=count),
    "balanced": Policy(balanced, meet=cluster),
    "herding": Policy(herding, "weighted", mean_vector),
    "whitened-kcenter": Policy(whitened_kcenter, "weighted", covariance),
    "perplexity": Policy(perplexity, "likelihood"),
    "perplexity-mid": Policy(middle_perplexity, "likelihood", mean_value),
    "uds": Policy(uds, "nuclear", queue),
    "oasis": Policy(oasis, "gradient", standing),
    "none": Policy(none, bins=0),
    "full-stream": Policy(full_stream, bins=math.inf),
}


def _any_of(beaten: list[int], rng: np.random.Generator) -> int | None:
    return int(rng.choice(beaten)) if beaten else None


def _not_the_newcomer(leaves: int, bins: Sequence[Kept]) -> int | None:
    return leaves if leaves < len(bins) else None


def _vectors(bins: Sequence[Kept], *more: Kept) -> np.ndarray:
    return np.stack([k.embedding for k in (*bins, *more)]).astype(np.float32)


def _lowest(values: Sequence[float] | np.ndarray) -> int:
    """The last of the lowest; rounded, so that the order of sums in a batch does not decide."""
    rounded = [_rounded(float(v)) for v in values]
    lowest = min(rounded)
    return max(i for i, v in enumerate(rounded) if v == lowest)


def _most_crowded(distance: np.ndarray) -> int:
    """The later one of the two points that are nearest to each other, of distances (N, N)."""
    np.fill_diagonal(distance, np.inf)
    return _lowest(distance.min(axis=1))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The index (N,) of the centre (k, H) with the largest cosine to each point (N, H)."""
    nearest: np.ndarray = np.round(points @ unit(centres).T, 4).argmax(axis=1)
    return nearest


def _running_mean(value: np.ndarray | np.float64, memory: Memory) -> dict[str, Any]:
    seen = memory.get("seen", np.int64(0)) + np.int64(1)
    mean = memory.get("mean", np.zeros_like(value))
    return {"seen": seen, "mean": mean + (value - mean) / seen}


def _projected(vector: np.ndarray) -> np.ndarray:
    """(H,) → (min(H, 32),) by a fixed random projection of the vector at length 1."""
    point = unit(vector)
    return point if len(point) <= WHITENED else point @ _basis(len(point))


@lru_cache(maxsize=4)
def _basis(width: int) -> np.ndarray:
    """(H, 32), the same on every device and after every restart."""
    basis = np.random.Generator(np.random.Philox(key=width)).standard_normal((width, WHITENED))
    return (basis / math.sqrt(WHITENED)).astype(np.float32)
