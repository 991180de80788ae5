"""A run's events as TensorBoard reads them, written while it goes on: `tensorboard --logdir runs`."""

from __future__ import annotations

from typing import Any

from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import Evaluation, Event, RoundEnd
from florilegium.simulation.runs.folder import RunFolder

OF_A_ROUND = ("releases", "silent", "signal_to_noise", "change_norm_l2", "shared_norm_l2", "averaging_error")


class TensorBoardWriter:
    """Scalars of the events that came since it was last updated. The folder is `tensorboard` in that of the run."""

    def __init__(self, run: RunFolder) -> None:
        """Raises `RunError` where TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RunError(f"--tensorboard needs a package: pip install 'florilegium[tensorboard]' ({error})") from None
        self.run, self.seen = run, 0
        self.writer: Any = SummaryWriter(run.path / "tensorboard")

    def update(self) -> None:
        for number, event in enumerate(self.run.events()):
            if number >= self.seen:
                self._write(event)
                self.seen = number + 1
        self.writer.flush()

    def _write(self, event: Event) -> None:
        if isinstance(event, RoundEnd):
            scalars = {name: value for name in OF_A_ROUND if (value := getattr(event, name)) is not None}
            scalars |= {f"seconds/{phase}": spent for phase, spent in (event.seconds or {}).items()}
        elif isinstance(event, Evaluation):
            scalars = {f"{event.metric}/{event.arm}": event.mean_per_user}
        else:
            return
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, event.round)
