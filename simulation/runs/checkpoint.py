"""Checkpoints of the server: what it had at the end of a round, or after the round's releases, in one file each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from florilegium.privacy.release import Array

MOMENTS = "optimizer."  # begins the names of what a server's optimizer remembers
HEADS = ("heads.names", "heads.values")


@dataclass(frozen=True)
class Checkpoint:
    """What the server had at the end of a round, or after its releases."""

    round: int
    shared: Mapping[str, Array]
    heads: Mapping[str, str]  # device → head of its ledger with its last release
    moments: Mapping[str, Any]  # of the server's optimizer
    facts: dict[str, Any] | None = None  # of the round, where it is not over


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """The file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    moments = {f"{MOMENTS}{name}": moment for name, moment in checkpoint.moments.items()}
    stored = dict(checkpoint.shared) | moments | _packed(checkpoint.heads)
    metadata = {"facts": json.dumps(checkpoint.facts)}
    save_file({k: np.ascontiguousarray(v) for k, v in stored.items()}, fresh, metadata)
    fresh.replace(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Its round is what the file's name begins with."""
    with safe_open(path, "np") as stored:
        told = stored.metadata()
        arrays = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
    heads = _unpacked(arrays)
    shared = {k: a for k, a in arrays.items() if not k.startswith(MOMENTS)}
    moments = {k.removeprefix(MOMENTS): a for k, a in arrays.items() if k.startswith(MOMENTS)}
    return Checkpoint(int(path.stem[:5]), shared, heads, moments, json.loads(told["facts"]))


def _packed(heads: Mapping[str, str]) -> dict[str, Array]:
    """Heads of ledgers by device as arrays: there may be millions, and a file's header has 100 MB."""
    names, values = "\n".join(heads).encode(), bytes.fromhex("".join(heads.values()))
    return {key: np.frombuffer(data, np.uint8) for key, data in zip(HEADS, (names, values), strict=True)}


def _unpacked(arrays: dict[str, Any]) -> dict[str, str]:
    """The inverse of `_packed`; takes them out of the arrays."""
    names, values = (arrays.pop(key).tobytes() for key in HEADS)
    return {name: values[32 * i : 32 * i + 32].hex() for i, name in enumerate(names.decode().split("\n")) if name}
