"""An invitation as a QR code (ISO/IEC 18004): on a terminal, and as a picture.

About 1,000 characters of the 4,296 that a code can hold, four fifths of them chance: two keys, a secret and the
certificate (in PEM 635 bytes). A code of 93 x 93 modules, which a telephone reads from a screen.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.invitation import Invitation, as_line

if TYPE_CHECKING:
    from segno import QRCode

QUIET = 4  # modules around a code, as the standard wants
PIXELS = 8  # of a module's side in a picture


def code_of(invitation: Invitation) -> QRCode:
    """Raises `DeviceError` for what fits into no code, and where the package segno is missing."""
    try:
        from segno import DataOverflowError, make_qr
    except ModuleNotFoundError:
        raise DeviceError("--qr needs the package segno: pip install 'florilegium[simulation]'") from None
    line = as_line(invitation)
    try:
        return make_qr(line, error="l", mode="alphanumeric")
    except DataOverflowError:
        raise DeviceError(
            f"the invitation has {len(line):,} characters, of which a QR code holds 4,296: hand over the file"
        ) from None


def columns(code: QRCode) -> int:
    """That its lines take on a terminal."""
    return int(code.symbol_size(border=QUIET)[0])


def lines_of(code: QRCode) -> str:
    """Two modules a character, the dark ones left blank: to be shown light on dark."""
    written = io.StringIO()
    code.terminal(written, border=QUIET, compact=True)
    return written.getvalue().rstrip("\n")


def picture_of(code: QRCode) -> bytes:
    """In PNG."""
    written = io.BytesIO()
    code.save(written, kind="png", scale=PIXELS, border=QUIET)
    return written.getvalue()
