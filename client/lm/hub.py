"""Where language models come from: the bundled `nano`, the cache, a folder, or the Hugging Face hub.

Only safetensors are ever read, and no code that comes with a model is ever run. A model of the hub that is in
the local cache is used as it is, so that the driver and its workers agree. Not covered: fetching
`smollm2-135m` (see `client.lm.pull`), quantised weights, adapters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from privacy.errors import UserError

NAMES = ("nano", "smollm2-135m")
PULL = "florilegium models pull smollm2-135m"
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
HUB_TIMEOUT_S = 5.0
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]  # nothing that holds a pickle
HUB_SKIPPED = ["*/*", "consolidated*"]  # other formats of the same weights


class ModelError(UserError):
    """A model is unknown, missing, or not one that a device can use; the message names the way out."""


def default_device() -> str:
    """What `device = "auto"` means here: cuda where torch sees a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def multiplies_bfloat16(device: str) -> bool:
    """Whether `device` has instructions for bfloat16 matrices, so that they are faster than float32 ones."""
    if device != "cpu":
        return True
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private in torch: may be missing
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def cache_folder() -> Path:
    """Where pulled models are kept: `FLORILEGIUM_CACHE`, else `florilegium` in the user's cache folder."""
    named = os.environ.get("FLORILEGIUM_CACHE")
    if named:
        return Path(named).expanduser()
    parent = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(parent) if parent else Path.home() / ".cache") / "florilegium"


def load(
    name: str, *, dtype: torch.dtype, device: str, chat_template: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model `name` in evaluation mode, and its tokenizer.

    `name` is `nano`, `smollm2-135m`, a local folder or a hub id, in this order. `chat_template` replaces the
    tokenizer's own: "plain" or a Jinja template. Afterwards the tokenizer has a chat template, an end-of-text
    and a padding token, and each of its ids has a row in the embedding. Raises `ModelError`.
    """
    _check_device(device)
    folder = resolve(name)
    _check_weights(folder, name)
    tokenizer = _load_tokenizer(folder, name, chat_template)
    model = _load_model(folder, name, dtype)
    embedding = torch.as_tensor(model.get_input_embeddings().weight)  # (V, H)
    rows, highest = len(embedding), max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(f"model {name!r}: token id {highest} has no row in an embedding of {rows}; wrong tokenizer?")
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers' wrapper hides its signature
    model.eval()
    return model.requires_grad_(False), tokenizer


def resolve(name: str) -> Path:
    """The folder of the model `name`; a model of the hub is downloaded if it is not in the cache."""
    if name == "nano":
        return nano_folder()
    if name == "smollm2-135m":
        folder = cache_folder() / name
        if not has_weights(folder):
            raise ModelError(f"model {name!r} is not in {cache_folder()}; fetch it once with: {PULL}")
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") == 1 and name[0] not in "./~" and not name.endswith("/"):
        return hub_folder(name)
    if "/" in name or os.sep in name:
        raise ModelError(f"model {name!r} is not a folder, nor a hub id like owner/name")
    near = get_close_matches(name.lower(), NAMES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ModelError(f"unknown model {name!r}; {hint}use {', '.join(NAMES)}, a folder, or a hub id like owner/name")


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds safetensors, in one file or in parts."""
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


# -- nano ---------------------------------------------------------------------------------------------------------


def nano_folder() -> Path:
    """The folder with nano's weights: beside this code, else in the installed distribution."""
    for folder in _nano_candidates():
        if has_weights(folder):
            return folder
    raise ModelError(
        "model 'nano': neither this package nor an installed florilegium has its weights; "
        "pip install florilegium, or florilegium models pretrain configs/pretrain/nano.toml"
    )


def _nano_candidates() -> Iterator[Path]:
    yield Path(str(resources.files("client.lm") / "nano"))
    try:
        installed = metadata.distribution("florilegium")
    except metadata.PackageNotFoundError:
        return
    yield Path(str(installed.locate_file("client/lm/nano")))
    origin = json.loads(installed.read_text("direct_url.json") or "{}")  # an editable install points at its sources
    url = urlsplit(origin.get("url", ""))
    if url.scheme == "file":
        yield Path(url2pathname(unquote(url.path))) / "client/lm/nano"


# -- the hub ------------------------------------------------------------------------------------------------------


def hub_folder(name: str) -> Path:
    """The local copy of the hub's model `name`, downloaded if need be. Without a network it fails within seconds."""
    cached = _cached(name)
    if cached is not None:
        return cached
    way_out = f"use a local folder, nano, or smollm2-135m ({PULL})"
    if _offline():
        raise ModelError(f"model {name!r} is not in the local cache and HF_HUB_OFFLINE is set; {way_out}")
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)  # asks once; the download would ask again for a minute
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIPPED))
    except RepositoryNotFoundError as error:
        raise ModelError(f"model {name!r}: no such folder, and the hub shows you no such model; {way_out}") from error
    except Exception as error:  # whatever stops the client of the hub, the user's ways out are the same
        reason = _first_line(error)
        raise ModelError(f"model {name!r}: no such folder, and the hub failed ({reason}); {way_out}") from error


