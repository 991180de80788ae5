"""What is read off the hidden states, against the definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.features import FEATURES, HiddenStates, gradient, mean, nuclear, weighted
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.packing import Example
from florilegium.client.selection.buffer import candidate
from florilegium.client.selection.config import SelectionConfig
from florilegium.client.selection.lexicons import load_lexicons
from florilegium.client.selection.scores import entropy_over_dimensions, entropy_over_tokens


def sight(n: int = 5, width: int = 7, words: int = 11, seed: int = 0) -> tuple[HiddenStates, torch.nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(width, words, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(words, width, generator=generator))
    hidden = torch.randn(n, width, generator=generator)
    before = torch.randn(n, width, generator=generator)
    ids = torch.randint(0, words, (n,), generator=generator)
    return HiddenStates(hidden, before, ids, head), head


def test_means_by_hand() -> None:
    seen = HiddenStates(
        torch.tensor([[1.0, 0.0], [4.0, 3.0]]), torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), torch.nn.Identity()
    )
    assert mean(seen).vector.tolist() == [2.5, 1.5]
    assert weighted(seen).vector.tolist() == [3.0, 2.0]  # (1 · first + 2 · second) / 3


def test_both_readings_of_the_entropy() -> None:
    assert entropy_over_tokens(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(1.0)
    assert entropy_over_dimensions(torch.tensor([-3.0, 1.0])) == pytest.approx(0.8112781)  # H(¾, ¼) in bits
    assert entropy_over_dimensions(torch.zeros(4)) == 0.0


def test_what_is_kept_of_a_text_is_pooled_as_configured(lm: LanguageModel) -> None:
    """The paper's policies by the mean or as RDS+; a policy with a reading of its own is not touched."""
    [features] = lm.embed(["one two three"], ["mean", "weighted", "nuclear"])
    for policy, pooling, reading in (
        ("quality", "mean", "mean"), ("quality", "weighted", "weighted"), ("uds", "weighted", "nuclear"),
    ):  # fmt: skip
        config = SelectionConfig(policy=policy, pooling=pooling)
        stored = candidate(Dialogue("a", "one two three", ""), features, load_lexicons(config.lexicons), config)
        assert np.array_equal(stored.embedding, features.readings[reading].vector.half().numpy())


@torch.no_grad()
def test_the_nuclear_norm_is_the_sum_of_singular_values() -> None:
    seen, head = sight()
    reading = nuclear(seen)
    assert reading.value == pytest.approx(float(torch.linalg.matrix_norm(head(seen.hidden), "nuc")), rel=1e-5)
    assert reading.vector.shape == (256,)


@torch.no_grad()
def test_projected_logits_keep_distances() -> None:
    """Over many long texts the sketch's distance is that of the logits; few tokens share a draw that may be off."""
    ratios = []
    for seed in range(40):
        one, head = sight(60, 12, 500, seed)
        noise = torch.randn(60, 12, generator=torch.Generator().manual_seed(seed + 1000))
        other = HiddenStates(one.hidden + noise, one.before, one.ids, head)
        true = (head(one.hidden) - head(other.hidden)).norm()
        ratios.append(float((nuclear(one).vector - nuclear(other).vector).norm() / true))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05)


def test_the_gradient_is_that_of_the_head() -> None:
    """Norm as by autograd; inner products of sketches follow those of the gradients."""
    gradients, sketches = [], []
    _, head = sight()
    for k in range(30):
        like, _ = sight(seed=k % 3)  # three kinds of texts, with something of their own each
        seen = HiddenStates(like.hidden, like.before + 0.3 * torch.randn_like(like.before), like.ids, head)
        loss = torch.nn.functional.cross_entropy(head(seen.before), seen.ids)
        (true,) = torch.autograd.grad(loss, head.weight)
        with torch.no_grad():
            reading = gradient(seen)
        assert reading.value == pytest.approx(float(true.norm()), rel=1e-4)
        gradients.append(true.flatten() / true.norm())
        sketches.append(reading.vector / reading.vector.norm())
    true_cosines, cosines = (torch.stack(x) @ torch.stack(x).T for x in (gradients, sketches))
    apart = ~torch.eye(30, dtype=torch.bool)
    assert float(torch.corrcoef(torch.stack([true_cosines[apart], cosines[apart]]))[0, 1]) > 0.9


def test_the_likelihood_is_the_mean_nll_of_the_texts_own_tokens(lm: LanguageModel) -> None:
    text = "do you like the sea"
    (found,) = lm.embed([text], ["likelihood"])
    example = lm.format.prompts([text])[0]
    first, last = example.words
    as_reply = Example(example.prompt[:first], example.prompt[first:last], (0, first), False)
    (nll,) = lm.engine.score([as_reply], [0], [])
    assert found.readings["likelihood"].value == pytest.approx(nll / (last - first), rel=1e-4)


def test_a_text_without_words_has_every_reading(lm: LanguageModel) -> None:
    """An empty prompt must not stop a device."""
    (found,) = lm.embed([""], list(FEATURES))
    assert set(found.readings) == set(FEATURES)
    assert all(torch.isfinite(r.vector).all() for r in found.readings.values())


def test_readings_are_the_same_alone_and_in_company(lm: LanguageModel) -> None:
    texts = ["do you like films", "my doctor said that I should rest and drink a lot of water", "no"]
    together = lm.embed(texts, list(FEATURES))
    for text, found in zip(texts, together, strict=True):
        (alone,) = lm.embed([text], list(FEATURES))
        for name, reading in alone.readings.items():
            torch.testing.assert_close(found.readings[name].vector, reading.vector, rtol=1e-3, atol=1e-3)
            assert found.readings[name].value == pytest.approx(reading.value, rel=1e-3)
