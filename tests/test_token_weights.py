"""Weights of tokens in personal training: by contrast and by recency, by hand, and that the engine trains by them."""

from __future__ import annotations

import math

import pytest
import torch
from test_engine import engine_of, example, layout_of, rows_of

from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.token_weights import MOST, by_recency, weight


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of(torch.float32)


def test_a_token_weighs_by_how_much_likelier_it_has_become() -> None:
    """Twice as likely weighs twice, its square root with exponent one half; nothing weighs beyond the bounds."""
    assert weight(math.log(2), 1.0) == pytest.approx(2) and weight(math.log(2), 0.5) == pytest.approx(math.sqrt(2))
    assert weight(-math.log(2), 1.0) == pytest.approx(0.5) and weight(0.0, 3.0) == 1
    assert weight(50.0, 1.0) == pytest.approx(MOST) and weight(-50.0, 1.0) == pytest.approx(1 / MOST)


def test_a_dialogue_weighs_half_once_so_many_newer_ones_are_buffered() -> None:
    assert by_recency(5, 2.0) == pytest.approx([1 / 4, 1 / math.sqrt(8), 1 / 2, 1 / math.sqrt(2), 1])
    assert by_recency(0, 2.0) == []


def test_the_losses_of_tokens_sum_up_to_those_of_replies(engine: Engine) -> None:
    stack = Adapters(layout_of(engine), rows_of(layout_of(engine), 3) + 0.05)
    texts, slots = [example(9 + 3 * i, 3 + i, i) for i in range(6)], [2, 0, 1, 1, 0, 2]
    found = engine.token_losses(texts, slots, [stack])
    assert [len(x) for x in found] == [e.targets for e in texts]
    assert [sum(x) for x in found] == pytest.approx(engine.score(texts, slots, [stack]), abs=1e-3)


def trained(engine: Engine, weights: list[list[list[float]]]) -> tuple[torch.Tensor, list[list[float]]]:
    """Two devices of which each takes one step on two texts, and a third on one."""
    layout = layout_of(engine)
    start = Adapters(layout, torch.stack([layout.start(k) for k in range(3)]))
    texts = [[example(12, 4, 0), example(9, 3, 1)], [example(15, 6, 2), example(8, 2, 3)], [example(10, 5, 4)]]
    sets = [TrainingSet(t, [list(range(len(t)))], w) for t, w in zip(texts, weights, strict=True)]
    result = engine.finetune(start, [], sets, [[1e-2]] * 3)
    return result.adapters.rows, result.losses


def test_equal_weights_are_none(engine: Engine) -> None:
    plain, losses = trained(engine, [[], [], []])
    same, others = trained(engine, [[[3.0] * 4, [3.0] * 3], [], [[0.5] * 5]])
    torch.testing.assert_close(same, plain, atol=1e-6, rtol=1e-4)
    assert [x[0] for x in others] == pytest.approx([x[0] for x in losses], abs=1e-5)


def test_the_loss_is_the_weighted_mean_over_a_batchs_tokens(engine: Engine) -> None:
    """Of seven tokens one counts three times and one not at all; the others' devices do not notice."""
    weights = [[1.0, 3.0, 0.0, 1.0], [1.0, 1.0, 1.0]]
    rows, losses = trained(engine, [weights, [], []])
    plain, before = trained(engine, [[], [], []])
    single = engine.token_losses([example(12, 4, 0), example(9, 3, 1)], [0, 0], [])
    total = sum(w * x for of, some in zip(weights, single, strict=True) for w, x in zip(of, some, strict=True))
    assert losses[0][0] == pytest.approx(total / 8, abs=1e-4) and losses[0][0] != pytest.approx(before[0][0], abs=1e-3)
    assert losses[1:] == before[1:]
    torch.testing.assert_close(rows[1:], plain[1:])
    assert float((rows[0] - plain[0]).abs().max()) > 1e-4
