"""What travels in a round of secure aggregation, step by step, as plain values of a message's record.

Every `read_…` takes what somebody else has sent and raises ValueError for anything that is not of the form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np

from florilegium.privacy.encoding import Encoded
from florilegium.privacy.secure_aggregation.adverts import Advert
from florilegium.privacy.secure_aggregation.keys import KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES
from florilegium.privacy.secure_aggregation.rounded_noise import packed, packed_bytes, unpacked
from florilegium.privacy.secure_aggregation.session import Numbers
from florilegium.privacy.secure_aggregation.sharing import PART_BYTES

KEYS, SHARES, CONFIRM, UNMASK = STEPS = tuple(f"query.{step}" for step in ("keys", "shares", "confirm", "unmask"))
RECORD = "secure"  # of a message, beside its plan
MASKED = "masked"  # the array of a masked part
SEALED_BYTES = 2 * PART_BYTES + TAG_BYTES
MOST_NAMES = 100_000
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a device
ADVERT = (KEY_BYTES, SIGNATURE_BYTES, KEY_BYTES, KEY_BYTES, KEY_BYTES, SIGNATURE_BYTES)
ADVERT_BYTES = sum(ADVERT)
Value = str | bytes | list[str] | list[bytes]
Record = Mapping[str, object]  # as somebody else has sent it
Told = dict[str, Value]


def advert_bytes(advert: Advert) -> bytes:
    """One after the other."""
    return b"".join((
        advert.identity, advert.certificate, advert.sharing_key, advert.masking_key, advert.own_mask_hash,
        advert.signature,
    ))  # fmt: skip


def read_advert(sent: object) -> Advert:
    """What `advert_bytes` gave."""
    if not isinstance(sent, bytes) or len(sent) != ADVERT_BYTES:
        raise ValueError("not an advert")
    ends = [sum(ADVERT[:i]) for i in range(len(ADVERT) + 1)]
    return Advert(*(sent[a:b] for a, b in pairwise(ends)))


# -- what a server tells ----------------------------------------------------------------------------------------------


def tell_shares(names: Iterable[str], adverts: Mapping[str, Advert]) -> Told:
    """Who is in the round, and the adverts of a device's neighbourhood."""
    return {"names": [*names], **_pairs("neighbours", "adverts", {n: advert_bytes(a) for n, a in adverts.items()})}


def read_shares(told: Record) -> tuple[list[str], dict[str, Advert]]:
    _has(told, "names", "neighbours", "adverts")
    found = _read_pairs(told, "neighbours", "adverts", ADVERT_BYTES)
    return _names(told["names"]), {name: read_advert(sent) for name, sent in found.items()}


def tell_masked(members: Iterable[str], inbox: Mapping[str, bytes]) -> Told:
    """Whose parts have come, and those that are sealed for a device."""
    return {"members": [*members], **_pairs("from", "shares", inbox)}


def read_masked(told: Record) -> tuple[list[str], dict[str, bytes]]:
    _has(told, "members", "from", "shares")
    return _names(told["members"]), _read_pairs(told, "from", "shares", SEALED_BYTES)


def tell_confirm(survivors: Iterable[str]) -> Told:
    """Whose masked numbers have come."""
    return {"survivors": [*survivors]}


def read_confirm(told: Record) -> list[str]:
    _has(told, "survivors")
    return _names(told["survivors"])


def tell_unmask(confirmations: Mapping[str, bytes]) -> Told:
    """The signatures of a neighbourhood under that list."""
    return _pairs("from", "signatures", confirmations)


def read_unmask(told: Record) -> dict[str, bytes]:
    _has(told, "from", "signatures")
    return _read_pairs(told, "from", "signatures", SIGNATURE_BYTES)


# -- what a device replies --------------------------------------------------------------------------------------------


def reply_advert(advert: Advert) -> Told:
    return {"advert": advert_bytes(advert)}


def reply_shares(shares: Mapping[str, bytes]) -> Told:
    """A sealed pair of parts for each neighbour."""
    return _pairs("to", "shares", shares)


def read_shares_reply(sent: Record) -> dict[str, bytes]:
    _has(sent, "to", "shares")
    return _read_pairs(sent, "to", "shares", SEALED_BYTES)


def reply_confirmation(signature: bytes) -> Told:
    return {"signature": signature}


def read_confirmation(sent: Record) -> bytes:
    _has(sent, "signature")
    return _bytes(sent["signature"], SIGNATURE_BYTES)


def reply_parts(parts: Mapping[str, bytes]) -> Told:
    """The part of one secret of each neighbour."""
    return _pairs("of", "parts", parts)


def read_parts(sent: Record) -> dict[str, bytes]:
    _has(sent, "of", "parts")
    return _read_pairs(sent, "of", "parts", PART_BYTES)


def masked_array(numbers: Numbers, bits: int) -> Encoded:
    """A device's masked numbers (P,), packed."""
    return {MASKED: packed(numbers, bits)}


def read_masked_array(sent: Mapping[str, object], width: int, bits: int) -> Numbers:
    check_masked(sent, packed_bytes(width, bits))
    return unpacked(np.asarray(sent[MASKED]), width, bits)


def check_masked(sent: Mapping[str, object], size_bytes: int) -> None:
    """Raises ValueError unless this is one array of so many bytes."""
    array = sent.get(MASKED)
    if set(sent) != {MASKED} or not isinstance(array, np.ndarray):
        raise ValueError("not masked numbers")
    if array.dtype != np.uint8 or array.shape != (size_bytes,):
        raise ValueError(f"masked numbers of {array.dtype}{array.shape}, expected {size_bytes} bytes")


def reply_bytes(holders: int) -> int:
    """Of all that a device sends in a round beside its masked numbers, with so many in its neighbourhood."""
    return ADVERT_BYTES + (holders - 1) * SEALED_BYTES + SIGNATURE_BYTES + holders * PART_BYTES


def told_bytes(holders: int) -> int:
    """Of all that a device is sent beside the shared adapter; names are not counted."""
    return holders * ADVERT_BYTES + (holders - 1) * SEALED_BYTES + holders * SIGNATURE_BYTES


# -- forms ------------------------------------------------------------------------------------------------------------


def _pairs(names: str, values: str, found: Mapping[str, bytes]) -> Told:
    return {names: [*found], values: [*found.values()]}


def _read_pairs(told: Record, names: str, values: str, size: int) -> dict[str, bytes]:
    given, texts = _names(told[names]), told[values]
    if not isinstance(texts, list) or len(texts) != len(given) or len(set(given)) != len(given):
        raise ValueError(f"{names} and {values} do not belong together")
    return {name: _bytes(text, size) for name, text in zip(given, texts, strict=True)}


def _names(told: object) -> list[str]:
    if not isinstance(told, list) or len(told) > MOST_NAMES or not all(_is_name(name) for name in told):
        raise ValueError("not names of devices")
    return [*told]


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(NAME.fullmatch(name))


def _bytes(sent: object, size: int) -> bytes:
    if not isinstance(sent, bytes) or len(sent) != size:
        raise ValueError(f"not {size} bytes")
    return sent


def _has(told: Record, *names: str) -> None:
    if set(told) != set(names):
        raise ValueError(f"has {sorted(map(str, told))[:4]}, expected {', '.join(names)}")
