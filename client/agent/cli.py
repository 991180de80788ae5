"""`florilegium device`: a real device in its owner's hands."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.folder import USUAL, DeviceFolder, write_private
from florilegium.client.terminal import Figures

if TYPE_CHECKING:
    from florilegium.client.agent.owner_client import Json, OwnerClient

app = typer.Typer(no_args_is_help=True)
console = Console(soft_wrap=True, markup=False)
HomeOption = Annotated[Path, typer.Option("--home", envvar="FLORILEGIUM_HOME", help="The device's folder.")]
HOME = USUAL
MOST_LINES = 64  # of a temporary chat that the agent is told again
SHOWN = 50  # characters of a text in a table
INTERRUPTED = 130
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@app.callback()
def private() -> None:
    """A real device: talk with it, let it learn, see what has left it."""
    os.umask(0o077)  # what is written is its owner's alone


@app.command()
def init(
    home: HomeOption = HOME,
    model: Annotated[str, typer.Option(help="A model's name; empty: what fits this machine's memory.")] = "",
    memory_limit: Annotated[str, typer.Option(help="Of the agent's process, as 1GiB; 768MiB at least.")] = "",
    key: Annotated[str, typer.Option(help="Where the key lies: file (mode 600) or keyring.")] = "file",
    learn: Annotated[bool | None, typer.Option(help="Consent to learning from conversations.")] = None,
    federate: Annotated[bool | None, typer.Option(help="Consent to joining a federation.")] = None,
) -> None:
    """Make a device: its folder, its key, its encrypted file. Asks for consent, item by item."""
    from florilegium.client.agent.config import CONSENTS, new_config
    from florilegium.client.agent.memory_limits import check_limit, fitting, limit_memory, thrifty
    from florilegium.client.lm.config import ModelConfig
    from florilegium.client.lm.places import check_model

    if key not in ("file", "keyring"):
        raise typer.BadParameter("--key takes file or keyring")
    limit = _bytes_of(memory_limit)
    memory = limit or psutil.virtual_memory().total
    chosen = fitting(memory)
    if model:
        chosen = thrifty(model, memory) if limit else ModelConfig(name=model)
    folder = DeviceFolder(home)
    with plain_errors():
        folder.check_empty()
        check_model(chosen.name)
        check_limit(limit)
        given = {"learn": learn, "federate": federate}
        consents = {
            item: typer.confirm(text, default=False) if given[item] is None else given[item]
            for item, text in CONSENTS.items()
        }
        config = new_config(chosen, "keyring" if key == "keyring" else "file", limit)
        limit_memory(limit)

        from florilegium.client.agent.agent import Agent  # and with it torch, now that nothing is left to refuse
        from florilegium.client.agent.device import Device, loaded

        lm = loaded(config.device.model)
        secret = folder.make(config)
        with folder.locked():
            agent = Agent(Device(folder, config, lm, secret))
            for item, agreed in consents.items():
                agent.consent(item, bool(agreed))
            agent.status()
            agent.device.vault.copy_to(folder.good_copy)
    console.print(f"{config.name} with {lm.name} is in {folder.path}. Next: {folder.command('serve')}")


def _bytes_of(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text or 0))
    except ValidationError:
        raise typer.BadParameter(f"{text!r} is no size, such as 1GiB") from None


@app.command()
def serve(
    home: HomeOption = HOME,
    port: Annotated[int | None, typer.Option(help="Of the page on 127.0.0.1; 0: any that is free.")] = None,
) -> None:
    """Run the agent: the model in memory, the page, learning by itself when that is allowed."""
    from florilegium.client.agent.daemon import learning, opened, showing

    logging.getLogger("florilegium.client.agent").setLevel(logging.INFO)
    over = threading.Event()
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as with `nohup`
            signal.signal(number, lambda *_: over.set())
    with plain_errors(), opened(DeviceFolder(home)) as agent:
        from florilegium.client.agent.supernode import connected  # and with it flwr

        wanted = agent.device.config.port if port is None else port
        with learning(agent), connected(agent), showing(agent, wanted) as address:
            seen = agent.page_address if sys.stdout.isatty() else f"{address} (florilegium device page opens it)"
            print(f"{agent.device.config.name}: {seen}", flush=True)  # a log may be read by others
            over.wait()
    logging.shutdown()
    os._exit(0)  # a thread may still be at work in the model; what was written is whole


@app.command()
def page(home: HomeOption = HOME) -> None:
    """The address of the page, with the token that opens it until the agent is started again."""
    with _remote(home) as agent:
        print(agent.read("page") or "there is no page: florilegium device serve")


tokens = typer.Typer(
    no_args_is_help=True, help="Tokens of programs that may use the endpoint /v1 of the page's address."
)
app.add_typer(tokens, name="token")


@tokens.command("new")
def new_token(
    name: Annotated[str, typer.Argument(help="Of the program that it is for.")], home: HomeOption = HOME
) -> None:
    """Make a token, which is shown this once."""
    with _remote(home) as agent:
        print(agent.write("token-new", name=name), flush=True)
        address = str(agent.read("page")).partition("#")[0] or "http://127.0.0.1:PORT/, while `serve` runs, "
        kept = "learns from" if agent.read("consents")["learn"]["given"] else "does not keep"
        console.print(f"{address}v1 takes it. This device {kept} what comes with it")


@tokens.command("list")
def list_tokens(home: HomeOption = HOME) -> None:
    """The programs that have one, and since when."""
    with _remote(home) as agent:
        table = Table("for", "made")
        for token in agent.read("tokens"):
            table.add_row(token["name"], f"{datetime.fromtimestamp(token['made']):%Y-%m-%d %H:%M}")
        console.print(table)


@tokens.command("revoke")
def revoke_token(name: str, home: HomeOption = HOME) -> None:
    """Take a token back: its next request is refused."""
    with _remote(home) as agent:
        agent.write("token-revoke", name=name)
        console.print(f"{name} is revoked")


@app.command()
def chat(
    text: Annotated[str, typer.Argument(help="Empty: talk on, until an empty line.")] = "",
    temporary: Annotated[bool, typer.Option("--temporary", help="Nothing of it is kept or learned from.")] = False,
    home: HomeOption = HOME,
) -> None:
    """Talk with the device."""
    with _remote(home) as agent:
        conversation, before = os.urandom(8).hex(), list[str]()
        while prompt := text or _asked():
            turn: dict[str, Json] = {}
            shown = ""
            told_of = {"temporary": True, "before": before} if temporary else {"conversation": conversation}
            for told in agent.stream("chat", prompt=prompt, **told_of):
                for one in told.get("recalled", []):
                    day = datetime.fromtimestamp(one["time"])
                    console.print(Text(f"because you said on {day.day} {day:%B}:"), _short(one["words"]))
                grown = told.get("text", told.get("done", {}).get("said", ""))
                if grown.startswith(shown):
                    sys.stdout.write(grown[len(shown) :])
                    sys.stdout.flush()
                    shown = grown
                turn = told.get("done", turn)
            print(f"\n[{turn['id']}]" if turn["id"] else "")
            before = [line for line in (*before, prompt, turn["said"]) if line][-MOST_LINES:]
            if text:
                return


def _asked() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


@app.command()
def rate(
    dialogue: str,
    liked: Annotated[bool | None, typer.Option("--up/--down", help="Whether the reply was good.")] = None,
    wanted: Annotated[str, typer.Option(help="What you would have said.")] = "",
    home: HomeOption = HOME,
) -> None:
    """Say what a reply was worth. DIALOGUE is the ID in brackets behind it; `dialogues` shows it again."""
    if liked is None and not wanted:
        raise typer.BadParameter("say --up, --down, or --wanted and what you would have said")
    with _remote(home) as agent:
        agent.write("rate", id=dialogue, liked=liked, wanted=wanted)
        console.print("noted; it is learned from with the next learning")


@app.command()
def learn(
    when: Annotated[str, typer.Argument(help="now; or by itself: asked, night, charging.")] = "now",
    home: HomeOption = HOME,
) -> None:
    """Learn now, or say when the device may by itself."""
    with _remote(home) as agent:
        if when != "now":
            agent.write("learns", when=when)
            console.print("learns when it is asked" if when == "asked" else f"learns by itself: {when}")
            return
        page: dict[str, Json] = {}
        for told in agent.stream("learn"):
            if "phase" in told:
                console.print(told["phase"])
            else:
                page = told["done"]
                console.print(f"{page['personal_examples']} examples, {page['seconds of all']:.1f} s")
                console.print(_tried(page["trial"]))
                if met := page.get("shared trial"):
                    console.print(_met(met))
        if not page["personal_examples"]:
            console.print(
                "nothing to learn from yet: say what you would have said (florilegium device rate ID --wanted …, "
                "florilegium device dialogues has the IDs), or that a reply was good (--up)"
            )


def _tried(told: dict[str, Json]) -> str:
    if told["before"] is None:
        return "kept untried: no reply of yours is held back yet"
    likelier = (
        f"on {told['replies']} held-back replies of yours {told['before']:.3f} → {told['after']:.3f} nats a token"
    )
    taken_back = ": the adapter before is used on" if told["decision"] == "taken back" else ""
    return f"{told['decision']}, {likelier}{taken_back}"


def _met(met: dict[str, Json]) -> str:
    """What became of a shared adapter of a server's."""
    figures = "" if met["after"] is None else (
        f"; {met['replies']} replies of yours at {met['before']:.3f} nats a token before and {met['after']:.3f} with it"
    )  # fmt: skip
    less = ": you go on with the one before" if met["decision"] == "refused" else ""
    return f"shared adapter {met['version']} of {met['federation']}: {met['decision']}{less}{figures}"


