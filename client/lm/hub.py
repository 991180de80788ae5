"""Loads language models from where they lie (`client.lm.places`).

Only safetensors and GGUF are ever read, and no code that comes with a model is ever run. Not covered: fetching
`smollm2-135m` (see `client.lm.pull`), adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from florilegium.client.lm import gguf_file
from florilegium.client.lm.places import ModelError, check_weights, is_gguf, resolve
from florilegium.client.lm.quantised import Weights, quantise
from florilegium.client.lm.token_budget import return_freed_memory
from florilegium.privacy.common.errors import first_line

TEMPLATES = {
    # User:\n…\nAssistant:\n…<eos>\n. Texts stand on lines of their own, so that they become the same tokens whether
    # they are encoded alone or with what is before them; the eos teaches a base model where a reply ends.
    "plain": (
        "{% if bos_token %}{{ bos_token }}{% endif %}"
        "{% for message in messages %}{{ message['role'] | capitalize }}:{{ '\n' }}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{{ '\n' }}{% endif %}"
    )
}


def default_device() -> str:
    """What `device = "auto"` means here: cuda where torch sees a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(
    name: str, *, dtype: torch.dtype, device: str, chat_template: str = "", weights: Weights = "float"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model `name` in evaluation mode, and its tokenizer.

    `name` is `nano`, `smollm2-135m`, a local folder, a GGUF file or a hub id, in this order. `chat_template` replaces
    the tokenizer's own: "plain" or a Jinja template; `weights` is what the linear layers are held in. Afterwards the
    tokenizer has a chat template, an end-of-text and a padding token, and each of its ids has a row in the embedding.
    Raises `ModelError`.
    """
    _check_device(device)
    folder = resolve(name)
    check_weights(folder, name)
    load_both = _load_gguf if is_gguf(folder) else _load_folder
    tokenizer, model = load_both(folder, name, chat_template, dtype)
    embedding = torch.as_tensor(model.get_input_embeddings().weight)  # (V, H)
    rows, highest = len(embedding), max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(f"model {name!r}: token id {highest} has no row in an embedding of {rows}; wrong tokenizer?")
    model.config.pad_token_id = tokenizer.pad_token_id
    if weights != "float":
        quantise(model, weights)  # before a device has to hold it
        return_freed_memory()
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers' wrapper hides its signature
    model.eval()
    return model.requires_grad_(False), tokenizer


# -- loading ------------------------------------------------------------------------------------------------------


def _check_device(device: str) -> None:
    way_out = "set [model] device to auto, cpu, cuda or cuda:1"
    try:
        wanted, seen = torch.device(device), torch.cuda.device_count()
    except RuntimeError as error:
        raise ModelError(f"device = {device!r} is not a device of torch; {way_out}") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= seen:
        raise ModelError(f"device = {device!r}, but torch sees {seen} GPUs; {way_out}")


def _load_folder(
    folder: Path, name: str, chat_template: str, dtype: torch.dtype
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    where = {"pretrained_model_name_or_path": str(folder)}
    tokenizer = _load_tokenizer(where, folder, name)
    _complete(tokenizer, f"eos_token in {folder}/tokenizer_config.json", name, chat_template)
    return tokenizer, _load_model(where, folder, name, dtype)


def _load_gguf(
    path: Path, name: str, chat_template: str, dtype: torch.dtype
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """What a file holds, its weights made floats of `dtype`."""
    reader = gguf_file.read(path, name)
    with gguf_file.alone(path) as where, redirect_stderr(StringIO()):  # where a progress bar goes
        tokenizer = gguf_file.with_its_tokens(_load_tokenizer(where, path, name), reader)
        _complete(tokenizer, f"tokenizer.ggml.eos_token_id in {path}", name, chat_template)
        model = _load_model(where, path, name, dtype)
    gguf_file.check_all_taken(reader, model, name)
    return tokenizer, model


def _load_tokenizer(where: Mapping[str, str], folder: Path, name: str) -> PreTrainedTokenizerBase:
    if package := _lacking(folder):  # without which transformers fails, or makes a tokenizer of something else
        raise ModelError(
            f"model {name!r}: no usable tokenizer in {folder} (tokenizer.model alone needs a package: pip install "
            f"{package}); write it with tokenizer.save_pretrained(folder), as tokenizer.json"
        )
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                **where, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # the kinds of failure are those of many tokenizer libraries
        raise ModelError(
            f"model {name!r}: no usable tokenizer in {folder} ({_reason(error)}); "
            "write it with tokenizer.save_pretrained(folder), as tokenizer.json"
        ) from error
    return tokenizer


def _complete(tokenizer: PreTrainedTokenizerBase, eos_setting: str, name: str, chat_template: str) -> None:
    """Gives it a token to pad with and a chat template; raises `ModelError` where it lacks what nothing replaces."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model {name!r}: its tokenizer has no end-of-text token, so that replies would not end and there is "
            f"nothing to pad with; set {eos_setting}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: padding is masked everywhere
    _set_template(tokenizer, name, chat_template)


def _reason(error: Exception) -> str:
    """What stopped transformers, without its advice to run the code of strangers."""
    if "custom code" in str(error):
        return (
            "it needs code that comes with it, which is never run here; take a model of an architecture that "
            "transformers has itself"
        )
    return first_line(error)


def _lacking(folder: Path) -> str:
    """The package that reads a tokenizer.model, if it is all there is and the package is not; transformers guesses."""
    file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not file.is_file():
        return ""
    with file.open("rb") as opened:
        package = "sentencepiece" if opened.read(1) == b"\n" else "tiktoken"  # a protobuf's first field, or base64
    return "" if find_spec(package) else package


def _set_template(tokenizer: PreTrainedTokenizerBase, name: str, chat_template: str) -> None:
    way_out = "set [model] chat_template to 'plain' or to a Jinja template"
    if chat_template:
        if chat_template not in TEMPLATES and "{" not in chat_template:
            raise ModelError(f"chat_template = {chat_template!r} is neither; {way_out}")
        tokenizer.chat_template = TEMPLATES.get(chat_template, chat_template)
    if not tokenizer.chat_template:
        raise ModelError(f"model {name!r}: its tokenizer has no chat template; {way_out}")
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], tokenize=False
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise ModelError(f"model {name!r}: its chat template fails ({first_line(error)}); {way_out}") from error


def _load_model(where: Mapping[str, str], folder: Path, name: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **where,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # torn files, wrong shapes, unknown architectures: each library has its own kind
        raise ModelError(f"model {name!r}: {folder} cannot be loaded ({_reason(error)})") from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:  # transformers would go on with random numbers
        raise ModelError(f"model {name!r}: {folder} lacks {len(missing)} weights, {missing[0]} among them")
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Loading without transformers' progress bars and reports; they are as they were afterwards."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
