"""What a small board holds, and keeping to it."""

from __future__ import annotations

import os
import sys

from florilegium.client.agent.errors import HomeError
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.places import cache_folder, has_weights

GIB = 2**30
LEAST = 768 * 2**20  # bytes with which nano learns; most of them are the libraries'
KERNELS = 16  # compiled for shapes of matrices, kept by oneDNN; its own 1,024 take hundreds of megabytes
SMALL_PASSES = 512  # tokens at once where memory is scarce: slower, but no more than a long example needs anyway


def fitting(memory: int) -> ModelConfig:
    """The largest of the models that are here, in the form in which so many bytes of memory hold it while it learns.

    From the measurements of `florilegium bench board`.
    """
    larger = has_weights(cache_folder() / "smollm2-135m")
    if larger and memory >= 6 * GIB:
        return ModelConfig(name="smollm2-135m")
    return thrifty("smollm2-135m" if larger and memory >= 1.5 * GIB else "nano", memory)


def thrifty(name: str, memory: int) -> ModelConfig:
    """The model so that it learns in little memory, slower; with half the bytes for its weights where they are many."""
    dtype = "bfloat16" if memory < 2 * GIB and name != "nano" else "auto"
    return ModelConfig(name=name, dtype=dtype, checkpointing=True, max_batch_tokens=SMALL_PASSES)


def check_limit(limit: int) -> None:
    """Raises `HomeError` for less than anything can be done with; 0 is no limit."""
    if 0 < limit < LEAST:
        raise HomeError(f"memory_limit = {limit / 2**20:.0f} MiB: an agent needs {LEAST / 2**20:.0f} MiB of memory")


def limit_memory(limit: int) -> None:
    """Has this process get no more memory of its own than `limit` bytes; 0: as much as there is.

    Where a pass through the model does not fit, smaller ones are made; what cannot be done at all is told, and the
    process goes on. Linux alone; shared libraries and files that are mapped do not count. Raises `HomeError` for less
    than anything can be done with.
    """
    check_limit(limit)
    if limit:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
    if limit and sys.platform == "linux":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if most < 0 else min(limit, most), most))
