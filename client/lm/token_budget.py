"""Memory: keep what was freed, and do with less of it when there is no more."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

LOG = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Tells glibc not to hand large blocks back to the system after each use.

    A step of training takes and frees the same megabytes again and again; fetching their pages anew was most of the
    time of what goes element by element. Does nothing where the C library is another one.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Hands what is free back to the system now. Does nothing where the C library is not glibc."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


class TokenBudget:
    """How many tokens go through the model at once; halved when the memory does not suffice."""

    def __init__(self, tokens: int, least: int = 16) -> None:
        self.tokens, self.least = tokens, least
        self._told = False

    def each(
        self,
        items: Sequence[Item],
        split: Callable[[Sequence[Item], int], list[list[Item]]],
        work: Callable[[list[Item]], Result],
    ) -> Iterator[tuple[list[Item], Result]]:
        """`work` on every group of `split(items, tokens)`; a group that does not fit is split smaller and repeated.

        Raises `MemoryError` when even `least` tokens do not fit.
        """
        waiting = deque(split(items, self.tokens))
        while waiting:
            group = waiting.popleft()
            try:
                result = work(group)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error)
            else:
                yield group, result
                continue
            waiting.extendleft(reversed(split(group, self.tokens)))

    def _halve(self, error: Exception) -> None:
        if self.tokens // 2 < self.least:
            raise MemoryError(
                f"{self.tokens} tokens at once do not fit into memory; take a smaller model or shorter texts "
                f"([model] limits), or adapters of lower rank"
            ) from error
        self.tokens //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self._told:
            LOG.warning("out of memory: going on with %d tokens at once ([model] max_batch_tokens)", self.tokens)
        self._told = True


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, or what it calls, could not get memory."""
    text = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in text
        or "could not create a memory" in text  # of oneDNN, as the next one
        or "could not create a primitive" in text
        or "bad_alloc" in text
    )
