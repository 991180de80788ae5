"""The reply to a chat in OpenAI's form, whole or as it grows.

A program sends the whole chat each time: it is found again in the vault by its last exchange, so that a dialogue has
its conversation, and every dialogue that has a line of what was in sight is a cause of the reply.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from secrets import token_hex
from threading import Event

from florilegium.client.agent.agent import Agent
from florilegium.client.agent.conversation import with_lines
from florilegium.client.agent.http_json import Body
from florilegium.client.agent.openai_messages import ChatRequest
from florilegium.client.agent.vault import Turn

Grown = Callable[[str], None]


class StoppedError(Exception):
    """Nobody waits for the reply any more."""


class Reply:
    """The reply to one request, whole or as it grows."""

    def __init__(self, agent: Agent, asked: ChatRequest, temporary: bool) -> None:
        self.agent, self.asked, self.temporary = agent, asked, temporary
        self.stopped = Event()
        self._name, self._made = f"chatcmpl-{token_hex(12)}", int(time.time())
        self._tokens, self._most, self._lines = 0, 0, list[str]()

    def completion(self) -> Body:
        """The object of a reply that is not streamed."""
        turn = self._turn(lambda text: None)
        message = {"role": "assistant", "content": turn.said, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish}
        return self._object("chat.completion", [choice]) | {"usage": self._usage(), **_kept(turn)}

    def stream(self, tell: Callable[[Body], None]) -> None:
        """Tells the pieces of a reply, each with what is new."""
        told = 0

        def grown(text: str) -> None:
            nonlocal told
            if text[told:]:
                tell(self._piece({"content": text[told:]} | ({} if told else {"role": "assistant"})))
                told = len(text)

        turn = self._turn(grown)
        grown(turn.said)
        tell(self._piece({} if told else {"role": "assistant", "content": ""}, self._finish) | _kept(turn))
        if self.asked.with_usage:
            tell(self._object("chat.completion.chunk", []) | {"usage": self._usage()})

    def _turn(self, grown: Grown) -> Turn:
        def told(text: str) -> None:
            if self.stopped.is_set():
                raise StoppedError
            self._tokens += 1
            grown(text)

        asked, device = self.asked, self.agent.device
        given = {"temperature": asked.temperature, "max_new_tokens": asked.max_tokens}
        sampling = device.config.chat.model_copy(update={k: v for k, v in given.items() if v is not None})
        self._most, self._lines = sampling.max_new_tokens, self._seen()
        causes = dict.fromkeys(turn.id for line in self._lines for turn in device.vault.saying(line))
        turn = self.agent.chat(
            asked.prompt, self._conversation(), told, before=self._lines, causes=list(causes),
            temporary=self.temporary, sampling=sampling, seed=asked.seed,
        )  # fmt: skip
        self._tokens = max(self._tokens, device.format.length(turn.said) if turn.said else 0)
        return turn

    def _seen(self) -> list[str]:
        """What a reply sees before the prompt: instructions, and as many lines of the chat as on the page."""
        turns = self.agent.device.config.context_turns
        said = [text for _, text in self.asked.said if text.strip()]
        return [text for text in self.asked.instructions if text.strip()] + (said[-turns:] if turns else [])

    def _conversation(self) -> str:
        """The one whose last exchange is the one before the prompt; a chat that was branched off is a new one."""
        vault = self.agent.device.vault
        if self.asked.last_exchange and not self.temporary:
            said, reply = (text.strip() for text in self.asked.last_exchange)
            for turn in reversed(vault.saying(said)):
                exchange = turn.prompt.strip() == said and reply in (turn.said.strip(), turn.wanted.strip())
                if exchange and vault.ends(turn):
                    return turn.conversation
        return token_hex(8)

    @property
    def _finish(self) -> str:
        return "length" if self._tokens >= self._most else "stop"

    def _piece(self, delta: Mapping[str, object], finish: str | None = None) -> Body:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list[Body]) -> Body:
        return {"id": self._name, "object": kind, "created": self._made, "model": self.asked.model, "choices": choices}

    def _usage(self) -> Body:
        (example,) = self.agent.device.format.prompts([with_lines(self.asked.prompt, self._lines)])
        read = len(example.prompt)
        return {"prompt_tokens": read, "completion_tokens": self._tokens, "total_tokens": read + self._tokens}


def _kept(turn: Turn) -> Body:
    """By what its owner can rate the reply, where it was kept; other programs overlook it."""
    return {"florilegium": {"dialogue": turn.id}} if turn.id else {}
