"""What the server does with the mean change of a round: a step of SGD, with momentum, of Adam or of Yogi.

The change is minus a gradient, so it is added. Adam and Yogi are those of Algorithm 2 in Reddi et al. 2021 (arXiv
2003.00295v5) with Δ_t the change, m₋₁ = 0 and v₋₁ = τ², the smallest that the algorithm allows. Flower's strategies
of the same names differ from it: both begin with v₋₁ = 0, and FedAdam multiplies the learning rate of round t = 1, 2, …
by √(1 − β₂^(t+1)) / (1 − β₁^(t+1)), which is Adam's correction of a zero start with the exponents of a round later.
With those two undone the numbers agree. FedAvgM is the same in both (Hsu et al. 2019, arXiv 1909.06335). Not covered:
FedAdagrad, Nesterov's momentum, weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from florilegium.privacy.common.errors import UserError
from florilegium.privacy.common.registry import UnexpectedError, calling, is_extension, resolve
from florilegium.privacy.release import Array
from florilegium.server.aggregation import Places, check_array
from florilegium.server.fixed_point import Numbers

Real = TypeVar("Real", np.float32, np.float64)


@dataclass(frozen=True)
class Moments:
    """What an optimizer remembers between rounds; (P,) float64 each, or (0,) where it has no use for it."""

    first: Numbers  # m, of changes
    second: Numbers  # v, of their squares

    def arrays(self) -> dict[str, Numbers]:
        """To be stored; `Moments.of` gives the same bits again."""
        return {"first": self.first, "second": self.second}

    @classmethod
    def of(cls, arrays: Mapping[str, Numbers]) -> Self:
        """Raises `ValueError` for arrays that `arrays` cannot have given."""
        if set(arrays) != {"first", "second"} or any(a.dtype != np.float64 or a.ndim != 1 for a in arrays.values()):
            raise ValueError(f"stored moments are `first` and `second`, float64 (P,), not {sorted(arrays)}")
        return cls(arrays["first"].copy(), arrays["second"].copy())

    def at(self, places: Places) -> Self:
        """Of these numbers alone."""
        return type(self)(*(m[places] if m.size else m for m in (self.first, self.second)))

    def replaced(self, places: Places, part: Moments) -> Self:
        """With those of `part` at these numbers."""
        return type(self)(_put(self.first, places, part.first), _put(self.second, places, part.second))


class OptimizerSettings(Protocol):
    """What optimizers read of the server's settings."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def beta_2(self) -> float: ...
    @property
    def tau(self) -> float: ...


@runtime_checkable
class ServerOptimizer(Protocol):
    """Settings of a server's steps; all that changes is in the moments."""

    def start(self, width: int) -> Moments:
        """Before the first round."""

    def step(self, shared: Array, change: Array, state: Moments) -> tuple[Array, Moments]:
        """The shared adapter (P,) after a mean change (P,), and the moments. Raises `ValueError` for what is no step.

        The same arguments give the same bits, so a run that is resumed from stored moments does not differ.
        """


@dataclass(frozen=True)
class FedAvg:
    """x + η Δ (McMahan et al. 2017, arXiv 1602.05629)."""

    learning_rate: float = 1.0

    def start(self, width: int) -> Moments:
        return Moments(np.zeros(0), np.zeros(0))

    def step(self, shared: Array, change: Array, state: Moments) -> tuple[Array, Moments]:
        _check(change, shared)
        return _moved(shared, self.learning_rate * change.astype(np.float64)), state


@dataclass(frozen=True)
class FedAvgM:
    """m ← β m + Δ; x + η m (Hsu et al. 2019, arXiv 1909.06335)."""

    learning_rate: float = 1.0
    momentum: float = 0.9

    def start(self, width: int) -> Moments:
        return Moments(np.zeros(width), np.zeros(0))

    def step(self, shared: Array, change: Array, state: Moments) -> tuple[Array, Moments]:
        _check(change, shared, state.first)
        first = self.momentum * state.first + change
        return _moved(shared, self.learning_rate * first), Moments(first, state.second)


