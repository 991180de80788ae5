"""Linear layers that add the adapters of each device to what the frozen base computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from florilegium.client.lm.adapter import AdaptedLayer, AdapterLayout, Adapters
from florilegium.client.lm.ia3 import ScaledLayer, ScalingLayout
from florilegium.client.lm.packing import Example, Rectangle
from florilegium.client.lm.quantised import QuantisedLinear, input_gradient, product
from florilegium.client.lm.soft_prompt import AdaptedEmbedding, PromptLayout
from florilegium.privacy.common.errors import UserError

ATTENDING = {"attention", "full_attention", "sliding_attention", "chunked_attention"}  # as configs name such layers
LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")  # as configs name them
LINEAR = (nn.Linear, QuantisedLinear)
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # as Llama and its kin name them


class UnsupportedModelError(UserError):
    """The model is built in a way that stacked adapters cannot change."""


@dataclass(frozen=True)
class Factors:
    """One layer's part of stacked adapters, and which tokens each device has."""

    order: int  # which of the active adapters it is part of
    a: torch.Tensor  # (K, r, in)
    bt: torch.Tensor  # (K, r, out), B transposed
    scale: float
    owned: Rectangle
    gate: torch.Tensor | None = None  # (K, in, 1): σ(gate · x) weighs this part, 1 − σ the others


@dataclass(frozen=True)
class Scaling:
    """One layer's vectors of stacked (IA)³ adapters."""

    vectors: torch.Tensor  # (K, size)
    on_input: bool
    owned: Rectangle

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (1, N, size), each token times its owner's vector; nobody's stay what they are."""
        count = self.owned.tokens
        own = x[..., :count, :] * self.vectors[self.owned.owners(count)]
        return own if count == x.shape[-2] else torch.cat([own, x[..., count:, :]], -2)


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus the adapters that are active: `y = W x + Σ scale · B A x`.

    Beside a gated one: `y = W x + g · scale · B A x + (1 − g) · Σ others`, with g of its own for each token. Vectors
    of (IA)³ multiply x before, or y after.
    """

    def __init__(self, base: nn.Linear | QuantisedLinear) -> None:
        super().__init__()
        self.base = base
        self.active: list[Factors] = []
        self.scaled: list[Scaling] = []
        self.siblings = [self]  # layers that are given the same input, in the order in which the model calls them
        self.ready: list[tuple[torch.Tensor, torch.Tensor]] = []  # at most one: an input, and the output for it

    @property
    def weight(self) -> torch.Tensor:
        """Nothing that a model may multiply with by itself: the adapters would be left out."""
        size = f"{self.base.in_features} → {self.base.out_features}"
        raise UnsupportedModelError(
            f"the model takes the weights of a linear layer ({size}) out of it: no adapter could change what is "
            f"computed with them; set [model] targets to the layers that it calls, such as ['q_proj', 'v_proj']"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) → (..., out); the tokens are those of the active factors' rectangles."""
        for scaling in self.scaled:
            x = scaling(x) if scaling.on_input else x
        y = self._added(x)
        for scaling in self.scaled:
            y = y if scaling.on_input else scaling(y)
        return y

    def _added(self, x: torch.Tensor) -> torch.Tensor:
        if not self.active:
            return self.base(x)  # type: ignore[no-any-return]
        if not self.ready or self.ready[0][0] is not x:
            together = [s for s in self.siblings if [f.order for f in s.active] == [f.order for f in self.active]]
            gated = any(f.gate is not None for f in self.active)
            for sibling, y in zip(together, (_mixed if gated else _adapted)(together, x), strict=True):
                sibling.ready[:] = [(x, y)]
        return self.ready.pop()[1]


