"""The agent's HTTP API: a socket for its owner's own commands, a page on 127.0.0.1.

The socket lies in a folder that is its owner's alone. The page's port can be reached by every user of the machine and,
through a browser, by every page that is open in it. The page itself is no secret; what it asks of the agent wants the
token that `serve` prints, in a header, and the page's own origin and name. The token comes to the page in its address'
fragment, which no browser sends, and stays in the tab's storage, which no other port of this machine shares; a cookie
would go to all of them. Nothing that a person said is logged.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib import resources
from threading import Thread
from typing import cast

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from florilegium.client.agent.access import PAGE, AccessControl
from florilegium.client.agent.agent import Agent
from florilegium.client.agent.config import CONSENTS, Consent, When
from florilegium.client.agent.errors import AgentError
from florilegium.client.agent.http_json import (
    Body,
    error_response,
    flag_of,
    read_json,
    status_of,
    text_of,
    texts_of,
    told_of,
)
from florilegium.client.agent.openai_api import Endpoint
from florilegium.client.agent.recall import own_words
from florilegium.client.agent.vault import Turn
from florilegium.client.lm.places import ADAPTERS

CONVERSATION = re.compile(r"[A-Za-z0-9_-]{0,64}")
URGENT = {"/api/consent", "/api/leave", "/api/token-revoke"}  # what an owner can always do, whatever else goes on
A_PAGE, LONGEST_SEARCH = 20, 200  # conversations, characters
THREADS = 32  # of which those that write wait for the disk together
Handler = Callable[[Request], Awaitable[Response]]
Told = Callable[[Body], None]


def application(agent: Agent) -> Starlette:
    """What the owner's own commands may ask."""
    return Starlette(routes=Service(agent).routes)


def page_application(agent: Agent, port: int) -> ASGIApp:
    """The same for the page on this port, and the endpoint for programs, behind its access control."""
    routes = [*Service(agent).routes, *Endpoint(agent).routes]
    return AccessControl(Starlette(routes=routes), agent.page_token, agent.tokens, port)


