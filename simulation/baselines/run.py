"""Plays a baseline: devices meet their streams, keep what the policy keeps, and train on it, round after round.

All baselines get the same batches in the same order. Nothing is on the disk and no message is Flower's: a study
compares what is learned and counts the bytes of the arrays that would travel. `baselines.devices` has them in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.observation import PhaseRecorder
from florilegium.client.phases import annotate, observe
from florilegium.client.state import States
from florilegium.privacy.common.registry import UnexpectedError, calling
from florilegium.privacy.plan import RoundPlan
from florilegium.simulation.baselines.context import BaselineContext, Held, Lessons
from florilegium.simulation.baselines.registry import Baseline, baseline
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.data.population import met_by
from florilegium.simulation.engines.faults import tried

FLOAT_BYTES = 4
Found = TypeVar("Found")


@dataclass(frozen=True)
class Played:
    """A baseline after its last round."""

    baseline: Baseline
    context: BaselineContext
    held: Held
    sets: Lessons  # of the last round
    sent: list[torch.Tensor]  # by round, (K, S): what left each device
    tokens: float  # that a device was trained on, all rounds together, mean over devices

    @property
    def upload_bytes(self) -> int:
        """Of a device in a round."""
        return FLOAT_BYTES * self.sent[-1].shape[1]

    @property
    def download_bytes(self) -> int:
        """Of a device in a round."""
        return FLOAT_BYTES * self.held.shared.shape[1]

    @property
    def kept_bytes(self) -> int:
        """That a device holds between rounds for itself."""
        return FLOAT_BYTES * self.held.own.shape[1]


def play(
    lm: LanguageModel,
    config: ExperimentConfig,
    streams: Mapping[str, Sequence[Dialogue]],
    seed: int,
    listener: Callable[[str], None] | None = None,
) -> Played:
    """All rounds of `config.baseline` on devices with these streams, by name."""
    replies = {name: {d.id: d.response for d in stream} for name, stream in streams.items()}
    cohort = CohortContext.of(lm, config, seed, lambda device, dialogue: replies[device][dialogue], listener)
    name, context = config.baseline.name, BaselineContext.of(lm, config, seed)
    chosen, states = baseline(name), [cohort.new_state(device) for device in streams]
    with calling(name, "return what is Held, as `Baseline.start` says"):
        held = _of_kind(chosen.start(context, len(streams)), Held)
    sets, sent, tokens = list[TrainingSet](), list[torch.Tensor](), 0
    for number in range(1, config.rounds + 1):
        if listener:
            listener(f"{config.baseline.name}, round {number}")
        states = _met(states, streams, number, cohort)
        sets = [context.training_set(s, number) for s in states]
        with (
            _noted(number),
            calling(name, f"return what is Held and a tensor ({len(streams)}, S), as `Baseline.turn` says"),
        ):
            held, left = chosen.turn(held, sets, context, number)
            _of_kind(held, Held)
            if _of_kind(left, torch.Tensor).shape[:1] != (len(streams),) or left.ndim != 2:
                raise UnexpectedError(f"returned a tensor {tuple(left.shape)}")
        sent.append(left)
        tokens += sum(x.examples[i].length for x in sets for batch in x.batches for i in batch)
    return Played(chosen, context, held, sets, sent, tokens / len(streams))


def _of_kind(found: Found, kind: type[Found]) -> Found:
    """What a baseline of the user's own returned; raises `UnexpectedError` for something else."""
    if not isinstance(found, kind):
        raise UnexpectedError(f"returned {type(found).__name__}")
    return found


@contextmanager
def _noted(number: int) -> Iterator[None]:
    """An error within it is noted to be of this round."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in round {number}")
        raise


def _met(states: States, streams: Mapping[str, Sequence[Dialogue]], number: int, context: CohortContext) -> States:
    """What of a stream comes in one round, selected and annotated."""
    rounds = context.config.rounds
    arrived = [streams[s.id][s.arrived : met_by(len(streams[s.id]), number, rounds)] for s in states]

    def met(some: Sequence[int]) -> States:
        recorder = PhaseRecorder(len(some), number, context.listener)
        with recorder.phase("observe") as seen:
            after, seen[:] = observe(
                [states[k] for k in some], [arrived[k] for k in some], RoundPlan(number, number - 1), context
            )
        with recorder.phase("annotate") as asked:
            after, asked[:] = annotate(after, context)
        return after

    return tried(met, [s.id for s in states])