def _adapted(siblings: Sequence[AdaptedLinear], x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of layers with the same input."""
    tensors = [t for s in siblings for f in s.active for t in (f.a, f.bt)]
    flat = x.reshape(-1, x.shape[-1])
    ys: tuple[torch.Tensor, ...] = _Adapted.apply(flat, siblings, *tensors)  # type: ignore[no-untyped-call]
    return [y.view(*x.shape[:-1], -1) for y in ys]


def _mixed(siblings: Sequence[AdaptedLinear], x: torch.Tensor) -> list[torch.Tensor]:
    """As `_adapted`, where one of the active adapters is gated; by torch's own derivative."""
    flat, ys = x.reshape(-1, x.shape[-1]), list[torch.Tensor]()
    for sibling in siblings:
        y = sibling.base(flat)  # (N, out)
        (own,) = (f for f in sibling.active if f.gate is not None)
        assert own.gate is not None
        logit = flat.new_zeros(len(flat), 1)
        own.owned.add_product(logit, own.owned.spread(flat), own.gate)
        for f in sibling.active:
            part = flat.new_zeros(len(flat), f.bt.shape[-1])
            f.owned.add_product(part, torch.bmm(f.owned.spread(flat), f.a.mT) * f.scale, f.bt)
            y = y + part * torch.sigmoid(logit if f is own else -logit)  # σ(−z) = 1 − σ(z)
        ys.append(y.view(*x.shape[:-1], -1))
    return ys


class _Adapted(torch.autograd.Function):
    """The layers and their derivative, with the thin operands transposed instead of the activations.

    The A of layers with the same input are one matrix: one product for q, k and v.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, siblings: Sequence[AdaptedLinear], *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        bases = [s.base for s in siblings]
        ys = tuple(product(x, base) for base in bases)  # (N, out) each
        saved = []
        for adapter in zip(*(s.active for s in siblings), strict=True):
            owned, scale = adapter[0].owned, adapter[0].scale
            a = _cat([f.a for f in adapter])  # (K, Σr, in)
            spread = owned.spread(x)  # (K, T, in)
            down = torch.bmm(a, spread.mT).mul_(scale)  # (K, Σr, T)
            for y, f, part in zip(ys, adapter, down.split([f.a.shape[1] for f in adapter], 1), strict=True):
                owned.add_product(y, part.mT, f.bt)
            saved += [spread, down, a, *(f.bt for f in adapter)]
        ctx.save_for_backward(*saved)
        ctx.bases = bases  # frozen
        ctx.adapters = [(f.scale, f.owned) for f in siblings[0].active]
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count = len(grads)
        saved = ctx.saved_tensors  # read once: they may have to be computed again
        dx = input_gradient(list(grads), ctx.bases) if ctx.needs_input_grad[0] else None
        by_adapter: list[list[torch.Tensor | None]] = []  # of each adapter dA, dBᵀ of each layer
        for i, (scale, owned) in enumerate(ctx.adapters):
            spread, down, a, *bts = saved[i * (3 + count) : (i + 1) * (3 + count)]
            ranks = [bt.shape[1] for bt in bts]
            outs = [owned.spread_zero(grad) for grad in grads]  # (K, T, out) each
            ddown = _cat([torch.bmm(bt, out.mT) for bt, out in zip(bts, outs, strict=True)]).mul_(scale)  # (K, Σr, T)
            needs_a, needs_b = ctx.needs_input_grad[2 + 2 * i : 4 + 2 * i]
            das = torch.bmm(ddown, spread).split(ranks, 1) if needs_a else [None] * count
            dbs = [torch.bmm(p, o) if needs_b else None for p, o in zip(down.split(ranks, 1), outs, strict=True)]
            by_adapter.append([t for pair in zip(das, dbs, strict=True) for t in pair])
            if dx is not None:
                owned.add_product(dx, ddown.mT, a)
        by_layer = [by_adapter[i][2 * m + j] for m in range(count) for i in range(len(ctx.adapters)) for j in (0, 1)]
        return dx, None, *by_layer


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def refuse_coupling(model: nn.Module) -> None:
    """Raises `UnsupportedModelError` for layers in which the examples of a batch meet: batch normalization."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedModelError(
                f"{name} is {type(module).__name__}, which mixes the examples of a batch: no device's result would be "
                f"its own, and no example's gradient could be bounded"
            )


