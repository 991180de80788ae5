"""The files of a server for real devices, and its certificates: an authority that is used once, and what it signed."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.folder import write_private

TERMS, OPERATOR_KEY, SETTINGS = "terms.toml", "operator.key", "server.toml"
CA, CERTIFICATE, KEY = "ca.pem", "server.pem", "server.key"
STATUS_LINK, STATUS_TOKEN = "status.url", "status.token"  # of the operator's page, while the server runs, and always
OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
HOST = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
YEAR = timedelta(days=365)


def check_folder(folder: Path) -> None:
    """Raises `DeviceError` where a part is missing."""
    for name in (TERMS, OPERATOR_KEY, SETTINGS, CA, CERTIFICATE, KEY):
        if not (folder / name).exists():
            raise DeviceError(f"{folder / name} is missing: florilegium server init")


def make_certificates(folder: Path, hosts: Sequence[str]) -> Path:
    """An authority and, signed by it, a server's certificate for these names and addresses; returns the authority's.

    The machine's own names are added, by which its operator's commands reach it. Raises `DeviceError` where there are
    certificates already.
    """
    names = check_new(folder, hosts)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority, server = (_named(text) for text in ("florilegium authority", hosts[0]))
    own = _certificate(authority, authority_key, authority, authority_key, [])
    theirs = _certificate(server, key, authority, authority_key, names)
    (folder / CA).write_bytes(own.public_bytes(Encoding.PEM))
    (folder / CERTIFICATE).write_bytes(theirs.public_bytes(Encoding.PEM))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_private(folder / KEY, private)
    return folder / CA


def check_new(folder: Path, hosts: Sequence[str]) -> list[x509.GeneralName]:
    """These names and addresses with the machine's own; raises `DeviceError` for others, or where certificates are."""
    if (folder / KEY).exists():
        raise DeviceError(
            f"{folder} has certificates already: devices that trust them would refuse others; take another folder"
        )
    return [_alternative(h) for h in dict.fromkeys([*hosts, *OWN_HOSTS])]


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[x509.GeneralName],
) -> x509.Certificate:
    """Of a server at these hosts; without any, of an authority. The authority's key is not kept."""
    now, authority = datetime.now(UTC), not hosts
    made = (
        x509.CertificateBuilder()
        .subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + 10 * YEAR)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(x509.KeyUsage(
            digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
            decipher_only=False), critical=True)
    )  # fmt: skip
    if hosts:
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        made = made.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return made.sign(issuer_key, hashes.SHA256())


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not HOST.fullmatch(host):
            raise DeviceError(f"--host {host!r} is neither an address nor a name such as server.example") from None
        return x509.DNSName(host)
