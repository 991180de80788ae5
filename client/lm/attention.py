"""Causal attention over packed texts, in place of the model's own.

What a pass reads is set on the model's modules before it (`Feature`); nothing goes through the signatures of
`transformers`, whose keywords are its own to name. On a CPU, texts of tens of tokens are fastest as plain batched
products with a backward written out; elsewhere it is torch's scaled-dot-product attention, but where scores are capped,
which that cannot. A test asks that both are the same. Not covered, and refused: attention sinks, and whatever else a
model hands over that is not known to change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from florilegium.client.lm.cache import KeyValues
from florilegium.client.lm.layers import UnsupportedModelError
from florilegium.client.lm.packing import Band, Texts

NAME = "florilegium"
READING = "florilegium_reading"  # the attribute of the modules that attend
WRITTEN_OUT = frozenset({"cpu"})  # types of devices on which the products with a backward of their own are the faster
IDLE = {"cache_position", "deterministic", "dropout", "output_attentions", "position_ids", "use_cache"}  # here, without
# training and with texts packed by us, these change nothing


@dataclass
class Reading:
    """What the pass that is going on reads: packed texts, or one more token of each text in a cache."""

    texts: Texts | None = None
    cache: KeyValues | None = None
    windows: dict[int, int | None] = field(default_factory=dict)  # of each layer that has attended here

    @contextmanager
    def of(self, texts: Texts | None, cache: KeyValues | None = None) -> Iterator[None]:
        """Within it the model reads these; also when activations are computed again for a derivative."""
        before = self.texts, self.cache
        self.texts, self.cache = texts, cache
        try:
            yield
        finally:
            self.texts, self.cache = before


def attend_packed(model: PreTrainedModel) -> Reading:
    """Has the model attend by `packed_attention`; returns where it is told what it reads."""
    reading = Reading()
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            object.__setattr__(module, READING, reading)  # beside torch's own registers
    model.set_attn_implementation(NAME)
    return reading


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the form that `transformers` calls: q (1, h, N, d), k and v (1, g, N, d) → (1, N, h, d)."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    reading: Reading = getattr(module, READING, Reading())
    texts, cache = reading.texts, reading.cache
    if texts is None and cache is None:
        raise RuntimeError("this model reads packed texts only: call it through florilegium.client.lm.engine.Engine")
    if what := _unknown(key, value, more):
        raise UnsupportedModelError(f"{type(module).__name__} attends with {what}, which packed attention has not")
    reading.windows[module.layer_idx] = sliding_window  # type: ignore[index]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
    if cache is not None and cache.decoding:
        return cache.attend(module.layer_idx, q, k, v, scale, sliding_window, softcap)[None], None  # type: ignore[arg-type]
    assert texts is not None
    if cache is not None:
        cache.keep(module.layer_idx, k, v, texts)  # type: ignore[arg-type]
    if softcap or query.device.type in WRITTEN_OUT:
        return _Attention.apply(q, k, v, texts, scale, sliding_window, softcap)[None], None  # type: ignore[no-untyped-call]
    return _by_sdpa(q, k, v, texts, scale, sliding_window)[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)


def _unknown(key: torch.Tensor, value: torch.Tensor, more: Mapping[str, Any]) -> str:
    """What a model asks of attention that would be left out; empty: nothing."""
    if more.get("s_aux") is not None or more.get("sinks") is not None:
        return "sinks"
    if value.shape[-1] != key.shape[-1]:
        return f"values of another width than its keys ({key.shape[-1]})"
    if more.get("is_causal") is False:
        return "what comes after a token"
    odd = sorted(name for name, x in more.items() if name not in {*IDLE, "is_causal"} and x is not None)
    return f"{odd[0]!r}" if odd else ""


def causal_mask(width: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """(T, T) with 0 where a query may look and -inf where not."""
    age = torch.arange(width, device=like.device)[:, None] - torch.arange(width, device=like.device)[None]
    seen = (age >= 0) & (age < (window or width))
    return torch.zeros(width, width, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)


class _Attention(torch.autograd.Function):
    """softmax(scale · Q Kᵀ + mask) V for each band, heads that share a key stacked along the queries."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        texts: Texts,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        (n, heads, size), groups = q.shape, k.shape[1]
        bands, back = texts.heads(heads)
        few, _ = texts.heads(groups)
        saved, outputs = [], []
        for many, band in zip(bands, few, strict=True):
            queries = _pick(q, many).view(band.texts * groups, -1, size)  # (S g, h/g T, d)
            keys, values = (_pick(x, band).view(-1, band.width, size) for x in (k, v))  # (S g, T, d)
            scores = torch.bmm(queries, keys.mT).mul_(scale)
            slope = _cap_(scores, softcap)
            shaped = scores.view(-1, band.width, band.width)
            shaped.add_(causal_mask(band.width, window, scores))
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
            outputs.append(torch.bmm(weights, values).view(-1, size))
            saved += [queries, keys, values, weights, slope]
        ctx.save_for_backward(*saved)
        ctx.texts, ctx.scale = texts, scale
        return _stack(outputs).index_select(0, back).view(n, heads, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, texts = ctx.saved_tensors, ctx.texts
        heads, size = grad.shape[1:]
        bands, back = texts.heads(heads)
        dq, dk, dv = [], [], []
        groups = saved[1].shape[0] // bands[0].texts
        _, few_back = texts.heads(groups)
        for i, many in enumerate(bands):
            queries, keys, values, weights, slope = saved[5 * i : 5 * i + 5]
            out = _pick(grad, many).index_fill_(0, many.filler, 0).view(queries.shape)
            dv.append(torch.bmm(weights.mT, out).view(-1, size))
            dweights = torch.bmm(out, values.mT)
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dscores.mul_(slope).mul_(ctx.scale)
            dq.append(torch.bmm(dscores, keys).view(-1, size))
            dk.append(torch.bmm(dscores.mT, queries).view(-1, size))
        return (
            _stack(dq).index_select(0, back).view(-1, heads, size),
            _stack(dk).index_select(0, few_back).view(-1, groups, size),
            _stack(dv).index_select(0, few_back).view(-1, groups, size),
            None,
            None,
            None,
            None,
        )


def _cap_(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """cap · tanh(s / cap) in place (Gemma 2, arXiv 2408.00118); its derivative."""
    if not softcap:
        return scores.new_ones(())
    bent = scores.div_(softcap).tanh_()
    slope = 1 - bent.square()
    scores.mul_(softcap)
    return slope


def _pick(x: torch.Tensor, band: Band) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).index_select(0, band.pick)


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, texts: Texts, scale: float, window: int | None
) -> torch.Tensor:
    """The same by torch, differentiable; (N, h, d)."""
    heads, groups, size = q.shape[1], k.shape[1], q.shape[2]
    bands, back = texts.heads(heads)
    few, _ = texts.heads(groups)
    outputs = []
    for many, band in zip(bands, few, strict=True):
        queries = _pick(q, many).view(band.texts, heads, band.width, size)
        keys, values = (_pick(x, band).view(band.texts, groups, band.width, size) for x in (k, v))
        short = window is None or window >= band.width
        mask = None if short else causal_mask(band.width, window, q)
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=short, scale=scale, enable_gqa=heads != groups
        )
        outputs.append(out.reshape(-1, size))
    return _stack(outputs).index_select(0, back).view(-1, heads, size)
