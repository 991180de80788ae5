"""The endpoint for programs: `/v1/chat/completions`, `/v1/models` and `/v1/embeddings` as OpenAI has them.

What is said through it is the owner's chat like any other: the device learns from it where its owner has consented to
learning. A chat with `"store": false`, or with the header `X-Florilegium-Temporary: 1`, is answered and not kept.
Not covered: tools, images, more than one reply, what a program keeps itself.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from threading import BoundedSemaphore, Event, Thread
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from florilegium.client.agent.agent import Agent
from florilegium.client.agent.http_json import (
    Body,
    openai_error,
    openai_error_body,
    read_json,
    status_of,
    told_of,
)
from florilegium.client.agent.openai_messages import RequestError, check_fields, model_of, read_chat
from florilegium.client.agent.openai_reply import Reply

AT_ONCE = 8  # requests that are worked on or wait for the model
MOST_TEXTS = 64  # of a request for embeddings
TEMPORARY = "x-florilegium-temporary"
FLAGS = {"1": True, "true": True, "0": False, "false": False}
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
Done = TypeVar("Done")


class Endpoint:
    """The routes over one agent."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._free, self._threads = BoundedSemaphore(AT_ONCE), list[CapacityLimiter]()

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            Route("/v1/{rest:path}", self._nothing, methods=METHODS),
        ]

    # -- models -------------------------------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        try:
            self._check_model(request.path_params["name"])
        except RequestError as error:
            return _refused(error)
        return JSONResponse(self._described())

    def _described(self) -> Body:
        made = int(self.agent.device.folder.settings.stat().st_mtime)
        return {
            "id": self.agent.device.config.device.model.name,
            "object": "model",
            "created": made,
            "owned_by": "this-device",
        }

    def _check_model(self, name: str) -> None:
        if name != (own := self.agent.device.config.device.model.name):
            raise RequestError(f"this device has the model {own!r} alone, not {name!r}", "model", "model_not_found")

    async def _nothing(self, request: Request) -> Response:
        return openai_error(
            404, "this device has /v1/chat/completions, /v1/models and /v1/embeddings", code="unknown_url"
        )

    # -- chats --------------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        try:
            asked = read_chat(await read_json(request))
            self._check_model(asked.model)
            temporary = _temporary(request) or not asked.keep
        except ValueError as error:
            return openai_error(status_of(error), str(error))
        except RequestError as error:
            return _refused(error)
        if not self._free.acquire(blocking=False):
            return openai_error(429, f"{AT_ONCE} requests wait already", code="rate_limit_exceeded")
        reply = Reply(self.agent, asked, temporary)
        if asked.stream:
            return await self._streamed(reply)
        return await self._answered(reply.completion)

    async def _answered(self, work: Callable[[], Body]) -> Response:
        """Work in a thread of its own; its place is free again afterwards."""
        if not self._threads:
            self._threads.append(CapacityLimiter(AT_ONCE))
        try:
            return JSONResponse(await to_thread.run_sync(_then(work, self._free.release), limiter=self._threads[0]))
        except Exception as error:  # noqa: BLE001  # the program is told its kind
            return _failed(error)

    async def _streamed(self, reply: Reply) -> Response:
        """Server-sent events. What is wrong before the first piece has a status of its own."""
        pieces, loop = asyncio.Queue[Body | Exception | None](), asyncio.get_running_loop()

        def tell(piece: Body | Exception | None) -> None:
            with suppress(RuntimeError):  # the server is stopped
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work() -> None:
            try:
                reply.stream(tell)
            except Exception as error:  # noqa: BLE001  # the program is told its kind
                tell(error)
            tell(None)

        Thread(target=_then(work, self._free.release), daemon=True).start()
        first = await pieces.get()
        if isinstance(first, Exception):
            return _failed(first)
        return StreamingResponse(_events(first, pieces, reply.stopped), media_type="text/event-stream")

    # -- embeddings ---------------------------------------------------------------------------------------------------

    async def _embeddings(self, request: Request) -> Response:
        try:
            body = await read_json(request)
            check_fields(body, {"model", "input", "encoding_format", "dimensions"})
            self._check_model(model_of(body))
            texts, coded = self._texts(body), _coded(body)
        except ValueError as error:
            return openai_error(status_of(error), str(error))
        except RequestError as error:
            return _refused(error)
        if not self._free.acquire(blocking=False):
            return openai_error(429, f"{AT_ONCE} requests wait already", code="rate_limit_exceeded")
        return await self._answered(lambda: self._embedded(texts, coded))

    def _texts(self, body: Body) -> list[str]:
        found, longest, width = body.get("input"), self.agent.device.config.longest, self.agent.device.lm.hidden_size
        if body.get("dimensions") not in (None, width):
            raise RequestError(f"dimensions must be {width}", "dimensions")
        texts = [found] if isinstance(found, str) else found
        if (
            not isinstance(texts, list)
            or not 1 <= len(texts) <= MOST_TEXTS
            or not all(isinstance(t, str) for t in texts)
        ):
            raise RequestError(f"`input` must be a text, or a list of 1 to {MOST_TEXTS} texts", "input")
        if not all(0 < len(text) <= longest for text in texts):
            raise RequestError(f"a text of `input` must have 1 to {longest:,} characters", "input")
        return texts

    def _embedded(self, texts: list[str], coded: bool) -> Body:
        """Mean hidden states of the base model, of length 1; nothing of the texts is kept."""
        lm = self.agent.device.lm
        with self.agent.device.busy:
            rows = [f.readings["mean"].vector.float().numpy() for f in lm.embed(texts)]
        unit = [(row / max(float(np.linalg.norm(row)), 1e-12)).astype(np.float32) for row in rows]  # (H,) each
        tokens = sum(lm.format.length(text) for text in texts)
        data = [{"object": "embedding", "index": k, "embedding": _written(row, coded)} for k, row in enumerate(unit)]
        used = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": lm.name, "usage": used}


async def _events(
    first: Body | None, pieces: asyncio.Queue[Body | Exception | None], stopped: Event
) -> AsyncIterator[str]:
    """Server-sent events; whoever leaves in the middle ends the work for them."""
    piece: Body | Exception | None = first
    try:
        while piece is not None:
            if isinstance(piece, Exception):
                status, text = told_of(piece)
                yield f"data: {json.dumps(openai_error_body(status, text))}\n\n"
                return
            yield f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"
            piece = await pieces.get()
        yield "data: [DONE]\n\n"
    finally:
        stopped.set()


def _then(work: Callable[[], Done], end: Callable[[], None]) -> Callable[[], Done]:
    def both() -> Done:
        try:
            return work()
        finally:
            end()

    return both


def _temporary(request: Request) -> bool:
    shown = request.headers.get(TEMPORARY, "0").strip().lower()
    if shown not in FLAGS:
        raise RequestError(f"the header {TEMPORARY} takes 1 or 0", TEMPORARY)
    return FLAGS[shown]


def _coded(body: Body) -> bool:
    """Whether an embedding is written as base64 of little-endian float32."""
    found = body.get("encoding_format") or "float"
    if found not in ("float", "base64"):
        raise RequestError("encoding_format takes float or base64", "encoding_format")
    return found == "base64"


def _written(row: npt.NDArray[np.float32], coded: bool) -> object:
    return base64.b64encode(row.astype("<f4").tobytes()).decode() if coded else row.tolist()


def _refused(error: RequestError) -> Response:
    return openai_error(404 if error.code == "model_not_found" else 400, str(error), error.param, error.code)


def _failed(error: Exception) -> Response:
    return openai_error(*told_of(error))
