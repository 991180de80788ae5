"""`florilegium server registrar`: who says which devices there are, where these add noise together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from florilegium.client.agent.cli import plain_errors

app = typer.Typer(
    no_args_is_help=True,
    help="The registrar of devices that add noise together: somebody else than the server, with a key of its own.",
)
console = Console(soft_wrap=True, markup=False)


@app.command()
def new(folder: Path) -> None:
    """Make FOLDER with a registrar's key; keep it away from every server."""
    from florilegium.simulation.deployment.registrar import new_registrar

    with plain_errors():
        public = new_registrar(folder.resolve())
    console.print(f"{folder}: the operator needs this for the terms: server init … --registrar {public}")


@app.command()
def sign(
    folder: Path,
    terms: Annotated[Path, typer.Argument(help="terms.toml of the federation.")],
    name: Annotated[str, typer.Argument(help="Under which the server's operator admits the device.")],
    identity: Annotated[str, typer.Argument(help="What `florilegium device identity` shows for these terms.")],
) -> None:
    """Make NAME.registration: a device is one, under this NAME, for these terms. Know whose it is before you sign."""
    from florilegium.client.agent.registration import write_registration
    from florilegium.client.agent.terms import read_terms
    from florilegium.simulation.deployment.registrar import register

    with plain_errors():
        agreed = read_terms(terms)
        made = register(folder.resolve(), agreed, name, identity)
        path = Path(f"{name}.registration").resolve()
        write_registration(path, made)
    console.print(f"{path}: for its owner: florilegium device join … --registration {path.name}")
