"""How much each token of a lesson counts in personal training: the person's own ones more, old ones less.

Learning by contrast (after PerCE, arXiv 2603.06595): a token weighs by how much its chance depends on the person,

    weight = clip((p_personal / p_base) ^ exponent, 1 / `MOST`, `MOST`)

where p_personal is the model's with what has been learned of the person so far and p_base its without. An adapter that
is new weighs all tokens the same; with each lesson it is tried anew, which is the paper's bootstrap. The paper has
persons in the prompt where there is an adapter here. Recency: a dialogue's tokens weigh 2 ^ (−age / half-life), its age
the number of buffered dialogues that are newer. Never of the shared adapter: its weights would carry what is private.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.packing import Example

MOST = 4.0  # times that a token counts at most, and one by so much at least


def by_contrast(
    lm: LanguageModel,
    lessons: Sequence[Sequence[Example]],
    own: Adapters,
    beneath: Sequence[Adapters],
    exponent: float,
) -> list[list[list[float]]]:
    """Of each device, example and target the weight; `own` (K, P) has a row for each device, on what is beneath."""
    examples = [e for lesson in lessons for e in lesson]
    slots = [k for k, lesson in enumerate(lessons) for _ in lesson]
    base = lm.engine.token_losses(examples, slots, beneath)
    personal = lm.engine.token_losses(examples, slots, [*beneath, own])
    weights = iter(
        [weight(b - p, exponent) for b, p in zip(before, after, strict=True)]
        for before, after in zip(base, personal, strict=True)
    )
    return [[next(weights) for _ in lesson] for lesson in lessons]


def weight(gain: float, exponent: float) -> float:
    """Of a token that has become likelier by so many nats.

    >>> [round(weight(gain, 1.0), 3) for gain in (0.0, math.log(2), 9.0, -9.0)]
    [1.0, 2.0, 4.0, 0.25]
    """
    bound = math.log(MOST)
    return math.exp(min(bound, max(-bound, exponent * gain)))


def by_recency(buffered: int, half_life: float) -> list[float]:
    """Of so many dialogues from the oldest to the newest, which weighs 1.

    >>> by_recency(3, 1.0)
    [0.25, 0.5, 1.0]
    """
    return [2 ** (-(buffered - 1 - i) / half_life) for i in range(buffered)]
