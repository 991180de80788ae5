"""Families of models: many users' adapters in one pass are what transformers and PEFT make of one user at a time."""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from florilegium.client.lm import layers
from florilegium.client.lm.adapter import Adapters, layout
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.layers import UnsupportedModelError, adapted_layers
from florilegium.client.lm.model import PROBE, LanguageModel
from florilegium.client.lm.packing import Example
from florilegium.client.lm.peft_format import write_peft

USERS, NEW_TOKENS, END = 3, 6, 2
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
TURNS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "smollm2": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3Config", {**GROUPED, "no_rope_layers": [1, 0]}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**GROUPED, **TURNS, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, **TURNS, "head_dim": 16}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", GROUPED),
    "granite": ("GraniteConfig", {**GROUPED, **MULTIPLIERS, "logits_scaling": 8.0}),
    "hyperclova": ("HyperCLOVAXConfig", {**GROUPED, **MULTIPLIERS, "logits_scaling": 0.3, "use_post_norm": True}),
    "olmo": ("OlmoConfig", {"clip_qkv": 2.0}),
    "olmo2": ("Olmo2Config", GROUPED),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 4}),
    "cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.0625, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {**GROUPED, **TURNS, "logit_scale": 0.25}),
}
TEXTS = [
    Example(tuple((7 * k + 5 * i * i + i) % 60 + 3 for i in range(7 + k)),
            tuple((11 * k + 3 * i) % 60 + 3 for i in range(3 + k % 3)), (0, 7 + k), False)
    for k in range(5)
]  # fmt: skip
OWNERS = [0, 0, 1, 2, 2]
WEIGHTS = [0.5, 1.0, 2.0, 0.25, 1.5]


@lru_cache
def plain(family: str) -> PreTrainedModel:
    """As transformers has it, with random weights."""
    kind, more = FAMILIES[family]
    known = getattr(transformers, kind, None)
    if known is None:
        pytest.skip(f"this version of transformers does not know {kind}")
    torch.manual_seed(0)
    config = known(**{**SIZES, **more})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


@lru_cache
def engine(family: str) -> Engine:
    return Engine(copy.deepcopy(plain(family)))


def adapters(ours: Engine) -> Adapters:
    """A row of random numbers for each user."""
    form = layout(adapted_layers(ours.modules), 2, 4)
    return Adapters(form, 0.2 * torch.randn(USERS, form.width, generator=torch.Generator().manual_seed(1)))


def peft_model(family: str, stack: Adapters, user: int, folder: Path) -> PeftModel:
    """The plain model with one user's adapter, as PEFT reads it from a folder."""
    write_peft(folder, stack.layout, stack.rows[user], "base")
    return PeftModel.from_pretrained(copy.deepcopy(plain(family)), folder, is_trainable=True)


