"""Adapters as llama.cpp reads them, and that it says with them what is said here; the base is written by this project.

The parts that need llama.cpp itself are left out where the extra `llamacpp` is not installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from test_gguf import write as write_tiny
from typer.testing import CliRunner

from florilegium.client.agent.agent import Agent
from florilegium.client.agent.config import AgentConfig, GenerationConfig, new_config
from florilegium.client.agent.device import Device, write_adapter
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.gguf_export import adapters_on
from florilegium.client.lm import llamacpp
from florilegium.client.lm.adapter import AdapterLayout, Adapters
from florilegium.client.lm.config import AdapterConfig, ModelConfig, ReplyConfig, SamplingConfig
from florilegium.client.lm.gguf_adapter import Placement, gguf_adapter, placement
from florilegium.client.lm.gguf_base import Kind, write_gguf
from florilegium.client.lm.llamacpp import LlamaCpp
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.peft_format import AdapterFormatError
from florilegium.client.lm.places import ModelError
from florilegium.client.personalization.acceptance import AcceptanceConfig
from florilegium.simulation.cli.models import app as models_app
from florilegium.simulation.data.population import User
from florilegium.simulation.settings import set_value

needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="pip install 'florilegium[llamacpp]'"
)
CLOSE = 5e-3  # nats between logarithms of probabilities: float32 on both sides, but for llama.cpp's cache in float16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "nano.gguf"
    write_gguf("nano", path)
    return path


@pytest.fixture(scope="module")
def written(base: Path) -> LanguageModel:
    """What is read of the file that was written."""
    return LanguageModel.load(ModelConfig(name=str(base), dtype="float32"))


def adapters(lm: LanguageModel, rank: int = 4) -> list[Adapters]:
    """A shared adapter of values alone with a frozen A, and a personal one of all layers on top of it."""
    torch.manual_seed(0)
    shared = lm.lora_layout(AdapterConfig(rank=rank, alpha=64, factors="b", targets=("v_proj",)), public_seed=1)
    personal = lm.lora_layout(AdapterConfig(rank=8, alpha=16))
    rows = 0.02 * torch.randn(shared.width), personal.start(0) + 0.02 * torch.randn(personal.width)
    return [lm.adapters(shared, rows[0]), lm.adapters(personal, rows[1])]


def read(content: bytes, folder: Path) -> GGUFReader:
    (folder / "adapter.gguf").write_bytes(content)
    return GGUFReader(folder / "adapter.gguf")


def delta(reader: GGUFReader, name: str) -> torch.Tensor:
    """The change of a weight (out, in), as llama.cpp has it: alpha / rank · B A."""
    found = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    a, b = found[f"{name}.weight.lora_a"], found[f"{name}.weight.lora_b"]
    return float(reader.fields["adapter.lora.alpha"].contents()) / len(a) * b @ a


# -- the file ---------------------------------------------------------------------------------------------------------


def test_queries_of_two_heads_are_put_in_pairs_of_neighbours() -> None:
    rows = torch.arange(8.0)[:, None]  # two heads of four: halves (0, 1), (2, 3) and (4, 5), (6, 7)
    place = Placement("llama", {}, {"q": 2})
    assert place.ordered("q", rows).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert place.ordered("v", rows) is rows


def test_a_base_that_is_written_is_the_same_model(lm: LanguageModel, written: LanguageModel) -> None:
    (one,), (other,) = (m.format.prompts(["Do you like tea?"]) for m in (lm, written))
    assert one == other and written.format.stop == lm.format.stop
    a, b = (m.engine.score([one], [0], []) for m in (lm, written))
    assert a == b
    ((_, x),), ((_, y),) = (list(m.engine.hidden([one])) for m in (lm, written))
    assert torch.equal(x, y)


@pytest.mark.parametrize(("together", "rank"), [(False, 4), (True, 4), (True, 1)])
def test_a_file_says_what_the_adapter_says(
    written: LanguageModel, base: Path, tmp_path: Path, together: bool, rank: int
) -> None:
    """Σ scale · B A of the adapters that are on, in the order of rows that the file of the base has."""
    on = adapters(written, rank)[0 if together else 1 :]
    reader = read(gguf_adapter(on, placement(written.engine, GGUFReader(base))), tmp_path)
    told = {k: reader.fields[k].contents() for k in ("general.architecture", "general.type", "adapter.type")}
    assert list(told.values()) == ["llama", "adapter", "lora"]
    weights = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(base).tensors}
    for kind, module in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"), ("attn_output", "o_proj")):
        name = f"model.layers.2.self_attn.{module}"
        expected = torch.zeros(192, 192)
        for one in on:
            assert isinstance(one.layout, AdapterLayout)
            parts = {n: (a.reshape(-1, 192), b.reshape(192, -1)) for n, a, b in one.layout.split(one.rows) if n == name}
            if name in parts:
                expected += one.layout.scale * parts[name][1] @ parts[name][0]
        weight = written.engine.modules[name].base.weight  # the order of its rows in the file, found by their values
        order = [int((weight == torch.from_numpy(row)).all(1).nonzero()) for row in weights[f"blk.2.{kind}.weight"]]
        torch.testing.assert_close(delta(reader, f"blk.2.{kind}"), expected[order], rtol=1e-5, atol=1e-7)
        assert (order == sorted(order)) == (kind in ("attn_v", "attn_output"))


def test_orders_are_those_of_the_file_whatever_its_bits(tmp_path: Path) -> None:
    for kind in ("F16", "Q8_0", "Q4_0"):
        path = write_tiny(tmp_path / f"{kind}.gguf", kind)
        engine = LanguageModel.load(ModelConfig(name=str(path), dtype="float32", weights="int8")).engine
        heads = placement(engine, GGUFReader(path)).heads
        assert {(n.rpartition(".")[2], h) for n, h in heads.items()} == {("q_proj", 4), ("k_proj", 2)}


def test_a_file_with_other_rows_is_refused(written: LanguageModel, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "x.gguf")
    lm = LanguageModel.load(ModelConfig(name=str(path), dtype="float32"))
    with torch.no_grad():
        layer = lm.engine.modules["model.layers.0.self_attn.q_proj"].base
        layer.weight.copy_(layer.weight.flip(0))
    with pytest.raises(AdapterFormatError, match=r"weights of .*q_proj in an order that is not known"):
        placement(lm.engine, GGUFReader(path))
    with pytest.raises(AdapterFormatError, match=r"no tensor blk\.2\.attn_q\.weight"):
        placement(written.engine, GGUFReader(path))


@pytest.mark.parametrize(("kind", "named"), [("ia3", "ScalingLayout"), ("prompt", "PromptLayout")])
def test_what_is_no_lora_is_refused_by_name(written: LanguageModel, kind: str, named: str) -> None:
    layout = written.layout(AdapterConfig.model_validate({"kind": kind}))
    one = written.adapters(layout, layout.start(0))
    with pytest.raises(AdapterFormatError, match=f"{named}: llama.cpp knows LoRA adapters alone"):
        gguf_adapter([one], placement(written.engine))


def test_gates_are_refused(written: LanguageModel) -> None:
    plain = written.lora_layout(AdapterConfig(rank=2))
    gated = AdapterLayout(plain.layers, 2, 4.0, "both", gated=True)
    with pytest.raises(AdapterFormatError, match="has gates"):
        gguf_adapter([written.adapters(gated, torch.zeros(gated.width))], placement(written.engine))


def test_a_base_that_is_no_llama_is_not_written(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from florilegium.client.lm.places import nano_folder

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path / "qwen"
    Qwen2ForCausalLM(Qwen2Config(vocab_size=4160, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((nano_folder() / name).read_bytes())
    with pytest.raises(ModelError, match=r"of the type 'qwen2'.*convert_hf_to_gguf"):
        write_gguf(str(folder), tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
    lm = LanguageModel.load(ModelConfig(name=str(folder), dtype="float32"))
    with pytest.raises(AdapterFormatError, match="type 'qwen2' that is no GGUF file has no known order"):
        placement(lm.engine)


def test_the_command_writes_a_base_in_fewer_bits_and_writes_over_nothing(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "nano.gguf"
    done = CliRunner().invoke(models_app, ["gguf", "nano", str(file), "--kind", "Q8_0"])
    assert done.exit_code == 0 and base.stat().st_size > 2 * file.stat().st_size
    assert {t.tensor_type.name for t in GGUFReader(file).tensors} == {"Q8_0", "F32"}
    for wrong in ([str(file)], [str(tmp_path / "x.bin")], [str(tmp_path / "x.gguf"), "--kind", "Q3"]):
        assert CliRunner().invoke(models_app, ["gguf", "nano", *wrong]).exit_code == 2
    assert list(tmp_path.iterdir()) == [file]


# -- llama.cpp itself -------------------------------------------------------------------------------------------------


def logarithms(server: LlamaCpp, prompt: Sequence[int], size: int) -> np.ndarray:
    """Of the probabilities of all that may follow a prompt (V,)."""
    asked = {"prompt": list(prompt), "n_predict": 1, "temperature": 0.0, "n_probs": size}
    (choice,) = server._server.handle_completions(asked)["choices"]
    found = {one["id"]: one["logprob"] for one in choice["logprobs"]["content"][0]["top_logprobs"]}
    return np.array([found[i] for i in range(size)])


def ours(lm: LanguageModel, prompt: str, on: Sequence[Adapters]) -> np.ndarray:
    ((_, hidden),) = list(lm.engine.hidden(lm.format.prompts([prompt]), on))
    return torch.log_softmax(lm.engine.logits(hidden[-1:]).float(), -1)[0].numpy()


@pytest.fixture
def server(written: LanguageModel, base: Path) -> Iterator[LlamaCpp]:
    found = LlamaCpp(base, 512, 1, gguf_adapter(adapters(written), placement(written.engine, GGUFReader(base))))
    yield found
    found.close()


@pytest.mark.slow
@needs_llamacpp
def test_llama_cpp_says_the_same_with_the_same_adapter(
    written: LanguageModel, base: Path, server: LlamaCpp, people: list[User]
) -> None:
    on, prompts = adapters(written), [d.prompt for user in people for d in user.stream][:50]
    assert len(prompts) == 50
    for prompt in prompts[:3]:
        ids, bare = written.format.prompts([prompt])[0].prompt, ours(written, prompt, [])
        expected = ours(written, prompt, on)
        assert abs(logarithms(server, ids, 4096) - expected).max() < CLOSE < 0.1 < abs(bare - expected).max()
    sampling, heard = SamplingConfig(max_new_tokens=16), list[str]()
    replies = written.generate(prompts, [0] * 50, on, sampling, [0] * 50)
    theirs = [server.reply(e.prompt, sampling, 0, heard.append) for e in written.format.prompts(prompts)]
    assert sum(a == b for a, b in zip(replies, theirs, strict=True)) >= 48  # of 50: 95 %, rounded up
    assert len(set(replies)) > 10 and heard[-1] == theirs[-1]


@pytest.mark.slow
@needs_llamacpp
@pytest.mark.parametrize(("kind", "most"), [("Q8_0", 0.01), ("Q4_1", 0.1)])
def test_fewer_bits_cost_little(
    written: LanguageModel,
    people: list[User],
    tmp_path: Path,
    kind: Kind,
    most: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nats a token of real replies: in float32, on the file's weights in PyTorch, and in llama.cpp's integers."""
    write_gguf("nano", path := tmp_path / "nano.gguf", kind)
    coded = LanguageModel.load(ModelConfig(name=str(path), dtype="float32"))
    examples = written.format.dialogues(people[0].stream[:6])
    tokens, nobody = sum(e.targets for e in examples), [0] * len(examples)
    floats, ours = (sum(m.engine.score(examples, nobody, [])) / tokens for m in (written, coded))
    server, nll = LlamaCpp(path, 512, 1), 0.0
    for example in examples:
        whole = [*example.prompt, *example.reply]
        for k in range(len(example.prompt), len(whole)):
            nll -= logarithms(server, whole[:k], 4096)[whole[k]]
    server.close()
    with capsys.disabled():
        print(f"nano {kind}, {tokens} tokens: {floats:.4f}, {ours - floats:+.4f}, {nll / tokens - floats:+.4f}")
    assert abs(ours - floats) < most and abs(nll / tokens - ours) < 0.02


