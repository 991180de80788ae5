"""The language model with stacked adapters, on the bundled model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm import attention
from florilegium.client.lm.adapter import Adapters, layout
from florilegium.client.lm.batching import schedule
from florilegium.client.lm.cache import KeyValues
from florilegium.client.lm.config import AdapterConfig, SamplingConfig
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.layers import UnsupportedModelError, adapt, adapted_layers
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.optimizer import Moments, adamw_
from florilegium.client.lm.packing import Example
from florilegium.client.lm.peft_format import read_peft, write_peft
from florilegium.client.lm.places import Base, nano_folder
from florilegium.client.lm.training_data import TrainingSet

TALKS = [Dialogue(str(i), f"what do you think about {w}?", f"i like {w} a lot, {w} is fun") for i, w in enumerate(
    ["movies", "the sea", "old books and new ones", "rain", "jazz", "cats"])]  # fmt: skip


def sets(lm: LanguageModel, devices: int) -> list[TrainingSet]:
    """Device k has 2 + k % 3 examples, so that lengths and step counts differ."""
    made = []
    for k in range(devices):
        talks = [TALKS[(k + i) % len(TALKS)] for i in range(2 + k % 3)]
        made.append(TrainingSet(lm.format.dialogues(talks), schedule(len(talks), 2, 2, k)))
    return made


@pytest.mark.parametrize("factors", ["both", "b", "a"])
def test_a_device_learns_the_same_alone_and_in_a_cohort(lm: LanguageModel, factors: str) -> None:
    layout = lm.lora_layout(AdapterConfig.model_validate({"rank": 4, "factors": factors}), public_seed=3)
    rows = torch.stack([layout.start(k) for k in range(5)])
    work = sets(lm, 5)
    rates = [[3e-4] * len(x.batches) for x in work]
    together = lm.engine.finetune(lm.adapters(layout, rows), [], work, rates)
    for k in range(5):
        alone = lm.engine.finetune(lm.adapters(layout, rows[k]), [], [work[k]], [rates[k]])
        torch.testing.assert_close(together.adapters.rows[k], alone.adapters.rows[0], atol=1e-5, rtol=0)
        assert together.losses[k] == pytest.approx(alone.losses[0], abs=1e-5)
        assert (alone.adapters.rows[0] - rows[k]).abs().max() > 1e-4  # it did move


def test_a_row_is_scored_with_its_own_adapter(lm: LanguageModel) -> None:
    layout = lm.lora_layout(AdapterConfig(rank=2))
    rows = torch.randn(3, layout.width, generator=torch.Generator().manual_seed(0)) * 0.05
    examples = lm.format.dialogues(TALKS)
    slots = [2, 0, 1, 1, 0, 2]
    mixed = lm.score(examples, slots, [lm.adapters(layout, rows)])
    for example, slot, score in zip(examples, slots, mixed, strict=True):
        (alone,) = lm.score([example], [0], [lm.adapters(layout, rows[slot])])
        assert score.nll == pytest.approx(alone.nll, abs=1e-4)


def test_example_gradients_add_up_to_the_batch_gradient(lm: LanguageModel) -> None:
    layout = lm.lora_layout(AdapterConfig(rank=2))
    stack = lm.adapters(layout, torch.randn(1, layout.width, generator=torch.Generator().manual_seed(1)) * 0.05)
    examples = lm.format.dialogues(TALKS)
    weights = [1 / len(e.reply) for e in examples]
    by_example = torch.zeros(len(examples), layout.width)
    for group, gradient, _ in lm.engine.row_gradients(stack, [], examples, [0] * len(examples), weights):
        by_example[group] = gradient
    for i, (example, weight) in enumerate(zip(examples, weights, strict=True)):
        ((_, alone, _),) = lm.engine.row_gradients(stack, [], [example], [0], [weight])
        torch.testing.assert_close(by_example[i], alone[0], atol=1e-5, rtol=1e-4)


def test_peft_loads_an_exported_adapter_and_gives_the_same_logits(lm: LanguageModel, tmp_path: Path) -> None:
    layout = lm.lora_layout(AdapterConfig(rank=2, alpha=6))
    row = torch.randn(layout.width, generator=torch.Generator().manual_seed(2)) * 0.1
    write_peft(tmp_path, layout, row, Base("nano"))
    assert torch.equal(read_peft(tmp_path, layout), row)
    examples = lm.format.dialogues(TALKS)
    base = AutoModelForCausalLM.from_pretrained(nano_folder(), dtype=torch.float32)
    bare = plain_nll(base, examples)
    theirs = plain_nll(PeftModel.from_pretrained(base, tmp_path), examples)
    ours = [s.nll for s in lm.score(examples, [0] * 6, [lm.adapters(layout, row)])]
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert min(abs(x - y) for x, y in zip(ours, bare, strict=True)) > 1e-2


def plain_nll(model: torch.nn.Module, examples: Sequence[Example]) -> list[float]:
    """Summed NLL of the replies by a model as transformers or PEFT has it, one example after the other."""
    found = []
    for e in examples:
        ids = torch.tensor([e.prompt + e.reply])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, len(e.prompt) - 1 : -1]
        found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, len(e.prompt) :], reduction="sum")))
    return found


def test_sampled_replies_depend_on_their_seed_alone(lm: LanguageModel) -> None:
    sampling = SamplingConfig(max_new_tokens=8, temperature=0.9)
    prompts = [t.prompt for t in TALKS]
    many = lm.generate(prompts, [0] * 6, [], sampling, list(range(6)))
    assert [lm.generate([p], [0], [], sampling, [i])[0] for i, p in enumerate(prompts)] == many


def test_long_prompts_lose_their_beginning(lm: LanguageModel) -> None:
    (example,) = lm.format.dialogues([Dialogue("x", "start " + "word " * 500 + "end", "yes")])
    words = lm.tokenizer.decode(example.prompt[slice(*example.words)])
    assert example.truncated
    assert "start" not in words
    assert words.endswith("end")


def test_stacked_adamw_is_torchs_on_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 7, generator=generator)
    expected = [torch.nn.Parameter(r.clone()) for r in rows]
    optimizers = [torch.optim.AdamW([p], lr=0.01 * (k + 1), weight_decay=0.1) for k, p in enumerate(expected)]
    moments, rate = Moments.zeros(rows), [0.01, 0.02, 0.03]
    for step in range(5):
        gradient = torch.randn(3, 7, generator=generator)
        moving = [k for k in range(3) if (step + k) % 3]
        for k in moving:
            expected[k].grad = gradient[k].clone()
            optimizers[k].step()
        adamw_(rows, gradient[moving], moments, moving, [rate[k] for k in moving], 0.1)
    torch.testing.assert_close(rows, torch.stack([p.detach() for p in expected]), atol=1e-6, rtol=1e-5)


# -- families of models -------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": (Gemma2Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma3": (Gemma3TextConfig, {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt-neox": (GPTNeoXConfig, {}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2}),
    "phi3": (Phi3Config, {"num_key_value_heads": 2}),
}


def tiny(lm: LanguageModel, config: PretrainedConfig) -> LanguageModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return LanguageModel(model, lm.tokenizer, lm.config.model_copy(update={"name": "tiny"}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_models_learns_as_plain_peft_reads_it(lm: LanguageModel, family: str, tmp_path: Path) -> None:
    kind, more = FAMILIES[family]
    other = tiny(
        lm, kind(vocab_size=len(lm.tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2, **SIZES, **more)
    )
    layout = other.lora_layout(AdapterConfig(rank=2, alpha=4))
    training_set = TrainingSet(other.format.dialogues(TALKS), [[0, 1, 2], [3, 4, 5]])
    start = other.adapters(layout, layout.start(0))
    trained = other.engine.finetune(start, [], [training_set], [[1e-2, 1e-2]])
    write_peft(tmp_path, layout, trained.adapters.rows[0], Base("tiny"))
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(
        other.engine.model.config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    bare = plain_nll(plain, training_set.examples)
    theirs = plain_nll(PeftModel.from_pretrained(plain, str(tmp_path)), training_set.examples)
    ours = [s.nll for s in other.score(training_set.examples, [0] * 6, [trained.adapters])]
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert min(abs(x - y) for x, y in zip(ours, bare, strict=True)) > 1e-3 and len(trained.losses[0]) == 2


def test_a_family_without_linear_projections_is_refused_with_what_was_found(lm: LanguageModel) -> None:
    config = GPT2Config(vocab_size=len(lm.tokenizer), n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel .*c_attn \(Conv1D\)"):
        tiny(lm, config)


WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZED = WIDTHS | {"intermediate_size": 48, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
OTHER_FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "MambaConfig": ({"state_size": 4}, r"carries a state .*mixer\.conv1d is Conv1d"),
    "FalconMambaConfig": ({"state_size": 4}, "carries a state"),
    "Mamba2Config": ({"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1}, "carries a state"),
    "RwkvConfig": ({"attention_hidden_size": 32}, "carries a state .*its class says so"),
    "Lfm2Config": ({"layer_types": ["conv", "full_attention"]}, r"carries a state .*conv\.conv is Conv1d"),
    "FalconH1Config": ({"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}, "a state"),
    "GraniteMoeHybridConfig": ({"mamba_n_heads": 8, "mamba_d_state": 4, "mamba_d_head": 8}, "carries a state"),
    "Qwen3NextConfig": ({**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16}, "carries a state"),
    "Qwen3_5TextConfig": (LINEAR, "carries a state"),
    "MiniMaxConfig": ({"num_local_experts": 2, "layer_types": LINEAR["layer_types"]}, "of the type linear_attention"),
    "MixtralConfig": ({"num_local_experts": 4}, r"MixtralExperts.* = \['k_proj', 'o_proj', 'q_proj', 'v_proj'\]"),
    "Qwen3MoeConfig": (EXPERTS, r"Qwen3MoeExperts, experts in one stack .*\[model\] targets = \['k_proj', "),
    "GPTNeoConfig": (
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4}, "0 of 2 layers of GPTNeo"
    ),
}  # fmt: skip


def other_family(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    """A random model with a vocabulary of 64."""
    torch.manual_seed(0)
    known = getattr(transformers, kind, None)
    if known is None:
        pytest.skip(f"this version of transformers does not know {kind}")
    sizes = {k: v for k, v in SIZED.items() if k in known().to_dict() or k in ("pad_token_id", "eos_token_id")}
    return AutoModelForCausalLM.from_config(known(**sizes | more), dtype=torch.float32).to(dtype)  # drawn in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OTHER_FAMILIES)
def test_a_model_that_is_built_otherwise_is_refused_by_name(kind: str, dtype: torch.dtype) -> None:
    """In bfloat16 too, where rounding would hide how far packed texts are from texts alone."""
    more, why = OTHER_FAMILIES[kind]
    with pytest.raises(UnsupportedModelError, match=why):
        Engine(other_family(kind, dtype, **more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("GptOssConfig", {"num_local_experts": 4}, "GptOssAttention attends with sinks"),
        (
            "DeepseekV3Config",
            {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
             "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
            r"DeepseekV3Attention attends with values of another width than its keys \(16\)",
        ),
        ("Llama4TextConfig", {}, "does not say which part of it comes before its head"),
    ],
)  # fmt: skip
def test_attention_of_another_kind_is_refused_by_name(
    kind: str, more: dict[str, Any], why: str, dtype: torch.dtype
) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        Engine(other_family(kind, dtype, **more), ["o_proj"])


@pytest.mark.parametrize(("kind", "more"), [("MixtralConfig", {"num_local_experts": 4}), ("Qwen3MoeConfig", EXPERTS)])
def test_beside_a_mixtures_experts_the_named_layers_learn_alone_as_in_company(kind: str, more: dict[str, Any]) -> None:
    engine = Engine(other_family(kind, **more), ["q_proj", "v_proj"])
    form = layout(adapted_layers(engine.modules), 2, 4)
    rows = torch.stack([form.start(k) for k in range(3)])
    sets = [
        TrainingSet([Example(tuple(range(2, 6 + k)), (7, 8 + k, 9), (0, 4 + k), False)], [[0], [0]]) for k in range(3)
    ]
    rates = [[1e-2, 1e-2]] * 3
    together = engine.finetune(Adapters(form, rows), [], sets, rates).adapters.rows
    for k in range(3):
        alone = engine.finetune(Adapters(form, rows[k : k + 1]), [], sets[k : k + 1], rates[:1]).adapters.rows
        assert (alone[0] - rows[k]).norm() > 1e-2
        torch.testing.assert_close(together[k], alone[0], atol=1e-4, rtol=1e-3)


def test_a_rank_is_bounded_by_the_widest_layer(lm: LanguageModel) -> None:
    assert lm.lora_layout(AdapterConfig(rank=192)).rank == 192
    with pytest.raises(UnsupportedModelError, match=r"rank = 100000 must be <= 192, .*model\.layers\.0\..* \(192 → "):
        lm.lora_layout(AdapterConfig(rank=100_000))
    narrow = lm.engine.modules["model.layers.0.self_attn.k_proj"].base.out_features
    with pytest.raises(UnsupportedModelError, match=rf"must be <= {min(192, narrow)}, .*k_proj"):
        lm.lora_layout(AdapterConfig(rank=193, targets=("k_proj",)))


def test_a_model_that_takes_a_layers_weights_out_of_it_is_told(lm: LanguageModel) -> None:
    with pytest.raises(UnsupportedModelError, match=r"a linear layer \(192 → 192\).*\[model\] targets"):
        _ = lm.engine.modules["model.layers.0.self_attn.q_proj"].weight


def test_an_attached_head_is_not_adapted(lm: LanguageModel) -> None:
    with pytest.raises(UnsupportedModelError, match="outside the head"):
        adapt(AutoModelForCausalLM.from_pretrained(str(nano_folder())), ["lm_head"])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_ours_goes_through_the_models_signatures(
    lm: LanguageModel, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass hands over what every transformers 5 takes; what else it needs is set on the modules beforehand."""
    kind, more = FAMILIES[family]
    other = tiny(
        lm, kind(vocab_size=len(lm.tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2, **SIZES, **more)
    )
    body, handed = other.engine.model.base_model, []
    whole = body.forward

    def forward(*args: object, **named: object) -> object:
        handed.append((args, set(named)))
        return whole(*args, **named)

    monkeypatch.setattr(body, "forward", forward)
    other.generate(["hi"], [0], [], SamplingConfig(max_new_tokens=2), [0])
    other.score(other.format.dialogues(TALKS[:1]), [0], [])
    assert len(handed) >= 2 and all(found == ((), {"input_ids", "position_ids", "use_cache"}) for found in handed)
    assert {"input_ids", "position_ids", "use_cache"} <= set(inspect.signature(type(body).forward).parameters)
    attending = [m for m in body.modules() if hasattr(m, attention.READING)]
    assert attending and not any(attention.READING in m.state_dict() for m in attending)


def test_no_class_of_transformers_that_moves_is_built_upon() -> None:
    """Its `Cache` has had three signatures in one major version."""
    assert KeyValues.__mro__[1:] == (object,)
