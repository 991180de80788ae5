"""What a federation's operator signs of each question, so that a device answers nobody else.

Ed25519 over the federation's name, the kind of message, the plan and a hash of the arrays. The private half stays in
the server's folder, the public one is in the terms. Not covered: that an operator asks the same twice, which costs a
device nothing.
"""

from __future__ import annotations

import json
from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from florilegium.privacy.secure_aggregation.wire import RECORD

SEAL = "seal"  # the record of a message, and its one value
DOMAIN = b"florilegium question 1\n"


def new_key() -> bytes:
    """A private key, in PEM."""
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_half(private: bytes) -> str:
    """The public half of a private key in PEM: 64 hexadecimal digits. Raises ValueError for what is not one."""
    return private_key(private).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def sealed(content: RecordDict, kind: str, federation: str, private: bytes, arrays_hash: str = "") -> RecordDict:
    """The same question with its signature; a hash of the arrays that is known already is not made again."""
    signature = private_key(private).sign(_told(content, kind, federation, arrays_hash))
    return RecordDict({**content, SEAL: ConfigRecord({SEAL: signature})})


def is_sealed(message: Message, federation: str, public: str) -> bool:
    """Whether this federation's operator has signed what is asked, and nothing else is in it."""
    content = message.content
    try:
        signature = content.config_records[SEAL][SEAL]
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes(signature), _told(content, message.metadata.message_type, federation))  # type: ignore[arg-type]
    except (InvalidSignature, KeyError, ValueError, TypeError):
        return False
    return set(content) - {RECORD} == {"plan", "arrays", SEAL}


def hash_of(arrays: ArrayRecord) -> str:
    """SHA-256 of arrays: of their names, types, shapes and bytes."""
    found = sha256()
    for name, array in sorted(arrays.items()):
        head = [name, array.dtype, list(array.shape), array.stype, len(array.data)]
        found.update(json.dumps(head).encode() + b"\n")
        found.update(array.data)
    return found.hexdigest()


def _told(content: RecordDict, kind: str, federation: str, arrays_hash: str = "") -> bytes:
    told: dict[str, object] = {
        "federation": federation,
        "kind": kind,
        "plan": dict(content.config_records["plan"]),
        "arrays": arrays_hash or hash_of(content.array_records["arrays"]),
    }
    if RECORD in content:  # a step of secure aggregation
        told["step"] = {name: _plain(value) for name, value in content.config_records[RECORD].items()}
    return DOMAIN + json.dumps(told, sort_keys=True, default=repr).encode()


def _plain(value: object) -> object:
    """As JSON has it."""
    if isinstance(value, bytes):
        return value.hex()
    return [_plain(v) for v in value] if isinstance(value, list) else value


def private_key(pem: bytes) -> Ed25519PrivateKey:
    """Raises ValueError for what is not one in PEM."""
    key = load_pem_private_key(pem, None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("not an Ed25519 key")  # noqa: TRY004  # of what is in a file
    return key
