"""A run's events as TensorBoard reads them, written while it goes on: `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from florilegium.simulation.runs.callbacks import Callback, RunFacts
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import Evaluation, Event, RoundEnd

OF_A_ROUND = ("releases", "silent", "signal_to_noise", "change_norm_l2", "shared_norm_l2", "averaging_error")


class TensorBoardWriter(Callback):
    """Scalars of a run's events. The folder is `tensorboard` in that of the run."""

    def __init__(self) -> None:
        """Raises `RunError` where TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RunError(f"--tensorboard needs a package: pip install 'florilegium[tensorboard]' ({error})") from None
        self.open: Callable[..., Any] = SummaryWriter
        self.writer: Any = None

    def on_run_begin(self, facts: RunFacts) -> None:
        self.writer = self.open(facts.folder / "tensorboard")
        self._write(facts)

    def on_round_end(self, facts: RunFacts) -> None:
        self._write(facts)

    def on_run_end(self, facts: RunFacts) -> None:
        self._write(facts)
        self.writer.close()

    def _write(self, facts: RunFacts) -> None:
        for event in facts.events:
            self._add(event)
        self.writer.flush()

    def _add(self, event: Event) -> None:
        if isinstance(event, RoundEnd):
            scalars = {name: value for name in OF_A_ROUND if (value := getattr(event, name)) is not None}
            scalars |= {f"seconds/{phase}": spent for phase, spent in (event.seconds or {}).items()}
        elif isinstance(event, Evaluation):
            scalars = {f"{event.metric}/{event.arm}": event.mean_per_user}
        else:
            return
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, event.round)
