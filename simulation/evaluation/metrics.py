"""What was it worth: arms compared on the users' held-out later replies, per query and per user.

A query's NLL is per token of its reply; a user's is the sum over all of the user's queries by the sum of their
tokens. Intervals are over users, at 95 %, by Student's t; comparisons are paired by user.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.config import SamplingConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.rouge import rouge1
from florilegium.simulation.data.errors import DataError

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
class Scored:
    """NLL in nats and length in tokens of each of a user's recorded replies."""

    nll: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Reply:
    """A generated reply to a held-out prompt."""

    device: int
    query: Dialogue
    text: str
    rouge1: float
    tokens: int  # its length


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


def paired_p(differences: Sequence[float]) -> float:
    """Of a paired t-test that they are zero on the mean; 1 where all of them are."""
    return float(stats.ttest_1samp(differences, 0).pvalue) if np.any(differences) else 1.0


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's (1979): the i-th smallest of m times m − i + 1, never below one before it.

    >>> holm([0.04, 0.01, 0.5])
    [0.08, 0.03, 0.5]
    """
    highest, found = 0.0, [0.0] * len(ps)
    for rank, (p, i) in enumerate(sorted((p, i) for i, p in enumerate(ps))):
        highest = max(highest, min(1.0, p * (len(ps) - rank)))
        found[i] = highest
    return found


def compare(better: Measured, than: Measured, *, lower_is_better: bool) -> Comparison:
    """Paired over users."""
    differences = np.array(better.by_user) - np.array(than.by_user)
    wins = differences < 0 if lower_is_better else differences > 0
    return Comparison(float(differences.mean()), interval(differences.tolist()), len(differences), int(wins.sum()))


def score_arms(lm: LanguageModel, queries: Queries, arms: Mapping[str, Arm]) -> dict[str, Measured]:
    """NLL of the recorded replies under each arm, nats per token."""
    return {arm: measure_nll(of_users) for arm, of_users in score_users(lm, queries, arms).items()}


def score_users(lm: LanguageModel, queries: Queries, arms: Mapping[str, Arm]) -> dict[str, list[Scored]]:
    """Under each arm the NLL of each user's recorded replies."""
    slots = [k for k, asked in enumerate(queries) for _ in asked]
    examples = lm.format.dialogues([q for asked in queries for q in asked])
    found: dict[str, list[Scored]] = {}
    for name, adapters in arms.items():
        nll: list[list[float]] = [[] for _ in queries]
        tokens: list[list[int]] = [[] for _ in queries]
        for slot, score in zip(slots, lm.score(examples, slots, adapters), strict=True):
            nll[slot].append(score.nll)
            tokens[slot].append(score.tokens)
        found[name] = [Scored(tuple(n), tuple(t)) for n, t in zip(nll, tokens, strict=True)]
    return found


def measure_nll(of_users: Sequence[Scored]) -> Measured:
    """Nats per token, by user and by query."""
    by_query = tuple(n / t for s in of_users for n, t in zip(s.nll, s.tokens, strict=True))
    return Measured(tuple(sum(s.nll) / sum(s.tokens) for s in of_users), by_query)


def reply_arms(
    lm: LanguageModel, queries: Queries, arms: Mapping[str, Arm], sampling: SamplingConfig, seeds: Sequence[int]
) -> dict[str, list[Reply]]:
    """Replies of each arm to the same prompts, with the same limits, seeds and stop token for all."""
    asked = [(k, q) for k, of_user in enumerate(queries) for q in of_user]
    replies: dict[str, list[Reply]] = {}
    for name, adapters in arms.items():
        texts = lm.generate([q.prompt for _, q in asked], [k for k, _ in asked], adapters, sampling, seeds)
        replies[name] = [
            Reply(k, q, t, rouge1(q.response, t), lm.format.length(t)) for (k, q), t in zip(asked, texts, strict=True)
        ]
    return replies


def measure_rouge(of_users: Sequence[Sequence[Reply]]) -> Measured:
    """ROUGE-1 F1 with stemming; a user's is the mean over the user's queries."""
    by_user = tuple(float(np.mean([r.rouge1 for r in replies])) for replies in of_users)
    return Measured(by_user, tuple(r.rouge1 for replies in of_users for r in replies))


def by_device(replies: Sequence[Reply], devices: int) -> list[list[Reply]]:
    """Those of each device, in their order."""
    return [[r for r in replies if r.device == k] for k in range(devices)]


def derangement(count: int, seed: int) -> list[int]:
    """A random cycle: whose adapter each device gets in the `shuffled` arm, never its own (for count > 1)."""
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(count)
    given = np.empty(count, dtype=int)
    given[order] = np.roll(order, 1)
    return [int(i) for i in given]


def other_people(owners: Sequence[str], seed: int) -> list[int]:
    """A derangement in which nobody gets what is the same person's at another moment.

    Ordered by person and shifted by the largest group, no place keeps its person. Raises `DataError` where one person
    has more than half of the places.
    """
    most = max(Counter(owners).values())
    if most == 1:
        return derangement(len(owners), seed)
    if 2 * most > len(owners):
        raise DataError(
            f"one person has {most} of {len(owners)} places, more than half; ask more people, or fewer times"
        )
    shuffled = np.random.Generator(np.random.Philox(key=seed)).permutation(len(owners))
    order = sorted((int(i) for i in shuffled), key=lambda i: owners[i])
    given = dict(zip(order, np.roll(order, most), strict=True))
    return [int(given[i]) for i in range(len(owners))]
