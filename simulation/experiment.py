"""A whole experiment: make or find its folder, federate on the chosen engine, write summary and report."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid

from client.shared import release_noise
from privacy.seeds import derive_key, derive_seed
from server.strategy import Aggregate, FedAvgReleases, RoundFacts, to_arrays, to_numpy
from simulation.config import ExperimentConfig
from simulation.grid import CohortGrid
from simulation.host import SimulatedDevices, open_devices
from simulation.report import render_report
from simulation.runs import RunError, RunFolder, create, resume, settle
from simulation.session import Session
from simulation.summary import export_adapters, write_summary

Listener = Callable[[str], None]
RUN_VARIABLE = "FLORILEGIUM_RUN"  # how the apps of Flower's own engine find the run's folder


def run_experiment(
    config: ExperimentConfig,
    folder: Path,
    *,
    resuming: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Runs to the end, or goes on, and returns the summary. Ctrl-C keeps what was finished, and its report."""
    if resuming and overwrite:
        raise RunError("--resume and --overwrite exclude each other")
    folder = folder.resolve()  # an engine may change the working directory
    run = resume(folder, config) if resuming else create(folder, config, overwrite=overwrite)
    try:
        ENGINES[config.engine](run, listener)
    finally:
        if run.metrics.exists() if resuming else settle(run):
            if listener:
                listener("report")
            render_report(run.path)
    return write_summary(run)


def _on_cohorts(run: RunFolder, listener: Listener | None) -> None:
    devices = open_devices(run, listener)
    federate(run, CohortGrid(devices, list(devices.users)), devices)


def _on_flower(run: RunFolder, listener: Listener | None) -> None:
    """Flower's stock simulation: a message per device, Ray actors."""
    from flwr.simulation import run_simulation

    from simulation.app import client_app, server_app

    here = Path.cwd()
    os.environ[RUN_VARIABLE] = str(run.path)
    os.chdir(run.path)  # Ray puts the working directory first on its workers' path: no foreign client.py may be there
    try:
        run_simulation(
            server_app,
            client_app,
            num_supernodes=run.config.data.users,
            backend_config={
                "init_args": {"include_dashboard": False, "log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    finally:
        os.chdir(here)


ENGINES: dict[str, Callable[[RunFolder, Listener | None], None]] = {"cohort": _on_cohorts, "flower": _on_flower}


def federate(run: RunFolder, grid: Grid, devices: SimulatedDevices) -> None:
    """All rounds over a grid, from the last one that was finished, and the verdict."""
    config, last = run.config, run.last_shared()
    done = last.round if last else -1
    secret = run.server_secret() if config.privacy.secret == "os" else derive_key(config.seed, "server")
    noise = release_noise(config, config.server.noise_bands, secret)
    strategy = FedAvgReleases(
        config.server, devices.schema, config.seed, noise,
        first_round=max(1, done + 1), commit=partial(_commit, run), committed=_committed(run, max(1, done + 1)),
    )  # fmt: skip
    ends = [e["wall_s"] for e in run.events() if e["event"] == "end"]
    session = Session(run, devices, strategy, earlier_s=ends[-1] if last and ends else 0.0)
    if last:
        run.rewind(done)
        arrays, strategy.heads = to_arrays(last.shared), last.heads
    else:
        run.metrics.unlink(missing_ok=True)
        session.open()
        start = devices.site.shared_layout.start(derive_seed(config.seed, "shared"))
        arrays = to_arrays(devices.schema.split(start.numpy()))
    try:
        timeout = config.server.reply_timeout_s
        result = strategy.start(grid, arrays, config.rounds, timeout, evaluate_fn=session.after_round)
        shared = torch.from_numpy(devices.schema.join(to_numpy(result.arrays)))
        session.finish(shared)
        export_adapters(run, devices, shared)
    except BaseException:
        session.close(interrupted=True)
        raise
    session.close(interrupted=False)


def _commit(run: RunFolder, made: Aggregate) -> None:
    run.save_shared(made.round, to_numpy(made.shared), made.heads, asdict(made.facts))


def _committed(run: RunFolder, round_number: int) -> Aggregate | None:
    stored = run.aggregate(round_number)
    if stored is None:
        return None
    return Aggregate(stored.round, to_arrays(stored.shared), stored.heads, RoundFacts(**stored.facts))