def _offline() -> bool:
    """The hub's client reads the variables at import alone; here a later change counts too."""
    values = (os.environ.get(key, "") for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return constants.HF_HUB_OFFLINE or any(v.upper() in constants.ENV_VARS_TRUE_VALUES for v in values)


def _cached(name: str) -> Path | None:
    """The cached copy of a hub model, if it is complete."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        _check_weights(folder, name)
    except (OSError, ValueError, ModelError):
        return None
    return folder if any(folder.glob("tokenizer*")) else None


# -- loading ------------------------------------------------------------------------------------------------------


def _check_device(device: str) -> None:
    way_out = "set [model] device to auto, cpu, cuda or cuda:1"
    try:
        wanted, seen = torch.device(device), torch.cuda.device_count()
    except RuntimeError as error:
        raise ModelError(f"device = {device!r} is not a device of torch; {way_out}") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= seen:
        raise ModelError(f"device = {device!r}, but torch sees {seen} GPUs; {way_out}")


def _check_weights(folder: Path, name: str) -> None:
    """Refuses anything through which transformers would read a pickle, another model, or half a model."""
    if (folder / "adapter_config.json").exists():  # transformers would fetch its base, and load adapter_model.bin
        raise ModelError(f"model {name!r}: {folder} holds an adapter; name the folder of a whole model")
    if not has_weights(folder):
        raise ModelError(
            f"model {name!r}: no model.safetensors in {folder}; other formats (.bin, .pt, .gguf) are not read, "
            "write it with model.save_pretrained(folder)"
        )
    if (folder / "model.safetensors").is_file():
        return
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        parts = sorted({str(part) for part in index["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"model {name!r}: {folder}/model.safetensors.index.json is malformed") from error
    for part in parts:
        if Path(part).name != part or not part.endswith(".safetensors") or not (folder / part).is_file():
            raise ModelError(f"model {name!r}: its index names {part!r}, which is not a .safetensors file in {folder}")


def _load_tokenizer(folder: Path, name: str, chat_template: str) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # the kinds of failure are those of many tokenizer libraries
        package = _lacking(folder)
        reason = f"tokenizer.model alone needs a package: pip install {package}" if package else _first_line(error)
        raise ModelError(
            f"model {name!r}: no usable tokenizer in {folder} ({reason}); "
            "write it with tokenizer.save_pretrained(folder), as tokenizer.json"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model {name!r}: its tokenizer has no end-of-text token, so that replies would not end and there is "
            f"nothing to pad with; set eos_token in {folder}/tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: padding is masked everywhere
    _set_template(tokenizer, name, chat_template)
    return tokenizer


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
        raise ModelError(f"model {name!r}: its chat template fails ({_first_line(error)}); {way_out}") from error


def _load_model(folder: Path, name: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # torn files, wrong shapes, unknown architectures: each library has its own kind
        raise ModelError(f"model {name!r}: {folder} cannot be loaded ({_first_line(error)})") from error
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


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