def refuse_states(model: PreTrainedModel) -> None:
    """Raises `UnsupportedModelError` for a model in which tokens meet otherwise than by attending to each other.

    Of state-space models, linear attention and short convolutions, alone or between layers that attend.
    """
    if found := _state_of(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} carries a state from token to token ({found}): the texts that are packed behind "
            f"each other in one pass would mix; use a model whose layers all attend, such as Llama, Qwen 3 or Gemma"
        )


def _state_of(model: PreTrainedModel) -> str:
    """What carries a state; empty: nothing that is known."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d) and max(module.kernel_size) > 1:
            return f"{name} is {type(module).__name__}"
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if odd := sorted(set(kinds) - ATTENDING):
        return f"it has layers of the type {odd[0]}"
    return "its class says so" if getattr(model, "_is_stateful", False) else ""


def windowed(model: PreTrainedModel) -> list[int]:
    """The layers that see only what is near, as the config says; the probes are too short to show it."""
    config = model.config.get_text_config()
    every = ["sliding_attention"] * config.num_hidden_layers if getattr(config, "sliding_window", None) else []
    kinds = getattr(config, "layer_types", None) or every
    return [i for i, kind in enumerate(kinds) if kind in ("sliding_attention", "chunked_attention")]


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The layer that makes logits of the last hidden states; raises `UnsupportedModelError`."""
    if model.base_model is model:
        raise UnsupportedModelError(f"{type(model).__name__} does not say which part of it comes before its head")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(f"the head of {type(model).__name__} is {type(head).__name__}, not nn.Linear")
    return head


def logit_scales(model: PreTrainedModel) -> tuple[float, ...]:
    """What the head's output may be multiplied by: 1, a number of the config that is named for it, or its inverse.

    Granite divides by the number that HyperCLOVA X multiplies by, under one name: the engine takes what agrees.
    """
    config = model.config.get_text_config()
    told = [getattr(config, name, None) for name in LOGIT_SCALES]
    return (1.0, *(x for scale in told if scale for x in (float(scale), 1 / scale)))


PROBE_LENGTHS = (9, 6, 4)  # longest first, as the engine reads them


