"""A whole experiment: make or find its folder, federate on the chosen engine, write summary and report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import gettempdir

from filelock import FileLock, Timeout
from rich.console import Console
from safetensors import SafetensorError

from florilegium.client.secure_sessions import SimulatedSessions
from florilegium.client.state_store import StoreError
from florilegium.privacy.common.dumps import forbid_dumps
from florilegium.privacy.common.environment import (
    environment,
    lend_imports,
    make_absolute,
    prepare_process,
    private_files,
)
from florilegium.privacy.common.errors import BrokenDeviceError
from florilegium.privacy.common.registry import ExtensionError, calling, import_folders, resolve
from florilegium.privacy.ledger import LedgerError
from florilegium.simulation.baselines.devices import load_run_devices, run_devices_of_worker
from florilegium.simulation.config import ExperimentConfig, with_absolute_paths
from florilegium.simulation.data.population import User, told_of
from florilegium.simulation.devices.people import device_name
from florilegium.simulation.devices.preflight import ready
from florilegium.simulation.devices.simulated import forget_sessions
from florilegium.simulation.engines.cohort_grid import CohortGrid
from florilegium.simulation.engines.placement import open_workers
from florilegium.simulation.engines.scheduler import Scheduler
from florilegium.simulation.engines.workers import LocalWorkers
from florilegium.simulation.engines.world_grid import WorldGrid, open_clock
from florilegium.simulation.recorder import federate_run
from florilegium.simulation.reports.run_report import render_report
from florilegium.simulation.results import Result, load_run
from florilegium.simulation.runs.callbacks import Callback, named_callbacks
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.folder import RunFolder, create, resume, settle
from florilegium.simulation.runs.progress import RunProgress, progress_line, tell_data
from florilegium.simulation.runs.summary import RunSummary, write_summary


@dataclass(frozen=True)
class Experiment:
    """One federation in simulation: its settings, and the folder that the run is kept in."""

    config: ExperimentConfig
    folder: str | Path

    def run(
        self, *, resume: bool = False, overwrite: bool = False, callbacks: Sequence[Callback] = (), quiet: bool = False
    ) -> Result:
        """Runs to the end, or with `resume` goes on, and returns what there is; a line says how far it is.

        Bit for bit what `florilegium run` does. Raises `UserError` before anything is begun where a setting, the
        people, the model or the folder cannot be, and `BrokenDeviceError` where a device's code raises. What was
        finished is kept in the folder, whatever ends the run.
        """
        prepare_process()
        forbid_dumps()  # what people said is in memory
        folder = Path(self.folder)
        people = ready(self.config, folder, resuming=resume, overwrite=overwrite)
        console = Console(quiet=quiet)
        tell_data(told_of(people), console)
        with progress_line(self.config, console) as progress:
            run_experiment(
                self.config, folder, resuming=resume, overwrite=overwrite, progress=progress, callbacks=callbacks,
                people=people,
            )  # fmt: skip
        return load_run(folder)


def run(config: ExperimentConfig, folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> Result:
    """`Experiment(config, folder).run(…)` in one call."""
    return Experiment(config, folder).run(resume=resume, overwrite=overwrite)


def run_experiment(
    config: ExperimentConfig,
    folder: Path,
    *,
    resuming: bool = False,
    overwrite: bool = False,
    progress: RunProgress | None = None,
    callbacks: Sequence[Callback] = (),
    people: Sequence[User] | None = None,
) -> RunSummary:
    """Runs to the end, or goes on, and returns the summary. Ctrl-C keeps what was finished, and its report.

    `callbacks` are told how it goes on, beside those that the settings name; `people` are those of
    `simulation.devices.preflight`, where they have been read already. Raises `RunError` also for what the disk does not
    take. It and `KeyboardInterrupt` say how to go on.
    """
    if resuming and overwrite:
        raise RunError("--resume and --overwrite exclude each other")
    make_absolute()  # an engine may change the working directory
    named_callbacks(config)
    lend_imports(import_folders(config.extensions()))
    folder, config = folder.resolve(), with_absolute_paths(config)
    try:
        with private_files(), FileLock(_lock_of(folder), timeout=0):
            run = resume(folder, config) if resuming else create(folder, config, overwrite=overwrite)
            return _run(run, resuming, progress or RunProgress(), callbacks, people)
    except Timeout:
        raise RunError(f"{folder} is in use by another process; wait for it, or choose name=…") from None
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}: {error}") from error


def _lock_of(folder: Path) -> Path:
    """Held while a run goes on, outside its folder, which may have to go; on this machine alone."""
    return Path(gettempdir()) / f"florilegium-{sha256(str(folder).encode()).hexdigest()[:16]}.lock"


def _run(
    run: RunFolder,
    resuming: bool,
    progress: RunProgress,
    callbacks: Sequence[Callback],
    people: Sequence[User] | None,
) -> RunSummary:
    begun = False
    try:
        try:
            name = run.config.engine.name
            with calling(name, "federate, as `Engine` says"):
                resolve(name, ENGINES, Callable)(run, progress, callbacks, people)
        finally:
            begun = run.metrics.exists() if resuming else settle(run)
            if begun:
                progress.enter("report")
                render_report(run.path)
        return write_summary(run)
    except (OSError, SafetensorError, StoreError, LedgerError) as error:
        raise RunError(f"{run.path}: {error}; {_way_on(run, begun)}") from error
    except ExtensionError as error:
        raise ExtensionError(f"{error}; {_way_on(run, begun)}") from error.__cause__
    except BrokenDeviceError as error:
        error.add_note(f"after the mend: {_way_on(run, begun)}")
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {_way_on(run, begun)}") from None


def _way_on(run: RunFolder, begun: bool) -> str:
    """What there is of a run that has ended too early, and what to do with it."""
    if not begun:
        return f"nothing was begun: {run.path} is as it was before"
    if not run.has_rounds:
        return f"no round was finished: {run.path} begins anew with --resume"
    return f"what was finished is kept in {run.path}: go on with --resume"


def _on_cohorts(
    run: RunFolder, progress: RunProgress, callbacks: Sequence[Callback], people: Sequence[User] | None
) -> None:
    devices = load_run_devices(run, progress.enter, people)
    names = [device_name(k) for k in range(run.config.data.users)]
    with open_workers(run, devices, run_devices_of_worker) as workers:
        scheduler, clock = Scheduler(workers, devices, progress), open_clock(devices, names)
        schema = devices.schema
        sessions = SimulatedSessions(devices.context) if devices.summed else None
        grid = (
            WorldGrid(scheduler.ask, schema, names, clock, sessions)
            if clock
            else CohortGrid(scheduler.ask, schema, names, sessions)
        )
        federate_run(run, grid, scheduler, clock, callbacks)


def _on_flower(
    run: RunFolder, progress: RunProgress, callbacks: Sequence[Callback], people: Sequence[User] | None
) -> None:
    """Flower's stock simulation: a message per device, Ray actors."""
    from florilegium.simulation.engines.flower_ray import stock_grid
    from florilegium.simulation.flower_app import RUN_VARIABLE, client_app

    devices, users = load_run_devices(run, progress.enter, people), run.config.data.users
    forget_sessions(run)
    with (
        environment(RUN_VARIABLE, str(run.path)),
        stock_grid(client_app, users, run.path, progress.visit) as grid,
    ):
        federate_run(run, grid, Scheduler(LocalWorkers(devices), devices, progress), callbacks=callbacks)


# Federates a run that is made, tells the callbacks, and takes the people where they have been read already.
Engine = Callable[[RunFolder, RunProgress, Sequence[Callback], Sequence[User] | None], None]
ENGINES: dict[str, Engine] = {"cohort": _on_cohorts, "flower": _on_flower}
