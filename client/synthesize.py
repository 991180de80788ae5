"""New prompts in the manner of a kept one, by the same language model (Qin et al. 2024, §3.3).

The reply stays the user's own. A ROUGE-1 check throws away what is too far from the original, a copy, or empty.
The base model writes, adapters off, so that no device's texts colour another's and nothing private is used twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from pydantic import Field, model_validator
from rouge_score.rouge_scorer import RougeScorer

from client.lm.config import SamplingConfig
from client.lm.model import LanguageModel
from privacy.config import Config


class SynthesisConfig(Config):
    """How many, how asked for, and what is thrown away. The threshold is not printed in the paper."""

    per_dialogue: int = Field(3, ge=0, le=16)
    instruction: str = (
        "Refine and generate a text semantically similar to the following text block, no need to answer it, "
        "no need to explain, use [ ] to hold your generated response: "
    )
    rouge1_min: float = Field(0.3, ge=0, le=1)
    rouge1_max: float = Field(0.95, ge=0, le=1, description="above it, a text is a copy")
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=48, temperature=0.5)

    @model_validator(mode="after")
    def _ordered(self) -> SynthesisConfig:
        if self.rouge1_min > self.rouge1_max:
            raise ValueError(f"rouge1_min = {self.rouge1_min} must be <= rouge1_max = {self.rouge1_max}")
        return self


def synthesize(
    prompts: Sequence[str], lm: LanguageModel, config: SynthesisConfig, seeds: Sequence[int]
) -> tuple[list[list[str]], list[Counter[str]]]:
    """For each prompt the synthetic ones that passed, and why the others did not."""
    asked = [config.instruction + p for p in prompts for _ in range(config.per_dialogue)]
    draws = [seed + i for seed in seeds for i in range(config.per_dialogue)]
    written = iter(lm.generate(asked, [0] * len(asked), [], config.sampling, draws))
    kept: list[list[str]] = []
    rejected: list[Counter[str]] = []
    for prompt in prompts:
        passed: list[str] = []
        reasons: Counter[str] = Counter()
        for _ in range(config.per_dialogue):
            text = unwrap(next(written))
            reason = objection(text, prompt, passed, config)
            if reason:
                reasons[reason] += 1
            else:
                passed.append(text)
        kept.append(passed)
        rejected.append(reasons)
    return kept, rejected


def unwrap(text: str) -> str:
    """What stands between the first [ and the last ], or the whole text without them."""
    inner = text.partition("[")[2] or text
    return (inner.rpartition("]")[0] or inner).strip()


def objection(text: str, original: str, passed: Sequence[str], config: SynthesisConfig) -> str:
    """Why a synthetic text is thrown away; empty when it may stay."""
    if not text:
        return "empty"
    score = rouge1(original, text)
    if score < config.rouge1_min:
        return "too far"
    if score > config.rouge1_max or text in passed:
        return "copy"
    return ""


@lru_cache(maxsize=1)
def _scorer() -> RougeScorer:
    return RougeScorer(["rouge1"], use_stemmer=True)


def rouge1(reference: str, text: str) -> float:
    """ROUGE-1 F1 with stemming (Lin 2004)."""
    return float(_scorer().score(reference, text)["rouge1"].fmeasure)
