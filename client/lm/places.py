"""Where language models lie: the bundled `nano`, the cache, a folder, a GGUF file, or the Hugging Face hub.

Knows names and folders without any model library, so that a wrong name is told at once. A model of the hub that is in
the local cache is used as it is, so that the driver and its workers agree. Not covered: loading (`client.lm.hub`),
fetching `smollm2-135m` (`client.lm.pull`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata, resources
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from florilegium.privacy.common.errors import UserError, first_line
from florilegium.privacy.common.suggestions import did_you_mean

NAMES = ("nano", "smollm2-135m")
PULL = "florilegium models pull smollm2-135m"
SOURCE = "source.json"  # beside pulled weights
GGUF, GGUF_MAGIC = ".gguf", b"GGUF"
HUB_TIMEOUT_S = 5.0
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]  # nothing that holds a pickle
CARDS = ["README.md", "LICENSE*"]  # which are not loaded, but say what may be done with what is
HUB_SKIPPED = ["*/*", "consolidated*"]  # other formats of the same weights
FINGERPRINT_STRIDE_BYTES, FINGERPRINT_PART_BYTES = 1 << 24, 1 << 16


class ModelError(UserError):
    """A model is unknown, missing, or not one that a device can use; the message names the way out."""


def cache_folder() -> Path:
    """Where pulled models are kept: `FLORILEGIUM_CACHE`, else `florilegium` in the user's cache folder."""
    named = os.environ.get("FLORILEGIUM_CACHE")
    if named:
        return Path(named).expanduser()
    parent = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(parent) if parent else Path.home() / ".cache") / "florilegium"


def resolve(name: str) -> Path:
    """The folder, or the GGUF file, of the model `name`; one of the hub is downloaded if it is not in the cache."""
    if name == "nano":
        return nano_folder()
    if name == "smollm2-135m":
        folder = cache_folder() / name
        if not has_weights(folder):
            raise ModelError(f"model {name!r} is not in {cache_folder()}; fetch it once with: {PULL}")
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir() or is_gguf(folder):
        return folder
    if folder.suffix.lower() == GGUF:
        raise ModelError(f"model {name!r}: there is no such file; a GGUF file of the hub has to be fetched first")
    if name.count("/") == 1 and name[0] not in "./~" and not name.endswith("/"):
        return hub_folder(name)
    if "/" in name or os.sep in name:
        raise ModelError(f"model {name!r} is not a folder, a .gguf file, nor a hub id like owner/name")
    near = did_you_mean(name.lower(), NAMES, 0.4)
    hint = f"{near} " if near else ""
    raise ModelError(f"unknown model {name!r}; {hint}use {', '.join(NAMES)}, a folder, or a hub id like owner/name")


def is_gguf(path: Path) -> bool:
    """Whether a model is a file of that name."""
    return path.suffix.lower() == GGUF and path.is_file()


def check_model(name: str) -> None:
    """Raises `ModelError` where there is no such model, a folder does not hold whole weights, or a file is no GGUF."""
    check_weights(resolve(name), name)


