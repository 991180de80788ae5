"""`florilegium data`: the data sets that there are, what is in one, and whose a run's devices are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from florilegium.simulation.cli.app import console

app = typer.Typer(no_args_is_help=True, help="Data sets: what there is, and what is in one.")


@app.command("list")
def list_data() -> None:
    """The data sets known by name, and whether they are on this machine."""
    from florilegium.simulation.data.describe import names

    for listed in names():
        console.print(f"{listed.name:16}{'' if listed.available else '(absent) '}{listed.about}")


@app.command("describe")
def describe_data(
    name: str,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw who has how many replies of which label to this new HTML file.")
    ] = None,
) -> None:
    """Users, pairs, quantiles and an example of a data set, and how a partition comes out.

    NAME is one of florilegium data list, a file or a folder, or hub:owner/dataset. OVERRIDES are settings of a run's
    section data:

    florilegium data describe chats.jsonl min_pairs=8 split=all

    florilegium data describe faq.csv partition.kind=dirichlet partition.by=topic users=8 --picture faq.html

    florilegium data describe hub:owner/dataset data.hub_fields.prompt=question data.hub_fields.response=answer
    """
    from florilegium.simulation.data.describe import describe, render
    from florilegium.simulation.data.errors import DataError
    from florilegium.simulation.settings import data_config

    found = describe(data_config(name, overrides or []), seed=0)
    console.print(render(found))
    if picture:
        try:
            from florilegium.simulation.reports.partition_figure import write_picture
        except ImportError:
            raise DataError("--picture needs the package plotly: pip install 'florilegium[simulation]'") from None
        write_picture(picture, found.users)
        console.print(f"picture: {picture}", soft_wrap=True)


@app.command("import")
def import_data(
    file: Path,
    out: Path,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    named: Annotated[str, typer.Option("--as", help="the format, where it is not recognised")] = "",
) -> None:
    """A file or a folder of others, once, as JSON Lines of user, time, prompt, response and domain.

    OUT is a new file, OVERRIDES are settings of a run's section data:

    florilegium data import export.json chats.jsonl reply_within_s=600
    """
    from florilegium.simulation.data.convert import convert
    from florilegium.simulation.settings import data_config

    reading = convert(data_config(str(file), overrides or []), out, named)
    for told in (reading.told(), *reading.problems()):
        console.print(Text(told), soft_wrap=True)


@app.command("who")
def whose(
    run: Path,
    devices: Annotated[list[str] | None, typer.Argument()] = None,
    out: Annotated[Path | None, typer.Option(help="Write them as JSON to this new file instead.")] = None,
) -> None:
    """Which user of the data set each device of a run stands for; its folder does not say.

    RUN is the folder of the run, DEVICES are some of its devices: florilegium data who runs/quickstart device-00007
    """
    from florilegium.simulation.devices.owners import who, write_who
    from florilegium.simulation.runs.folder import RunFolder

    found = who(RunFolder(run), devices or [])
    if out:
        write_who(out, found)
    else:
        for device, user in found.items():
            console.print(Text(f"{device}  {user}"), soft_wrap=True)


@app.command("lexicons")
def show_lexicons(
    text: Annotated[str, typer.Argument()] = "",
    source: Annotated[
        list[str] | None, typer.Option(help="general, medical, vader, empath, nrc, or a .toml file")
    ] = None,
) -> None:
    """Word lists of the domain-specific score, and what they match in a text.

    TEXT is any text; without it the lists are shown with their sizes:

    florilegium data lexicons --source general --source medical "my doctor gave me a pill, I am scared"
    """
    from florilegium.client.selection.lexicons import BUNDLED, load_lexicons, matches
    from florilegium.client.selection.scores import domain_specific_score, dominant_domain

    lexicons = load_lexicons(tuple(source or BUNDLED))
    found = matches(text, lexicons)
    for name, listed in lexicons.items():
        if not text:
            console.print(f"{name:24}{len(listed):6,} words, such as {', '.join(sorted(listed)[:6])}", soft_wrap=True)
        elif name in found:
            console.print(f"{name:24}{len(found[name]):3}  {', '.join(found[name])}", soft_wrap=True)
    if text:
        domain = dominant_domain(text, lexicons) or "none"
        console.print(f"DSS {domain_specific_score(text, lexicons):.4f}, dominant domain {domain}", soft_wrap=True)
