"""Linear layers that add the adapters of each device to what the frozen base computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from client.lm.adapter import AdaptedLayer, Adapters
from client.lm.packing import Example, Rectangle


class UnsupportedModelError(ValueError):
    """The model is built in a way that stacked adapters cannot change."""


@dataclass(frozen=True)
class Factors:
    """One layer's part of stacked adapters, and which tokens each device has."""

    a: torch.Tensor  # (K, r, in)
    bt: torch.Tensor  # (K, r, out), B transposed
    scale: float
    owned: Rectangle


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus the adapters that are active: `y = W x + Σ scale · B A x`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.active: list[Factors] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) → (..., out); the tokens are those of the active factors' rectangles."""
        if not self.active:
            return self.base(x)  # type: ignore[no-any-return]
        tensors = [t for f in self.active for t in (f.a, f.bt)]
        flat = x.reshape(-1, x.shape[-1])
        y: torch.Tensor = _Adapted.apply(flat, self.base.weight, self.base.bias, self.active, *tensors)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)


class _Adapted(torch.autograd.Function):
    """The layer and its derivative, with the thin operands transposed instead of the activations."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        active: list[Factors],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight, bias)  # (N, out)
        saved = [weight]
        for f in active:
            spread = f.owned.spread(x)  # (K, T, in)
            down = torch.bmm(f.a, spread.mT).mul_(f.scale)  # (K, r, T)
            if f.owned.even:
                y.view(*spread.shape[:2], -1).baddbmm_(down.mT, f.bt)
            else:
                y.add_(f.owned.collect(torch.bmm(down.mT, f.bt)))
            saved += [spread, down, f.a, f.bt]
        ctx.save_for_backward(*saved)
        ctx.active = [(f.scale, f.owned) for f in active]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        found: list[torch.Tensor | None] = []
        for i, (scale, owned) in enumerate(ctx.active):
            spread, down, a, bt = saved[4 * i : 4 * i + 4]
            needs_a, needs_b = ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i]
            out = owned.spread_zero(grad)  # (K, T, out)
            ddown = torch.bmm(bt, out.mT).mul_(scale)  # (K, r, T)
            found.append(torch.bmm(ddown, spread) if needs_a else None)
            found.append(torch.bmm(down, out) if needs_b else None)
            if dx is not None and owned.even:
                dx.view(*out.shape[:2], -1).baddbmm_(ddown.mT, a)
            elif dx is not None:
                dx.add_(owned.collect(torch.bmm(ddown.mT, a)))
        return dx, None, None, None, *found


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The layer that makes logits of the last hidden states."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(f"the head of {type(model).__name__} is {type(head).__name__}, not nn.Linear")
    return head


PROBES = tuple(Example(tuple(range(3, 3 + n)), (), (0, n), False) for n in (4, 9, 6))


@torch.inference_mode()
def probe(model: PreTrainedModel) -> torch.Tensor:
    """Logits of `PROBES` one after the other, by the model as it is; (N, V)."""
    ids = [torch.tensor([x.prompt], device=model.device) for x in sorted(PROBES, key=lambda x: -x.length)]
    return torch.cat([model(i, use_cache=False).logits[0] for i in ids]).float()


def adapt(model: nn.Module, targets: Sequence[str]) -> dict[str, AdaptedLinear]:
    """Puts an `AdaptedLinear` in the place of each linear layer whose name ends in a target; by name.

    Without targets, of every linear layer but the head.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    names = [n for n, _ in model.named_modules() if _ends_in(n, targets)] if targets else linear
    if not names:
        sought = f"ends in any of {', '.join(targets)}" if targets else "is nn.Linear outside the head"
        raise UnsupportedModelError(
            f"no layer of {type(model).__name__} {sought}; its layers with weights end in: {_endings(model)}; "
            f"adapters need nn.Linear, as in Llama, Qwen, Gemma or GPT-NeoX; set [model] targets"
        )
    adapted: dict[str, AdaptedLinear] = {}
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear) or module is head:
            raise UnsupportedModelError(
                f"layer {name} of {type(model).__name__} is {type(module).__name__}; adapters need nn.Linear "
                f"outside the head, as in Llama, Qwen, Gemma or GPT-NeoX"
            )
        adapted[name] = AdaptedLinear(module)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapted[name])
    return adapted


def adapted_layers(modules: dict[str, AdaptedLinear], targets: Sequence[str] = ()) -> tuple[AdaptedLayer, ...]:
    """Names and sizes of the layers that an adapter with these targets changes, in the model's order."""
    chosen = [n for n in modules if not targets or _ends_in(n, targets)]
    if not chosen:
        endings = sorted({n.rpartition(".")[2] for n in modules})
        raise UnsupportedModelError(f"targets {list(targets)} match no adapted layer; there are {endings}")
    return tuple(AdaptedLayer(n, modules[n].base.in_features, modules[n].base.out_features) for n in chosen)


@contextmanager
def active(
    modules: dict[str, AdaptedLinear], adapters: Sequence[Adapters], owned: Rectangle, dtype: torch.dtype
) -> Iterator[None]:
    """Within it, the tokens of owner k pass through row k of every adapter; outside, the base is bare.

    An adapter of one row serves all owners.
    """
    try:
        for adapter in adapters:
            shape = owned if len(adapter.rows) == owned.rows else owned.together
            for name, a, bt in adapter.unstack(dtype):
                modules[name].active.append(Factors(a, bt, adapter.layout.scale, shape))
        yield
    finally:
        for module in modules.values():
            module.active = []


def _ends_in(name: str, targets: Sequence[str]) -> bool:
    return any(name == t or name.endswith(f".{t}") for t in targets)


def _endings(model: nn.Module) -> str:
    found = {n.rpartition(".")[2]: type(m).__name__ for n, m in model.named_modules() if hasattr(m, "weight") and n}
    return ", ".join(f"{ending} ({kind})" for ending, kind in sorted(found.items())) or "none"
