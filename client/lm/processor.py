"""What the processor can do, as the system lists it; torch is asked too where it is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, arm
PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch.cpu, private: may be missing


def multiplies_bfloat16(device: str) -> bool:
    """Whether `device` has instructions for bfloat16 matrices, so that they are faster than float32 ones."""
    return device != "cpu" or bool(bfloat16_flags()) or _torch_says_so()


def bfloat16_flags() -> list[str]:
    """Those of the CPU's flags that stand for such instructions."""
    return [flag for flag in BF16_FLAGS if flag in cpu_flags()]


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the first CPU says it can do; empty where there is no `cpuinfo`."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    listed = [line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(listed[0].split()) if listed else frozenset()


def _torch_says_so() -> bool:
    cpu = getattr(sys.modules.get("torch"), "cpu", None)
    return any(getattr(cpu, probe, bool)() for probe in PROBES)
