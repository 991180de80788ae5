"""What was it worth: arms compared on the users' held-out later replies, per query and per user.

A query's NLL is per token of its reply; a user's is the sum over all of the user's queries by the sum of their
tokens. Intervals are over users, at 95 %, by Student's t; comparisons are paired by user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from client.dialogue import Dialogue
from client.lm.adapter import Adapters
from client.lm.config import SamplingConfig
from client.lm.model import LanguageModel
from client.synthesize import rouge1

Arm = Sequence[Adapters]  # the adapters that are on; a stack's row k is device k's
Queries = Sequence[Sequence[Dialogue]]  # by device


@dataclass(frozen=True)
class Measured:
    """One metric of one arm."""

    by_user: tuple[float, ...]
    by_query: tuple[float, ...]

    @property
    def mean_per_user(self) -> float:
        return float(np.mean(self.by_user))

    @property
    def mean_per_query(self) -> float:
        return float(np.mean(self.by_query))

    @property
    def ci95(self) -> tuple[float, float]:
        return interval(self.by_user)

    def summary(self) -> dict[str, float | list[float]]:
        return {
            "mean_per_user": self.mean_per_user,
            "mean_per_query": self.mean_per_query,
            "ci95": list(self.ci95),
        }


@dataclass(frozen=True)
class Reply:
    """A generated reply to a held-out prompt."""

    device: int
    query: Dialogue
    text: str
    rouge1: float


@dataclass(frozen=True)
class Comparison:
    """`better` minus `than`, paired by user."""

    mean_difference: float
    ci95: tuple[float, float]
    users: int
    users_better: int


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean by Student's t; of a single value, the value itself."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, mean
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return mean - half, mean + half


def compare(better: Measured, than: Measured, *, lower_is_better: bool) -> Comparison:
    """Paired over users."""
    differences = np.array(better.by_user) - np.array(than.by_user)
    wins = differences < 0 if lower_is_better else differences > 0
    return Comparison(float(differences.mean()), interval(differences.tolist()), len(differences), int(wins.sum()))


def score_arms(lm: LanguageModel, queries: Queries, arms: Mapping[str, Arm]) -> dict[str, Measured]:
    """NLL of the recorded replies under each arm, nats per token."""
    slots = [k for k, asked in enumerate(queries) for _ in asked]
    examples = lm.format.dialogues([q for asked in queries for q in asked])
    measured: dict[str, Measured] = {}
    for name, adapters in arms.items():
        scores = lm.score(examples, slots, adapters)
        nll, tokens = np.zeros(len(queries)), np.zeros(len(queries))
        for slot, score in zip(slots, scores, strict=True):
            nll[slot] += score.nll
            tokens[slot] += score.tokens
        by_query = tuple(s.nll / s.tokens for s in scores)
        measured[name] = Measured(tuple((nll / tokens).tolist()), by_query)
    return measured


def reply_arms(
    lm: LanguageModel, queries: Queries, arms: Mapping[str, Arm], sampling: SamplingConfig, seed: int
) -> dict[str, list[Reply]]:
    """Replies of each arm to the same prompts, with the same limits and stop token for all."""
    asked = [(k, q) for k, of_user in enumerate(queries) for q in of_user]
    replies: dict[str, list[Reply]] = {}
    for name, adapters in arms.items():
        seeds = [seed + i for i in range(len(asked))]
        texts = lm.generate([q.prompt for _, q in asked], [k for k, _ in asked], adapters, sampling, seeds)
        replies[name] = [Reply(k, q, t, rouge1(q.response, t)) for (k, q), t in zip(asked, texts, strict=True)]
    return replies


def measure_rouge(replies: Sequence[Reply], devices: int) -> Measured:
    """ROUGE-1 F1 with stemming; a user's is the mean over the user's queries."""
    by_user = [[r.rouge1 for r in replies if r.device == k] for k in range(devices)]
    return Measured(tuple(float(np.mean(x)) for x in by_user), tuple(r.rouge1 for r in replies))


def token_lengths(lm: LanguageModel, replies: Sequence[Reply]) -> list[int]:
    """Of each reply."""
    return [len(lm.tokenizer(r.text)["input_ids"]) for r in replies]


def derangement(count: int, seed: int) -> list[int]:
    """A random cycle: whose adapter each device gets in the `shuffled` arm, never its own (for count > 1)."""
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(count)
    given = np.empty(count, dtype=int)
    given[order] = np.roll(order, 1)
    return [int(i) for i in given]
