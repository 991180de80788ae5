"""All rounds of a federation, whatever carries its messages, whoever its devices are, whatever is kept of it.

A simulation, a study in memory, Flower's app and a server of real devices differ in the `Grid`, in the devices behind
it, and in the recorder.
"""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from florilegium.server.release_collector import to_numpy
from florilegium.server.strategy import NoReleaseError, ReleaseStrategy


class Recorder:
    """What is done beside the rounds; here nothing."""

    def open(self) -> None:
        """Before the first of the rounds, when the devices have answered."""

    def after_round(self, number: int, arrays: ArrayRecord) -> None:
        """When a round is over, with what devices are sent next; before round 1 for round 0."""

    def finish(self, shared: torch.Tensor) -> None:
        """After the last round, with the shared adapter (P,)."""

    def close(self, *, interrupted: bool) -> None:
        """At the end, whatever it was."""

    def check(self) -> None:
        """Raises what lies behind a round without a release, where that is known."""


def federate(
    grid: Grid, strategy: ReleaseStrategy, recorder: Recorder, start: ArrayRecord, rounds: int
) -> torch.Tensor:
    """All rounds that are left, up to `rounds`, from the arrays `start`; returns the shared adapter (P,).

    Raises `NoReleaseError` where a round has no release but errors, unless the recorder knows better.
    """
    try:
        strategy.greet(grid)
        recorder.open()
        interrupted = True
        try:
            shared = _played(grid, strategy, recorder, start, rounds)
            interrupted = False
        finally:
            recorder.close(interrupted=interrupted)
    except NoReleaseError:
        recorder.check()
        raise
    return shared


def _played(grid: Grid, strategy: ReleaseStrategy, recorder: Recorder, start: ArrayRecord, rounds: int) -> torch.Tensor:
    timeout = strategy.config.reply_timeout_s
    result = strategy.start(grid, start, rounds, timeout, evaluate_fn=recorder.after_round)
    shared = torch.from_numpy(strategy.whole.join(to_numpy(result.arrays)))
    recorder.finish(shared)
    return shared
