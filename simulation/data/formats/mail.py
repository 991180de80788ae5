"""A mailbox in mbox: who wrote what in answer to what, without what was quoted and without signatures."""

from __future__ import annotations

import mailbox
import re
from collections.abc import Iterator
from email.header import decode_header, make_header
from email.message import Message as Mail
from email.utils import parseaddr, parsedate_to_datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from florilegium.simulation.data.formats.messages import Message
from florilegium.simulation.data.formats.opened import opened
from florilegium.simulation.data.formats.reading import Reading
from florilegium.simulation.data.jsonl import moment

ESCAPED = re.compile(r"^>(?=>*From )")  # a line that begins with "From " begins a mail, so programs put a mark before
QUOTED = re.compile(r"^\s*>")
ATTRIBUTION = re.compile(  # over one line or two
    r"^(On|Am|Le|El) [^\n]{4,160}(\n[^\n]{0,120})?\b(wrote|schrieb[^\n]*|écrit|escribió)\s*:[ \t]*$", re.MULTILINE
)
SENDER = r"\*?(From|Von|De):\*? [^\n]*"
BESIDE = r"\*?(Sent|Gesendet|Envoyé|Enviado|Date|Datum|Fecha|Subject|Betreff|Objet|Asunto|To|An|À|Para):\*? [^\n]*"
HEADERS = re.compile(  # Outlook's and Thunderbird's: the sender beside another one of a mail's headers, in any order
    rf"^({SENDER}\n{BESIDE}|{BESIDE}\n({BESIDE}\n)*{SENDER})$", re.MULTILINE
)
ORIGINAL = re.compile(
    r"^-{2,}\s*(Original Message|Forwarded message|Ursprüngliche Nachricht|Weitergeleitete Nachricht|Message d'origine"
    r"|Message transféré|Mensaje original|Mensaje reenviado)", re.IGNORECASE
)  # fmt: skip


def mails(path: Path, reading: Reading) -> Iterator[Message]:
    """Each mail as a message of its sender's address; its thread is the first mail that it refers to."""
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "mbox"
        with opened(path) as stream, copy.open("wb") as out:
            while piece := stream.read(1 << 20):
                out.write(piece)
        box = mailbox.mbox(copy, create=False)
        try:
            for n, mail in enumerate(box, start=1):
                where = f"{path}, mail {n}"
                identity = _header(mail, "Message-ID") or where
                parents = (_header(mail, "References") or _header(mail, "In-Reply-To")).split()
                answered = _header(mail, "In-Reply-To").split() or parents[-1:]
                yield Message(
                    parseaddr(str(mail["From"] or ""))[1].lower(),
                    _own_words(_plain(mail, where, reading)),
                    _time(mail, where, reading),
                    where,
                    parents[0] if parents else identity,
                    identity,
                    answered[0] if answered else "",
                )
        finally:
            box.close()


def _header(mail: Mail, key: str) -> str:
    """Decoded; as it stands where it is in an encoding that nobody knows."""
    raw = str(mail[key] or "")
    try:
        return str(make_header(decode_header(raw))).strip()
    except (LookupError, ValueError):
        return raw.strip()


def _plain(mail: Mail, where: str, reading: Reading) -> str:
    found: list[str] = []
    for part in _texts(mail):
        payload = part.get_payload(decode=True)
        charset = part.get_content_charset() or "utf-8"
        try:
            found.append(payload.decode(charset) if isinstance(payload, bytes) else "")
        except (UnicodeDecodeError, LookupError):
            reading.leave_out(f"mail that is not the {charset} that it says", where)
            return ""
    if not found:
        reading.leave_out("mail without plain text", where)
    return "\n".join(found)


def _texts(mail: Mail) -> Iterator[Mail]:
    """The parts that are the mail's own plain text: not what is attached, which may be somebody else's mail."""
    if mail.get_content_disposition() == "attachment" or mail.get_content_maintype() == "message":
        return
    if mail.is_multipart():
        for part in mail.get_payload():
            if isinstance(part, Mail):
                yield from _texts(part)
    elif mail.get_content_type() == "text/plain":
        yield mail


def _own_words(body: str) -> str:
    kept: list[str] = []
    body = ATTRIBUTION.sub("", body.replace("\r\n", "\n"))
    if quotation := HEADERS.search(body):
        body = body[: quotation.start()]
    for line in (ESCAPED.sub("", line) for line in body.split("\n")):
        if line in ("-- ", "--") or ORIGINAL.match(line):
            break
        if not QUOTED.match(line):
            kept.append(line)
    return "\n".join(kept).strip()


def _time(mail: Mail, where: str, reading: Reading) -> float:
    try:
        return moment(parsedate_to_datetime(_header(mail, "Date")), where)
    except (ValueError, TypeError):
        reading.leave_out("mail without a date that can be read, taken as the oldest", where)
        return 0.0
