"""What a device keeps of its stream, and how it chooses."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from florilegium.client.selection.lexicons import LexiconError, check_source
from florilegium.client.selection.policies import POLICIES, Policy
from florilegium.privacy.common.base_config import Config, Names
from florilegium.privacy.common.registry import check, resolve


class SelectionConfig(Config):
    """What the personal adapter's buffer holds."""

    extensible: ClassVar = {"policy": POLICIES}

    policy: str = Field("quality", description="which dialogue leaves the full buffer for a new one")
    bins: int = Field(32, ge=1, description="dialogues that are kept")
    bin_bytes: int = Field(22 * 1024, ge=1, description="text and embedding of a bin; what does not fit is turned away")
    annotations_per_round: int = Field(0, ge=0, description="most bins that a user is asked about in a round; 0: all")
    entropy: Literal["tokens", "dimensions"] = Field("tokens", description="what the paper's EOE is taken over")
    pooling: Literal["mean", "weighted"] = Field("mean", description="of tokens, for policies that read nothing else")
    dissimilarity: Literal["frozen", "recomputed"] = Field("frozen", description="IDD when it came, or in each buffer")
    lexicons: Names = Field(
        ("general",), min_length=1, description="general, medical, vader, empath, nrc, or a .toml file"
    )

    @field_validator("policy")
    @classmethod
    def _known(cls, value: str) -> str:
        return check(value, POLICIES, Policy)

    @field_validator("lexicons")
    @classmethod
    def _found(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(check_source(source) for source in value)
        except LexiconError as error:
            raise ValueError(str(error)) from None

    @property
    def chosen(self) -> Policy:
        """The policy that is named."""
        return resolve(self.policy, POLICIES, Policy)

    @property
    def reading(self) -> str:
        """What is read off a text (`client.lm.features`)."""
        own = self.chosen.reading
        return self.pooling if own == "mean" else own
