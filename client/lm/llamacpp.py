"""Replies by llama.cpp (`xllamacpp`, the extra `llamacpp`): one base of GGUF, and the adapter that is on.

The library lays out llama.cpp's server within this process. It opens a door to it that cannot be left out: a socket in
a folder that is there for no longer than the start, behind a key that nobody is told; nobody comes through it. The
adapter is in memory and never on a disk. Putting another one on takes the server anew, tenths of a second: the base is
mapped, and its pages stay. Not covered: other systems than Linux, contrasts, several replies at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from typing import TypedDict

from florilegium.client.lm.config import SamplingConfig
from florilegium.client.lm.places import ModelError

EXTRA = "pip install 'florilegium[llamacpp]'"
QUIET = -1
SEEDS = 1 << 32  # that llama.cpp tells apart


class _Choice(TypedDict, total=False):
    text: str
    finish_reason: str | None


class _Answer(TypedDict, total=False):
    choices: list[_Choice]
    error: dict[str, str]


def check_llamacpp() -> None:
    """Raises `ModelError` where llama.cpp cannot be used here."""
    if find_spec("xllamacpp") is None:
        raise ModelError(f"generation.backend = 'llamacpp' needs an extra: {EXTRA}; or set it to 'torch'")
    if not hasattr(os, "memfd_create"):
        raise ModelError("generation.backend = 'llamacpp' was made for Linux alone; set it to 'torch'")


class LlamaCpp:
    """One base, loaded, with at most one adapter on."""

    def __init__(self, base: Path, context_tokens: int, threads: int, adapter: bytes = b"", stop: str = "") -> None:
        """Replies end before the text `stop`, if any.

        Raises `ModelError` where llama.cpp does not load the base, or the adapter for it.
        """
        import xllamacpp

        self._stop = stop
        params = xllamacpp.CommonParams()
        params.model.path = str(base)
        params.n_ctx, params.n_parallel = context_tokens, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup, params.verbosity, params.ui = False, QUIET, False
        params.cache_ram_mib = 0  # of what earlier prompts were: it would grow to gigabytes
        params.api_keys = [token_hex(16)]
        with TemporaryDirectory(prefix="florilegium-") as folder, _in_memory(adapter) as path:
            params.hostnames = [f"{folder}/closed.sock"]
            if adapter:
                params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0)]
            try:
                self._server = xllamacpp.Server(params)
            except RuntimeError as error:
                what = "the base, or the adapter for it" if adapter else "the base"
                raise ModelError(
                    f"llama.cpp does not load {what}: {base}; set generation.backend to 'torch'"
                ) from error

    def close(self) -> None:
        """Ends it, and gives its memory back."""
        del self._server

    def reply(self, prompt: Sequence[int], sampling: SamplingConfig, seed: int, told: Callable[[str], None]) -> str:
        """What follows the ids of a prompt, as text without control tokens; `told` hears all of it so far as it grows.

        It ends where the model says so, or after `sampling.max_new_tokens`. Raises `ModelError` with what llama.cpp
        says where it refuses.
        """
        asked: dict[str, object] = {
            "prompt": list(prompt), "n_predict": sampling.max_new_tokens, "stream": True, "cache_prompt": True,
            "temperature": sampling.temperature, "samplers": ["temperature"], "seed": seed % SEEDS,
            **({"stop": [self._stop]} if self._stop else {}),
        }  # fmt: skip
        parts: list[str] = []
        errors: list[str] = []

        def heard(answer: _Answer) -> bool:
            """Whether no more is to be said."""
            if "error" in answer:
                errors.append(answer["error"].get("message", "no reason given"))
                return True
            if text := answer["choices"][0].get("text", ""):
                parts.append(text)
                told("".join(parts).strip())
            return False

        self._server.handle_completions(asked, heard)
        if errors:
            raise ModelError(f"llama.cpp refuses: {errors[0]}")
        return "".join(parts).strip()


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A path to a file that is on no disk."""
    number = os.memfd_create("adapter")
    try:
        with open(number, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)
