"""The command `florilegium`: all of its commands, and how it tells of errors."""

from __future__ import annotations

import os
import sys
from traceback import print_exc

from rich.console import Console
from rich.text import Text

from florilegium.client.agent.cli import app as device
from florilegium.client.terminal import speak_plainly
from florilegium.privacy.common.dumps import forbid_dumps
from florilegium.privacy.common.environment import umask
from florilegium.privacy.common.errors import BrokenDeviceError, UserError
from florilegium.simulation.cli import bench, config, data, models, server
from florilegium.simulation.cli.app import app
from florilegium.simulation.cli.doctor import doctor
from florilegium.simulation.cli.export import export
from florilegium.simulation.cli.run import audit, report, run
from florilegium.simulation.cli.study import study

OURS = (
    "this is a fault of Florilegium's: please report it with the traceback above and what `florilegium doctor` prints"
)

for command in (run, report, export, audit, study, doctor):
    app.command()(command)
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.add_typer(bench.app, name="bench")
app.add_typer(device, name="device")
app.add_typer(server.app, name="server")


def main() -> None:
    """Runs the command; a user's mistake is told in a line, a fault of ours by its traceback.

    What it writes, people's words among it, is for whoever runs it alone; FLORILEGIUM_UMASK=022 lets others read.
    """
    speak_plainly()
    forbid_dumps()
    told = Console(stderr=True, markup=False, highlight=False)
    try:
        os.umask(umask())
        app()
    except BrokenDeviceError as error:
        print(error.traced, file=sys.stderr)  # of the process that the device was in
        told.print(Text("error:", style="bold red"), Text(str(error)), soft_wrap=True)
        told.print("\n".join(getattr(error, "__notes__", [])), soft_wrap=True)
        raise SystemExit(1) from None
    except UserError as error:
        told.print(Text("error:", style="bold red"), Text(str(error)), soft_wrap=True)
        raise SystemExit(2) from None
    except Exception:  # noqa: BLE001  # the end of the program: all of it is told
        print_exc()
        told.print(OURS, soft_wrap=True)
        raise SystemExit(1) from None
