"""An invitation in one file and in a QR code: what is drawn is read by a decoder that others wrote, and joins."""

from __future__ import annotations

import base64
import io
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zxingcpp
from PIL import Image
from rich.console import Console
from test_agent import made
from test_deployment import free_port
from typer.testing import CliRunner

from florilegium.client.agent.agent import Agent
from florilegium.client.agent.cli import app as device_app
from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.invitation import LARGEST, MARK, USUAL, Invitation, as_line, read_invitation, read_line
from florilegium.client.agent.signature import new_key, public_half
from florilegium.client.agent.terms import Terms, write_terms
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.places import base_hash
from florilegium.simulation.cli.server import app as server_app
from florilegium.simulation.deployment import qr_code
from florilegium.simulation.deployment.certificates import (
    CA,
    CERTIFICATE,
    KEY,
    OPERATOR_KEY,
    SETTINGS,
    make_certificates,
)
from florilegium.simulation.deployment.https_server import Allowed, device_server
from florilegium.simulation.deployment.link import Link
from florilegium.simulation.deployment.register import admitted, invite, welcome

BLOCKS = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}  # of a character's two modules, 1: light


def server_in(folder: Path) -> Path:
    """The files of a server for nano, as `server init` makes them."""
    make_certificates(folder, ["127.0.0.1"])
    operator, norm = public_half(new_key()), 4.21717711171
    terms = Terms(name="orchard", base=base_hash("nano"), operator=operator, seed=2**47 + 1, largest_norm_l2=norm)
    write_terms(folder / "terms.toml", terms)
    for name in (OPERATOR_KEY, SETTINGS):
        (folder / name).write_text("")
    return folder


def decoded(picture: Image.Image) -> str:
    (found,) = zxingcpp.read_barcodes(np.asarray(picture.convert("L")))
    assert found.format == zxingcpp.BarcodeFormat.QRCode
    return str(found.text)


def photographed(lines: list[str]) -> Image.Image:
    """A terminal with these lines, light on dark."""
    rows = [[BLOCKS[c][half] for c in line] for line in lines for half in (0, 1)]
    return Image.fromarray(np.array(rows, np.uint8) * 255).resize((len(rows[0]) * 4, len(rows) * 4), 0)