@app.command()
def trials(home: HomeOption = HOME) -> None:
    """What each learning did to the likelihood of replies of yours that were held back; what the model said to some."""
    with _remote(home) as agent:
        told = agent.read("trials")
        table = Figures("when", "replies", "nats a token before", "after", "what was decided")
        for trial in told["trials"]:
            figures = ("–" if trial[n] is None else f"{trial[n]:.3f}" for n in ("before", "after"))
            when = f"{datetime.fromtimestamp(trial['time']):%Y-%m-%d %H:%M}"
            table.add_row(when, str(trial["replies"]), *figures, trial["decision"])
        console.print(table)
        for met in told["shared"]:
            console.print(_met(met))
        for shown in told["shown"]:
            console.print(Text(f"You were told: {shown['prompt']}\n  before: {shown['said_before']}"))
            console.print(Text(f"  after: {shown['said_after']}\n  you: {shown['wanted']}"))
        if told["can_go_back"]:
            console.print("florilegium device revert goes back to the adapter before the last learning")


@app.command()
def revert(home: HomeOption = HOME) -> None:
    """Take the last learning back: go on with the adapter before it. What you said stays."""
    with _remote(home) as agent:
        agent.write("go-back")
        console.print("the adapter before the last learning is used")


@app.command()
def dialogues(home: HomeOption = HOME) -> None:
    """What was said, with the IDs that `rate` and `erase` take; ○ waits for a reply of yours."""
    with _remote(home) as agent:
        table = Table("ID", "", "when", "you", "the device, or what you would have said")
        for turn in agent.read("dialogues"):
            answered = turn["wanted"] or turn["liked"] is not None
            when = f"{datetime.fromtimestamp(turn['time']):%Y-%m-%d %H:%M}"
            said = turn["wanted"] or turn["said"]
            table.add_row(turn["id"], "" if answered else "○", when, _short(turn["prompt"]), _short(said))
        console.print(table)


