"""Writes a Llama model that lies as safetensors as one GGUF file: what llama.cpp needs to run it.

Matrices are float32, float16, in 8 bits (`Q8_0`) or in 4 (`Q4_1`, but for the embedding in 8); norms are float32. Rows
of queries and keys are in llama.cpp's order (`gguf_adapter`). Not covered: other architectures, scaled positions,
tokenizers other than byte-level BPE with GPT-2's or SmolLM's splitting, for which llama.cpp has converters of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import quantize
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from florilegium.client.lm.gguf_adapter import LLAMA, rotated
from florilegium.client.lm.hub import load
from florilegium.client.lm.places import ModelError

Kind = Literal["F32", "F16", "Q8_0", "Q4_1"]
CONTROL = ("bos", "eos", "unk", "pad")
EMBEDDING = "token_embd.weight"  # the head too, where both are one
OTHERWISE = "llama.cpp's convert_hf_to_gguf.py knows more of them"


def write_gguf(name: str, path: Path, kind: Kind = "F32", chat_template: str = "") -> None:
    """The model `name` as a GGUF file, whole or not at all. Raises `ModelError` for one that cannot be written."""
    model, tokenizer = load(name, dtype=torch.float32, device="cpu", chat_template=chat_template)
    config = model.config
    _check(config, name)
    writer = GGUFWriter(beside := path.with_name(f".{path.name}.new"), LLAMA)
    writer.add_type("model")
    writer.add_name(Path(name).name)
    _describe(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size, name)
    for tensor, weight in _tensors(model, config):
        matrix = weight.ndim == 2 and kind != "F32"
        bits = "Q8_0" if kind == "Q4_1" and tensor == EMBEDDING else kind
        coded = GGMLQuantizationType[bits if matrix else "F32"]
        writer.add_tensor(tensor, quantize(weight, coded) if matrix else weight, raw_dtype=coded)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _check(config: PretrainedConfig, name: str) -> None:
    rope: dict[str, Any] = config.rope_parameters
    if config.model_type != LLAMA or rope.get("rope_type", "default") != "default":
        what = f"of the type {config.model_type!r}, positions {rope.get('rope_type', 'default')!r}"
        raise ModelError(f"model {name!r} is {what}: plain Llama models alone are written as GGUF here; {OTHERWISE}")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ModelError(
            f"model {name!r} has heads of a size of their own: it is not written as GGUF here; {OTHERWISE}"
        )
    if config.attention_bias or config.mlp_bias:
        raise ModelError(f"model {name!r} has biases in its layers: it is not written as GGUF here; {OTHERWISE}")


def _describe(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: Any, config: PretrainedConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Weights by GGUF's names; a head that is the embedding is not there twice."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    for name, weight in model.named_parameters():  # shared ones once
        to = names.get_name(name, try_suffixes=(".weight",))
        assert to, name
        kind = to.partition("blk.")[2].partition(".")[2]
        yield to, (rotated(weight, heads[kind]) if kind in heads else weight).detach().contiguous().numpy()


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, name: str) -> None:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE" or state["normalizer"]:
        raise ModelError(f"model {name!r}: its tokenizer is no plain byte-level BPE; {OTHERWISE}")
    vocabulary = {i: token for token, i in tokenizer.get_vocab().items()}
    special = {t["id"]: t["special"] for t in state["added_tokens"]}
    types = {None: TokenType.NORMAL, True: TokenType.CONTROL, False: TokenType.USER_DEFINED}
    merges = (m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(state["pre_tokenizer"], name))
    writer.add_token_list([vocabulary.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([types[special.get(i)] if i in vocabulary else TokenType.UNUSED for i in range(size)])
    writer.add_token_merges(list(merges))
    for role in CONTROL:
        if (identity := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(identity)
    writer.add_add_bos_token(False)  # which is in the template where there is one
    writer.add_chat_template(tokenizer.get_chat_template())


def _splitting(told: dict[str, Any], name: str) -> str:
    """What llama.cpp calls the way in which a text is cut into words before it is made tokens."""
    parts = told["pretokenizers"] if told["type"] == "Sequence" else [told]
    digits, last = parts[:-1], parts[-1]
    if last["type"] == "ByteLevel" and last["use_regex"] and not last["add_prefix_space"]:
        if not digits:
            return "gpt-2"
        if [(d["type"], d.get("individual_digits")) for d in digits] == [("Digits", True)]:
            return "smollm"
    raise ModelError(f"model {name!r}: its tokenizer cuts texts in a way that is not known here; {OTHERWISE}")