@needs_llamacpp
def test_llama_cpp_draws_by_the_seed_and_stops(written: LanguageModel, base: Path, server: LlamaCpp) -> None:
    (asked,) = written.format.prompts(["Do you like tea?"])
    warm, heard = SamplingConfig(max_new_tokens=12, temperature=1.0), list[str]()
    said = {seed: server.reply(asked.prompt, warm, seed, heard.append) for seed in (1, 2, 2**40 + 1)}
    assert said[1] != said[2] and said[2**40 + 1] == said[1]
    with pytest.raises(ModelError, match=r"llama\.cpp refuses: .*context"):
        server.reply(asked.prompt * 200, warm, 1, heard.append)
    other = LlamaCpp(base, 512, 1, stop=" ")
    assert " " not in other.reply(asked.prompt, warm, 1, heard.append)
    other.close()


@needs_llamacpp
def test_an_adapter_of_another_base_is_refused(written: LanguageModel, base: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "x.gguf")
    adapter = gguf_adapter(adapters(written), placement(written.engine, GGUFReader(base)))
    with pytest.raises(ModelError, match=r"llama\.cpp does not load the base, or the adapter for it"):
        LlamaCpp(other, 512, 1, adapter)


# -- a device ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def agent(base: Path, written: LanguageModel) -> Iterator[Agent]:
    """One that talks through llama.cpp, with a socket's short path."""
    with TemporaryDirectory(prefix="device-") as folder:
        home = DeviceFolder(Path(folder) / "home")
        config = new_config(ModelConfig(name=str(base), dtype="float32")).model_copy(
            update={
                "generation": GenerationConfig(backend="llamacpp"),
                "acceptance": AcceptanceConfig(share=0),
                "chat": ReplyConfig(max_new_tokens=12),
            }
        )
        found = Agent(Device(home, config, written, home.make(config)))
        found.consent("learn", True)
        yield found
        found.close()


