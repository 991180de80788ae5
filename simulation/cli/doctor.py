"""What this machine has and what a run would make of it: versions, hardware, models, data, defaults.

Reads only: it downloads nothing and loads no model, and torch, which takes seconds, only where all is asked for. Not
covered: memory and core limits of a container, other machines of a cluster.
"""

from __future__ import annotations

import platform
from importlib import metadata, util
from pathlib import Path
from typing import Annotated

import psutil
import typer
from packaging.version import Version
from rich.table import Table
from rich.text import Text

from florilegium.client.lm.places import PULL, ModelError, cache_folder, nano_folder, resolve
from florilegium.client.lm.processor import bfloat16_flags, cpu_flags, multiplies_bfloat16
from florilegium.privacy.common.machine import cores
from florilegium.simulation.cli.app import console
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import data_folder

TRIED = {  # package → the lowest and the newest version that the tests were run with; pyproject.toml goes from one to
    "torch": ("2.6.0", "2.13.0"),  # the next minor after the other, since we lean on internals of these
    "transformers": ("5.8.0", "5.24.0"),
    "peft": ("0.18.0", "0.21.2"),
    "opacus": ("1.6.0", "1.6.0"),
    "flwr": ("1.41.0", "1.42.0"),
    "ray": ("2.55.1", "2.55.1"),  # Flower's choice
}
OTHERS = ("dp-accounting", "pydantic", "numpy")
WIDE = ("avx2", "avx512f", "asimd", "sve")  # instructions that a pass is as fast as
FULL = "florilegium doctor --full asks torch"
GPU_PLACES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of drivers: Nvidia's, AMD's, that of WSL
NVIDIA = Path("/proc/driver/nvidia/gpus")
GIB = 2**30

Facts = dict[str, dict[str, str]]


def doctor(full: Annotated[bool, typer.Option(help="Ask torch too: its threads, its GPUs.")] = False) -> None:
    """Show what is installed, what the machine has, and which defaults a run would take."""
    console.print(as_table(full))


def as_table(full: bool = False) -> Table:
    """The facts as a table for rich, one section after the other."""
    table = Table(show_header=False, title="florilegium doctor", title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    for section, rows in facts(full).items():
        for i, (name, value) in enumerate(rows.items()):
            table.add_row("" if i else section, Text(name), Text(value), end_section=i == len(rows) - 1)
    return table


def facts(full: bool = False) -> Facts:
    """Section → name → value, all as text for people; with what only torch knows where `full`."""
    return {
        "versions": _versions(),
        "machine": _machine(full),
        "models": _models(),
        "data": _data(),
        "defaults": _defaults(full),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "florilegium": _version("florilegium")}
    return found | {p: _against_tried(p) for p in TRIED} | {p: _version(p) for p in OTHERS}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _against_tried(package: str) -> str:
    """The version that is installed, and whether it lies between those that were tried."""
    version, (lowest, newest) = _version(package), TRIED[package]
    if version == "not installed":
        return version
    if Version(lowest) <= Version(Version(version).public) <= Version(newest):
        return f"{version} (tried: {lowest} to {newest})"
    age = "older" if Version(version) < Version(lowest) else "newer"
    return (
        f"{version}: {age} than what was tried ({lowest} to {newest}); pip install '{package}=={newest}', or try it: "
        f"pip install '.[test]' && pip install --no-deps '{package}=={version}' && pytest"
    )


def _machine(full: bool) -> dict[str, str]:
    memory = psutil.virtual_memory()
    wide = [flag for flag in WIDE if flag in cpu_flags()]
    found = {
        "cores": f"{cores()} usable",
        "memory": f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} available",
        "cpu": ", ".join([platform.machine(), *wide]),
    }
    told = _of_torch() if full else _gpus_of_the_system()
    return {**found, "bf16 on cpu": _bf16_on_cpu(), **told}


def _of_torch() -> dict[str, str]:
    """What torch sees and uses."""
    import torch

    found = {"torch": f"{torch.get_num_threads()} threads, kernels: {torch.backends.cpu.get_cpu_capability()}"}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        bf16 = "fast" if gpu.major >= 8 else "slow"  # tensor cores for it since compute capability 8.0
        found[f"gpu {i}"] = f"{gpu.name}, {gpu.total_memory / GIB:.1f} GiB, bf16 {bf16}"
    return found if torch.cuda.is_available() else {**found, "gpu": "none that torch sees"}


def _gpus_of_the_system() -> dict[str, str]:
    """Those that a driver has told of."""
    if not _has_gpu_driver():
        return {"gpu": "no driver of one"}
    told = [path.read_text(encoding="utf-8").splitlines() for path in sorted(NVIDIA.glob("*/information"))]
    models = [line.partition(":")[2].strip() for lines in told for line in lines if line.startswith("Model")]
    return {f"gpu {i}": f"{model}; {FULL}" for i, model in enumerate(models)} or {"gpu": FULL}


def _has_gpu_driver() -> bool:
    return any(Path(place).exists() for place in GPU_PLACES)


def _bf16_on_cpu() -> str:
    if multiplies_bfloat16("cpu"):
        return f"fast ({', '.join(bfloat16_flags()) or 'torch says so'})"
    return "emulated: use float32" if cpu_flags() else f"the system does not list what its CPU can; {FULL}"


def _models() -> dict[str, str]:
    try:
        nano = f"{_megabytes(nano_folder()):.1f} MB in {nano_folder()}"
    except ModelError:
        nano = "no weights in this installation"
    try:
        smollm2 = f"{_megabytes(resolve('smollm2-135m')):.1f} MB in {resolve('smollm2-135m')}"
    except ModelError:
        smollm2 = f"not in {cache_folder()}; fetch it with: {PULL}"
    return {"nano": nano, "smollm2-135m": smollm2}


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def _data() -> dict[str, str]:
    chitchat = "installed" if util.find_spec("chitchat_dataset") else "not installed; pip install chitchat-dataset"
    try:
        folder = data_folder()
    except DataError as error:
        return {"chitchat": chitchat, "FLORILEGIUM_DATA": str(error)}
    names = sorted(file.name.removesuffix(".jsonl.xz") for file in folder.glob("*.jsonl.xz"))
    return {"chitchat": chitchat, "FLORILEGIUM_DATA": f"{', '.join(names) or 'no .jsonl.xz files'} in {folder}"}


def _defaults(full: bool) -> dict[str, str]:
    """What `device = "auto"` and `dtype = "auto"` come to."""
    if not full and _has_gpu_driver():
        return {"model": "nano", "device": f"cuda where torch sees a GPU, else cpu; {FULL}", "dtype": _dtype("cpu")}
    device = "cpu"
    if full:
        from florilegium.client.lm.hub import default_device  # and with it torch

        device = default_device()
    return {"model": "nano", "device": device, "dtype": _dtype(device)}


def _dtype(device: str) -> str:
    return "bfloat16" if multiplies_bfloat16(device) else "float32"
