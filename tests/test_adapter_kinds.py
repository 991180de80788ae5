"""(IA)³ and soft prompts of many devices in one pass: what PEFT computes for one, whatever the company."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from peft import PeftModel
from transformers import AutoModelForCausalLM

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters, Layout
from florilegium.client.lm.config import AdapterConfig, SamplingConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.packing import Example
from florilegium.client.lm.peft_format import write_peft
from florilegium.client.lm.places import Base, nano_folder
from florilegium.client.lm.training_data import TrainingSet
from florilegium.simulation.config import load_config
from florilegium.simulation.data.population import load_population
from florilegium.simulation.experiment import run_experiment
from florilegium.simulation.settings import ConfigError, config_folder

KINDS = ["ia3", "prompt"]
TALKS = [
    Dialogue("a", "hello there, how are you?", "fine, thanks, and you?"),
    Dialogue("b", "what did you eat?", "soup"),
    Dialogue("c", "do you like to read books in the evening", "i do, mostly about the sea and ships"),
    Dialogue("d", "yes", "no"),
]


def layout_of(lm: LanguageModel, kind: str) -> Layout:
    return lm.layout(AdapterConfig.model_validate({"kind": kind, "virtual_tokens": 3}))


def moved(layout: Layout, device: int, by: float = 0.05) -> torch.Tensor:
    return layout.start(device) + by * torch.randn(layout.width, generator=torch.Generator().manual_seed(device))


def by_peft(folder: Path, examples: Sequence[Example]) -> tuple[list[torch.Tensor], list[torch.nn.Parameter]]:
    """The loss of each example's reply by plain transformers and peft, and what it is differentiable in."""
    base = AutoModelForCausalLM.from_pretrained(nano_folder(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder)
    adapter = [p.requires_grad_(True) for n, p in model.named_parameters() if "ia3_l" in n or "prompt_encoder" in n]
    return [loss_of(model, e)[0] for e in examples], adapter


def loss_of(model: torch.nn.Module, example: Example) -> tuple[torch.Tensor, int]:
    """Of a reply, summed, and its tokens; virtual tokens may stand before the prompt."""
    ids = torch.tensor([example.prompt + example.reply])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(example.reply) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(example.reply), reduction="sum")
    return loss, len(example.reply)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_peft(lm: LanguageModel, tmp_path: Path, kind: str) -> None:
    layout, examples = layout_of(lm, kind), lm.format.dialogues(TALKS)
    row = moved(layout, 7)
    write_peft(tmp_path, layout, row, Base("nano"))
    theirs, parameters = by_peft(tmp_path, examples)
    adapters = lm.adapters(layout, row)
    ours = [s.nll for s in lm.score(examples, [0] * len(examples), [adapters])]
    assert ours == pytest.approx([x.item() for x in theirs], abs=1e-4)
    bare = [s.nll for s in lm.score(examples, [0] * len(examples), [])]
    assert min(abs(x - y) for x, y in zip(ours, bare, strict=True)) > 1e-3
    expected = torch.autograd.grad(torch.stack(theirs).sum(), parameters)
    gradients = lm.engine.row_gradients(adapters, [], examples, [0] * len(examples), [1.0] * len(examples))
    total = sum(gradient.sum(0) for _, gradient, _ in gradients)
    # both list the model's layers in its order
    torch.testing.assert_close(total, torch.cat([g.flatten() for g in expected]), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_learns_scores_and_writes_the_same_alone_and_in_company(lm: LanguageModel, kind: str) -> None:
    layout = layout_of(lm, kind)
    rows = torch.stack([moved(layout, k) for k in range(4)])
    sets = [TrainingSet(lm.format.dialogues(TALKS[k:] + TALKS[:k]), [[0, 1], [2, 3], [k % 4]]) for k in range(4)]
    rates = [[1e-2] * 3] * 4
    together = lm.engine.finetune(Adapters(layout, rows), [], sets, rates).adapters.rows
    examples, prompts = lm.format.dialogues(TALKS), [d.prompt for d in TALKS]
    greedy = SamplingConfig(max_new_tokens=8)
    scores = lm.score(examples, range(4), [Adapters(layout, together)])
    replies = lm.generate(prompts, range(4), [Adapters(layout, together)], greedy, range(4))
    for k in range(4):
        alone = lm.engine.finetune(Adapters(layout, rows[k : k + 1]), [], sets[k : k + 1], rates[:1]).adapters.rows
        assert (alone[0] - rows[k]).norm() > 1e-2
        torch.testing.assert_close(together[k], alone[0], atol=1e-4, rtol=1e-3)
        own = [Adapters(layout, together[k : k + 1])]
        assert lm.score(examples[k : k + 1], [0], own)[0].nll == pytest.approx(scores[k].nll, abs=1e-3)
        assert lm.generate(prompts[k : k + 1], [0], own, greedy, [k]) == [replies[k]]


def test_kinds_are_added_to_each_other_and_the_base_is_bare_again(lm: LanguageModel) -> None:
    examples = lm.format.dialogues(TALKS)
    bare = lm.score(examples, range(4), [])
    stacks = [
        Adapters(layout, torch.stack([moved(layout, k) for k in range(4)]))
        for layout in (layout_of(lm, "ia3"), layout_of(lm, "prompt"), lm.lora_layout(AdapterConfig(rank=2)))
    ]
    found = {tuple(lm.score(examples, range(4), some)) for some in ([stacks[0]], stacks[:2], stacks)}
    assert len(found) == 3 and lm.score(examples, range(4), []) == bare
    with pytest.raises(ValueError, match="two soft prompts"):
        lm.score(examples, range(4), [stacks[1], stacks[1]])
    assert lm.score(examples, range(4), []) == bare


def shown_in_the_readme() -> str:
    """Its lines on how to use what a run exported."""
    readme = Path(__file__).parent.parent / "README.md"
    found = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    (lines,) = (x for x in found if "from peft import" in x)
    return str(lines)


@pytest.mark.parametrize("kind", ["lora", *KINDS])
def test_the_readmes_lines_give_the_personal_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lm: LanguageModel, kind: str
) -> None:
    """In a run's folder that was moved, with nothing but plain peft."""
    overrides = [*SMALL, "data.users=2", "rounds=1", "evaluation.pooled_epochs=0", f"personal.adapter.kind={kind}"]
    config = load_config(config_folder() / "quickstart.toml", [*overrides, "model.dtype=float32"])
    run_experiment(config, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert str(tmp_path) not in Path("adapters/personal/device-00000/adapter_config.json").read_text()
    found: dict[str, torch.nn.Module] = {}
    exec(shown_in_the_readme(), found)
    results = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    nll = {e["arm"]: e["nll"] for e in results if e["device"] == "device-00000"}
    user = load_population(config.data, config.seed)[0]
    examples = lm.format.dialogues(user.held_out)
    losses, tokens = zip(*(loss_of(found["model"], e) for e in examples), strict=True)
    assert sum(x.item() for x in losses) / sum(tokens) == pytest.approx(nll["personal"], abs=1e-4)
    assert min(abs(nll["personal"] - nll[arm]) for arm in ("base", "shared", "local")) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shared_is_lora(kind: str) -> None:
    with pytest.raises(ConfigError, match="what is shared"):
        load_config(config_folder() / "quickstart.toml", [f"shared.adapter.kind={kind}"])


def test_new_ones_are_small_and_begin_near_the_base(lm: LanguageModel) -> None:
    ia3, prompt = layout_of(lm, "ia3"), layout_of(lm, "prompt")
    examples = lm.format.dialogues(TALKS)
    fresh = lm.score(examples, [0] * 4, [lm.adapters(ia3, ia3.start(0))])
    assert [s.nll for s in fresh] == pytest.approx([s.nll for s in lm.score(examples, [0] * 4, [])], abs=1e-4)
    assert prompt.width == 3 * lm.engine.embedding.weight.shape[1]
    assert torch.equal(prompt.start(1), prompt.start(1)) and not torch.equal(prompt.start(1), prompt.start(2))
    table = lm.engine.embedding.weight.float()
    assert all((table == word).all(1).any() for word in prompt.start(1).view(3, -1))
