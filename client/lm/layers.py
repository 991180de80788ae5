"""Linear layers that add the adapters of each row of a batch to what the frozen base computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from client.lm.adapter import AdaptedLayer, Adapters


class UnsupportedModelError(ValueError):
    """The model is built in a way that stacked adapters cannot change."""


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus the adapters that are active: `y = W x + Σ scale · B A x`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.active: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (R, T, in) → (R, T, out), row r through its own factors."""
        y: torch.Tensor = self.base(x)
        for a, b, scale in self.active:
            down = x @ a.mT if a.dim() == 2 or a.shape[0] > 1 else x @ a[0].mT  # (R, T, r)
            if b.shape[0] > 1:
                y = torch.baddbmm(y, down, b.mT, alpha=scale)
            else:
                y = torch.add(y, down @ b[0].mT, alpha=scale)
        return y


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
def active(modules: dict[str, AdaptedLinear], adapters: Sequence[Adapters], dtype: torch.dtype) -> Iterator[None]:
    """Within it, each row of a batch passes through its row of every adapter; outside, the base is bare."""
    try:
        for adapter in adapters:
            for name, a, b in adapter.layout.split(adapter.rows.to(dtype)):
                modules[name].active.append((a.to(b), b, adapter.layout.scale))
        yield
    finally:
        for module in modules.values():
            module.active = []


def _ends_in(name: str, targets: Sequence[str]) -> bool:
    return any(name == t or name.endswith(f".{t}") for t in targets)


def _endings(model: nn.Module) -> str:
    found = {n.rpartition(".")[2]: type(m).__name__ for n, m in model.named_modules() if hasattr(m, "weight") and n}
    return ", ".join(f"{ending} ({kind})" for ending, kind in sorted(found.items())) or "none"
