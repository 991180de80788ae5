"""What a device holds of its person's interests: a few short texts with weights, and the vector that they make.

After the user profiling layer of ASLS (arXiv 2409.16973), profile = Σ_i α_i d_i: here d_i is the embedding of interest
i, and α_i, normalised, its feedback × how often × how lately: f_i · log₂(1 + n_i) · 2^(−age_i / half-life). The state
is what a person can read, edit and delete: the texts, how often and when they came up, what was thought of the
replies. Vectors follow from the texts, so that an edit is all that is needed.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import regex
import torch

from florilegium.client.personalization.config import ProfileConfig
from florilegium.privacy.common.errors import UserError

Embed = Callable[[Sequence[str]], torch.Tensor]  # texts → (n, H)
LONGEST = 80  # characters of an interest
_SPACE = re.compile(r"\s+")
_LONG_WORD = regex.compile(r"[\p{L}\p{M}]{4,}")  # of a script without spaces, what stands between its signs


class ProfileError(UserError):
    """An edited profile cannot be read."""


@dataclass(frozen=True, slots=True)
class Interest:
    """Something that a person talks about."""

    text: str
    count: int = 1
    last: int = 0  # number of the interaction in which it came up
    feedback: float = 0.5  # moving average; 1: replies were accepted, 0: rejected

    def weight(self, now: int, half_life: float) -> float:
        """α before normalisation."""
        recency: float = 0.5 ** (max(0, now - self.last) / half_life)
        return self.feedback * math.log2(1 + self.count) * recency


@dataclass(frozen=True)
class Profile:
    """A person's interests, and how often there is an interaction."""

    interests: tuple[Interest, ...] = ()
    interactions: int = 0

    def weights(self, config: ProfileConfig) -> torch.Tensor:
        """α (n,), which sum to one; of a profile without weight, equal ones."""
        found = torch.tensor([i.weight(self.interactions, config.half_life) for i in self.interests])
        total = float(found.sum())
        return found / total if total > 0 else torch.full_like(found, 1 / max(1, len(found)))

    def vector(self, embed: Embed, config: ProfileConfig) -> torch.Tensor:
        """Σ α_i d_i over unit vectors, (H,); zeros for nobody's."""
        if not self.interests:
            return torch.zeros_like(embed([""])[0])
        return self.weights(config) @ _unit(embed([i.text for i in self.interests]))

    def after(self, text: str, feedback: float, embed: Embed, config: ProfileConfig) -> Profile:
        """With one more interaction: what was said, and 1 for a reply that was accepted, 0 for one that was not."""
        said, now = _SPACE.sub(" ", text).strip()[:LONGEST], self.interactions + 1
        known = list(self.interests)
        vectors = _unit(embed([said, *(i.text for i in known)]))
        cosines = vectors[1:] @ vectors[0]
        if known and float(cosines.max()) >= config.same:
            at = int(cosines.argmax())
            mean = known[at].feedback + config.feedback_rate * (feedback - known[at].feedback)
            known[at] = replace(known[at], count=known[at].count + 1, last=now, feedback=mean)
        elif said:
            mean = 0.5 + config.feedback_rate * (feedback - 0.5)
            known.append(Interest(said, 1, now, mean))
        if len(known) > config.interests:
            known.remove(min(known, key=lambda i: (i.weight(now, config.half_life), i.last, i.text)))
        return Profile(tuple(known), now)

    def words(self, config: ProfileConfig, most: int = 8) -> str:
        """The words that weigh most in it, for a prompt."""
        total = Counter[str]()
        for interest, weight in zip(self.interests, self.weights(config).tolist(), strict=True):
            for word in set(_LONG_WORD.findall(interest.text.lower())):
                total[word] += weight
        return ", ".join(sorted(total, key=lambda w: (-round(total[w], 6), w))[:most])

    def to_json(self) -> str:
        """For its owner to read and to edit."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Raises `ProfileError` for what is not a profile."""
        try:
            told = json.loads(text)
            interests = tuple(Interest(**i) for i in told["interests"])
            profile = cls(interests, told["interactions"])
            text.encode()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProfileError(
                f"this is not a profile: {type(error).__name__}; its form is {{interests: […], interactions: n}}"
            ) from None
        if not _is_count(profile.interactions):
            raise ProfileError("interactions must be a whole number from 0 to 2³¹ − 1")
        for i in interests:
            numbers = _is_count(i.count) and _is_count(i.last) and type(i.feedback) in (int, float)
            sound = type(i.text) is str and len(i.text) <= LONGEST and _is_text(i.text) and numbers
            if not sound or not 0 <= i.feedback <= 1 or i.count < 1:
                raise ProfileError(
                    f"interest {str(i.text)[:20]!r}: a text of at most {LONGEST} characters, whole numbers count >= 1 "
                    f"and last >= 0, feedback from 0 to 1"
                )
        return profile


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_text(value: str) -> bool:
    """Half a surrogate, which JSON can name, is none: nothing could be written with it."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


def drift(before: torch.Tensor, now: torch.Tensor) -> float:
    """1 − cosine of two profiles' vectors, from 0 to 2; 1 where one of them is nobody's."""
    return 1 - float(torch.nn.functional.cosine_similarity(before, now, dim=0))


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)
