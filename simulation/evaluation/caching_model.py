"""A language model that remembers what the base said of a text: the cells of a study meet the same streams.

What the base model says depends on the text, the seed and the settings alone, so that an answer that is remembered
is the answer that would be given. Whatever has adapters on is never remembered.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.config import SamplingConfig
from florilegium.client.lm.model import Features, LanguageModel


class CachingModel(LanguageModel):
    """`readings` are those that any cell of the study asks for, so that a text is read once.

    `cached_seconds` adds up what remembered answers took when they were first given: a cell that met them alone would
    have taken so much longer.
    """

    readings: Collection[str] = ("mean",)
    cached_seconds = 0.0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._features: dict[str, tuple[Features, float]] = {}
        self._texts: dict[tuple[str, int, SamplingConfig], tuple[str, float]] = {}

    def embed(self, texts: Sequence[str], readings: Collection[str] = ("mean",)) -> list[Features]:
        asked = list(dict.fromkeys(t for t in texts if t not in self._features))
        with self._costing(texts, self._features, len(asked)) as seconds:
            new = super().embed(asked, self.readings)
        self._features |= {t: (f, seconds[0]) for t, f in zip(asked, new, strict=True)}
        return [self._features[t][0] for t in texts]

    def generate(
        self,
        prompts: Sequence[str],
        slots: Sequence[int],
        adapters: Sequence[Adapters],
        sampling: SamplingConfig,
        seeds: Sequence[int],
    ) -> list[str]:
        if adapters:
            return super().generate(prompts, slots, adapters, sampling, seeds)
        keys = [(p, s, sampling) for p, s in zip(prompts, seeds, strict=True)]
        asked = list(dict.fromkeys(k for k in keys if k not in self._texts))
        with self._costing(keys, self._texts, len(asked)) as seconds:
            new = super().generate([k[0] for k in asked], [0] * len(asked), [], sampling, [k[1] for k in asked])
        self._texts |= {k: (t, seconds[0]) for k, t in zip(asked, new, strict=True)}
        return [self._texts[k][0] for k in keys]

    @contextmanager
    def _costing(self, keys: Sequence[Any], known: dict[Any, tuple[Any, float]], asked: int) -> Iterator[list[float]]:
        """Adds the seconds of what is known to `cached_seconds` and yields a place for those of each that is asked."""
        self.cached_seconds += sum(known[key][1] for key in set(keys) if key in known)
        began, seconds = time.perf_counter(), [0.0]
        yield seconds
        seconds[0] = (time.perf_counter() - began) / max(1, asked)
