"""A device's adapters as files of llama.cpp's."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from gguf import GGUFReader

from florilegium.client.agent.device import Device
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.gguf_adapter import Placement, gguf_adapter, placement
from florilegium.client.lm.places import is_gguf, resolve
from florilegium.client.phases import frozen_adapters

FOLDER = "gguf"


def gguf_files(device: Device) -> dict[str, bytes]:
    """`personal.gguf`; where there is a shared adapter `shared.gguf` too, and `merged.gguf`, which is both in one.

    With them the bundled base, as llama.cpp reads it. Raises `AdapterFormatError` for adapters that it does not know.
    """
    place, (*shared, personal) = placed(device), adapters_on(device)
    found = {"personal": gguf_adapter([personal], place)}
    if shared:
        found |= {"shared": gguf_adapter(shared, place), "merged": gguf_adapter([*shared, personal], place)}
    if device.lm.name == "nano":
        found["base"] = _nano()
    return {f"{FOLDER}/{name}.gguf": content for name, content in found.items()}


def adapters_on(device: Device) -> list[Adapters]:
    """What a device talks with: what a server sent, if anything, and the personal adapter on top of it."""
    state, (received, _) = device.state(), device.used()
    shared = [] if received is None else frozen_adapters(received, [state.id], device.context)
    return [*shared, device.personal(state)]


def placed(device: Device) -> Placement:
    """Where the base's file has the layers that adapters change."""
    path = resolve(device.lm.name)
    return placement(device.lm.engine, GGUFReader(path) if is_gguf(path) else None)


def _nano() -> bytes:
    from florilegium.client.lm.gguf_base import write_gguf

    with TemporaryDirectory(prefix="florilegium-") as folder:
        path = Path(folder) / "base.gguf"
        write_gguf("nano", path)
        return path.read_bytes()
