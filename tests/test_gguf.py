"""A model in one GGUF file, written by the tests: what is loaded, learned and exported, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm import hub, places
from florilegium.client.lm.config import AdapterConfig, ModelConfig, SamplingConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.peft_format import write_peft
from florilegium.client.lm.places import Base, ModelError
from florilegium.client.lm.training_data import TrainingSet
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.experiment import run_experiment

HEADS, GROUPS, LAYERS, WIDTH, INNER, VOCABULARY = 4, 2, 2, 32, 64, 280
END, PAD = "<|end|>", "<|pad|>"
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
SPECIAL = [PAD, END, "<|user|>", "<|assistant|>"]
TALKS = [Dialogue(str(k), f"what about {w}?", f"i like {w}") for k, w in enumerate(["rain", "the sea", "jazz"])]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
Change = Callable[[GGUFWriter], None]


def backend() -> Tokenizer:
    """A byte-level BPE."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["what about the rain, the sea and jazz that i like"] * 3, trainer)
    return bpe


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            rms_norm_eps=1e-5,
            initializer_range=0.2,
        )
    ).eval()


def tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """By GGUF's names, with the rows of queries and keys in the order of llama.cpp's rotation."""
    found = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for i in range(LAYERS):
        for ours, theirs in NAMES.items():
            weight = model.get_parameter(f"model.layers.{i}.{ours}.weight")
            heads = {"attn_q": HEADS, "attn_k": GROUPS}.get(theirs)
            if heads:
                weight = weight.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(weight.shape)
            found[f"blk.{i}.{theirs}.weight"] = weight
    return {name: weight.detach().numpy() for name, weight in found.items()}


def write(path: Path, kind: str = "F16", architecture: str = "llama", change: Change = lambda writer: None) -> Path:
    """A tiny Llama, its matrices as `kind` says; `change` may add to it."""
    writer, bpe = GGUFWriter(path, architecture), json.loads(backend().to_str())["model"]
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3 if i < len(SPECIAL) else 1 for i in range(VOCABULARY)])  # control tokens, words
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)  # without one, transformers 5.8 fails
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    for name, weight in tensors(llama()).items():
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            coded = GGMLQuantizationType[kind]
            writer.add_tensor(name, quants.quantize(weight, coded), raw_dtype=coded)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a folder with another model's tokenizer and template, which are not its own."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<wrong>", "chat_template": "wrong"}')
    (folder / "chat_template.jinja").write_text("wrong")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    other = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    (folder / "tokenizer.json").write_text(other.to_str())
    return write(folder / "tiny.gguf")


@pytest.fixture(scope="module")
def lm(half: Path) -> LanguageModel:
    return LanguageModel.load(ModelConfig(name=str(half), dtype="float32", device="cpu"))


def rounded(weight: np.ndarray, kind: str) -> np.ndarray:
    """To the 11 bits of float16, or to the 8 of blocks of 32 numbers of a row."""
    if weight.ndim == 1:
        return weight
    coded = GGMLQuantizationType[kind]
    return quants.dequantize(quants.quantize(weight, coded), coded)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_the_logits_are_those_of_the_model_that_was_written(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "tiny.gguf", kind)
    model, tokenizer = hub.load(str(path), dtype=torch.float32, device="cpu")
    expected = llama()
    for weight in expected.parameters():
        weight.data = torch.from_numpy(rounded(weight.detach().numpy(), kind))
    ids = torch.arange(4, 30)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == (END, PAD, TEMPLATE)
    assert tokenizer("what about jazz")["input_ids"] == backend().encode("what about jazz").ids
    assert "dequantizing" not in capfd.readouterr().err.replace("-", "")


