"""Arms in processes of one thread: each has its share of the devices, as a simulation's processes have.

Not covered: GPUs, whose contexts do not outlive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from florilegium.privacy.common.machine import cores
from florilegium.simulation.benchmarks.engine_florilegium import Cohort
from florilegium.simulation.benchmarks.engine_workload import Arm, Workload
from florilegium.simulation.runs.stopping import end_with_parent


class Shares:
    """Copies of an arm, forked once its model is loaded."""

    def __init__(self, arm: Arm, count: int) -> None:
        self.size = arm.size
        self.pipes = [_forked(arm) for _ in range(count)]
        self.asked: list[Connection] = []

    def prepare(self, work: Workload) -> Callable[[], list[Any]]:
        shares = work.shares(len(self.pipes))
        self.asked = self.pipes[: len(shares)]
        for pipe, share in zip(self.asked, shares, strict=True):
            pipe.send(share)
        for pipe in self.asked:
            pipe.recv()  # ready
        return self._run

    def _run(self) -> list[Any]:
        for pipe in self.asked:
            pipe.send(None)
        return [result for pipe in self.asked for result in pipe.recv()]


def ours(model: str, dtype: torch.dtype, device: str) -> Shares:
    """Our arm, a process a core."""
    return _shares(Cohort, model, dtype, device, cores())


def ours_on_one(model: str, dtype: torch.dtype, device: str) -> Shares:
    """Our arm on one core alone."""
    return _shares(Cohort, model, dtype, device, 1)


def peft(model: str, dtype: torch.dtype, device: str) -> Shares:
    """What a careful user would do: PEFT, a process a core."""
    from florilegium.simulation.benchmarks.engine_peft import OneByOne

    return _shares(OneByOne, model, dtype, device, cores())


def _shares(arm: Callable[..., Arm], model: str, dtype: torch.dtype, device: str, count: int) -> Shares:
    if device != "cpu" or not hasattr(os, "fork"):
        raise NotImplementedError("processes of one thread are for processors, and are forked")
    torch.set_num_threads(1)  # of the copies: before the first product
    return Shares(arm(model, dtype, device), count)


def _forked(arm: Arm) -> Connection:
    ours, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(its, arm, os.getpid()), daemon=True)
    process.start()
    its.close()
    return ours


def _serve(pipe: Connection, arm: Arm, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all: the parent ends this one
    end_with_parent(parent)
    while True:
        run = arm.prepare(pipe.recv())
        pipe.send(None)
        pipe.recv()
        pipe.send(run())
