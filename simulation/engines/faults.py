"""What happens when a device of a simulation raises: the run ends with the first such error, or it is counted.

A device that raises is a fault of the code that simulates it, and a run without it would be another experiment. Who
simulates faults sets `engine.on_device_error = "count"`: then a `DeviceFaultError`, what a device's data or disk can
cause, costs that device its turn and is counted; anything else ends the run all the same.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from florilegium.client.state_store import StoreError
from florilegium.privacy.common.errors import BrokenDeviceError, DeviceFaultError, UserError
from florilegium.privacy.ledger import LedgerError

Result = TypeVar("Result")
OTHERS = 8  # devices that are tried alone, to say whether they fail alike
NO_DEVICES_FAULT = (UserError, StoreError, LedgerError, MemoryError)  # end a run whatever is set


class ElsewhereError(UserError):
    """What a user can mend, said by another process."""


class TooManyFailedError(UserError):
    """More devices failed than `engine.failed_share` allows."""


def tried(work: Callable[[Sequence[int]], Result], names: Sequence[str]) -> Result:
    """`work` on the places of all these devices at once; raises `BrokenDeviceError` where one of them breaks it.

    The first that does is found by halves, each tried alone; `work` must bear that.
    """
    try:
        return work(range(len(names)))
    except (*NO_DEVICES_FAULT, BrokenDeviceError):
        raise
    except Exception as error:  # noqa: BLE001  # is raised, by name
        raised = error
    raise _found(raised, work, names) from raised  # not while it is handled: it would be the context of what is tried


def _found(error: Exception, work: Callable[[Sequence[int]], Any], names: Sequence[str]) -> BrokenDeviceError:
    group = list(range(len(names)))
    while len(group) > 1:
        first, rest = group[: len(group) // 2], group[len(group) // 2 :]
        failure, group = (early, first) if (early := _failure(work, first)) else (_failure(work, rest), rest)
        if failure is None:
            who, alike = f"{names[0]} … {names[-1]}", "only together: each half of them comes through"
            return BrokenDeviceError(who, named(error), alike, _traced(error))
        error = failure
    return BrokenDeviceError(names[group[0]], named(error), _alike(error, work, group[0], len(names)), _traced(error))


def _failure(work: Callable[[Sequence[int]], Any], group: Sequence[int]) -> Exception | None:
    try:
        work(group)
    except NO_DEVICES_FAULT:
        raise
    except Exception as error:  # noqa: BLE001  # which one it is is what is asked
        return error
    return None


def _alike(error: Exception, work: Callable[[Sequence[int]], Any], broken: int, count: int) -> str:
    """How many of the other devices of its cohort fail so too; of a large one only some are tried."""
    others = [k for k in range(count) if k != broken]
    some = others[:: -(-len(others) // OTHERS)] if others else []
    failures = [_failure(work, [k]) for k in some]
    like = sum(f is not None and (type(f), _place(f)) == (type(error), _place(error)) for f in failures)
    if not some:
        return "it was alone in its cohort"
    if len(others) == 1:
        return f"the other device in its cohort {'failed' if like else 'did not fail'} alike"
    tried_of = f"{len(some)}" if len(some) == len(others) else f"{len(some)} tried of {len(others)}"
    return f"of the {tried_of} others in its cohort {like or 'none'} failed alike"


def _place(error: BaseException) -> tuple[str, int]:
    """File and line that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].filename, frames[-1].lineno or 0) if frames else ("", 0)


def named(error: BaseException) -> str:
    """Its kind and its first line, and where it was noted that the device was."""
    lines = str(error).splitlines() or [""]
    where = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {lines[0]}{where}"


def _traced(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@dataclass(frozen=True)
class Attempt:
    """What came of a job for a cohort: results of some devices each, and why others failed."""

    results: list[tuple[tuple[str, ...], Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def attempt(job: Callable[..., Any], counting: bool, devices: Any, names: Sequence[str], shared: Any) -> Attempt:
    """A job (`engines.workers.Job`) done for a cohort; where it is `counting`, faults of devices cost them alone."""

    def work(some: Sequence[int]) -> Any:
        return job(devices, [names[k] for k in some], shared)

    if not counting:
        return Attempt([(tuple(names), tried(work, names))])
    try:
        return Attempt([(tuple(names), work(range(len(names))))])
    except NO_DEVICES_FAULT:
        raise
    except DeviceFaultError as error:
        if len(names) == 1:
            return Attempt(failed={names[0]: named(error)})
    except Exception:  # noqa: BLE001  # no fault of a device's: as where nothing is counted
        return Attempt([(tuple(names), tried(work, names))])
    half = len(names) // 2
    first, rest = (attempt(job, counting, devices, part, shared) for part in (names[:half], names[half:]))
    return Attempt([*first.results, *rest.results], first.failed | rest.failed)


# -- what processes of Flower's leave for the driver ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """A device whose fault was counted, and what it was asked for: a release, an adoption, a control, an evaluation."""

    device: str
    what: str
    error: str


def leave(folder: Path, device: str, what: str, error: Exception | str) -> None:
    """Keeps an error for the driver in the run's folder; a text is one that is to be counted."""
    told = {"device": device, "what": what, "counted": isinstance(error, str), "error": str(error)}
    if isinstance(error, BrokenDeviceError):
        told["broken"] = error.args
    folder.mkdir(exist_ok=True)
    fresh = folder / f"{device}.new"
    fresh.write_text(json.dumps(told), encoding="utf-8")
    fresh.replace(folder / f"{device}.json")


def left(folder: Path) -> list[Failure]:
    """What was left in a folder, which is then empty; raises the first error that is not to be counted."""
    found = []
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        if "broken" in told:
            raise BrokenDeviceError(*told["broken"])
        if not told["counted"]:
            raise ElsewhereError(told["error"])
        found.append(Failure(told["device"], told["what"], told["error"]))
    return found
