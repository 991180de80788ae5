"""The last thing that every byte from a device to a server passes: what is not on this list does not leave.

A reply is a header of a few public values and, for a release alone, arrays of the agreed schema. Not covered: that a
device answers at all, when, and how fast.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from florilegium.privacy.encoding import ENCODINGS, Encoded
from florilegium.privacy.release import PROTOCOL, ReleaseRefusedError, Schema
from florilegium.privacy.secure_aggregation.neighbours import REFUSALS
from florilegium.privacy.secure_aggregation.wire import (
    NAME,
    check_masked,
    read_advert,
    read_confirmation,
    read_parts,
    read_shares_reply,
)

# Why there is no release, in a word.
FAILED, NO_RELEASE, BAD_MESSAGE, NO_DEVICE = OWN_CODES = ("failed", "no-release", "bad-message", "no-device")
CODES = (*OWN_CODES, *REFUSALS)
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
STEPS: Mapping[frozenset[str], Callable[[Mapping[str, object]], object]] = {  # of secure aggregation, and their forms
    frozenset({"advert"}): lambda header: read_advert(header["advert"]),
    frozenset({"to", "shares"}): read_shares_reply,
    frozenset({"signature"}): read_confirmation,
    frozenset({"of", "parts"}): read_parts,
}


def check_step(header: Mapping[str, object]) -> None:
    """Raises `ReleaseRefusedError` unless this is what a device says at a step of secure aggregation."""
    form = STEPS.get(frozenset(header))
    if form is None:
        raise ReleaseRefusedError(f"a header with {sorted(map(str, header))[:4]} is not one that a device sends")
    try:
        form(header)
    except ValueError as error:
        raise ReleaseRefusedError(f"a step of secure aggregation: {error}") from None


def check_masked_reply(header: Mapping[str, object], arrays: Encoded, size_bytes: int) -> None:
    """Raises `ReleaseRefusedError` unless this is a release's header with masked numbers of so many bytes."""
    _check_header(header, RELEASE)
    try:
        check_masked(arrays, size_bytes)
    except ValueError as error:
        raise ReleaseRefusedError(str(error)) from None


def check_reply(header: Mapping[str, object], arrays: Encoded | None, schema: Schema) -> None:
    """Raises `ReleaseRefusedError` unless this is one of the four kinds of reply, and nothing else."""
    kind = next((k for k in HEADERS if set(k) == set(header)), None)
    if kind is None:
        raise ReleaseRefusedError(f"a header with {sorted(map(str, header))[:4]} is not one that a device sends")
    _check_header(header, kind)
    if (arrays is not None) != (kind is RELEASE):
        raise ReleaseRefusedError("arrays belong to a release, and a release has arrays")
    if arrays is not None:
        schema.check(ENCODINGS[schema.encoding].decode(arrays))


def _check_header(header: Mapping[str, object], kind: Mapping[str, Callable[[object], bool]]) -> None:
    wrong = [name for name, allowed in kind.items() if name not in header or not allowed(header[name])]
    if wrong or set(header) != set(kind):
        raise ReleaseRefusedError(f"{[*wrong, *header][0]} in a header does not have the agreed form")