def _short(text: str) -> Text:
    """A line of it, as it is: what was said is no markup."""
    line = " ".join(text.split())
    return Text(line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…")


@app.command()
def status(home: HomeOption = HOME) -> None:
    """What the device is, holds and has spent."""
    with _remote(home) as agent:
        told = agent.read("status")
        learned, there = told["learned"], told["federation"]
        spent = "its account is broken" if told["epsilon"] is None else f"{told['epsilon']:.3f}"
        rows = {
            "device": f"{told['device']}, {told['model']}",
            "doing": told["doing"] or "nothing",
            "consents": ", ".join(f"{item}: {'yes' if given else 'no'}" for item, given in told["consents"].items()),
            "learns": f"when {told['learns']}" if told["learns"] == "asked" else f"by itself, {told['learns']}",
            "learned last": f"{datetime.fromtimestamp(learned['at']):%Y-%m-%d %H:%M}" if learned else "never",
            "dialogues": f"{told['dialogues']}, {told['new']} of them new",
            "kept": f"{told['buffered']} of {told['bins']} in the buffer, {told['pooled']} in the pool; "
            f"{told['unanswered']} wait for a reply of yours",
            "held back": f"{told['held_back']} replies of yours, to try what is learned",
            "federation": f"{there['name']} at {there['server']}, {there['rounds']} rounds" if there else "none",
            **({"not answered": told["unprotected"]} if there and told["unprotected"] else {}),
            "sent": f"{told['releases']} releases; ε {spent} of {told['epsilon_budget']:g} for {told['unit']}",
            "turned away": ", ".join(f"{n} × {what}" for what, n in told["turned away"].items()) or "nothing",
            "disk, memory": f"{told['vault_bytes'] / 1e6:.1f} MB, {told['memory_bytes'] / 1e6:.0f} MB",
        }
        table = Table(show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)


@app.command()
def consent(
    item: Annotated[str, typer.Argument(help="learn, or federate")],
    given: Annotated[bool, typer.Argument(help="yes or no")],
    home: HomeOption = HOME,
) -> None:
    """Give or take back a consent: learn, or federate."""
    with _remote(home) as agent:
        agent.write("consent", item=item, given=given)
        console.print(f"{item}: {'yes' if given else 'no'}")


@app.command()
def join(
    terms: Annotated[Path, typer.Argument(help="Of a federation, or an invitation; -: the text of a QR code.")],
    server: Annotated[str, typer.Option(help="host:port of the server; an invitation has it.")] = "",
    certificates: Annotated[
        Path | None, typer.Option(help="The server's CA, as its operator gave it to you; an invitation has it.")
    ] = None,
    registration: Annotated[
        Path | None, typer.Option(help="What the registrar has signed, where devices add noise together.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeOption = HOME,
) -> None:
    """Join a federation on the TERMS that its server gives out, or by an invitation, which has all that is needed.

    `serve` then keeps in touch with it.
    """
    from florilegium.client.agent.invitation import accept, read_invitation, read_line
    from florilegium.client.agent.registration import read_registration
    from florilegium.client.agent.terms import read_terms

    scanned = str(terms) == "-"
    if scanned and not yes and not sys.stdin.isatty():
        raise typer.BadParameter("--yes is needed where the text does not come from a terminal: nobody could be asked")
    with plain_errors():
        invitation = read_line(sys.stdin.readline()) if scanned else read_invitation(terms)
        registered = read_registration(registration) if registration else None
        if invitation and registered and invitation.device != registered.device:
            raise DeviceError(
                f"the invitation is for {invitation.device!r}, the registration for {registered.device!r}: other "
                f"devices would not know this one"
            )
    server = invitation.server if invitation else server
    if not invitation and certificates is None:
        raise typer.BadParameter("--certificates FILE is needed: ca.pem of the server's operator")
    host, _, port = server.rpartition(":")
    if not host or "/" in server or not port.isdigit():
        raise typer.BadParameter(f"--server {server}: host:port, as server.example:9092")
    with plain_errors():
        folder, asked = DeviceFolder(home), invitation.terms if invitation else read_terms(terms)
        with folder.locked():
            folder.check()

            from florilegium.client.agent.agent import Agent  # and with it torch, now that nothing is left to refuse
            from florilegium.client.agent.supernode import prepare

            agent = Agent.open(folder)
            agent.check_terms(asked, registered)
            privacy, spent = agent.device.config.device.privacy, agent.epsilon()
            if asked.distributed:
                privacy = privacy.model_copy(update=asked.distributed.model_dump(include={"epsilon", "delta"}))
            console.print(
                f"{asked.name} at {server}: {asked.rounds} rounds. Each answer is the change of a shared adapter of "
                f"{agent.device.lm.name}, with noise for {privacy.promise.unit}: at most ε = {privacy.epsilon:g} at "
                f"δ = {privacy.delta:g} over all rounds. Not covered: {privacy.promise.not_covered}."
            )
            if sums := asked.distributed:
                console.print(
                    f"The noise is that of a sum of {sums.survivors} devices or more, of which {sums.colluding} may "
                    f"tell the server what they know. Which devices there are is said by the registrar, "
                    f"{sums.registrar}: trust it not to invent any, and not to be the server's operator."
                )
            if spent is None or spent > 0:
                told = "The account is broken" if spent is None else f"ε = {spent:.3f} of it is spent already"
                console.print(f"{told}: what cannot be paid for is not sent, and spent budget does not return.")
            if not yes and not typer.confirm("Join?", default=False):
                raise typer.Exit(1)
            given = invitation.certificates.encode() if invitation else certificates or Path()
            public = prepare(folder.supernode, given)
            if invitation:
                accept(invitation, public.read_text(encoding="utf-8"))
            agent.join(asked, server, registered)
        to_do = "" if invitation else f"give {public} to the server's operator, then: "
        console.print(f"joined; {to_do}{folder.command('serve')}")


@app.command()
def identity(
    terms: Annotated[Path, typer.Argument(help="The terms of a federation, or an invitation to it.")],
    home: HomeOption = HOME,
) -> None:
    """Show this device's identity for a federation whose devices add noise together: what its registrar signs.

    It is of these terms alone; stop `serve` first.
    """
    from florilegium.client.agent.invitation import read_invitation
    from florilegium.client.agent.registration import public_identity
    from florilegium.client.agent.terms import read_terms
    from florilegium.client.agent.vault import Vault

    with plain_errors():
        invitation = read_invitation(terms)
        asked = invitation.terms if invitation else read_terms(terms)
        if asked.distributed is None:
            raise DeviceError(f"{asked.name!r} has no registrar: its devices add no noise together")
        folder = DeviceFolder(home)
        with folder.locked():
            vault = Vault(folder.vault, folder.read_key(folder.check()))
            console.print(public_identity(vault, asked.federation))


@app.command()
def leave(home: HomeOption = HOME) -> None:
    """Leave the federation; what was sent cannot be taken back."""
    with _remote(home) as agent:
        there = agent.read("status")["federation"]
        agent.write("leave")
        console.print(
            f"left {there['name']}; what was spent stays spent" if there else "this device is in no federation"
        )


@app.command()
def ledger(home: HomeOption = HOME) -> None:
    """What was spent of the privacy budget, and what has left the device."""
    with _remote(home) as agent:
        told, sent = agent.read("ledger"), agent.read("sent")
        spent = "the account is broken: nothing is released" if told["spent"] is None else f"{told['spent']:.3f}"
        console.print(f"ε {spent} of {told['budget']:g} at δ = {told['delta']:g}, for {told['unit']}")
        console.print(f"trust: {told['trust']}; not covered: {told['not covered']}")
        table = Figures("federation", "round", "what", "bytes", "ε then")
        for row in sent:
            table.add_row(
                *(str(row[n]) for n in ("federation", "round", "kind", "bytes")), f"{row['epsilon'] or 0:.3f}"
            )
        console.print(table)


@app.command()
def export(
    file: Path,
    gguf: Annotated[bool, typer.Option("--gguf", help="The adapters as llama.cpp reads them too.")] = False,
    home: HomeOption = HOME,
) -> None:
    """Write everything that is yours to FILE, a zip. It is readable by whoever has it."""
    if os.path.lexists(file) or not file.absolute().parent.is_dir():
        raise typer.BadParameter(
            f"{file} exists" if os.path.lexists(file) else f"there is no folder {file.absolute().parent}"
        )
    with _remote(home) as agent:
        packed = agent.export(gguf=gguf)
        write_private(file, packed)
        console.print(f"{file}: {len(packed):,} bytes")


@app.command()
def erase(
    dialogues: Annotated[list[str] | None, typer.Argument(help="Dialogues to erase; none: the whole device.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    keep_replies: Annotated[
        bool, typer.Option("--keep-replies", help="Keep what the model said since it had learned from them.")
    ] = False,
    home: HomeOption = HOME,
) -> None:
    """Erase dialogues and what they left in the device, the model's replies since among it, or the whole device."""
    if dialogues:
        with _remote(home) as agent:
            under = [] if keep_replies or yes else agent.write("said-under", ids=dialogues)
            for turn in under:
                console.print(Text(turn["id"]), _short(turn["said"]))
            if under:
                these = "this reply" if len(under) == 1 else f"these {len(under)} replies"
                asked = f"Erase {these} of the model too? It may hold what is erased."
                keep_replies = not typer.confirm(asked, default=True)
            for told in agent.stream("erase", ids=dialogues, keep_replies=keep_replies):
                console.print(told.get("phase") or _anew(told["done"]))
        return
    if not DeviceFolder(home).exists:
        raise typer.BadParameter(f"there is no device in {DeviceFolder(home).path}")
    if not yes and not typer.confirm("Erase the whole device: dialogues, adapter, accounts, key?", default=False):
        raise typer.Exit(1)
    with plain_errors():
        folder = DeviceFolder(home)
        with folder.locked():
            folder.erase()
        console.print(f"{folder.path} is empty")


def _anew(done: dict[str, Json]) -> str:
    learned = "the adapter was trained anew" if done["retrained"] else "there was nothing to train on"
    sent = f"; {done['sent']} releases were sent before and cannot be recalled"
    said = f"; {done['replies']} replies of the model were erased with them" if done.get("replies") else ""
    return f"{done['dialogues']} dialogues are left; {learned}{said}{sent if done['sent'] else ''}"


@app.command()
def restore(yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False, home: HomeOption = HOME) -> None:
    """Go back to the last good copy, for a file that is damaged. What came after is gone; nothing is spent twice."""
    if not yes and not typer.confirm("Go back to the last good copy? What came after it is set aside.", default=False):
        raise typer.Exit(1)
    with plain_errors():
        folder = DeviceFolder(home)
        with folder.locked():
            folder.check_copy()

            from florilegium.client.agent.device import restore as put_back

            put_back(folder)
        console.print(
            "restored, without consents and federation: give them again (florilegium device consent, join). "
            "Where the copy lacks a payment, this device releases nothing any more"
        )


@app.command()
def rebase(home: HomeOption = HOME) -> None:
    """Begin anew on the model that the settings name now: from the dialogues, which stay. Leaves the federation."""
    from florilegium.client.lm.places import check_model

    with plain_errors():
        folder = DeviceFolder(home)
        with folder.locked():
            check_model(folder.check().device.model.name)

            from florilegium.client.agent.agent import Agent  # and with it torch, now that nothing is left to refuse

            console.print(_anew(asdict(Agent.open(folder, rebasing=True).rebase(console.print))))


@contextmanager
def _remote(home: Path) -> Iterator[OwnerClient]:
    from florilegium.client.agent.owner_client import reached

    with plain_errors(), reached(DeviceFolder(home)) as agent:
        yield agent


@contextmanager
def plain_errors() -> Iterator[None]:
    """An interruption ends the process at once; want of memory is the owner's to mend. Others are as they are."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # a thread may still be at work in the model; what was written is whole
    except MemoryError:
        raise DeviceError("the memory does not suffice: raise memory_limit, or take a smaller model") from None