def base_hash(name: str) -> str:
    """SHA-256 of a model's weights: what an adapter was trained on."""
    found, place = sha256(), resolve(name)
    for path in [place] if is_gguf(place) else sorted(place.glob("*.safetensors")):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds safetensors, in one file or in parts."""
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


@dataclass(frozen=True)
class Base:
    """What an exported adapter says of its base: what `from_pretrained` takes, and what must lie there for it."""

    name: str
    revision: str | None = None
    files: tuple[Path, ...] = ()  # of a model that nobody else has by a name


ADAPTERS, BASE_FOLDER = "adapters", "base"
BESIDE = f"./{ADAPTERS}/{BASE_FOLDER}"  # from the folder that holds both; with two slashes it is no id of the hub


def base_of(name: str) -> Base:
    """The base `name` as another machine finds it: the hub's id and revision, or a copy beside the adapters.

    A folder or a file of the user's stays its path, which holds on this machine alone.
    """
    if name in NAMES:
        folder = resolve(name)
        told = source(folder)
        if told.get("from") == "hub":
            return Base(told["id"], told["revision"])
        return Base(BESIDE, files=tuple(sorted(p for p in folder.iterdir() if p.is_file())))  # with its licence
    place = Path(name).expanduser()
    if place.is_dir() or is_gguf(place):
        return Base(str(place))
    return Base(name, resolve(name).name)  # .../snapshots/<revision>


def source(folder: Path) -> dict[str, str]:
    """Where a pulled model came from, as `client.lm.pull` noted it."""
    path = folder / SOURCE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def copy_base(base: Base, folder: Path) -> None:
    """Copies into the folder of the adapters what must lie beside them, if anything."""
    if base.files:
        (folder / BASE_FOLDER).mkdir(parents=True, exist_ok=True)
    for path in base.files:
        shutil.copyfile(path, folder / BASE_FOLDER / path.name)


def fingerprint(model: Path) -> str:
    """A hash of what is loaded of a folder or a file: of large files their sizes and a part in every 16 MB."""
    digest = sha256()
    loaded = [p for p in model.iterdir() if any(p.match(x) for x in HUB_FILES)] if model.is_dir() else [model]
    for path in sorted(loaded):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(0, size, FINGERPRINT_STRIDE_BYTES):
                file.seek(place)
                digest.update(file.read(FINGERPRINT_PART_BYTES if size > FINGERPRINT_STRIDE_BYTES else size))
    return digest.hexdigest()


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
    yield Path(str(resources.files("florilegium.client.lm") / "nano")).absolute()  # the working directory may change
    try:
        installed = metadata.distribution("florilegium")
    except metadata.PackageNotFoundError:
        return
    yield Path(str(installed.locate_file("client/lm/nano"))).absolute()
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
        wanted = [*HUB_FILES, *CARDS]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=HUB_SKIPPED)).absolute()
    except RepositoryNotFoundError as error:
        raise ModelError(f"model {name!r}: no such folder, and the hub shows you no such model; {way_out}") from error
    except Exception as error:  # whatever stops the client of the hub, the user's ways out are the same
        reason = first_line(error)
        raise ModelError(f"model {name!r}: no such folder, and the hub failed ({reason}); {way_out}") from error


def _offline() -> bool:
    """The hub's client reads the variables at import alone; here a later change counts too."""
    values = (os.environ.get(key, "") for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return constants.HF_HUB_OFFLINE or any(v.upper() in constants.ENV_VARS_TRUE_VALUES for v in values)


def _cached(name: str) -> Path | None:
    """The cached copy of a hub model, if it is complete."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True)).absolute()
        _check_whole(folder, name)
    except (OSError, ValueError, ModelError):
        return None
    return folder if any(folder.glob("tokenizer*")) else None


def check_weights(folder: Path, name: str) -> None:
    """Refuses anything through which transformers would read a pickle, another model, or half a model."""
    if is_gguf(folder):
        with folder.open("rb") as file:
            if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
                raise ModelError(f"model {name!r}: {folder} does not begin as a GGUF file does")
        return
    _check_whole(folder, name)
    _refuse_coded(folder, name)


def _check_whole(folder: Path, name: str) -> None:
    """Refuses a folder without all of the weights of one model as safetensors."""
    if (folder / "adapter_config.json").exists():  # transformers would fetch its base, and load adapter_model.bin
        raise ModelError(f"model {name!r}: {folder} holds an adapter; name the folder of a whole model")
    if not has_weights(folder):
        raise ModelError(
            f"model {name!r}: no model.safetensors in {folder}; other formats (.bin, .pt) are not read, "
            "write it with model.save_pretrained(folder); where there is a .gguf file, name that"
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


def _refuse_coded(folder: Path, name: str) -> None:
    """Raises `ModelError` where weights are codes of another library, whose layers adapters cannot change."""
    try:
        coded = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return  # which transformers will tell better
    if coded:
        how = coded.get("quant_method", "somehow") if isinstance(coded, dict) else coded
        raise ModelError(
            f"model {name!r}: the weights in {folder} are quantised already ({how}); "
            "take the folder with the float ones, or a .gguf file, and set [model] weights to 'int8' or 'int4'"
        )
