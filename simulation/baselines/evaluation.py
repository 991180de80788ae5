"""What a baseline that was played is worth on the users' held-out later replies, by `simulation.evaluation.metrics`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from florilegium.client.lm.config import SamplingConfig
from florilegium.privacy.common.registry import calling
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.baselines.run import Played
from florilegium.simulation.evaluation.metrics import (
    Arm,
    Measured,
    Queries,
    Scored,
    derangement,
    measure_nll,
    measure_rouge,
    reply_arms,
    score_users,
)

Item = TypeVar("Item")


def strangers(played: Played) -> Played | None:
    """Each device with what somebody else has kept; none where nothing is kept."""
    own = played.held.own
    if not own.shape[1]:
        return None
    given = derangement(len(own), derive_seed(played.context.seed, "shuffled"))
    return replace(played, held=replace(played.held, own=own[given]))


def nll(played: Played, queries: Queries) -> Measured:
    """Of the recorded replies, nats per token."""
    lm, (asked, arm) = played.context.lm, _asked(played, queries)
    found = iter(score_users(lm, asked, {"own": arm})["own"])
    if played.baseline.by_query is None:
        return measure_nll(list(found))
    grouped = _by_user(found, queries)
    return measure_nll([Scored(tuple(s.nll[0] for s in of), tuple(s.tokens[0] for s in of)) for of in grouped])


def rouge(played: Played, queries: Queries, sampling: SamplingConfig, seed: int) -> tuple[Measured, float]:
    """ROUGE-1 of generated replies, and their mean length in tokens."""
    asked, arm = _asked(played, queries)
    seeds = range(seed, seed + sum(map(len, queries)))
    replies = reply_arms(played.context.lm, asked, {"own": arm}, sampling, seeds)["own"]
    return measure_rouge(list(_by_user(iter(replies), queries))), sum(r.tokens for r in replies) / len(replies)


def _asked(played: Played, queries: Queries) -> tuple[Queries, Arm]:
    """Whose rows answer which queries: a device's all of its own, or each row one query."""
    name = played.context.config.baseline.name
    with calling(name, "return adapters, as `Baseline.arm` and `Baseline.by_query` say"):
        if played.baseline.by_query is None:
            return queries, played.baseline.arm(played.held, played.context)
        arm = played.baseline.by_query(played.held, played.context, queries, played.sets)
    return [[q] for of_user in queries for q in of_user], arm


def _by_user(found: Iterator[Item], queries: Queries) -> Iterator[list[Item]]:
    for asked in queries:
        yield [next(found) for _ in asked]
