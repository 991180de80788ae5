"""What an OpenAI-style request for a chat asks for: read field by field; what cannot be done is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from florilegium.client.agent.errors import AgentError
from florilegium.client.agent.http_json import Body

NEUTRAL: dict[str, tuple[object, ...]] = {  # fields that change nothing with these values, and would with others
    "n": (1,), "top_p": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "stop": ([], ""),
}  # fmt: skip
IGNORED = {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}  # names of things elsewhere
READ = {"model", "messages", "stream", "stream_options", "store", "max_tokens", "max_completion_tokens", "temperature",
        "seed"}  # fmt: skip
ROLES = ("system", "developer", "user", "assistant")
MOST_MESSAGES, LONGEST_REPLY, HOTTEST = 1000, 1024, 2.0
LARGEST_SEED = 2**63


class RequestError(AgentError):
    """A field of a request that is not as it must be."""

    def __init__(self, told: str, param: str, code: str | None = None) -> None:
        super().__init__(told)
        self.param, self.code = param, code


@dataclass(frozen=True)
class ChatRequest:
    """A chat as a program asks for it."""

    model: str
    prompt: str  # the last message
    instructions: tuple[str, ...]  # of the system, in order
    said: tuple[tuple[str, str], ...]  # (role, text) of user and assistant before the prompt
    stream: bool = False
    with_usage: bool = False  # in the stream
    keep: bool = True  # `store`: the device may learn from it
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None

    @property
    def last_exchange(self) -> tuple[str, str] | None:
        """The prompt and the reply just before, if the chat has them."""
        if [role for role, _ in self.said[-2:]] != ["user", "assistant"]:
            return None
        return self.said[-2][1], self.said[-1][1]


def read_chat(body: Body) -> ChatRequest:
    """Raises `RequestError` for what is missing, not of its form, or cannot be done."""
    check_fields(body, READ)
    model = model_of(body)
    messages = _messages(body)
    *before, (role, prompt) = messages
    if role != "user":
        raise RequestError("the last of `messages` must be the user's", "messages")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise RequestError("stream_options takes include_usage alone", "stream_options")
    return ChatRequest(
        model,
        prompt,
        tuple(text for role, text in before if role in ("system", "developer")),
        tuple((role, text) for role, text in before if role in ("user", "assistant")),
        stream=_flag(body, "stream", False),
        with_usage=bool(options.get("include_usage")),
        keep=_flag(body, "store", True),
        max_tokens=_tokens(body),
        temperature=_temperature(body),
        seed=_seed(body),
    )


def check_fields(body: Body, read: set[str]) -> None:
    """Raises `RequestError` for a field that would have to change something and cannot."""
    for name, value in body.items():
        if name in read or name in IGNORED or value is None or value in NEUTRAL.get(name, ()):
            continue
        only = f"; only {NEUTRAL[name][0]!r} is" if name in NEUTRAL else ""
        raise RequestError(f"{name!r} is not supported here{only}", name, "unsupported_parameter")


def model_of(body: Body) -> str:
    """The name of the model that is asked; raises `RequestError` where none is."""
    name = body.get("model")
    if type(name) is not str:
        raise RequestError("`model` must be a text: /v1/models has it", "model")
    return name


def _messages(body: Body) -> list[tuple[str, str]]:
    found = body.get("messages")
    if not isinstance(found, list) or not found or len(found) > MOST_MESSAGES:
        raise RequestError(f"`messages` must be a list of 1 to {MOST_MESSAGES:,} messages", "messages")
    return [_message(message, k) for k, message in enumerate(found)]


def _message(message: object, number: int) -> tuple[str, str]:
    here = f"messages[{number}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RequestError(f"{here} must have a role of {', '.join(ROLES)}", f"{here}.role")
    if message.get("tool_calls") or message.get("function_call"):
        raise RequestError(f"{here} calls tools, which this device has none of", here, "unsupported_value")
    return str(message["role"]), _content(message.get("content"), f"{here}.content")


def _content(content: object, here: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        parts = cast("list[Body]", content)
        if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            return "\n".join(str(part["text"]) for part in parts)
    raise RequestError(f"{here} must be a text, or parts of type text", here, "unsupported_value")


def _flag(body: Body, name: str, default: bool) -> bool:
    found = body.get(name)
    if found is not None and type(found) is not bool:
        raise RequestError(f"{name} must be true or false", name)
    return default if found is None else bool(found)


def _tokens(body: Body) -> int | None:
    names = [n for n in ("max_completion_tokens", "max_tokens") if body.get(n) is not None]
    for name in names:
        if type(body[name]) is not int or not 1 <= cast(int, body[name]) <= LONGEST_REPLY:
            raise RequestError(f"{name} must be a whole number from 1 to {LONGEST_REPLY:,}", name)
    return cast(int, body[names[0]]) if names else None


def _temperature(body: Body) -> float | None:
    found = body.get("temperature")
    if found is None:
        return None
    if type(found) not in (int, float) or not 0 <= cast(float, found) <= HOTTEST:
        raise RequestError(f"temperature must be a number from 0 to {HOTTEST:g}", "temperature")
    return float(cast(float, found))


def _seed(body: Body) -> int | None:
    found = body.get("seed")
    if found is None:
        return None
    if type(found) is not int or not -LARGEST_SEED <= found < LARGEST_SEED:
        raise RequestError("seed must be a whole number of 64 bits", "seed")
    return found % LARGEST_SEED