def plain_loss(model: PeftModel, text: Example) -> torch.Tensor:
    """Σ NLL of a reply's tokens, from the logits of the whole model."""
    ids = torch.tensor([[*text.prompt, *text.reply]])
    logits = model(input_ids=ids).logits[0, len(text.prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, ids[0, len(text.prompt) :], reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_ours_goes_through_any_familys_signature(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, handed = engine(family), list[tuple[tuple[object, ...], set[str]]]()
    body = ours.model.base_model
    whole = body.forward

    def forward(*args: object, **named: object) -> object:
        handed.append((args, set(named)))
        return whole(*args, **named)

    monkeypatch.setattr(body, "forward", forward)
    ours.score(TEXTS, OWNERS, [adapters(ours)])
    assert handed and all(found == ((), {"input_ids", "position_ids", "use_cache"}) for found in handed)
    assert {"input_ids", "position_ids", "use_cache"} <= set(inspect.signature(type(body).forward).parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_users_together_learn_as_peft_has_it_one_at_a_time(family: str, tmp_path: Path) -> None:
    ours = engine(family)
    stack = adapters(ours)
    batches = [[t for t, owner in zip(TEXTS, OWNERS, strict=True) if owner == user] for user in range(USERS)]
    weights = [[w for w, owner in zip(WEIGHTS, OWNERS, strict=True) if owner == user] for user in range(USERS)]
    gradients, losses = ours.gradient(stack, [], batches, weights)
    one_by_one = torch.zeros_like(gradients)
    for group, gradient, _ in ours.row_gradients(stack, [], TEXTS, OWNERS, WEIGHTS):
        one_by_one.index_add_(0, torch.tensor([OWNERS[i] for i in group]), gradient)
    for user in range(USERS):
        model = peft_model(family, stack, user, tmp_path / str(user))
        loss = sum(w * plain_loss(model, t) for t, w in zip(batches[user], weights[user], strict=True))
        loss.backward()
        assert losses[user].item() == pytest.approx(loss.item(), rel=1e-4)
        for name, *factors in stack.layout.split(gradients[user : user + 1]):
            for letter, found in zip("AB", factors, strict=True):
                expected = model.get_parameter(f"base_model.model.{name}.lora_{letter}.default.weight").grad
                torch.testing.assert_close(found[0], expected, rtol=2e-3, atol=2e-4)
    assert gradients.norm(dim=1).min() > 0.01
    torch.testing.assert_close(one_by_one, gradients, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_users_together_are_answered_as_peft_answers_one_at_a_time(family: str, tmp_path: Path) -> None:
    ours = engine(family)
    stack = adapters(ours)
    prompts = [t.prompt for t in TEXTS]
    found = ours.generate(
        prompts, OWNERS, [stack], seeds=range(len(TEXTS)), max_new_tokens=NEW_TOKENS, temperature=0.0, stop=(END,)
    )
    asked = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=END, pad_token_id=0)
    for user in range(USERS):
        model = peft_model(family, stack, user, tmp_path / str(user))
        for prompt, reply, owner in zip(prompts, found, OWNERS, strict=True):
            if owner == user:
                ids = torch.tensor([prompt])
                told = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=asked, use_cache=True
                )
                assert reply == [i for i in told[0, len(prompt) :].tolist() if i != END]
    assert len({tuple(reply) for reply in found}) > 1


@pytest.mark.parametrize(
    ("family", "scale"), [("llama", 1), ("granite", 1 / 8), ("hyperclova", 0.3), ("cohere", 0.0625), ("cohere2", 0.25)]
)
def test_logits_are_scaled_as_the_model_scales_them(family: str, scale: float) -> None:
    """Granite divides by the number of that name by which HyperCLOVA X multiplies."""
    ours = engine(family)
    assert ours.scale == scale
    ids = torch.tensor([TEXTS[0].prompt])
    ((_, hidden),) = ours.hidden([Example(TEXTS[0].prompt, (), (0, 1), False)])
    with torch.inference_mode():
        torch.testing.assert_close(ours.logits(hidden), plain(family)(ids).logits[0], rtol=1e-4, atol=1e-4)


def test_logits_that_are_scaled_by_what_no_config_names_are_refused() -> None:
    model = copy.deepcopy(plain("cohere"))
    model.logit_scale = 0.5  # the config still says 0.0625
    with pytest.raises(UnsupportedModelError, match="CohereForCausalLM computes attention or logits"):
        Engine(model)


# -- what a model is tried with -------------------------------------------------------------------------------------


def test_a_model_is_tried_with_words_of_a_text_and_not_with_control_tokens(lm: LanguageModel) -> None:
    """Untrained tokens, as many of SmolLM2's first ones are, would be far from themselves by rounding alone."""
    words = lm.tokenizer(PROBE)["input_ids"]
    read = [i for text in layers.probes(4096, words) for i in text.prompt]
    assert lm.tokenizer.decode(read) == PROBE[: len(lm.tokenizer.decode(read))] and len(read) == 19
    assert lm.engine.error < 1e-4


def test_without_a_text_the_middle_of_the_vocabulary_is_read() -> None:
    assert [text.prompt for text in layers.probes(64)] == [
        tuple(range(21, 30)), tuple(range(30, 36)), tuple(range(36, 40))
    ]  # fmt: skip
    assert [text.prompt for text in layers.probes(64, [7, 8])][1:] == [(8, 7, 8, 7, 8, 7), (8, 7, 8, 7)]
