"""`florilegium server`: a server for real devices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from florilegium.client.agent.cli import plain_errors
from florilegium.client.agent.errors import DeviceError
from florilegium.simulation.cli import registrar as registrar_commands

if TYPE_CHECKING:
    from florilegium.client.agent.invitation import Invitation

app = typer.Typer(no_args_is_help=True, help="A server for real devices: terms, certificates, who may join, rounds.")
app.add_typer(registrar_commands.app, name="registrar")
console = Console(soft_wrap=True, markup=False)


@app.callback()
def private() -> None:
    """A server for real devices: terms, certificates, who may join, rounds."""
    os.umask(0o077)  # keys, and who takes part, are the operator's alone


@app.command()
def init(
    folder: Path,
    name: Annotated[str, typer.Option(help="Of the federation.")],
    host: Annotated[list[str], typer.Option(help="Names and addresses that devices know the server by.")],
    model: str = "nano",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    min_devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Releases below which a round is not aggregated, or begun; usually 1, in *-distributed the survivors.",
        ),
    ] = None,
    patience_s: Annotated[float, typer.Option(min=1, help="For the answers of a round.")] = 600.0,
    least_epsilon: Annotated[float, typer.Option(min=0.01, help="Of devices: it bounds the norm of a release.")] = 4.0,
    mode: Annotated[
        Literal["example-local", "user-local", "example-distributed", "user-distributed"],
        typer.Option(help="Of devices, as privacy.mode: for the norm as well."),
    ] = "example-local",
    registrar: Annotated[
        str | None, typer.Option(help="*-distributed: whose key it is that says which devices there are.")
    ] = None,
    devices: Annotated[int | None, typer.Option(help="*-distributed: in one sum at most, of 128.")] = None,
    survivors: Annotated[int | None, typer.Option(help="*-distributed: below which no sum is unmasked.")] = None,
    colluding: Annotated[int | None, typer.Option(help="*-distributed: whose noise counts for nothing.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="*-distributed: of all rounds; usually 8.")] = None,
    delta: Annotated[float | None, typer.Option(help="*-distributed: usually 1e-5.")] = None,
    clip_norm_l2: Annotated[float | None, typer.Option(help="*-distributed: as privacy.clip_norm_l2; 1.")] = None,
    bits: Annotated[int | None, typer.Option(help="*-distributed: of a number; usually the fewest.")] = None,
    rule: Annotated[str, typer.Option(help="mean, trimmed-mean, krum, or package.module:NAME.")] = "mean",
    trimmed_share: Annotated[float, typer.Option(help="Of the releases, left out at both ends by trimmed-mean.")] = 0.1,
    byzantine: Annotated[int, typer.Option(help="Releases of a round that may be false, for krum.")] = 0,
    krum_keep: Annotated[int, typer.Option(help="Releases that krum averages.")] = 1,
) -> None:
    """Make FOLDER with the terms of a federation, the certificates of its server and the key of its operator.

    Devices' owners need FOLDER/terms.toml and FOLDER/ca.pem; `server admit` lets their devices in.
    """
    from secrets import randbits

    from florilegium.client.agent.acceptance import check_settings
    from florilegium.client.agent.terms import Terms
    from florilegium.client.lm.places import base_hash
    from florilegium.server.config import ServerConfig
    from florilegium.simulation.deployment.certificates import check_new
    from florilegium.simulation.deployment.settings import check_rule
    from florilegium.simulation.settings import validate

    folder = folder.resolve()
    of_sums = {
        "registrar": registrar, "devices": devices, "survivors": survivors, "colluding": colluding,
        "epsilon": epsilon, "delta": delta, "clip_norm_l2": clip_norm_l2, "bits": bits,
    }  # fmt: skip
    sums = _sums(mode, {name: value for name, value in of_sums.items() if value is not None})
    with plain_errors():
        of_rule = {"rule": rule, "trimmed_share": trimmed_share, "byzantine": byzantine, "krum_keep": krum_keep}
        settings = validate(ServerConfig, of_rule, "server init")
        told = {
            "name": name, "model": model, "base": base_hash(model), "rounds": rounds, "seed": randbits(48),
            "min_devices": min_devices or survivors or 1, "patience_s": patience_s,
        }  # fmt: skip
        terms = validate(Terms, told, "server init")
        check_settings(terms.shared, terms.rounds)
        check_rule(settings, terms)
        check_new(folder, host)

        from florilegium.simulation.deployment.rounds import (
            make_folder,  # and with it torch, now that little is left to refuse
        )

        made = make_folder(folder, terms, settings, least_epsilon, host, mode, sums)
    console.print(
        f"{folder}: give terms.toml and ca.pem to the devices' owners, and let in who sends you a node.pub: "
        f"florilegium server admit {folder} NAME node.pub"
    )
    if made.distributed:
        console.print(
            f"a sum is of {made.distributed.survivors} devices at least, which {made.distributed.registrar} has "
            f"registered: florilegium server registrar sign; noise multiplier {made.distributed.noise_multiplier:.3g}"
        )
        return
    console.print(f"a release longer than {made.largest_norm_l2:.3g} is refused: that of a device in {mode} with ε "
                  f"below {least_epsilon:g}, or of one that does not keep to what is agreed")  # fmt: skip


def _sums(mode: str, given: dict[str, object]) -> dict[str, object] | None:
    """What devices fix that add noise together; None where each adds its own."""
    if not mode.endswith("-distributed"):
        if given:
            raise typer.BadParameter(f"--{next(iter(given)).replace('_', '-')} is for --mode *-distributed, not {mode}")
        return None
    for name in ("registrar", "devices", "survivors"):
        if name not in given:
            raise typer.BadParameter(f"--{name} is needed for --mode {mode}")
    return {"epsilon": 8.0, "delta": 1e-5, "clip_norm_l2": 1.0, "mode": mode, **given}


@app.command()
def start(
    folder: Path,
    host: Annotated[str, typer.Option(help="To listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 9092,
    status_port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Of the operator's page and metrics, on 127.0.0.1; 0: any that is free."),
    ] = 0,
) -> None:
    """Run the rounds of FOLDER's terms with the devices that were admitted. Goes on where it was stopped.

    What is listened to is what a registered device asks, and nothing else: there is nothing on this port that starts,
    shows or stops anything.
    """
    from florilegium.client.agent.terms import read_terms
    from florilegium.simulation.deployment.certificates import TERMS, check_folder
    from florilegium.simulation.deployment.settings import check_rule, read_settings

    folder = folder.resolve()
    with plain_errors(), _stoppable(f"stopped; florilegium server start {folder} goes on"):
        check_folder(folder)
        terms = read_terms(folder / TERMS)
        check_rule(read_settings(folder), terms)

        from florilegium.simulation.deployment.rounds import (
            all_done,
            layout_of,
            run_rounds,
            serving,
        )  # and with it torch and flwr

        if not all_done(folder):
            layout = layout_of(terms)
            with serving(folder, host, port, layout, console.print, status_port) as link:
                console.print(
                    f"{len(link.nodes)} devices may connect to {host}:{port}; a round begins when {terms.min_devices} "
                    f"are there; florilegium server page {folder} shows how it goes"
                )
                run_rounds(folder, link, layout, console.print)
    console.print(f"all rounds are done: {folder / 'server'}")


@app.command()
def admit(
    folder: Path,
    name: str,
    key: Annotated[str, typer.Argument(help="A device's courier/node.pub, or its text in quotes.")],
) -> None:
    """Let a device in, under this NAME from now on; a server that runs does so at once."""
    with _registering(folder) as register:
        register.admit(folder.resolve(), name, key)
        console.print(f"{name} may connect")


@app.command()
def invite(
    folder: Path,
    name: str,
    server: Annotated[str, typer.Option(help="host:port as the device reaches it.")],
    qr: Annotated[bool, typer.Option("--qr", help="As a QR code too: here, and in NAME.png.")] = False,
) -> None:
    """Make NAME.invitation, the one file that a device needs to join under this NAME; it works once."""
    from florilegium.client.agent.invitation import write_invitation

    with _registering(folder) as register:
        path = Path(f"{name}.invitation").resolve()
        made = register.invite(folder.resolve(), name, server)
        write_invitation(path, made)
        console.print(f"{path}: for {name} alone; florilegium device join {path.name}")
        if qr:
            _draw(made, path.with_suffix(".png"))


def _draw(invitation: Invitation, path: Path) -> None:
    """The code of an invitation as a picture, in place of an older one, and on a terminal that is wide enough."""
    from florilegium.client.agent.folder import write_private
    from florilegium.simulation.deployment.qr_code import code_of, columns, lines_of, picture_of

    code = code_of(invitation)
    path.unlink(missing_ok=True)
    write_private(path, picture_of(code))
    if not console.is_terminal or console.width >= columns(code):
        console.print(lines_of(code), style="bright_white on black")
    else:
        console.print(f"this terminal has {console.width} columns of the {columns(code)} that the code takes")
    console.print(f"{path}: the same; whose reader has the text of it: florilegium device join -")


@app.command()
def expel(folder: Path, name: str) -> None:
    """Let a device in no more; a server that runs ends its connection at once."""
    with _registering(folder) as register:
        register.expel(folder.resolve(), name)
        console.print(f"{name} may not connect any more; what it has sent stays in what was made of it")


@app.command()
def page(folder: Path) -> None:
    """The address of the page of the server that runs on FOLDER, with the token that opens it: keep it to yourself."""
    from florilegium.simulation.deployment.certificates import STATUS_LINK, check_folder

    with plain_errors():
        check_folder(folder.resolve())
        try:
            console.print((folder / STATUS_LINK).read_text(encoding="utf-8").strip())
        except FileNotFoundError:
            raise DeviceError(f"no server runs on {folder}: florilegium server start {folder}") from None


@app.command("list")
def list_devices(folder: Path) -> None:
    """Who may connect: names, and the beginning of the SHA-256 of their keys."""
    with _registering(folder) as register:
        table = Table("device", "key")
        for name, key in register.admitted(folder.resolve()).items():
            table.add_row(name, register.fingerprint(key))
        console.print(table)


@contextmanager
def _registering(folder: Path) -> Iterator[ModuleType]:
    """What changes who may join; where there is no server's folder it is told before anything is loaded."""
    from florilegium.simulation.deployment.certificates import check_folder

    with plain_errors():
        check_folder(folder.resolve())

        from florilegium.simulation.deployment import register  # and with it flwr

        yield register


@contextmanager
def _stoppable(text: str) -> Iterator[None]:
    """Ctrl-C or `kill` ends what is being done in here, once; what was stored is whole."""
    from florilegium.simulation.runs.stopping import Stopped, stoppable

    try:
        with stoppable():
            yield
    except Stopped as stopped:
        console.print(text)
        raise typer.Exit(stopped.exit_code) from None
