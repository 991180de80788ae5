"""Whose devices a run's devices are, for `florilegium data who RUN`; nothing in the run's own folder says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from florilegium.client.agent.folder import write_private
from florilegium.simulation.devices.people import UsersByDevice
from florilegium.simulation.devices.preflight import everybody
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.folder import RunFolder


def who(run: RunFolder, devices: Sequence[str] = ()) -> dict[str, str]:
    """The user's id of each device, all of them where none is named; the population is drawn again.

    `ana~2` is a device whose dialogues are resampled from ana's; where data knows no users, what was dealt has a
    number, as test-00002. Raises `RunError` for what is no run or none of its devices, and what reading data raises.
    """
    if not (run.path / "config.toml").is_file():
        raise RunError(f"{run.path} is not the folder of a run; name one, as runs/quickstart")
    people = UsersByDevice(everybody(run.config))
    if unknown := [device for device in devices if device not in people]:
        last = list(people)[-1]
        raise RunError(f"{unknown[0]!r} is no device of {run.path}; they are device-00000 to {last}")
    return {device: people[device].id for device in devices or people}


def write_who(path: Path, found: dict[str, str]) -> None:
    """As JSON, in a new file that its owner alone can read; raises `RunError` where one is there or none can be."""
    try:
        write_private(path, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    except FileExistsError:
        raise RunError(f"{path} exists; name a new file") from None
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None
