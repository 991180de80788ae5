"""`florilegium models list` and `models check`: what is on a machine, and what works with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import FAMILIES as COMPARED
from test_families import plain
from test_models import EOS, PAD, TEMPLATE, write_model, write_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, PreTrainedModel
from typer.testing import CliRunner

from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.places import NAMES
from florilegium.simulation.cli.main import app
from florilegium.simulation.models import listing
from florilegium.simulation.models.check import FAMILIES, Tried, check

NEEDED = ["loading", "packed texts", "adapters of many", "DP gradients", "writing", "export to PEFT"]
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with layers of 16 inputs."""
    torch.manual_seed(0)
    write_model(tmp_path / "tiny", vocab_size=262)
    write_tokenizer(tmp_path / "tiny", eos_token=EOS, pad_token=PAD, chat_template=TEMPLATE)
    return tmp_path / "tiny"


def replaced(folder: Path, model: PreTrainedModel) -> Path:
    """Another model behind the same tokenizer."""
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


def tried(folder: Path, **settings: Any) -> dict[str, Tried]:
    config = ModelConfig.model_validate({"name": str(folder), "dtype": "float32", "device": "cpu", **settings})
    return {part.part: part for part in check(config)}


# -- what there is --------------------------------------------------------------------------------------------------


def cached(cache: Path, name: str, folder: Path) -> Path:
    """A folder as the hub's client lays its cache out."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / REVISION)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(REVISION)
    (place / "blobs").mkdir()
    return place / "snapshots" / REVISION


def test_what_is_in_the_caches_is_listed_with_sizes_and_licences(folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    whole = cached(hub, "owner/whole", folder)
    (whole / "README.md").write_text('---\nlanguage: en\nlicense: "apache-2.0"\n---\n# license: none\n')
    own = cached(hub, "owner/own", folder)
    (own / "README.md").write_text("---\nlicense: other\nlicense_name: own-licence\n---\n")
    (own / "x.Q8_0.gguf").write_bytes(b"GGUF" + bytes(96))
    torn = cached(hub, "owner/torn", folder)
    (torn / "model.safetensors").rename(torn / "pytorch_model.bin")
    data = hub / "datasets--owner--data" / "snapshots" / REVISION
    data.mkdir(parents=True)
    found = {model.name: model for model in listing.listed(hub)}
    assert list(found) == [*NAMES, str(own / "x.Q8_0.gguf"), "owner/own", "owner/torn", "owner/whole"]
    size = sum(p.stat().st_size for p in folder.iterdir())
    assert (found["owner/whole"].bytes, found["owner/whole"].licence, found["owner/whole"].why_not) == (
        size, "apache-2.0", ""
    )  # fmt: skip
    assert found["owner/own"].licence == found[str(own / "x.Q8_0.gguf")].licence == "own-licence"
    assert found[str(own / "x.Q8_0.gguf")].bytes == 100
    assert found["owner/torn"].why_not.startswith("no model.safetensors") and found["owner/torn"].licence == "not told"
    assert found["nano"].licence == "cc-by-sa-4.0" and not found["nano"].why_not


def test_the_list_is_a_line_a_model_or_json(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("FLORILEGIUM_CACHE", str(tmp_path / "cache"))
    lines = CliRunner().invoke(app, ["models", "list"]).stdout.splitlines()
    assert lines[0].split()[:4] == ["nano", "5.4", "MB", "cc-by-sa-4.0"]
    assert "fetch it once with: florilegium models pull smollm2-135m" in lines[1]
    shutil.copytree(folder, tmp_path / "cache" / "smollm2-135m")
    (tmp_path / "cache" / "smollm2-135m" / "source.json").write_text('{"licence": "Apache-2.0"}')
    told = json.loads(CliRunner().invoke(app, ["models", "list", "--json"]).stdout)
    assert told[1]["name"] == "smollm2-135m" and told[1]["licence"] == "Apache-2.0" and told[1]["why_not"] == ""
    assert set(told[0]) == {"name", "place", "bytes", "licence", "why_not"}


def test_without_a_cache_there_is_what_is_bundled(tmp_path: Path) -> None:
    assert [model.name for model in listing.listed(tmp_path / "none")] == list(NAMES)


# -- what works -----------------------------------------------------------------------------------------------------


def test_all_that_a_run_needs_works_with_a_small_llama(folder: Path) -> None:
    found = tried(folder)
    assert [name for name, part in found.items() if part.needed] == NEEDED
    assert all(part.works for part in found.values() if part.needed)
    numbers = 262 * 16 + 4 * 16 * 16 + 3 * 16 * 16  # without the three norms
    assert f"one of the families that are tested; {numbers:,} parameters" in found["loading"].told
    assert found["int8 weights"].works and not found["int4 weights"].works
    assert found["int4 weights"].told == "a layer has 16 inputs, which is no multiple of 32"
    assert not found["int4 weights"].needed
    assert found["writing"].told.endswith("a reply ends with [1]")


def test_in_bits_and_in_bfloat16_too(folder: Path) -> None:
    for settings in ({"weights": "int8"}, {"dtype": "bfloat16"}, {"targets": ("q_proj",)}):
        found = tried(folder, **settings)
        assert all(part.works for part in found.values() if part.needed), found


@pytest.mark.parametrize("family", ["granite", "cohere2"])
def test_logits_that_are_scaled_are_no_hindrance(folder: Path, family: str) -> None:
    kind = plain(family).config
    config = type(kind).from_dict({**kind.to_dict(), "vocab_size": 262})
    found = tried(replaced(folder, AutoModelForCausalLM.from_config(config)))
    assert all(part.works for part in found.values() if part.needed), found


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (GPT2Config(vocab_size=262, n_embd=16, n_layer=1, n_head=2), r"no layer of GPT2LMHeadModel is nn.Linear"),
        (
            MixtralConfig(vocab_size=262, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=2, num_local_experts=2),
            r"MixtralExperts, experts in one stack",
        ),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_used_is_told_with_the_reason_and_exit_code_1(
    folder: Path, config: Any, why: str
) -> None:
    replaced(folder, AutoModelForCausalLM.from_config(config))
    asked = CliRunner().invoke(app, ["models", "check", str(folder), "dtype=float32"])
    assert asked.exit_code == 1
    (line,) = asked.stdout.splitlines()
    assert line.startswith("loading           no") and why in line


def test_the_command_ends_with_0_where_only_what_is_not_needed_is_lacking(folder: Path) -> None:
    asked = CliRunner().invoke(app, ["models", "check", str(folder), "dtype=float32", "--json"])
    told = json.loads(asked.stdout)
    assert asked.exit_code == 0
    assert [part["part"] for part in told if not part["works"]] == ["int4 weights"]


def test_gradients_that_depend_on_their_company_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Engine.row_gradients

    def coupled(self: Engine, *given: Any) -> Iterator[Any]:
        for group, gradient, losses in whole(self, *given):
            yield group, gradient * (1 + 1e-6 * len(group)), losses

    monkeypatch.setattr(Engine, "row_gradients", coupled)
    found = tried(folder)
    assert not found["DP gradients"].works
    assert found["DP gradients"].told.endswith("depends on its company")
    assert found["adapters of many"].works


def test_a_token_that_is_not_the_likeliest_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda *given, **more: [[5, *ids] for ids in whole(*given, **more)])
    found = tried(folder)
    assert not found["writing"].works and "not the likeliest" in found["writing"].told


def test_the_families_that_are_told_to_be_tested_are_those_that_are() -> None:
    assert sorted({plain(family).config.model_type for family in COMPARED}) == sorted(FAMILIES)
