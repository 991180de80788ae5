"""Writes SmolLM2-135M-Instruct, as it was fetched (`client.lm.pull`), as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from florilegium.client.lm.hub import quiet
from florilegium.client.lm.places import ModelError

PARAMETERS = 134_515_008
# 269 MB instead of 538, and no magnitude above 10. Float16 rounds to 11 bits, which the 8 bits of the hub's
# bfloat16 fit into, and next to which the steps of a 4-bit file are a hundred times as wide.
STORED_DTYPE = torch.float16


def convert(folder: Path, out: Path, gguf_file: str | None) -> None:
    """Writes the model of `folder` to `out` as float16 safetensors without any trace of quantisation."""
    where: dict[str, Any] = {"gguf_file": gguf_file, "local_files_only": True, "trust_remote_code": False}
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **where)
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=STORED_DTYPE, use_safetensors=True, **where)
        plain = _plain(model)
        check(plain, tokenizer)
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that transformers does not take for a quantised one, which it will not save."""
    settings = model.config.to_dict()
    for of_the_file in ("quantization_config", "_model_name_or_path"):
        settings.pop(of_the_file, None)
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=STORED_DTYPE)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a conversion that lost what a chat needs, however it came about."""
    size = sum(p.numel() for p in model.parameters())
    facts = (size, bool(model.config.tie_word_embeddings), str(tokenizer.eos_token), bool(tokenizer.chat_template))
    expected = (PARAMETERS, True, "<|im_end|>", True)
    if facts != expected:
        raise ModelError(f"smollm2-135m: parameters, tied embeddings, eos, template = {facts}, expected {expected}")