def probes(vocabulary: int, ids: Sequence[int] = ()) -> tuple[Example, ...]:
    """What a model is tried with: pieces of these ids; without any, of what is in the middle of its vocabulary.

    At its ends are control tokens, of which many were never trained: in bfloat16 such tokens alone differ by a tenth.
    """
    read = ids or [(vocabulary // 3 + k) % vocabulary for k in range(sum(PROBE_LENGTHS))]
    starts = (sum(PROBE_LENGTHS[:k]) for k in range(len(PROBE_LENGTHS)))
    pieces = ([read[(start + k) % len(read)] for k in range(n)] for start, n in zip(starts, PROBE_LENGTHS, strict=True))
    return tuple(Example(tuple(piece), (), (0, len(piece)), False) for piece in pieces)


@torch.inference_mode()
def own_logits(model: PreTrainedModel, texts: Sequence[Example]) -> torch.Tensor:
    """Logits of texts one after the other, by the model as it is; (N, V)."""
    ids = [torch.tensor([x.prompt], device=model.device) for x in texts]
    return torch.cat([model(i, use_cache=False).logits[0] for i in ids]).float()


def adapt(model: nn.Module, targets: Sequence[str]) -> dict[str, AdaptedLinear]:
    """Puts an `AdaptedLinear` in the place of each linear layer whose name ends in a target; by name.

    Without targets, of every linear layer but the head; a model that has others too is then refused.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [n for n, m in model.named_modules() if isinstance(m, LINEAR) and m is not head]
    names = [n for n, _ in model.named_modules() if _ends_in(n, targets)] if targets else linear
    if not names:
        sought = f"ends in any of {', '.join(targets)}" if targets else "is nn.Linear outside the head"
        raise UnsupportedModelError(
            f"no layer of {type(model).__name__} {sought}; its layers with weights end in: {_endings(model)}; "
            f"adapters need nn.Linear, as in Llama, Qwen, Gemma or GPT-NeoX; set [model] targets"
        )
    if not targets:
        _refuse_stacked(model, names)
    adapted: dict[str, AdaptedLinear] = {}
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, LINEAR) or module is head:
            raise UnsupportedModelError(
                f"layer {name} of {type(model).__name__} is {type(module).__name__}; adapters need nn.Linear "
                f"outside the head, as in Llama, Qwen, Gemma or GPT-NeoX"
            )
        adapted[name] = AdaptedLinear(module)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapted[name])
    for name, layer in adapted.items():
        parent, _, child = name.rpartition(".")
        for family in SAME_INPUT:
            if child in family:
                layer.siblings = [adapted[n] for n in (f"{parent}.{c}" for c in family) if n in adapted]
    return adapted


def _refuse_stacked(model: nn.Module, names: Sequence[str]) -> None:
    """Raises `UnsupportedModelError` where a mixture's experts would be left out without a word."""
    for name, module in model.named_modules():
        if any(p.dim() > 2 for p in module.parameters(recurse=False)) and not isinstance(module, _ConvNd):
            endings = sorted({n.rpartition(".")[2] for n in names})
            raise UnsupportedModelError(
                f"{name} of {type(model).__name__} is {type(module).__name__}, experts in one stack and no nn.Linear: "
                f"adapters cannot change it; to adapt the other layers alone, set [model] targets = {endings}"
            )


def adapted_layers(modules: dict[str, AdaptedLinear], targets: Sequence[str] = ()) -> tuple[AdaptedLayer, ...]:
    """Names and sizes of the layers that an adapter with these targets changes, in the model's order."""
    chosen = [n for n in modules if not targets or _ends_in(n, targets)]
    if not chosen:
        endings = sorted({n.rpartition(".")[2] for n in modules})
        raise UnsupportedModelError(f"targets {list(targets)} match no adapted layer; there are {endings}")
    return tuple(AdaptedLayer(n, modules[n].base.in_features, modules[n].base.out_features) for n in chosen)


def check_rank(rank: int, chosen: Sequence[AdaptedLayer]) -> None:
    """Raises `UnsupportedModelError` for a rank that no layer has: its factors would be larger than the layers."""
    widest = max(chosen, key=_width)
    if rank > _width(widest):
        raise UnsupportedModelError(
            f"rank = {rank} must be <= {_width(widest)}, the rank that a change of the widest adapted layer can have: "
            f"{widest.name} ({widest.in_features} → {widest.out_features})"
        )


def _width(layer: AdaptedLayer) -> int:
    return min(layer.in_features, layer.out_features)


def scaled_layers(modules: dict[str, AdaptedLinear], model: PreTrainedModel) -> tuple[ScaledLayer, ...]:
    """The layers that (IA)³ changes in models of this type, as PEFT knows them."""
    from peft.utils import constants  # takes a second

    kind = str(model.config.model_type)
    changed = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind, ())
    inputs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, ())
    if not changed:
        raise UnsupportedModelError(f"PEFT knows no (IA)³ layers of the model type {kind!r}; use kind = 'lora'")
    return tuple(
        ScaledLayer(n, m.base.in_features if _ends_in(n, inputs) else m.base.out_features, _ends_in(n, inputs))
        for n, m in modules.items()
        if _ends_in(n, changed)
    )


def adapt_embedding(model: PreTrainedModel) -> AdaptedEmbedding:
    """Puts an `AdaptedEmbedding` in the place of the layer that looks tokens up."""
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise UnsupportedModelError(
            f"{type(model).__name__} looks tokens up in {type(table).__name__}, no nn.Embedding"
        )
    name = next(n for n, m in model.named_modules() if m is table)
    parent, _, child = name.rpartition(".")
    adapted = AdaptedEmbedding(table)
    setattr(model.get_submodule(parent), child, adapted)
    return adapted


