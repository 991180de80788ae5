"""Models at their edges against `transformers` alone: windows shorter than the texts, capped scores, shared keys.

Weights are drawn so wide that a score moves what is read. The capped and the windowed scores are those of the model's
own eager attention; nothing of ours is in what is compared with. Each is done on both ways to attend.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from florilegium.client.lm import attention
from florilegium.client.lm.adapter import AdapterLayout, Adapters, layout
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.layers import UnsupportedModelError, adapted_layers
from florilegium.client.lm.packing import Example, Texts

WINDOW = 4
GROUPED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
CAPPED = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 3}
EDGES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"hidden_size": 48, "num_attention_heads": 6}),  # three heads a key
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "qwen3": ("Qwen3Config", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", {**MIXED, **CAPPED}),
    "gemma3": ("Gemma3TextConfig", {**MIXED, "query_pre_attn_scalar": 3}),
    "vault": ("VaultGemmaConfig", {**MIXED, **CAPPED}),
}
TEXTS = [Example(tuple((7 * k + 5 * i * i + i) % 60 + 3 for i in range(9 + k)), tuple((11 * k + 3 * i) % 60 + 3
         for i in range(4 + k % 3)), (0, 9 + k), False) for k in range(5)]  # fmt: skip


@pytest.fixture(params=["cpu", "elsewhere"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as on a CPU, or as on another device."""
    if request.param == "elsewhere":
        monkeypatch.setattr(attention, "WRITTEN_OUT", frozenset())