def test_it_learns_and_its_adapter_is_one_of_plain_peft(lm: LanguageModel, half: Path, tmp_path: Path) -> None:
    layout = lm.lora_layout(AdapterConfig(rank=2, alpha=4))
    work = TrainingSet(lm.format.dialogues(TALKS), [[0, 1, 2]] * 2)
    start = lm.adapters(layout, layout.start(0))
    trained = lm.engine.finetune(start, [], [work], [[1e-2, 1e-2]]).adapters
    assert places.base_of(str(half)) == Base(str(half))
    write_peft(tmp_path, layout, trained.rows[0], places.base_of(str(half)))
    base = AutoModelForCausalLM.from_pretrained(half.parent, gguf_file=half.name, dtype="float32").eval()
    plain = PeftModel.from_pretrained(base, str(tmp_path))
    scores = lm.score(work.examples, [0] * 3, [trained])
    for example, score, before in zip(work.examples, scores, lm.score(work.examples, [0] * 3, [start]), strict=True):
        ids = torch.tensor([example.prompt + example.reply])
        with torch.inference_mode():
            logits = plain(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
        theirs = torch.nn.functional.cross_entropy(logits, ids[0, len(example.prompt) :], reduction="sum")
        assert score.nll == pytest.approx(theirs.item(), abs=1e-3)
        assert score.nll < before.nll - 1e-2


def test_control_tokens_of_the_file_are_control_tokens(lm: LanguageModel) -> None:
    (asked,) = lm.format.prompts(["the <|end|> of rain"])
    assert asked.prompt[0] == 2 and asked.prompt[-1] == 3 and asked.prompt.count(1) == 1 and lm.format.stop == (1,)
    assert isinstance(lm.generate(["jazz?"], [0], [], SamplingConfig(max_new_tokens=4), [0])[0], str)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_its_floats_are_put_into_bits_again(half: Path, lm: LanguageModel, weights: str) -> None:
    coded = LanguageModel.load(ModelConfig(name=str(half), dtype="float32", device="cpu", weights=weights))
    assert coded.parameters == lm.parameters and coded.parameter_bytes < lm.parameter_bytes


def test_a_run_with_it_goes_from_end_to_end(half: Path, small: ExperimentConfig, tmp_path: Path) -> None:
    model = small.model.model_copy(update={"name": str(half), "targets": ("q_proj", "v_proj")})
    result = run_experiment(small.model_copy(update={"model": model, "rounds": 1}), tmp_path / "run")
    config = json.loads(next((tmp_path / "run" / "adapters").rglob("adapter_config.json")).read_text())
    assert config["base_model_name_or_path"] == str(half)
    assert result is not None


def test_a_changed_file_is_another_model(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    before = places.fingerprint(path), places.base_hash(str(path))
    write(path, "Q8_0")
    after = places.fingerprint(path), places.base_hash(str(path))
    assert before[0] != after[0] and before[1] != after[1]


# -- what is refused ------------------------------------------------------------------------------------------------


def load(path: Path) -> None:
    hub.load(str(path), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_a_torn_file_is_refused(half: Path, tmp_path: Path, share: float) -> None:
    whole = half.read_bytes()
    (tmp_path / "torn.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelError, match=r"torn\.gguf is no whole GGUF file .*fetch it again"):
        load(tmp_path / "torn.gguf")


def test_a_file_of_another_kind_is_told_before_a_model_library_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="does not begin as a GGUF file does"):
        places.check_model(str(tmp_path / "x.gguf"))
    with pytest.raises(ModelError, match=r"no such file; a GGUF file of the hub has to be fetched first"):
        places.check_model("owner/name.gguf")


def test_an_architecture_that_transformers_does_not_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"architecture 'granite', which transformers does not read .*llama, .*qwen3"):
        load(write(tmp_path / "tiny.gguf", architecture="granite"))


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is one of 3 parts; join them with llama-gguf-split --merge"):
        load(write(tmp_path / "tiny.gguf", change=lambda w: w.add_uint16("split.count", 3)))


def test_weights_that_transformers_would_leave_out_are_counted(tmp_path: Path) -> None:
    bias = np.ones(WIDTH, np.float32)
    with pytest.raises(ModelError, match=r"holds 36,544 numbers, .*LlamaForCausalLM of 36,512"):
        load(write(tmp_path / "tiny.gguf", change=lambda w: w.add_tensor("blk.0.attn_q.bias", bias)))


def test_frequencies_that_transformers_leaves_out_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path / "tiny.gguf", change=lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32))))
    assert "transformers does not read rope_freqs.weight" in caplog.text


def test_a_file_without_an_end_of_text_or_a_template_is_refused(tmp_path: Path) -> None:
    def without(key: str) -> Change:
        return lambda writer: writer.kv_data[0].pop(key) and None

    with pytest.raises(ModelError, match="no chat template"):
        load(write(tmp_path / "a.gguf", change=without("tokenizer.chat_template")))
    with pytest.raises(ModelError, match=r"no end-of-text token.*b\.gguf"):
        load(write(tmp_path / "b.gguf", change=without("tokenizer.ggml.eos_token_id")))
