"""A bar that shows how far a run is: one step for each phase of each cohort, in every round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from simulation.config import ExperimentConfig

OF_COHORT = ("observe", "annotate", "learn_shared", "release", "synthesize", "learn_personal")
OF_ROUND = ("control", "evaluate")
OF_RUN = ("evaluate", "pooled", "reply", "report")  # the first before round 1, the others at the end


@contextmanager
def progress_bar(config: ExperimentConfig, console: Console) -> Iterator[Callable[[str], None]]:
    """Yields a listener that is told the name of each phase that begins."""
    cohorts = math.ceil(config.data.users * config.server.sampled_share / config.cohort_size)
    total = config.rounds * (len(OF_COHORT) * cohorts + len(OF_ROUND)) + len(OF_RUN)
    columns = SpinnerColumn(), TextColumn("{task.description:32}"), BarColumn(), TaskProgressColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("loading", total=total)
        rounds = 0

        def listen(phase: str) -> None:
            nonlocal rounds
            rounds += phase == "evaluate"  # closes a round; the first stands before round 1
            where = f"round {min(max(1, rounds), config.rounds)} of {config.rounds}"
            bar.update(task, advance=1, description=f"{config.name}: {where}, {phase}")

        yield listen
        bar.update(task, completed=total, description=f"{config.name}: done")
