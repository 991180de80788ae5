"""Requests and errors as JSON: what is read is bounded and of the expected form, what is told quotes nobody."""

from __future__ import annotations

import json
import logging

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from florilegium.client.agent.errors import AgentError, VaultError
from florilegium.client.lm.layers import UnsupportedModelError
from florilegium.client.lm.peft_format import AdapterFormatError
from florilegium.client.lm.places import ModelError
from florilegium.client.personalization.profile import ProfileError
from florilegium.client.state import StateError
from florilegium.client.state_store import StoreError
from florilegium.privacy.common.registry import ExtensionError
from florilegium.privacy.ledger import LedgerError

log = logging.getLogger(__name__)
LARGEST = 200_000  # bytes of a request
OPENAI_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
Body = dict[str, object]  # an object of JSON


class TooLargeError(ValueError):
    """A request has more bytes than it may."""


async def read_json(request: Request) -> Body:
    """Raises ValueError for what is not an object of JSON, and `TooLargeError`. Half a character becomes a "?"."""
    body = await _read_body(request, LARGEST)
    try:
        found = json.loads(body or b"{}")
        written = json.dumps(found, ensure_ascii=False, allow_nan=False)  # NaN and 1e999 are no JSON
        found = json.loads(written.encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        raise ValueError("the request is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError("the request is not an object of JSON")  # noqa: TRY004  # as all that is wrong with a request
    return found


async def _read_body(request: Request, most: int) -> bytes:
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > most:
            raise TooLargeError(f"a request has at most {most:,} bytes")
    return bytes(found)


def status_of(error: ValueError) -> int:
    """Of a request that could not be read."""
    return 413 if isinstance(error, TooLargeError) else 400


def told_of(error: Exception) -> tuple[int, str]:
    """Status and what the owner is told; what is not one of our own errors could quote anything, and is only named."""
    if isinstance(error, KeyError):
        return 404, "there is no such dialogue"
    if isinstance(error, AgentError | AdapterFormatError | ModelError | ProfileError):
        return 400, str(error)
    if isinstance(error, ExtensionError):  # of a module that the owner's own settings name
        log.error("%s", type(error).__name__)
        return 500, str(error)
    if isinstance(error, VaultError | LedgerError | StoreError | StateError | UnsupportedModelError | MemoryError):
        log.error("%s", type(error).__name__)
        return 503, str(error)
    if isinstance(error, TypeError | ValueError):
        return 400, "the request does not have the expected form"
    log.error("%s", type(error).__name__)
    return 500, f"this went wrong here: {type(error).__name__}"


def error_response(status: int, text: str) -> Response:
    """As the page and the commands read it."""
    return JSONResponse({"error": text}, status_code=status)


def openai_error(status: int, text: str, param: str | None = None, code: str | None = None) -> Response:
    """As programs for OpenAI's interface read it."""
    headers = {"retry-after": "1"} if status == 429 else None
    return JSONResponse(openai_error_body(status, text, param, code), status_code=status, headers=headers)


def openai_error_body(status: int, text: str, param: str | None = None, code: str | None = None) -> Body:
    """The object of an error, which a stream ends with too."""
    kind = OPENAI_KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = code or {401: "invalid_api_key"}.get(status)
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def text_of(body: Body, name: str, default: str | None = None) -> str:
    """A field; raises ValueError for what is no text."""
    found = body.get(name, default)
    if type(found) is not str:
        raise ValueError(f"{name} must be a text")
    return found


def flag_of(body: Body, name: str, default: bool | None = None) -> bool:
    """A field; raises ValueError for what is neither true nor false."""
    found = body.get(name, default)
    if type(found) is not bool:
        raise ValueError(f"{name} must be true or false")
    return found


def texts_of(body: Body, name: str, default: list[str] | None = None) -> list[str]:
    """A field; raises ValueError for what is no list of texts."""
    found = body.get(name, default)
    if type(found) is not list or not all(type(text) is str for text in found):
        raise ValueError(f"{name} must be a list of texts")
    return found