def test_what_is_drawn_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture, a turned and blurred one, and what a terminal shows are the file, certificate and all."""
    folder = server_in(tmp_path / "server")
    monkeypatch.chdir(tmp_path)
    arguments = ["invite", str(folder), "alice", "--server", "server.example.org:9092", "--qr"]
    done = CliRunner().invoke(server_app, arguments)
    assert done.exit_code == 0, done.output
    made = read_invitation(tmp_path / "alice.invitation")
    assert made and "BEGIN CERTIFICATE" in made.certificates and len(as_line(made)) < 1100
    assert (tmp_path / "alice.png").stat().st_mode & 0o777 == 0o600
    picture = Image.open(tmp_path / "alice.png").convert("L")
    modules = picture.width // 8
    assert picture.size == (modules * 8,) * 2 and 85 + 8 <= modules <= 93 + 8  # version 17 or 18 with its quiet zone
    small = picture.resize((4 * modules,) * 2, Image.Resampling.BILINEAR).rotate(7, expand=True, fillcolor=255)
    drawn = [line for line in done.output.splitlines() if line and set(line) <= set(BLOCKS)]
    assert len(drawn) == (modules + 1) // 2 and {len(line) for line in drawn} == {modules}
    for seen in (picture, small, photographed(drawn)):
        assert read_line(decoded(seen)) == made
    assert made.secret not in done.output


def test_a_narrow_terminal_is_told_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = server_in(tmp_path / "server")
    monkeypatch.chdir(tmp_path)
    narrow = Console(width=80, force_terminal=True, soft_wrap=True, highlight=False)
    monkeypatch.setattr("florilegium.simulation.cli.server.console", narrow)
    done = CliRunner().invoke(server_app, ["invite", str(folder), "bob", "--server", "s:1", "--qr"])
    assert done.exit_code == 0 and "has 80 columns of the" in done.output and "█" not in done.output
    assert read_line(decoded(Image.open(tmp_path / "bob.png"))).device == "bob"


def test_what_fits_into_no_code_is_handed_over_as_a_file(tmp_path: Path) -> None:
    """A chain of authorities: 4,296 characters are the most of any code."""
    folder = server_in(tmp_path / "server")
    chain = [(make_certificates(tmp_path / str(k), ["localhost"])).read_text() for k in range(12)]
    invitation = invite(folder, "alice", "s:1").model_copy(update={"certificates": "".join(chain)})
    with pytest.raises(DeviceError, match="of which a QR code holds 4,296: hand over the file"):
        qr_code.code_of(invitation)
    two = invitation.model_copy(update={"certificates": "".join(chain[:2])})
    assert read_line(decoded(Image.open(io.BytesIO(qr_code.picture_of(qr_code.code_of(two)))))) == two


def test_a_line_is_whole_or_refused(tmp_path: Path) -> None:
    invitation = invite(server_in(tmp_path), "alice", "s:1")
    line = as_line(invitation)
    assert read_line(f"  {line}\n") == invitation
    assert set(line) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:")  # a code's alphanumeric mode
    packer = zlib.compressobj(9, zdict=USUAL)
    bomb = packer.compress(b'{"device":"' + b"a" * 100 * LARGEST) + packer.flush()
    packer = zlib.compressobj(9, zdict=USUAL)
    false = packer.compress(b'{"device":"alice"}') + packer.flush()
    broken = [MARK + base64.b32encode(b).decode().rstrip("=") for b in (bomb, false, false + b"more", b"", b"x" * 6000)]
    other = "Q" if line[40] != "Q" else "R"
    cut = [line[:-1], line[: len(line) // 2], line[:40] + other + line[41:], line[:40] + "1" + line[41:]]
    for bad in (*broken, *cut, "", MARK, "https://example.org", "FLORILEGIUM1:ä"):
        with pytest.raises(DeviceError, match="no whole invitation"):
            read_line(bad)


def test_a_device_joins_by_what_was_scanned(tmp_path: Path, lm: LanguageModel) -> None:
    """The text from a reader of codes on standard input."""
    folder, home, port = server_in(tmp_path / "server"), DeviceFolder(tmp_path / "device"), free_port()
    agent: Agent = made(home, lm)
    line = as_line(invite(folder, "alice", f"127.0.0.1:{port}"))
    options = ["join", "-", "--home", str(home.path)]
    asked = CliRunner().invoke(device_app, options, input=line + "\n")
    assert asked.exit_code == 2 and "--yes is needed" in asked.output.replace("\n", " ")
    broken = CliRunner().invoke(device_app, [*options, "--yes"], input=line[:200])
    assert isinstance(broken.exception, DeviceError) and "scan the code again" in str(broken.exception)
    with device_server(Link(), "127.0.0.1", port, folder / CERTIFICATE, folder / KEY, Allowed(),
                    welcome=partial(welcome, folder)):  # fmt: skip
        done = CliRunner().invoke(device_app, [*options, "--yes"], input=line + "\n")
        assert done.exit_code == 0 and "joined" in done.output, done.output
    assert list(admitted(folder)) == ["alice"]
    there = agent.device.membership
    assert there and (there.name, there.server) == ("orchard", f"127.0.0.1:{port}")
    assert (home.supernode / "server-ca.pem").read_text() == (folder / CA).read_text()


def test_a_line_of_this_version_is_read_by_later_ones() -> None:
    """What was drawn and printed stays good: `USUAL` is part of the form."""
    invitation = Invitation(device="a", server="b:1", secret="0" * 64, certificates="c", terms=Terms(name="d"))
    assert read_line(WRITTEN) == invitation


WRITTEN = "FLORILEGIUM1:PD4XVNOABZBVFGMIVQ2MTSQQLGMQDBIANALFU6SOY2JDAU3QEZA4ESOPMA2OTUJM5EMZFEHUABJRFNSJ"