def both(agent: Agent) -> tuple[str, str]:
    """A reply of llama.cpp's and PyTorch's, of the adapters that are on."""
    device, asked = agent.device, "What do you like best?"
    theirs = agent.chat(asked, temporary=True).said
    return theirs, device.lm.reply(asked, adapters_on(device), device.config.chat, 0, lambda told: None)


@pytest.mark.slow
@needs_llamacpp
def test_a_device_talks_with_what_it_has_learned(agent: Agent) -> None:
    device, heard = agent.device, list[str]()
    turn = agent.chat("Do you like music?", "c", heard.append)
    assert heard[-1] == turn.said and device.served
    before, at_first = both(agent), device.served
    assert before[0] == before[1]
    agent.settle()
    assert not device.has_weights
    with monitored() as loads:
        assert agent.chat("Do you like music?").said == turn.said
        assert agent.status()["model"] == device.config.device.model.name
    assert not loads and not device.has_weights and device.served == at_first
    for k in range(2):
        told = agent.chat(f"What do you like best, {k}?", "d")
        agent.rate(told.id, None, "I like nothing better than old boats and the smell of tar.")
    received = 0.05 * torch.randn(device.context.shared_layout.width, generator=torch.Generator().manual_seed(0))
    with device.vault.open() as connection:
        write_adapter(connection, "newest", received, 1)  # as from a server
    assert agent.learn()["personal_examples"] and device.used()[1] == 1
    assert not device.has_weights and device.served != at_first
    learned, then = both(agent), device.served
    assert learned[0] == learned[1] != before[0]
    agent.go_back()
    assert device.served == at_first != then
    back = both(agent)
    assert back[0] == back[1] == before[0]


@contextmanager
def monitored() -> Iterator[list[str]]:
    """The models that are loaded meanwhile."""
    loads, load = list[str](), LanguageModel.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "load", lambda config: loads.append(config.name) or load(config))
        yield loads


def settings(**changes: Any) -> dict[str, Any]:
    told = new_config(ModelConfig(name="x.gguf")).model_dump(mode="json")
    for place, value in {"generation.backend": "llamacpp", **changes}.items():
        set_value(told, place, value)
    return told


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("device.model.name", "nano", r"needs a \.gguf file as device\.model\.name, not 'nano'"),
        ("chat.contrast", 0.5, r"has no contrast: set chat\.contrast to 0"),
        ("device.personal.adapter.kind", "ia3", r"knows LoRA alone, not device\.personal\.adapter\.kind = 'ia3'"),
    ],
)
def test_settings_that_llama_cpp_cannot_have_are_refused(place: str, value: object, told: str) -> None:
    assert AgentConfig.model_validate(settings()).generation.backend == "llamacpp"
    with pytest.raises(ValueError, match=told):
        AgentConfig.model_validate(settings(**{place: value}))


def test_where_the_extra_is_missing_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'florilegium\[llamacpp\]'"):
        llamacpp.check_llamacpp()
