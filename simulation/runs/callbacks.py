"""Who is told how a run goes on: charts, messages, files elsewhere. What the run computes is not changed by it.

The callbacks of a run are told in its driver, one after the other. What one raises ends the run and names it. Not
covered: rounds of a study, of an audit and of a server of real devices.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from florilegium.privacy.common.registry import ExtensionError, calling, resolve
from florilegium.simulation.config import TRACKERS, ExperimentConfig
from florilegium.simulation.runs.events import Event, Tail
from florilegium.simulation.runs.folder import RunFolder

log = logging.getLogger(__name__)
OURS = {name: f"florilegium.simulation.runs.trackers:{kind}" for name, kind in TRACKERS.items()}


@dataclass(frozen=True)
class RunFacts:
    """What a callback is told. All of it may be kept; nothing that is done to it reaches the run."""

    folder: Path
    config: ExperimentConfig
    round: int  # the last one that is over; 0 before the first
    events: tuple[Event, ...]  # of metrics.jsonl, those that were written since the callback was told last
    interrupted: bool = False  # of the end: the run has not come to its own


class Callback:
    """Side effects of a run; derive from it what is wanted, and name an instance of it in `callbacks`."""

    def on_run_begin(self, facts: RunFacts) -> None:
        """When the devices are there; of a run that goes on, with all events of the rounds that are done."""

    def on_round_end(self, facts: RunFacts) -> None:
        """When a round is over and stored."""

    def on_run_end(self, facts: RunFacts) -> None:
        """At the end, whatever it was; of a callback whose `on_run_begin` has returned."""


def named_callbacks(config: ExperimentConfig) -> list[Callback]:
    """Those that the settings name, ours made anew. Raises `ExtensionError` for what is none."""
    return [_tracker(name) if name in TRACKERS else resolve(name, {}, Callback) for name in config.callbacks]


def _tracker(name: str) -> Callback:
    made: type[Callback] = resolve(OURS[name], {}, type[Callback])
    return made()


class Callbacks:
    """All callbacks of a run: those that its settings name and others."""

    def __init__(self, run: RunFolder, others: Sequence[Callback] = ()) -> None:
        self.run = run
        names = [OURS.get(name, name) for name in run.config.callbacks]
        self.all = [*zip(names, named_callbacks(run.config), strict=True)]
        self.all += [(f"{type(c).__module__}:{type(c).__name__}", c) for c in others]
        self.round, self._log = 0, Tail(run.metrics)

    def begin(self, done: int) -> None:
        """Of the rounds, so many are done. Where one callback raises, those that have begun are told the end."""
        self.round, everybody, self.all = done, self.all, []
        if not everybody:
            return
        facts = self._facts(interrupted=False)
        try:
            for name, callback in everybody:
                _call(name, callback, "on_run_begin", facts)
                self.all.append((name, callback))
        except BaseException:
            self.end(interrupted=True)
            raise

    def end_round(self, number: int) -> None:
        self.round = number
        self._tell("on_round_end")

    def end(self, *, interrupted: bool) -> None:
        """Raises only where the run has come to its own end: else that is what has to be told."""
        try:
            self._tell("on_run_end", interrupted=interrupted)
        except ExtensionError as error:
            if not interrupted:
                raise
            log.warning("%s", error)

    def _tell(self, what: str, *, interrupted: bool = False) -> None:
        if not self.all:
            return
        facts = self._facts(interrupted=interrupted)
        for name, callback in self.all:
            _call(name, callback, what, facts)

    def _facts(self, *, interrupted: bool) -> RunFacts:
        return RunFacts(self.run.path, self.run.config, self.round, tuple(self._log.more()), interrupted)


def _call(name: str, callback: Callback, what: str, facts: RunFacts) -> None:
    with calling(name, f"take {what}({RunFacts.__name__})"):
        getattr(callback, what)(facts)
