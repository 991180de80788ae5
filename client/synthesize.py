"""New dialogues in the manner of kept ones, by the same language model (Qin et al. 2024, §3.3).

By default the prompt is written anew and the reply stays the user's own. What is too far from the original, a copy,
of another length, empty, or (if asked for) points at a person or is unlikely is thrown away, and counted by the reason.
The base model writes, adapters off, so that no device's texts colour another's and nothing private is used twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.config import SamplingConfig
from florilegium.client.pii import personal_data
from florilegium.client.words import count, words
from florilegium.privacy.common.base_config import Config

if TYPE_CHECKING:
    from florilegium.client.lm.model import LanguageModel

Treatment = Literal["rewrite", "keep"]
Pair = tuple[str, str]  # a prompt and its reply


class SynthesisConfig(Config):
    """How many, how asked for, and what is thrown away. No threshold is printed in the paper."""

    per_dialogue: int = Field(3, ge=0, le=16, description="wanted of each kept dialogue")
    attempts: int = Field(1, ge=1, description="times that what was thrown away is written again")
    prompt: Treatment = Field("rewrite", description="the paper's default")
    response: Treatment = Field("keep", description="the paper's default")
    accept: Literal["paper", "likely"] = Field(
        "paper", description="likely: only where the model finds the reply no less likely than the original's"
    )
    instruction: str = Field(
        "Refine and generate a text semantically similar to the following text block, no need to answer it, "
        "no need to explain, use [ ] to hold your generated response: ",
        description="in front of what is to be written anew",
    )
    rouge1_min: float = Field(0.3, ge=0, le=1, description="likeness to the original below which a text is thrown away")
    rouge1_max: float = Field(0.95, ge=0, le=1, description="above it, a text is a copy")
    length_ratio_max: float = Field(
        3.0, ge=1, description="words of the longer text by words of the shorter; characters in scripts without spaces"
    )
    pii_free: bool = Field(False, description="throw away what looks like an address, a number or a link of a person")
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=48, temperature=0.5)

    @model_validator(mode="after")
    def _consistent(self) -> SynthesisConfig:
        if self.rouge1_min > self.rouge1_max:
            raise ValueError(f"rouge1_min = {self.rouge1_min} must be <= rouge1_max = {self.rouge1_max}")
        if self.per_dialogue and self.prompt == self.response == "keep":
            raise ValueError("prompt and response are both 'keep': rewrite one, or set per_dialogue = 0")
        return self


@dataclass(frozen=True)
class Request:
    """A kept dialogue of which similar ones are wanted."""

    device: str
    original: Pair
    seed: int


@dataclass(frozen=True)
class Written:
    """What came of a request."""

    kept: tuple[Pair, ...]
    rejected: Counter[str]  # by reason


def synthesize(
    requests: Sequence[Request], known: Iterable[tuple[str, str]], lm: LanguageModel, config: SynthesisConfig
) -> list[Written]:
    """The synthetic dialogues of each request that passed; `known` are (device, text) that none may repeat.

    All requests are one call of the model for each attempt.
    """
    seen = {(device, _plain(text)) for device, text in known}
    seen |= {(r.device, _plain(text)) for r in requests for text in r.original}
    kept: list[list[Pair]] = [[] for _ in requests]
    rejected: list[Counter[str]] = [Counter() for _ in requests]
    for attempt in range(config.attempts):
        wanted = [i for i, found in enumerate(kept) for _ in range(config.per_dialogue - len(found))]
        pairs = _write(requests, wanted, attempt, lm, config)
        unlikely = _less_likely(pairs, [requests[i].original for i in wanted], lm, config)
        for i, made, less in zip(wanted, pairs, unlikely, strict=True):
            reason = objection(made, requests[i], seen, config) or ("unlikely" if less else "")
            if reason:
                rejected[i][reason] += 1
            else:
                kept[i].append(made)
                seen |= {(requests[i].device, _plain(text)) for text in _new(made, config)}
    return [Written(tuple(k), r) for k, r in zip(kept, rejected, strict=True)]


def objection(made: Pair, request: Request, seen: set[tuple[str, str]], config: SynthesisConfig) -> str:
    """Why a synthetic dialogue is thrown away; empty when it may stay. Only what was written anew is judged."""
    from florilegium.client.rouge import rouge1  # and with it nltk and scipy, which settings alone need not

    for text, original in zip(_new(made, config), _new(request.original, config), strict=True):
        length, before = count(text), max(1, count(original))
        score = rouge1(original, text)
        if not text:
            return "empty"
        if score < config.rouge1_min:
            return "too far"
        if score > config.rouge1_max or (request.device, _plain(text)) in seen:
            return "copy"
        if max(length, before) > config.length_ratio_max * max(1, min(length, before)):
            return "length"
        if config.pii_free and personal_data(text):
            return "personal data"
    return ""


def unwrap(text: str) -> str:
    """What stands between the first [ and the last ], or the whole text without them."""
    inner = text.partition("[")[2] or text
    return (inner.rpartition("]")[0] or inner).strip()


def _write(
    requests: Sequence[Request], wanted: Sequence[int], attempt: int, lm: LanguageModel, config: SynthesisConfig
) -> list[Pair]:
    """One dialogue for each entry of `wanted`, in one call; the n-th of a request draws from a seed of its own."""
    number: Counter[int] = Counter()
    sources, seeds = [], []
    for i in wanted:
        seed = requests[i].seed + attempt * config.per_dialogue + number[i]
        number[i] += 1
        for text in _new(requests[i].original, config):
            sources.append(config.instruction + text)
            seeds.append(seed)
    written = (unwrap(t) for t in lm.generate(sources, [0] * len(sources), [], config.sampling, seeds))
    return [
        (
            next(written) if config.prompt == "rewrite" else requests[i].original[0],
            next(written) if config.response == "rewrite" else requests[i].original[1],
        )
        for i in wanted
    ]


def _less_likely(
    pairs: Sequence[Pair], originals: Sequence[Pair], lm: LanguageModel, config: SynthesisConfig
) -> list[bool]:
    """Whether the model, without adapters, finds a reply less likely, by token, than that of its original."""
    if config.accept == "paper":
        return [False] * len(pairs)
    dialogues = [Dialogue("", prompt, reply) for prompt, reply in (*pairs, *originals)]
    scores = lm.score(lm.format.dialogues(dialogues), [0] * len(dialogues), [])
    nll = [round(s.nll / max(1, s.tokens), 3) for s in scores]  # rounding in a batch must not decide
    return [made > before for made, before in zip(nll[: len(pairs)], nll[len(pairs) :], strict=True)]


def _new(pair: Pair, config: SynthesisConfig) -> list[str]:
    """The parts of a dialogue that are written anew."""
    return [t for t, how in zip(pair, (config.prompt, config.response), strict=True) if how == "rewrite"]


def _plain(text: str) -> str:
    """A text without case, spaces and punctuation: what differs in these alone is a copy."""
    return " ".join(words(text))
