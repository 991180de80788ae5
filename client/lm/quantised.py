"""The weights of linear layers in 8 or 4 bits, made numbers again a block at a time, where they are multiplied with.

Weight-only, by rounding to the nearest: no data is looked at, so that what is computed depends on the model alone. A
derivative reaches the input, never the weights. Embeddings, the head and norms stay as they are. Not covered: products
of integers; what is saved is memory, and not time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from florilegium.client.lm.places import ModelError

Weights = Literal["float", "int8", "int4"]
GROUP = 32  # weights of one row that share a scale and an offset in 4 bits
BLOCK = 1 << 22  # weights that are numbers at a time
LEAST_SCALE = 1e-12


class QuantisedLinear(nn.Module):
    """A frozen linear layer whose weights are codes: `w = scale · code`, in 4 bits `offset + scale · code`."""

    codes: torch.Tensor  # int8 (out, in), or uint8 (out, in / 2) with the even columns in the lower four bits
    scales: torch.Tensor  # float32 (out, 1), or float16 (out, in / GROUP, 1)
    offsets: torch.Tensor  # float16 (out, in / GROUP, 1); empty in 8 bits

    def __init__(self, layer: nn.Linear, weights: Weights) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, self.dtype = layer.bias, layer.weight.dtype
        made = _in_8_bits if weights == "int8" else _in_4_bits
        for name, x in zip(("codes", "scales", "offsets"), made(layer.weight.detach().float()), strict=True):
            self.register_buffer(name, x)

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), all of it as numbers."""
        return self.rows(slice(None))

    def rows(self, some: slice) -> torch.Tensor:
        """These rows of the weights, as numbers."""
        codes = self.codes[some]
        if not len(self.offsets):
            return (codes * self.scales[some]).to(self.dtype)
        whole = torch.stack((codes & 15, codes >> 4), -1).view(*self.scales[some].shape[:2], -1)
        return (whole * self.scales[some].float() + self.offsets[some].float()).view(len(codes), -1).to(self.dtype)

    def blocks(self) -> Iterator[slice]:
        """The rows that are numbers at a time: a function of the layer's shape alone."""
        step = max(1, BLOCK // self.in_features)
        for start in range(0, self.out_features, step):
            yield slice(start, start + step)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) → (..., out)."""
        y: torch.Tensor = _Product.apply(x.reshape(-1, self.in_features), self)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """The product with weights of which nothing is kept for the derivative but their codes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer = layer
        return product(x, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return input_gradient([grad], [ctx.layer]), None


def product(x: torch.Tensor, layer: nn.Linear | QuantisedLinear) -> torch.Tensor:
    """(N, in) → (N, out), without a derivative."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight, layer.bias)
    y = x.new_empty(len(x), layer.out_features)
    for some in layer.blocks():
        y[:, some] = x @ layer.rows(some).mT
    return y if layer.bias is None else y.add_(layer.bias)


def input_gradient(grads: list[torch.Tensor], layers: list[nn.Linear | QuantisedLinear]) -> torch.Tensor:
    """(N, in), Σ grad @ W over layers with the same input; each grad is (N, out) of its layer."""
    total: torch.Tensor | None = None
    for grad, layer in zip(grads, layers, strict=True):
        for part, weight in _parts(grad, layer):
            total = part @ weight if total is None else total.addmm_(part, weight)
    assert total is not None
    return total


def _parts(grad: torch.Tensor, layer: nn.Linear | QuantisedLinear) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if isinstance(layer, nn.Linear):
        yield grad, layer.weight
        return
    for some in layer.blocks():
        yield grad[:, some], layer.rows(some)


def quantise(model: nn.Module, weights: Weights) -> None:
    """Puts a `QuantisedLinear` in the place of each linear layer of the model but its head. Raises `ModelError`."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {name: m.in_features for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for name, inputs in linear.items():  # not the layers themselves: each is gone before the next has codes
        if weights == "int4" and inputs % GROUP:
            raise ModelError(
                f"model.weights = 'int4' needs layers whose inputs are a multiple of {GROUP}, and {name} has "
                f"{inputs}; use 'int8' or 'float'"
            )
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), child, QuantisedLinear(layer, weights))


def layers_of(model: nn.Module) -> Iterator[QuantisedLinear]:
    """The layers of a model whose weights are codes."""
    return (m for m in model.modules() if isinstance(m, QuantisedLinear))


def _in_8_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One scale a row: its largest magnitude is 127."""
    scales = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(LEAST_SCALE)
    return (weight / scales).round().to(torch.int8), scales, scales.new_empty(0)


def _in_4_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A scale and an offset a group: its least weight is 0, its largest 15."""
    groups = weight.view(len(weight), -1, GROUP)
    offsets = groups.amin(-1, keepdim=True).half()
    scales = ((groups.amax(-1, keepdim=True) - offsets.float()) / 15).half().clamp_min(torch.finfo(torch.half).tiny)
    codes = ((groups - offsets.float()) / scales.float()).round().clamp(0, 15).to(torch.uint8).view(len(weight), -1)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales, offsets
