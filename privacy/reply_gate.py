"""The last thing that every byte from a device to a server passes: what is not on this list does not leave.

A reply is a header of a few public values and, for a release alone, arrays of the agreed schema. Not covered: that a
device answers at all, when, and how fast.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from florilegium.privacy.encoding import ENCODINGS, Encoded
from florilegium.privacy.release import PROTOCOL, ReleaseRefusedError, Schema

# Why there is no release, in a word.
FAILED, NO_RELEASE, BAD_MESSAGE, NO_DEVICE = CODES = ("failed", "no-release", "bad-message", "no-device")
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
HEAD = re.compile(r"[0-9a-f]{64}")


def is_count(value: object) -> bool:
    """Whether this is a number of a round or a version."""
    return type(value) is int and 0 <= value < 2**31


HEADERS: tuple[dict[str, Callable[[object], bool]], ...] = (
    {"device": lambda v: type(v) is str and bool(NAME.fullmatch(v))},
    {"error": lambda v: type(v) is str and v in CODES},
    {"adopted": is_count},
    {
        "protocol": lambda v: type(v) is int and v == PROTOCOL,
        "version": is_count,
        "head": lambda v: type(v) is str and bool(HEAD.fullmatch(v)),
    },
)
RELEASE = HEADERS[-1]


def check_reply(header: Mapping[str, object], arrays: Encoded | None, schema: Schema) -> None:
    """Raises `ReleaseRefusedError` unless this is one of the four kinds of reply, and nothing else."""
    kind = next((k for k in HEADERS if set(k) == set(header)), None)
    if kind is None:
        raise ReleaseRefusedError(f"a header with {sorted(map(str, header))[:4]} is not one that a device sends")
    wrong = [name for name, allowed in kind.items() if not allowed(header[name])]
    if wrong:
        raise ReleaseRefusedError(f"{wrong[0]} in a header does not have the agreed form")
    if (arrays is not None) != (kind is RELEASE):
        raise ReleaseRefusedError("arrays belong to a release, and a release has arrays")
    if arrays is not None:
        schema.check(ENCODINGS[schema.encoding].decode(arrays))