class Service:
    """The routes over one agent."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._threads: dict[bool, CapacityLimiter] = {}  # of what is urgent, and of the rest

    @property
    def routes(self) -> list[Route]:
        reads: dict[str, Callable[[], object]] = {
            "/api/status": self.agent.status,
            "/api/kept": self.agent.kept,
            "/api/dialogues": lambda: [_told(t) for t in self.agent.device.vault.turns()],
            "/api/profile": lambda: json.loads(self.agent.profile.to_json()),
            "/api/sent": lambda: [asdict(s) for s in self.agent.device.vault.sent()],
            "/api/ledger": self._ledger,
            "/api/page": lambda: self.agent.page_address,
            "/api/trials": self.agent.trials,
            "/api/tokens": self.agent.tokens.listed,
            "/api/consents": lambda: {item: {"text": CONSENTS[item], "given": given}
                                      for item, given in self.agent.device.consents.items()},
        }  # fmt: skip
        writes: dict[str, Callable[[Body], object]] = {
            "/api/rate": lambda b: _told(self.agent.rate(text_of(b, "id"), _liked(b), text_of(b, "wanted", ""))),
            "/api/consent": lambda b: self.agent.consent(cast(Consent, b.get("item")), flag_of(b, "given")),
            "/api/learns": lambda b: self.agent.learn_when(cast(When, b.get("when"))),
            "/api/profile": lambda b: json.loads(self.agent.edit_profile(json.dumps(b)).to_json()),
            "/api/leave": lambda b: self.agent.leave(),
            "/api/go-back": lambda b: self.agent.go_back(),
            "/api/token-new": lambda b: self.agent.tokens.new(text_of(b, "name")),
            "/api/token-revoke": lambda b: self.agent.tokens.revoke(text_of(b, "name")),
            "/api/conversations": self._conversations,
            "/api/conversation": lambda b: [_told(t) for t in self.agent.device.vault.conversation(text_of(b, "name"))],
            "/api/said-under": lambda b: [_told(turn) for turn in self.agent.said_under(texts_of(b, "ids"))],
        }
        streams: dict[str, Callable[[Body, Told], object]] = {
            "/api/chat": self._chat,
            "/api/learn": lambda b, told: self.agent.learn(lambda phase: told({"phase": phase})),
            "/api/erase": self._erase,
        }
        return [
            *(Route(path, self._page) for path in PAGE),
            *(Route(path, partial(self._read, ask=ask)) for path, ask in reads.items()),
            *(Route(path, partial(self._write, do=do, urgent=path in URGENT), methods=["POST"])
              for path, do in writes.items()),
            *(Route(path, partial(self._stream, do=do), methods=["POST"]) for path, do in streams.items()),
            Route("/api/export", self._export),
        ]  # fmt: skip

    # -- forms of answers ---------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        name = "page.html" if request.url.path == "/" else request.url.path[1:]
        text = (resources.files("florilegium.client.agent") / "page" / name).read_text(encoding="utf-8")
        return Response(text, media_type=PAGE[request.url.path])

    async def _read(self, request: Request, ask: Callable[[], object]) -> Response:
        return await self._answered(lambda: self._at_once(ask))

    def _at_once(self, ask: Callable[[], object]) -> object:
        """With the vault to itself for all that it looks up there, not in turn with others for each."""
        with self.agent.device.vault.open():
            return ask()

    async def _write(self, request: Request, do: Callable[[Body], object], urgent: bool) -> Response:
        try:
            body = await read_json(request)
        except ValueError as error:
            return error_response(status_of(error), str(error))
        return await self._answered(lambda: do(body), urgent)

    async def _answered(self, work: Callable[[], object], urgent: bool = False) -> Response:
        """`urgent`: by threads that nothing else keeps busy."""
        if urgent not in self._threads:
            self._threads[urgent] = CapacityLimiter(THREADS)
        try:
            return JSONResponse(await to_thread.run_sync(work, limiter=self._threads[urgent]))
        except Exception as error:  # noqa: BLE001  # the owner is told its kind
            status, text = told_of(error)
            return error_response(status, text)

    async def _stream(self, request: Request, do: Callable[[Body, Told], object]) -> Response:
        """A line of JSON for each thing to tell; the last is {"done": …} or {"error": …}."""
        try:
            body = await read_json(request)
        except ValueError as error:
            return error_response(status_of(error), str(error))
        lines, loop = asyncio.Queue[Body | None](), asyncio.get_running_loop()

        def told(line: Body | None) -> None:
            with suppress(RuntimeError):  # the server is stopped
                loop.call_soon_threadsafe(lines.put_nowait, line)

        def work() -> None:
            try:
                told({"done": do(body, told)})
            except Exception as error:  # noqa: BLE001  # the owner is told its kind
                told({"error": told_of(error)[1]})
            told(None)

        Thread(target=work, daemon=True).start()
        return StreamingResponse(_lines(lines), media_type="application/x-ndjson")

    # -- what they do -------------------------------------------------------------------------------------------------

    def _chat(self, body: Body, told: Told) -> Body:
        prompt, conversation = text_of(body, "prompt"), _conversation(body)
        temporary, before = flag_of(body, "temporary", False), texts_of(body, "before", [])
        if before and not temporary:
            raise AgentError("`before` is for temporary chats: of others the device knows what was said before")
        turns = self.agent.device.config.context_turns
        seen = before[len(before) - min(turns, len(before)) :] if temporary else None

        def grown(text: str) -> None:
            told({"text": text})

        def recalls(turns: list[Turn]) -> None:
            if turns:
                told({"recalled": [{"id": t.id, "time": t.time, "words": own_words(t)} for t in turns]})

        turn = self.agent.chat(prompt, conversation, grown, before=seen, temporary=temporary, recalls=recalls)
        return _told(turn)

    def _conversations(self, body: Body) -> Body:
        """A page of them, and whether there are more."""
        search, before = text_of(body, "search", ""), body.get("before", 0)
        if type(before) is not int or not 0 <= before < 2**62 or len(search) > LONGEST_SEARCH:
            raise ValueError("before must be a number, search a text")
        found = self.agent.device.vault.conversations(search, before, A_PAGE + 1)
        return {"conversations": [asdict(c) for c in found[:A_PAGE]], "more": len(found) > A_PAGE}

    def _erase(self, body: Body, told: Told) -> Body:
        keep = flag_of(body, "keep_replies", False)
        return asdict(self.agent.erase(texts_of(body, "ids"), lambda phase: told({"phase": phase}), keep_replies=keep))

    def _ledger(self) -> Body:
        account = self.agent.account
        budget = self.agent.device.config.device.privacy
        return {
            "unit": budget.promise.unit,
            "trust": budget.promise.trust,
            "not covered": budget.promise.not_covered,
            "budget": budget.epsilon,
            "delta": budget.delta,
            "spent": self.agent.epsilon(),
            "whole": account is not None,
            "entries": [
                {"federation": e.experiment, "round": e.round, "dialogues": len(e.dialogues), **asdict(e.event)}
                for e in (account.entries if account else ())
            ],
        }

    async def _export(self, request: Request) -> Response:
        try:
            packed = await run_in_threadpool(self._packed, gguf="gguf" in request.query_params)
        except Exception as error:  # noqa: BLE001  # the owner is told its kind
            return error_response(*told_of(error))
        named = {"content-disposition": 'attachment; filename="florilegium-device.zip"'}
        return Response(packed, media_type="application/zip", headers=named)

    def _packed(self, *, gguf: bool) -> bytes:
        """All that is the owner's, readable: dialogues, what is kept, profile, accounts, the adapters."""
        agent, packed = self.agent, io.BytesIO()
        lists = {
            "dialogues": [_told(t) for t in agent.device.vault.turns()],
            "kept": agent.kept(),
            "trials": cast("list[Body]", agent.trials()["trials"]),
            "sent": [asdict(s) for s in agent.device.vault.sent()],
        }
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, rows in lists.items():
                archive.writestr(f"{name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            archive.writestr("profile.json", agent.profile.to_json())
            archive.writestr("ledger.json", json.dumps(self._ledger(), indent=1))
            archive.write(agent.device.folder.settings, "device.toml")
            for name, content in agent.exported(gguf=gguf).items():
                archive.writestr(f"{ADAPTERS}/{name}", content)
        return packed.getvalue()


async def _lines(lines: asyncio.Queue[Body | None]) -> AsyncIterator[str]:
    while (line := await lines.get()) is not None:
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _told(turn: Turn) -> Body:
    return asdict(turn)


def _conversation(body: Body) -> str:
    found = text_of(body, "conversation", "")
    if not CONVERSATION.fullmatch(found):
        raise ValueError("conversation must be at most 64 letters, digits, - and _")
    return found


def _liked(body: Body) -> bool | None:
    return None if body.get("liked") is None else flag_of(body, "liked")
