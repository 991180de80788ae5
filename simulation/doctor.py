"""What this machine has and what a run would make of it: versions, hardware, models, data, defaults.

Reads only: it downloads nothing and loads no model. Not covered: memory and core limits of a container, other
machines of a cluster.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata, util
from pathlib import Path

import psutil
import torch
from rich.table import Table

from client.lm.hub import default_device
from client.lm.places import PULL, ModelError, cache_folder, nano_folder, resolve
from simulation.data.errors import DataError
from simulation.data.folder import data_folder

PACKAGES = ("florilegium", "torch", "transformers", "peft", "opacus", "flwr", "ray", "dp-accounting")
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, arm
GIB = 2**30

Facts = dict[str, dict[str, str]]


def doctor() -> Table:
    """The facts as a table for rich, one section after the other."""
    table = Table(show_header=False, title="florilegium doctor", title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    for section, rows in facts().items():
        for i, (name, value) in enumerate(rows.items()):
            table.add_row("" if i else section, name, value, end_section=i == len(rows) - 1)
    return table


def facts() -> Facts:
    """Section → name → value, all as text for people."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "models": _models(),
        "data": _data(),
        "defaults": _defaults(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, str]:
    memory = psutil.virtual_memory()
    found = {
        "cores": f"{_cores()} usable, torch uses {torch.get_num_threads()} threads",
        "memory": f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} available",
        "cpu": f"{platform.machine()}, torch's kernels: {torch.backends.cpu.get_cpu_capability()}",
        "bf16 on cpu": _bf16_on_cpu(),
    }
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        bf16 = "fast" if gpu.major >= 8 else "slow"  # tensor cores for it since compute capability 8.0
        found[f"gpu {i}"] = f"{gpu.name}, {gpu.total_memory / GIB:.1f} GiB, bf16 {bf16}"
    return found if torch.cuda.is_available() else {**found, "gpu": "none that torch sees"}


def _cores() -> int:
    """Cores that this process may use, which can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bf16_on_cpu() -> str:
    flags = cpu_flags()
    fast = [flag for flag in BF16_FLAGS if flag in flags]
    if not flags:
        return "unknown: the system does not list the flags of its CPU"
    return f"fast ({', '.join(fast)})" if fast else "emulated: use float32"


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the first CPU says it can do; empty where there is no `cpuinfo`."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    listed = [line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(listed[0].split()) if listed else frozenset()


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


def _defaults() -> dict[str, str]:
    """What `device = "auto"` and `dtype = "auto"` come to."""
    device = default_device()
    return {"model": "nano", "device": device, "dtype": "float32" if device == "cpu" else "bfloat16"}
