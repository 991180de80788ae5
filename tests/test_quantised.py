"""A frozen base in 8 or 4 bits: its numbers, what it is worth, and that everything that a device does works with it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm import quantised
from florilegium.client.lm.adapter import Adapters, layout
from florilegium.client.lm.config import AdapterConfig, ModelConfig, SamplingConfig
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.layers import adapted_layers
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.packing import Example
from florilegium.client.lm.peft_format import write_peft
from florilegium.client.lm.places import Base, ModelError, nano_folder
from florilegium.client.lm.quantised import QuantisedLinear, Weights, input_gradient, product, quantise
from florilegium.client.lm.training_data import TrainingSet
from florilegium.simulation.data.population import User

LOSS = {"int8": 0.02, "int4": 0.05}  # nats a token beside the float base
BYTES = {"int8": 1 + 4 / 192, "int4": 0.5 + 4 / quantised.GROUP}  # a weight, of rows of 192, with what scales it


def linear(rows: list[list[float]], bias: bool = False) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=bias).requires_grad_(False)
    layer.weight.copy_(torch.tensor(rows))
    return layer


@pytest.fixture(scope="module", params=["int8", "int4"])
def coded(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel.load(ModelConfig(dtype="float32", device="cpu", weights=request.param))


def test_in_8_bits_a_rows_largest_magnitude_is_127_steps() -> None:
    layer = QuantisedLinear(linear([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]), "int8")
    assert layer.codes.tolist() == [[127, -50, 0], [0, 0, 0]]
    torch.testing.assert_close(layer.weight, torch.tensor([[1.27, -0.5, 0.0], [0.0, 0.0, 0.0]]))


def test_in_4_bits_a_group_reaches_from_its_least_weight_to_its_largest() -> None:
    """Steps of 1/8 from -1 to 7/8, exactly; in the next group of the same row steps of 1."""
    steps = [k % 16 / 8 - 1 for k in range(32)]
    layer = QuantisedLinear(linear([steps + [8 * x for x in steps], [3.0] * 64]), "int4")
    assert layer.codes[0, :3].tolist() == [0x10, 0x32, 0x54]  # the even columns below
    assert layer.codes.shape == (2, 32) and layer.scales[0].flatten().tolist() == [1 / 8, 1]
    assert layer.weight.tolist() == [steps + [8 * x for x in steps], [3.0] * 64]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_products_by_blocks_are_those_with_all_weights(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = QuantisedLinear(nn.Linear(64, 10), weights)
    monkeypatch.setattr(quantised, "BLOCK", 64 * 4)  # of four rows, four, and two
    assert [len(range(10)[some]) for some in layer.blocks()] == [4, 4, 2]
    x, grad = torch.randn(3, 64, requires_grad=True), torch.randn(3, 10)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x[None])[0], expected)
    (whole,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(torch.autograd.grad(layer(x), x, grad)[0], whole)
    torch.testing.assert_close(input_gradient([grad, grad], [layer, layer]), 2 * whole)


def test_weights_as_numbers_are_multiplied_as_torch_does() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(4, 5)
    assert torch.equal(product(x, layer), layer(x))


def test_layers_whose_groups_would_not_be_whole_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'int4' needs layers .* multiple of 32, and 0 has 80; use 'int8'"):
        quantise(nn.Sequential(nn.Linear(80, 8)), "int4")


def test_a_coded_base_is_as_good_and_as_small_as_is_said(
    lm: LanguageModel, coded: LanguageModel, people: list[User]
) -> None:
    weights = coded.config.weights
    examples = lm.format.dialogues([d for user in people for d in user.held_out])
    before, after = (
        sum(s.nll for s in x.score(examples, [0] * len(examples), [])) / sum(e.targets for e in examples)
        for x in (lm, coded)
    )
    assert before != after and abs(after - before) < LOSS[weights]
    numbers = sum(m.base.in_features * m.base.out_features for m in lm.engine.modules.values())
    assert coded.parameters == lm.parameters
    saved = lm.parameter_bytes - coded.parameter_bytes
    assert saved / numbers == pytest.approx(4 - BYTES[weights], abs=0.02)
    assert not any(isinstance(m.base, nn.Linear) for m in coded.engine.modules.values())


def test_a_coded_base_does_all_that_a_device_needs_and_peft_takes_what_was_learnt(
    lm: LanguageModel, coded: LanguageModel, tmp_path: Path
) -> None:
    talks = [Dialogue(str(k), prompt, "yes, i am") for k, prompt in enumerate(("are you there?", "home?", "well?"))]
    examples, layout = coded.format.dialogues(talks), coded.lora_layout(AdapterConfig(rank=2, alpha=4))
    start = coded.adapters(layout, layout.start(0))
    trained = coded.engine.finetune(start, [], [TrainingSet(examples, [[0, 1, 2]] * 3)], [[1e-2] * 3])
    assert trained.losses[0][2] < trained.losses[0][0]
    row = trained.adapters.rows[0]
    (gradients,), _ = coded.engine.dp_gradients(trained.adapters, [], [examples])
    assert gradients.shape == (3, layout.width) and gradients.isfinite().all() and gradients.any()
    assert all(len(f.readings["mean"].vector) == 192 for f in coded.embed([t.prompt for t in talks]))
    scores = [s.nll for s in coded.score(examples, [0] * 3, [trained.adapters])]
    assert coded.generate(["are you there?"], [0], [trained.adapters], SamplingConfig(max_new_tokens=4), [0])[0]
    with coded.engine.adaptable.merged([trained.adapters]):
        assert [s.nll for s in coded.score(examples, [0] * 3, [])] == pytest.approx(scores, abs=1e-3)
    write_peft(tmp_path, layout, row, Base("nano"))
    plain = AutoModelForCausalLM.from_pretrained(nano_folder(), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, tmp_path)
    for example, score in zip(examples, lm.score(examples, [0] * 3, [lm.adapters(layout, row)]), strict=True):
        ids = torch.tensor([example.prompt + example.reply])
        labels = ids.clone()
        labels[0, : len(example.prompt)] = -100
        with torch.inference_mode():
            nll = float(theirs(ids, labels=labels).loss) * example.targets
        assert score.nll == pytest.approx(nll, abs=1e-3)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_gradients_are_those_of_the_model_with_the_weights_that_the_codes_stand_for(weights: Weights) -> None:
    """Against plain transformers and autograd, through frozen layers below the adapters too."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes)).eval().requires_grad_(False)
    other = copy.deepcopy(plain)
    quantise(other, weights)
    for name, layer in other.named_modules():
        if isinstance(layer, QuantisedLinear):
            plain.get_submodule(name).weight.copy_(layer.weight)
    engine, text = Engine(other, ["v_proj", "up_proj"]), Example((5, 9, 3, 8), (7, 4, 1), (0, 4), False)
    form = layout(adapted_layers(engine.modules), 2, 4)
    row = 0.2 * torch.randn(form.width, generator=torch.Generator().manual_seed(1))
    found, _ = engine.gradient(Adapters(form, row[None]), [], [[text]], [[1.0]])
    row.requires_grad_(True)
    changed = {
        f"{name}.weight": plain.get_parameter(f"{name}.weight") + form.scale * (b[0] @ a[0])
        for name, a, b in form.split(row[None])
    }
    ids = torch.tensor([text.prompt + text.reply])
    logits = torch.func.functional_call(plain, changed, (ids,), {"use_cache": False}).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[3:-1], torch.tensor(text.reply), reduction="sum")
    (expected,) = torch.autograd.grad(loss, row)
    assert expected.norm() > 0.1
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-3)
