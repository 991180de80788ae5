"""Decoding by contrast of the personal and the base model, by hand and against a plain loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_engine import engine_of, example, layout_of, rows_of

from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.config import ReplyConfig, SamplingConfig
from florilegium.client.lm.contrast import Contrast, contrasted
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.ia3 import ScalingLayout
from florilegium.client.lm.layers import scaled_layers
from florilegium.client.lm.packing import Example
from florilegium.client.lm.soft_prompt import PromptLayout


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of(torch.float32)


def test_the_equation_by_hand() -> None:
    """p_personal (0.6, 0.3, 0.1), p_base (0.6, 0.1, 0.3), strength 1: p² / p_base = (0.6, 0.9, 0.033)."""
    personal, base = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.6, 0.1, 0.3]]).log()
    found = contrasted(personal, base, Contrast(1.0, 1e-9)).exp()[0]
    assert found.tolist() == pytest.approx([0.6, 0.9, 0.1 * 0.1 / 0.3])
    half = contrasted(personal, base, Contrast(0.5, 1e-9)).exp()[0]
    assert half.tolist() == pytest.approx([0.6, 0.3 * math.sqrt(3), 0.1 / math.sqrt(3)])


def test_a_token_that_is_not_plausible_is_out_however_much_likelier_it_has_become() -> None:
    """0.04 of 0.06 / 0.9 = 0.067: below a tenth of the likeliest one's chance, and a hundred times the base's."""
    personal, base = torch.tensor([[0.9, 0.06, 0.04]]).log(), torch.tensor([[0.9, 0.0996, 0.0004]]).log()
    assert contrasted(personal, base, Contrast(1.0, 0.1))[0].isinf().tolist() == [False, True, True]
    assert contrasted(personal, base, Contrast(1.0, 0.04))[0].argmax().item() == 2
    assert contrasted(personal, base, Contrast(1.0, 1.0))[0].isinf().tolist() == [False, True, True]


def test_constants_of_a_row_change_no_choice() -> None:
    personal, base = torch.randn(4, 9), torch.randn(4, 9)
    one, other = (contrasted(personal + c, base - c, Contrast(0.7, 0.2)).softmax(-1) for c in (0.0, 3.0))
    torch.testing.assert_close(one, other)


def stacks(engine: Engine) -> dict[str, Adapters]:
    """Three devices' adapters of each kind."""
    lora, scaling = layout_of(engine), ScalingLayout(scaled_layers(engine.modules, engine.model))
    prompt = PromptLayout(3, engine.embedding.weight.shape[1], engine.embedding.weight)
    drawn = torch.Generator().manual_seed(1)
    return {
        "lora": Adapters(lora, rows_of(lora, 3) + 0.05),
        "ia3": Adapters(scaling, 1 + 0.5 * torch.randn(3, scaling.width, generator=drawn)),
        "prompt": Adapters(prompt, torch.stack([prompt.start(k) for k in range(3)])),
    }


def plainly(
    engine: Engine,
    prompt: tuple[int, ...],
    adapter: Adapters,
    contrast: Contrast,
    most: int,
    stop: int,
) -> list[int]:
    """One text, the whole of it read anew for each token, with the adapter and without."""
    said: list[int] = []
    while len(said) < most:
        whole = [Example((*prompt, *said), ())]
        (_, on), (_, off) = *engine.hidden(whole, [adapter]), *engine.hidden(whole)
        token = int(contrasted(engine.logits(on[-1:]), engine.logits(off[-1:]), contrast).argmax())
        if token == stop:
            return said
        said.append(token)
    return said


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt"])
def test_a_cohort_in_one_pass_says_what_each_would_alone(engine: Engine, kind: str) -> None:
    stack, contrast = stacks(engine)[kind], Contrast(0.8, 0.05)
    prompts, slots = [example(3 + 4 * i, 1, i).prompt for i in range(6)], [0, 1, 2] * 2

    def said(stop: Any) -> list[list[int]]:
        return engine.generate(prompts, slots, [stack], seeds=range(6), max_new_tokens=10, temperature=0.0,
                               stop=stop, contrast=contrast)  # fmt: skip

    stop = said(())[0][3]
    expected = [plainly(engine, p, stack.pick([k]), contrast, 10, stop) for p, k in zip(prompts, slots, strict=True)]
    assert said([stop]) == expected
    plain = engine.generate(prompts, slots, [stack], seeds=range(6), max_new_tokens=10, temperature=0.0, stop=[stop])
    assert plain != expected


def test_without_strength_or_adapters_decoding_is_the_plain_one(engine: Engine) -> None:
    stack = stacks(engine)["lora"]
    prompts, slots = [example(3 + 4 * i, 1, i).prompt for i in range(6)], [0, 1, 2] * 2

    def said(on: list[Adapters], contrast: Contrast | None) -> list[list[int]]:
        return engine.generate(prompts, slots, on, seeds=range(6), max_new_tokens=10, temperature=0.9, stop=(),
                               contrast=contrast)  # fmt: skip

    assert said([stack], Contrast(0.0, 1.0)) == said([stack], None) != said([stack], Contrast(2.0, 0.5))
    assert said([], Contrast(2.0, 0.5)) == said([], None)


def test_settings_of_a_contrast_that_has_no_effect_are_refused() -> None:
    assert ReplyConfig(contrast=1.0, plausible=0.2).plausible == 0.2
    with pytest.raises(ValueError, match=r"plausible = 0\.2 without a contrast; set contrast above 0"):
        ReplyConfig(plausible=0.2)
    with pytest.raises(ValueError, match="contrast"):
        SamplingConfig.model_validate({"contrast": 1.0})  # of texts that no adapter has a part in
