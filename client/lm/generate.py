"""Greedy and sampled decoding of a batch with a key-value cache; each row has its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from transformers import PreTrainedModel

from privacy.config import Config


class SamplingConfig(Config):
    """How replies are decoded."""

    max_new_tokens: int = Field(32, ge=1)
    temperature: float = Field(0.0, ge=0, description="0 is greedy")


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    *,
    pad_id: int,
    stop_id: int,
) -> list[list[int]]:
    """Token ids of the replies, without the stop token. Prompts are padded on the left."""
    width, device = max(len(p) for p in prompts), model.device
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width + sampling.max_new_tokens), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    uniform = _uniform(seeds, sampling).to(device)  # (R, max_new_tokens)
    lengths = mask[:, :width].sum(1)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    cache, step_ids, positions = None, ids, (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    new = []
    for step in range(sampling.max_new_tokens):
        out = model(
            input_ids=step_ids,
            attention_mask=mask[:, : width + step],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        token = _choose(out.logits[:, -1].float(), uniform[:, step : step + 1].contiguous(), sampling.temperature)
        running = running & (token != stop_id)
        new.append(torch.where(running, token, stop_id))
        if not bool(running.any()):
            break
        step_ids, positions = token[:, None], (lengths + step)[:, None]
    rows = torch.stack(new, dim=1).tolist()
    return [row[: row.index(stop_id)] if stop_id in row else row for row in rows]


def _uniform(seeds: Sequence[int], sampling: SamplingConfig) -> torch.Tensor:
    if sampling.temperature == 0:
        return torch.zeros(len(seeds), sampling.max_new_tokens)
    draws = [np.random.Generator(np.random.Philox(key=seed)).random(sampling.max_new_tokens) for seed in seeds]
    return torch.from_numpy(np.stack(draws)).float()


def _choose(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """The most likely token, or the inverse of the cumulative distribution at `uniform` (R, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits / temperature, -1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform).squeeze(1)
    return drawn.clamp(max=logits.shape[-1] - 1)
