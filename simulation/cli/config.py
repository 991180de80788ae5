"""`florilegium config`: the settings of a file in full, what one of them is, and a schema of all for editors."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from florilegium.simulation.cli.completion import complete_config, complete_place, complete_setting

app = typer.Typer(no_args_is_help=True, help="Settings: those of a file in full, what each is, a schema for editors.")
Kind = Literal["run", "study", "rivals", "methods", "lives", "pretrain", "classes", "server", "device"]
OfKind = Annotated[Kind | None, typer.Option("--kind", help="What the file is for; not given: what its settings say.")]


@app.command("show")
def show_config(
    config: Annotated[str, typer.Argument(autocompletion=complete_config)],
    overrides: Annotated[list[str] | None, typer.Argument(autocompletion=complete_setting)] = None,
    kind: OfKind = None,
) -> None:
    """Print all settings of a file, those that it leaves out too, as TOML that loads again.

    CONFIG is a TOML file, the name of a bundled config or the folder of a run; OVERRIDES are as in florilegium run:

    florilegium config show quickstart privacy.epsilon=4

    florilegium config show configs/pretrain/nano.toml
    """
    from florilegium.simulation.cli.resolved import resolved

    typer.echo(resolved(config, overrides or [], kind or ""), nl=False)


@app.command("describe")
def describe_setting(
    name: Annotated[str, typer.Argument(autocompletion=complete_place)] = "", kind: OfKind = None
) -> None:
    """Say of a setting its type, default, bounds or choices, and what it does; of a section what it has.

    NAME is as in an override: florilegium config describe selection.policy
    """
    from florilegium.simulation.cli.known_settings import described, find_setting

    typer.echo(described(find_setting(name, kind or "")))


@app.command("schema")
def print_schema(kind: OfKind = "run") -> None:
    """Print a JSON Schema of a kind of file, for editors that check and complete TOML:

    florilegium config schema > florilegium.schema.json

    with "#:schema florilegium.schema.json" as the first line of a config beside it.
    """
    from florilegium.simulation.cli.known_settings import KINDS, json_schema

    typer.echo(json.dumps(json_schema(KINDS[kind or "run"]), indent=1, ensure_ascii=False))
