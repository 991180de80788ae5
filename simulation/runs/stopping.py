"""How a command ends when it is told to, by Ctrl-C, by `kill` or by a terminal that closes: soon, and with all that
it has started.

Not covered: what is left by a process that is killed outright. There `end_with_parent` ends the processes that ask for
it, and the kernel those of Ray that this process has begun (on Linux).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
GRACE_S = 2.0  # for processes that are ending by themselves
PATIENCE_S = 30.0  # for what is written down when a command is told to end; then it ends all the same
PARENT = "FLORILEGIUM_PARENT"  # the process that a child ends with


class Stopped(KeyboardInterrupt):
    """The command was told to end; once, for it does not hear it again."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.exit_code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """What is done in here ends with `Stopped` at a signal, and nothing that it has started is alive after that."""
    numbers, started, over = list[int](), list[psutil.Process](), threading.Event()

    def stop(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        started.extend(psutil.Process().children(recursive=True))  # while it is known who is whose
        numbers.append(number)
        threading.Thread(target=_end_at_last, args=(number, started, over), daemon=True).start()
        raise Stopped(number)

    before = {each: signal.signal(each, stop) for each in SIGNALS if _heard(each)}
    try:
        yield
    finally:
        if numbers:  # whatever others have made of it: Ray raises an exception of its own
            end_all(started, GRACE_S)
            over.set()
            raise Stopped(numbers[0]) from None
        for number, handler in before.items():
            signal.signal(number, handler)


def _heard(number: int) -> bool:
    """Whoever starts a command with `nohup` does not want it to hear that the terminal closes."""
    return number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN


def _end_at_last(number: int, started: list[psutil.Process], over: threading.Event) -> None:
    """For what cannot be interrupted, or swallows it."""
    if not over.wait(PATIENCE_S):
        end_all(started)
        os._exit(128 + number)


def end_all(processes: Iterable[psutil.Process], grace_s: float = 0.0) -> None:
    """Ends these processes and what they have started: those that are there after a while are killed."""
    deadline, left = time.monotonic() + grace_s, [p for p in processes if _alive(p)]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [p for p in left if _alive(p)]
    found: dict[int, psutil.Process] = {}
    for process in left:
        _hold(process, found)
    for process in found.values():
        with suppress(psutil.Error):
            process.kill()


def _hold(process: psutil.Process, found: dict[int, psutil.Process]) -> None:
    """Stops a process before it is asked what it has started: it begins nothing meanwhile."""
    if process.pid in found:
        return
    found[process.pid] = process
    with suppress(psutil.Error):
        process.suspend()
        for child in process.children():
            _hold(child, found)


def _alive(process: psutil.Process) -> bool:
    """Whether it can still do something; one that has ended is left for its parent to ask how."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def run_child(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`; however that ends, nothing of the child is left."""
    process = subprocess.Popen(
        command, cwd=cwd, env={**environment, PARENT: str(os.getpid())}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        said, told = process.communicate()
    except BaseException:
        with suppress(psutil.NoSuchProcess):
            end_all([psutil.Process(process.pid)])
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, said, told)


def end_with_parent(parent: int | None = None) -> None:
    """This process, and what it has started, ends when the one that started it is gone, however that ended."""
    expected = parent or int(os.environ.get(PARENT, os.getppid()))
    threading.Thread(target=_outlive, args=(expected,), daemon=True).start()


def _outlive(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    end_all(psutil.Process().children())
    os._exit(1)