def forget_activations(model: PreTrainedModel) -> None:
    """Has every block of the model compute its activations again when the derivative wants them (arXiv 1604.06174).

    What is kept of a block is its input. The adapters must still be active when the derivative is taken.
    """
    names = getattr(model, "_no_split_modules", None) or ()
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    if not blocks:
        raise UnsupportedModelError(f"{type(model).__name__} does not say what its blocks are; unset checkpointing")
    for block in blocks:
        block.forward = partial(_forgetting, block.forward)


def _forgetting(forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **named)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **named)


@dataclass(frozen=True)
class Adaptable:
    """The layers of a model that adapters can change."""

    linear: dict[str, AdaptedLinear]
    embedding: AdaptedEmbedding

    @contextmanager
    def active(self, adapters: Sequence[Adapters], owned: Rectangle, dtype: torch.dtype) -> Iterator[None]:
        """Within it, the tokens of owner k pass through row k of every adapter; outside, the base is bare.

        An adapter of one row serves all owners. Raises `ValueError` for more than one soft prompt.
        """
        try:
            for order, adapter in enumerate(adapters):
                shape = owned if len(adapter.rows) == owned.rows else owned.together
                self._switch_on(adapter, order, shape, dtype)
            yield
        finally:
            self.embedding.active.clear()
            for module in self.linear.values():
                module.active.clear()
                module.scaled.clear()
                module.ready.clear()

    @contextmanager
    def merged(self, adapters: Sequence[Adapters]) -> Iterator[None]:
        """Within it the base's weights, as numbers, hold these LoRA adapters, of one row each; afterwards none."""
        before: dict[str, nn.Linear | QuantisedLinear] = {}
        try:
            for adapter in adapters:
                assert isinstance(adapter.layout, AdapterLayout) and len(adapter.rows) == 1
                for name, a, bt, _ in adapter.layout.unstack(adapter.rows, torch.float32):
                    base = self.linear[name].base
                    before.setdefault(name, base)
                    change = (adapter.layout.scale * bt[0].mT @ a[0]).to(base.weight.dtype)
                    self.linear[name].base = _linear(base.weight.detach() + change, base.bias)
            yield
        finally:
            for name, base in before.items():
                self.linear[name].base = base

    def _switch_on(self, adapter: Adapters, order: int, owned: Rectangle, dtype: torch.dtype) -> None:
        layout, rows = adapter.layout, adapter.rows
        if isinstance(layout, AdapterLayout):
            for name, a, bt, gate in layout.unstack(rows, dtype):
                self.linear[name].active.append(Factors(order, a, bt, layout.scale, owned, gate))
        elif isinstance(layout, ScalingLayout):
            for layer, vectors in layout.split(rows):
                self.linear[layer.name].scaled.append(Scaling(vectors.to(dtype), layer.on_input, owned))
        elif isinstance(layout, PromptLayout):
            if self.embedding.active:
                raise ValueError("two soft prompts cannot both stand before everything else")
            prompts = rows.view(len(rows), layout.tokens, layout.hidden)
            self.embedding.active.append((prompts.to(dtype), owned))
        else:
            raise TypeError(f"{type(layout).__name__} is no layout of adapters")


def _linear(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A frozen layer of these."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), bias  # type: ignore[assignment]
    return made


def _ends_in(name: str, targets: Sequence[str]) -> bool:
    return any(name == t or name.endswith(f".{t}") for t in targets)


def _endings(model: nn.Module) -> str:
    found = {n.rpartition(".")[2]: type(m).__name__ for n, m in model.named_modules() if hasattr(m, "weight") and n}
    return ", ".join(f"{ending} ({kind})" for ending, kind in sorted(found.items())) or "none"
