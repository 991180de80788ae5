"""A process for each arm, so that arms can take turns and the memory of one is not that of another."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from florilegium.privacy.common.errors import UserError
from florilegium.simulation.benchmarks.engine_workload import Arm, ModelSize, Workload
from florilegium.simulation.runs.stopping import end_all, end_with_parent

ARMS = {  # name → module and what makes it, imported in the arm's own process
    "florilegium": ("florilegium.simulation.benchmarks.engine_florilegium", "Cohort"),
    "florilegium-contrast": ("florilegium.simulation.benchmarks.engine_florilegium", "Contrasting"),
    "florilegium-cores": ("florilegium.simulation.benchmarks.engine_cores", "ours"),
    "florilegium-one-core": ("florilegium.simulation.benchmarks.engine_cores", "ours_on_one"),
    "peft": ("florilegium.simulation.benchmarks.engine_peft", "OneByOne"),
    "peft-cores": ("florilegium.simulation.benchmarks.engine_cores", "peft"),
    "opacus": ("florilegium.simulation.benchmarks.engine_peft", "OpacusOneByOne"),
    "pfl": ("florilegium.simulation.benchmarks.engine_pfl", "Pfl"),
    "flower": ("florilegium.simulation.benchmarks.engine_flower", "federate"),
}
END_TIMEOUT_S = 30.0  # of Ray


@dataclass(frozen=True)
class Answer:
    """One measurement."""

    seconds: float
    peak_bytes: int | None
    results: list[Any]


class AbsentError(UserError):
    """An arm cannot run here; the message says why."""


class Worker:
    """One arm in a process of its own."""

    def __init__(self, arm: str, model: str, dtype: str, device: str) -> None:
        """Raises `AbsentError`."""
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, arm, model, dtype, device))
        self._process.start()
        theirs.close()
        try:
            self.size: ModelSize = self._receive()
        except BaseException:
            self.kill()
            raise

    def measure(self, work: Workload, *, memory: bool) -> Answer:
        """Time, or memory: to measure this one, what was freed is first handed back, which costs time after.

        Raises `AbsentError` where the arm cannot do this work.
        """
        self._pipe.send((work, memory))
        answer: Answer = self._receive()
        return answer

    def close(self) -> None:
        """Its process ends when it has nothing to do; one that does not is ended."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(END_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """Ends the process, and what it has started, whatever it does."""
        with suppress(psutil.NoSuchProcess):
            end_all([psutil.Process(self._process.pid)])
        self._process.join()

    def _receive(self) -> Any:
        try:
            received = self._pipe.recv()
        except EOFError:
            self._process.join()
            received = f"its process ended with exit code {self._process.exitcode}"
        if isinstance(received, str):
            raise AbsentError(received)
        return received


def _serve(pipe: Connection, arm: str, model: str, dtype: str, device: str) -> None:
    """Runs in the arm's process: says the model's size, then answers measurements until it is told None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all: the parent ends this one
    parent = parent_process()
    end_with_parent(parent.pid if parent else None)
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    module, name = ARMS[arm]
    try:
        make = getattr(import_module(module), name)
        if arm == "flower":
            make(model, dtype, device, lambda federation: _answer(pipe, federation, device))
        else:
            import torch

            _answer(pipe, make(model, getattr(torch, dtype), device), device)
    except Exception as error:  # noqa: BLE001  # whatever keeps the arm away is told in the table
        pipe.send(_reason(error))


def _answer(pipe: Connection, arm: Arm, device: str) -> None:
    pipe.send(arm.size)
    while (asked := pipe.recv()) is not None:
        work, memory = asked
        try:
            peak = _Peak(device) if memory else None
            run = arm.prepare(work)
            began = time.perf_counter()
            results = run()
            seconds = time.perf_counter() - began
            alone = peak is not None and not hasattr(arm, "pipes")  # of several processes nobody adds it up
            pipe.send(Answer(seconds, peak.bytes() if peak and alone else None, results))
        except Exception as error:  # noqa: BLE001  # another process tells it, with its traceback
            traceback.print_exc()
            pipe.send(_reason(error))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


class _Peak:
    """How much more memory than at its creation was in use at once: of the GPU, or of this process."""

    def __init__(self, device: str) -> None:
        import torch

        self.cuda = device != "cpu"
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):
                libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
            self.before = _status("VmRSS")

    def bytes(self) -> int | None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            return int(torch.cuda.max_memory_allocated() - self.before)
        return _status("VmHWM") - self.before if sys.platform == "linux" else None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