@dataclass(frozen=True)
class FedAdam:
    """v ← β₂ v + (1 − β₂) Δ² ; x + η m / (√v + τ) with m ← β₁ m + (1 − β₁) Δ (Reddi et al. 2021, Algorithm 2)."""

    learning_rate: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def start(self, width: int) -> Moments:
        return Moments(np.zeros(width), np.full(width, self.tau**2))  # v₋₁ ≥ τ²

    def step(self, shared: Array, change: Array, state: Moments) -> tuple[Array, Moments]:
        _check(change, shared, state.first, state.second)
        delta = change.astype(np.float64)
        first = self.beta_1 * state.first + (1 - self.beta_1) * delta
        second = self.second(state.second, delta**2)
        return _moved(shared, self.learning_rate * first / (np.sqrt(second) + self.tau)), Moments(first, second)

    def second(self, before: Numbers, square: Numbers) -> Numbers:
        """v_t (P,) of v_{t−1} and Δ_t²."""
        return self.beta_2 * before + (1 - self.beta_2) * square


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """v ← v − (1 − β₂) Δ² sign(v − Δ²): as FedAdam, but v moves by as much whatever it was (Algorithm 2)."""

    learning_rate: float = 0.01

    def second(self, before: Numbers, square: Numbers) -> Numbers:
        return before - (1 - self.beta_2) * square * np.sign(before - square)


def step_at(
    optimizer: ServerOptimizer, shared: Array, change: Array, state: Moments, places: Places
) -> tuple[Array, Moments]:
    """A step of those numbers that a round was about: `change` has as many as `places` (P,) has true.

    The others stay as they are, and so do their moments: a factor that is not trained in a round is not at rest.
    """
    moved, part = optimizer.step(shared[places], change, state.at(places))
    return _put(shared, places, moved), state.replaced(places, part)


def _put(whole: npt.NDArray[Real], places: Places, part: npt.NDArray[Real]) -> npt.NDArray[Real]:
    """A copy of (P,) with a part replaced; (0,) stays what it is."""
    after = whole.copy()
    if after.size:
        after[places] = part
    return after


class StepTooLargeError(UserError):
    """A step of the server leads out of what numbers can hold."""


def _check(change: Array, *others: npt.NDArray[np.float32 | np.float64]) -> None:
    if any(other.shape != change.shape for other in others):
        raise ValueError(f"a change of shape {change.shape} meets arrays of {[other.shape for other in others]}")
    if not np.isfinite(change).all():
        raise ValueError("the change of a round holds a number that is not finite")


def _moved(shared: Array, step: Numbers) -> Array:
    """x + step in float64, then float32."""
    limit = float(np.finfo(np.float32).max)
    moved: Numbers = shared + step
    if not (np.abs(moved) <= limit).all():
        raise StepTooLargeError("a step leaves the range of float32; lower [server] learning_rate")
    return moved.astype(np.float32)


OPTIMIZERS: Mapping[str, Callable[[OptimizerSettings], ServerOptimizer]] = {
    "fedavg": lambda c: FedAvg(c.learning_rate),
    "fedavgm": lambda c: FedAvgM(c.learning_rate, c.momentum),
    "fedadam": lambda c: FedAdam(c.learning_rate, c.momentum, c.beta_2, c.tau),
    "fedyogi": lambda c: FedYogi(c.learning_rate, c.momentum, c.beta_2, c.tau),
}


def new_optimizer(name: str, settings: OptimizerSettings) -> ServerOptimizer:
    """The optimizer of this name. Raises `ExtensionError` for what gives none."""
    make = resolve(name, OPTIMIZERS, Callable)
    with calling(name, "give a ServerOptimizer, with `start` and `step`"):
        optimizer: object = make(settings)
        if not isinstance(optimizer, ServerOptimizer):
            raise UnexpectedError(f"gave {type(optimizer).__name__}, which is none")
    return CheckedOptimizer(name, optimizer) if is_extension(name) else optimizer


@dataclass(frozen=True)
class CheckedOptimizer:
    """An optimizer of the user's own: what it raises or gives that is no step is an `ExtensionError` with its name."""

    name: str
    optimizer: ServerOptimizer

    def start(self, width: int) -> Moments:
        with calling(self.name, f"return Moments, each float64 ({width},) or (0,), all finite"):
            state = self.optimizer.start(width)
            _check_moments(state, width)
        return state

    def step(self, shared: Array, change: Array, state: Moments) -> tuple[Array, Moments]:
        width = len(shared)
        with calling(self.name, f"return float32 ({width},) and Moments, each float64 ({width},) or (0,), all finite"):
            after, moments = self.optimizer.step(shared, change, state)
            check_array(after, np.float32, (width,))
            _check_moments(moments, width)
        return after, moments


def _check_moments(state: object, width: int) -> None:
    if not isinstance(state, Moments):
        raise UnexpectedError(f"returned {type(state).__name__}")
    for moment in (state.first, state.second):
        check_array(moment, np.float64, (width,), (0,))
