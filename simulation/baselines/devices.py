"""A baseline on the real engine: what its devices do in a round, behind Flower's messages and in a run's folder.

Batches, training and what is sent are those of `simulation.baselines.run`; the server is every run's, with its mean,
its ledgers and its noise. Not covered: FedALT, whose server sends each device something else; FedDPA's mixture anew for
each query, in whose place devices answer with the weights of training; a control arm without a server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.observation import Observation, PhaseRecorder
from florilegium.client.private_training import release, train_shared
from florilegium.client.round import stay
from florilegium.client.state import DeviceState, States
from florilegium.privacy.common.registry import UnexpectedError, calling, resolve
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.secure_aggregation.part import Sendable
from florilegium.simulation.baselines.context import BaselineContext, Held, upload
from florilegium.simulation.baselines.registry import BASELINES, Baseline, keep
from florilegium.simulation.data.population import User
from florilegium.simulation.devices.simulated import RoundFunctions, SimulatedDevices, load_devices
from florilegium.simulation.runs.folder import RunFolder
from florilegium.simulation.runs.provenance import check_sources


@dataclass(frozen=True)
class BaselineRounds:
    """The rounds of a cohort under a baseline."""

    baseline: Baseline
    context: BaselineContext

    def contribute(
        self,
        states: States,
        arrived: Sequence[Sequence[Dialogue]],
        received: torch.Tensor,
        plan: RoundPlan,
        context: CohortContext,
    ) -> tuple[States, list[Sendable | None], list[Observation]]:
        """Selects, asks, trains what is shared (P,) and releases its change; with a server, for what it costs.

        A device whose account does not allow a release trains nothing before the aggregation.
        """
        own, failed = dict[str, torch.Tensor](), dict[str, str]()

        def learn(
            able: Sequence[DeviceState], received: torch.Tensor, plan: RoundPlan, context: CohortContext
        ) -> dict[str, torch.Tensor]:
            sets = [self.context.training_set(s, plan.round) for s in able]
            held = self._held(able, received)
            stays, sends = (len(able), held.own.shape[1]), (len(able), held.shared.shape[1])
            told = f"return float32 {stays} that stays and {sends} that is sent, all finite"
            with calling(self._name, told, _among(able)):
                kept, changes = self.baseline.contribute(held, sets, noting := self._noting())
                self._check(kept, able, held.own.shape[1])
                self._check(changes, able, held.shared.shape[1])
            own.update({s.id: row.clone() for s, row in zip(able, kept, strict=True)})
            failed.update({able[k].id: why for k, why in noting.diverged.items()})
            return {s.id: row for s, row in zip(able, upload(changes, self.context), strict=True)}

        states, releases, seen = stay(states, arrived, plan, context)
        recorder = PhaseRecorder(len(states), plan.round, context.listener)
        with recorder.phase("learn_shared") as spent:
            if self.context.config.server.absent:
                learn(states, received, plan, context)
                spent[:] = [Observation()] * len(states)
            else:
                states, changes, spent[:] = train_shared(states, received, plan, context, learn)
            tokens = [self._tokens(s, plan) if s.id in own else 0 for s in states]
            spent[:] = [
                replace(o, shared_tokens=n, personal_failed=failed.get(s.id))
                for o, n, s in zip(spent, tokens, states, strict=True)
            ]
        states = [replace(s, personal=own.get(s.id, s.personal)) for s in states]
        if not self.context.config.server.absent:
            with recorder.phase("release") as sent:
                states, releases = release(changes, states, received, plan, context)
                sizes = [context.upload_bytes(s.id, plan) if r else 0 for s, r in zip(states, releases, strict=True)]
                sent[:] = [Observation(upload_bytes=size) for size in sizes]
        return states, releases, [a.joined(b) for a, b in zip(seen, recorder.observations, strict=True)]

    def adopt(
        self, states: States, received: torch.Tensor, plan: RoundPlan, context: CohortContext
    ) -> tuple[States, list[Observation]]:
        """What stays on a device learns, if it does so now, on the aggregated adapter (P,)."""
        recorder = PhaseRecorder(len(states), plan.round, context.listener)
        over = [replace(s, sent=None, asked="") for s in states]
        with recorder.phase("learn_personal") as learned:
            learns, noting = self.baseline.adopt is not keep, self._noting()
            if learns:
                sets, held = [self.context.training_set(s, plan.round) for s in over], self._held(over, received)
                with calling(
                    self._name, f"return float32 {tuple(held.own.shape)} that stays, all finite", _among(over)
                ):
                    rows = self.baseline.adopt(held, sets, noting)
                    self._check(rows, over, held.own.shape[1])
                over = [replace(s, personal=row.clone()) for s, row in zip(over, rows, strict=True)]
            learned[:] = [
                Observation(
                    personal_tokens=self._tokens(s, plan) if learns else 0, personal_failed=noting.diverged.get(k)
                )
                for k, s in enumerate(over)
            ]
        return over, recorder.observations

    def _noting(self) -> BaselineContext:
        """The context of one call, which notes whose training diverged in it."""
        return replace(self.context, diverged={})

    @property
    def _name(self) -> str:
        return self.context.config.baseline.name

    def _check(self, rows: object, states: Sequence[DeviceState], width: int) -> None:
        """Raises `UnexpectedError` for what is no row of numbers for each device."""
        if not isinstance(rows, torch.Tensor):
            raise UnexpectedError(f"returned {type(rows).__name__}")
        if rows.shape != (len(states), width) or rows.dtype != torch.float32:
            raise UnexpectedError(f"returned {str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape)}")
        if broken := [s.id for s, fine in zip(states, rows.isfinite().all(1).tolist(), strict=True) if not fine]:
            raise UnexpectedError(f"returned numbers for {', '.join(broken)} that are not finite")

    def _held(self, states: Sequence[DeviceState], received: torch.Tensor) -> Held:
        width = self.baseline.start(self.context, 1).shared.shape[1]
        return Held(received[None, :width], torch.stack([s.personal for s in states]))

    def _tokens(self, state: DeviceState, plan: RoundPlan) -> int:
        """Tokens that a device trains on before the aggregation, or after it: all before, or a half each."""
        found = self.context.training_set(state, plan.round)
        count = len(found.batches) // (1 if self.baseline.adopt is keep else 2)
        return sum(found.examples[i].length for batch in found.batches[:count] for i in batch)


def _among(states: Sequence[DeviceState]) -> str:
    """The devices that a baseline is called for, all at once."""
    return states[0].id if len(states) == 1 else f"{states[0].id} … {states[-1].id}"


def load_run_devices(
    run: RunFolder, listener: Callable[[str], None] | None = None, people: Sequence[User] | None = None
) -> SimulatedDevices:
    """The devices of a run, which do what our own method does, or what a baseline does. Raises as `load_devices`."""
    devices, name = load_devices(run, listener, people), run.config.baseline.name
    return under(devices, resolve(name, BASELINES, Baseline)) if name else devices


@lru_cache(maxsize=1)
def run_devices_of_worker(folder: Path) -> SimulatedDevices:
    """As `load_run_devices`, in a worker process, once; refuses to run other code than the driver's."""
    run = RunFolder(folder)
    check_sources(run.path, run.config.extensions())
    return load_run_devices(run)


def under(devices: SimulatedDevices, baseline: Baseline) -> SimulatedDevices:
    """The devices of a run, under a baseline."""
    config, context = devices.run.config, devices.context
    own = BaselineContext.of(context.lm, config, config.seed)
    shared_layout, personal_layout = baseline.layouts(own)
    rounds = BaselineRounds(baseline, own)
    return replace(
        devices,
        context=replace(
            context,
            shared_layout=shared_layout,
            personal_layout=personal_layout,
            personal_start=baseline.start(own, 1).own[0],
        ),
        duties=RoundFunctions(rounds.contribute, rounds.adopt, baseline.own),
    )
