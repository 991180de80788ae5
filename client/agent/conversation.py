"""Talking with a device: its replies, what its owner thinks of them, what stood before them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from florilegium.client.agent import generation
from florilegium.client.agent.device import Device, Progress, silent
from florilegium.client.agent.errors import AgentError
from florilegium.client.agent.recall import line_of, recalled
from florilegium.client.agent.vault import Turn
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.config import SamplingConfig
from florilegium.privacy.seeds import fresh_secret


def chat(
    device: Device,
    prompt: str,
    conversation: str = "",
    told: Progress = silent,
    *,
    before: Sequence[str] | None = None,
    causes: Sequence[str] = (),
    temporary: bool = False,
    sampling: SamplingConfig | None = None,
    seed: int | None = None,
    recalls: Callable[[list[Turn]], None] = lambda turns: None,
) -> Turn:
    """A reply; `told` hears it grow. Kept only where its owner has consented to learning, and never if `temporary`.

    `before`: what was said before, and of which dialogues, where that is not what the vault has of the conversation.
    `recalls` hears what else of its owner's words the reply is shown: nothing of a chat that has its own `before`.
    """
    prompt = mended(prompt)
    check_length(device, prompt)
    if not prompt.strip():
        raise AgentError("there is nothing to reply to")
    with device.busy:
        if before is None:
            known = lines_before(device, conversation)
            found = recalled(device, prompt, {i for i, _ in known})
            recalls(found)
            before = [*(line_of(device, turn) for turn in found), *(line for _, line in known)]
            causes = list(dict.fromkeys([*(turn.id for turn in found), *(i for i, _ in known)]))
        asked = with_lines(prompt, before)
        said = generation.reply(device, asked, sampling or device.config.chat, seed or fresh_secret() >> 65, told)
        if temporary or not device.consents["learn"]:
            return Turn(0, "", time.time(), conversation, prompt, said, None, "", None)
        return device.vault.add(prompt, said, conversation, device.cycle, causes)


def with_lines(prompt: str, lines: Iterable[str]) -> str:
    """A prompt with what was said before it."""
    return Dialogue("", prompt, "", context="\n".join(map(mended, lines))).in_context.prompt


def rate(device: Device, identity: str, liked: bool | None, wanted: str = "") -> Turn:
    """👍, 👎, and what the owner would have said. Raises KeyError for a dialogue that is not there."""
    wanted = mended(wanted)
    check_length(device, wanted)
    if not device.consents["learn"]:
        raise AgentError("what you say of it is kept to learn from, which is not consented to")
    return device.vault.rate(identity, liked, wanted.strip())


def check_length(device: Device, text: str) -> None:
    """Raises `AgentError` for more than a prompt, a correction or a profile may have."""
    longest = device.config.longest
    if len(text) > longest:
        raise AgentError(f"{len(text):,} characters are more than the {longest:,} of `longest`")


def mended(text: str) -> str:
    """A text with a "?" for half a character: a terminal can give one, earlier versions took them, none is written."""
    return text.encode("utf-8", "replace").decode()


def as_dialogues(device: Device, turns: Iterable[Turn]) -> list[Dialogue]:
    """Turns as the phases take them, each with what was said before it, but for what is held back."""
    held = device.vault.held()
    return [
        Dialogue(t.id, t.prompt, t.reply, t.time, context=said_before(device, t.conversation, t.number, held))
        for t in turns
    ]


def said_before(
    device: Device, conversation: str, number: int | None = None, without: Collection[str] = frozenset()
) -> str:
    """The last turns of a conversation before this one, a line each; of those `without` nothing."""
    return "\n".join(line for i, line in lines_before(device, conversation, number) if i not in without)


def lines_before(device: Device, conversation: str, number: int | None = None) -> list[tuple[str, str]]:
    """The lines of `said_before`, each with the dialogue that it is from."""
    turns = device.config.context_turns
    if not turns or not conversation:
        return []
    values: tuple[object, ...] = (conversation, number or math.inf)
    past = device.vault.turns("WHERE conversation = ? AND number < ?", values)
    lines = [(turn.id, line) for turn in past for line in (turn.prompt, turn.wanted or turn.said) if line]
    return lines[-turns:]