def drawn(kind: str, more: dict[str, Any]) -> PreTrainedModel:
    known = getattr(transformers, kind, None)
    if known is None:
        pytest.skip(f"this version of transformers does not know {kind}")
    sizes = {"vocab_size": 64, "intermediate_size": 48, "pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = known(**{**GROUPED, **sizes, **more})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


@lru_cache
def plain(edge: str) -> PreTrainedModel:
    """As `transformers` has it."""
    return drawn(*EDGES[edge])


@lru_cache
def engine(edge: str) -> Engine:
    return Engine(copy.deepcopy(plain(edge)))


def adapters(ours: Engine) -> Adapters:
    form = layout(adapted_layers(ours.modules), 2, 4)
    return Adapters(form, 0.2 * torch.randn(2, form.width, generator=torch.Generator().manual_seed(1)))


def adapted_logits(edge: str, form: AdapterLayout, row: torch.Tensor, text: Example) -> torch.Tensor:
    """(n, V) by the plain model with W + scale · B A in the place of each W."""
    model = plain(edge)
    weights = {
        f"{name}.weight": model.get_parameter(f"{name}.weight").detach() + form.scale * (b[0] @ a[0])
        for name, a, b in form.split(row[None])
    }
    ids = torch.tensor([text.prompt + text.reply])
    logits: torch.Tensor = torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits[0]
    return logits


def nll(logits: torch.Tensor, text: Example) -> torch.Tensor:
    """Summed over the reply."""
    first = len(text.prompt)
    return torch.nn.functional.cross_entropy(logits[first - 1 : -1], torch.tensor(text.reply), reduction="sum")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("edge", EDGES)
def test_texts_longer_than_a_window_are_read_as_transformers_reads_them(edge: str) -> None:
    ours = engine(edge)
    found = dict(ours.hidden(TEXTS))
    for i, text in enumerate(TEXTS):
        with torch.inference_mode():
            theirs = plain(edge)(torch.tensor([text.prompt + text.reply]), use_cache=False).logits[0]
        torch.testing.assert_close(ours.logits(found[i].clone()), theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("edge", EDGES)
def test_losses_and_gradients_of_adapters_are_those_of_the_plain_model(edge: str) -> None:
    """Two devices, three and two texts, in one pass."""
    ours, batches = engine(edge), (TEXTS[:3], TEXTS[3:])
    stack = adapters(ours)
    slots = [0, 0, 0, 1, 1]
    scored = ours.score(TEXTS, slots, [stack])
    gradient, _ = ours.gradient(stack, [], batches, [[1.0] * len(batch) for batch in batches])
    for k, batch in enumerate(batches):
        row = stack.rows[k].clone().requires_grad_(True)
        losses = torch.stack([nll(adapted_logits(edge, stack.layout, row, text), text) for text in batch])
        torch.testing.assert_close(
            torch.tensor(scored[3 * k : 3 * k + len(batch)]), losses.detach(), atol=1e-4, rtol=1e-4
        )
        (theirs,) = torch.autograd.grad(losses.sum(), row)
        assert theirs.norm() > 1
        torch.testing.assert_close(gradient[k], theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("edge", EDGES)
def test_texts_are_continued_as_transformers_continues_them(edge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, together and alone; and what each token was chosen by. Prompts are read as above, either way."""
    prompts, model, ours = [text.prompt for text in TEXTS[::2]], plain(edge), engine(edge)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=8, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )

    def written(*some: tuple[int, ...]) -> list[list[int]]:
        seeds = [0] * len(some)
        return ours.generate(some, seeds, [], seeds=seeds, max_new_tokens=8, temperature=0.0, stop=())

    together, seen, logits = written(*prompts), list[torch.Tensor](), ours.logits
    monkeypatch.setattr(ours, "logits", lambda hidden: seen.append(logits(hidden)) or seen[-1])
    for prompt, reply in zip(prompts, together, strict=True):
        seen.clear()
        theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)))
        assert written(prompt) == [reply] == theirs.sequences[:, len(prompt) :].tolist()
        torch.testing.assert_close(torch.cat(seen), torch.cat(theirs.logits), atol=2e-4, rtol=1e-4)


def test_capped_scores_are_the_same_wherever_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of a deviation of 36 √8 under a cap of 5: without it, nothing would be the same."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (6 * torch.randn(1, h, 12, 8, generator=generator) for h in (4, 2, 2))
    module, reading = torch.nn.Identity(), attention.Reading()
    module.layer_idx = 0
    object.__setattr__(module, attention.READING, reading)

    def attend(softcap: float | None) -> torch.Tensor:
        with reading.of(Texts([7, 5], torch.device("cpu"))):
            return attention.packed_attention(module, q, k, v, None, scaling=1.0, softcap=softcap)[0]

    here, bare = attend(5.0), attend(None)
    monkeypatch.setattr(attention, "WRITTEN_OUT", frozenset())
    torch.testing.assert_close(attend(5.0), here)
    torch.testing.assert_close(attend(None), bare)
    assert (here - bare).norm() > 0.1 * bare.norm()
    scores = torch.tanh(q[0, 3, 6] @ k[0, 1, :7].T / 5) * 5  # the last head's last token of the first text
    torch.testing.assert_close(here[0, 6, 3], torch.softmax(scores, -1) @ v[0, 1, :7])


UNTOLD: dict[str, dict[str, Any]] = {
    "Qwen2MoeConfig": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
                       "layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
    "PhimoeConfig": {"num_local_experts": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", UNTOLD)
def test_a_window_that_attention_is_not_told_is_refused(kind: str) -> None:
    """These put it into a mask, which packed texts do not have; here it is longer than the texts that are tried."""
    untold = drawn(kind, {**UNTOLD[kind], "sliding_window": 12})
    with pytest.raises(UnsupportedModelError, match=r"layer \d of .* attends within a window or chunk"):
        Engine(untold, ["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("more", "what"),
    [({"position_bias": torch.zeros(1)}, "position_bias"), ({"is_causal": False}, "after"), ({"sinks": 1}, "sinks")],
)
def test_what_attention_would_leave_out_is_refused_by_name(more: dict[str, Any], what: str) -> None:
    module, x = torch.nn.Identity(), torch.zeros(1, 2, 3, 8)
    reading = attention.Reading(Texts([3], torch.device("cpu")))
    module.layer_idx = 0
    object.__setattr__(module, attention.READING, reading)
    with pytest.raises(UnsupportedModelError, match=f"Identity attends with .*{what}"):
        attention.packed_attention(module, x, x, x, None, **more)
    attention.packed_attention(module, x, x, x, None, dropout=0.0, use_cache=False, is_causal=True, position_bias=None)
