"""Which of a person's past items a prompt is given: the nearest by words or by the model's own embeddings.

`bm25` is Lucene's BM25 (k1 1.5, b 0.75) over the words of `client.words` by the library `bm25s`; `dense` the cosine
of mean hidden states of the base model. A question without anything to look by gets the newest. Of items that are
equally near the newest comes first. Causal: for an item of the history only those
before it are looked at, and counted for the inverse document frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import bm25s
import numpy as np
import numpy.typing as npt
import torch

from florilegium.client.lm.model import LanguageModel
from florilegium.client.personalization.config import Retriever
from florilegium.client.personalization.history import Asked, History
from florilegium.client.words import words
from florilegium.privacy.seeds import derive_seed

Ranking = Callable[[Asked, int], list[int]]  # (question, items that are there) → their places, best first


def rankings(
    kind: Retriever, histories: Sequence[History], lm: LanguageModel, devices: Sequence[str], seed: int
) -> list[Ranking]:
    """One for each history."""
    if kind == "bm25":
        return [_by_words(h) for h in histories]
    if kind == "dense":
        return _by_embeddings(histories, lm)
    if kind == "recent":
        return [_newest] * len(histories)
    return [_by_chance(derive_seed(seed, device, "retrieve")) for device in devices]


def _by_words(history: History) -> Ranking:
    documents = [words(past.document) for past in history]
    indexes: dict[int, bm25s.BM25] = {}

    def ranking(asked: Asked, before: int) -> list[int]:
        if not asked.search or not any(documents[:before]):
            return _newest(asked, before)
        if before not in indexes:
            indexes[before] = bm25s.BM25()
            indexes[before].index(documents[:before], show_progress=False)
        known = [w for w in words(asked.search) if w in indexes[before].vocab_dict]
        return best_first(indexes[before].get_scores(known) if known else np.zeros(before))

    return ranking


def _by_embeddings(histories: Sequence[History], lm: LanguageModel) -> list[Ranking]:
    known: dict[str, torch.Tensor] = {}

    def embedded(texts: Sequence[str]) -> torch.Tensor:
        new = [t for t in dict.fromkeys(texts) if t not in known]
        for text, features in zip(new, lm.embed(new), strict=True):
            known[text] = torch.nn.functional.normalize(features.readings["mean"].vector, dim=0)
        return torch.stack([known[t] for t in texts]) if texts else torch.zeros(0, 1)

    every = embedded([past.document for history in histories for past in history])
    parts = every.split([len(h) for h in histories])

    def ranking_of(vectors: torch.Tensor) -> Ranking:
        def ranking(asked: Asked, before: int) -> list[int]:
            if not asked.search:
                return _newest(asked, before)
            return best_first((vectors[:before] @ embedded([asked.search])[0]).numpy())

        return ranking

    return [ranking_of(part) for part in parts]


def _newest(asked: Asked, before: int) -> list[int]:
    return list(range(before))[::-1]


def _by_chance(seed: int) -> Ranking:
    """Another order for each question, the same whenever it is asked."""

    def ranking(asked: Asked, before: int) -> list[int]:
        rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, asked.prompt, before)))
        return [int(i) for i in rng.permutation(before)]

    return ranking


def best_first(scores: npt.NDArray[np.float32 | np.float64]) -> list[int]:
    """Places by falling score (n,), rounded so that rounding does not decide; of equal ones the later first."""
    return sorted(range(len(scores)), key=lambda i: (-round(float(scores[i]), 4), -i))
