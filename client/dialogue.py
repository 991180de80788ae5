"""One exchange between a person and a model: the unit that a device selects, keeps and learns from."""

from __future__ import annotations

from dataclasses import dataclass, replace


class Echo(str):
    """A reply in the model's words, which its user only liked: nothing that the user has said."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A prompt and the reply that the device's user recorded for it.

    `response` is the user's own annotation: a device may read it only after it has asked for it
    (see `client.phases.annotate`). `time` is seconds since the epoch, or a running number where a data set
    has no clock. `context` is what was said before, a line each: part of other dialogues, and so not of what one
    dialogue may change in a release.
    """

    id: str
    prompt: str
    response: str
    time: float = 0.0
    domain: str = ""
    context: str = ""

    @property
    def in_context(self) -> Dialogue:
        """The same with its context in front of the prompt."""
        return replace(self, prompt=f"{self.context}\n{self.prompt}", context="") if self.context else self
