"""Training of numbers that an adapter's row is made of: the row's gradient goes on through what makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Layout
from florilegium.client.lm.batching import schedule
from florilegium.client.lm.optimizer import Moments, adamw_
from florilegium.client.lm.packing import Example
from florilegium.client.personalization.config import TrainingConfig
from florilegium.client.personalization.method import MethodContext, TrainingFailedError
from florilegium.privacy.seeds import derive_seed

Expand = Callable[[torch.Tensor], torch.Tensor]  # numbers (M, N) → rows (M, P)


def backward(
    context: MethodContext, layout: Layout, rows: torch.Tensor, batches: Sequence[Sequence[Example]], weight: float = 0
) -> None:
    """Backpropagates Σ weight · NLL over each row's batch, on what is beneath; 0: the mean over the batch's tokens."""
    lm = context.lm
    weights = [[weight or 1 / max(1, sum(e.targets for e in batch))] * len(batch) for batch in batches]
    gradient, _ = lm.engine.gradient(lm.adapters(layout, rows.detach()), context.beneath, batches, weights)
    rows.backward(gradient.cpu())


def teach(
    context: MethodContext,
    layout: Layout,
    parameters: Iterable[torch.nn.Parameter],
    rows_of: Callable[[Sequence[int]], torch.Tensor],
    examples: Sequence[Example],
    name: str,
) -> None:
    """Trains a network that makes a row for each example, by the mean loss over the tokens of a batch."""
    training = context.config.training
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0)
    order = derive_seed(context.seed, name, "order")
    for batch in schedule(len(examples), training.batch_size, training.epochs, order):
        optimizer.zero_grad()
        weight = 1 / max(1, sum(examples[i].targets for i in batch))
        backward(context, layout, rows_of(batch), [[examples[i]] for i in batch], weight)
        optimizer.step()


def train_through(
    context: MethodContext,
    layout: Layout,
    start: torch.Tensor,
    expand: Expand,
    examples: Sequence[Sequence[Dialogue]],
    names: Sequence[str],
    after: Callable[[torch.Tensor], None] = lambda numbers: None,
) -> torch.Tensor:
    """Numbers (K, N) of each name after training on its examples, as `MethodContext.train` trains rows.

    `after` is told of all numbers after each step. Raises `TrainingFailedError`.
    """
    training, numbers = context.config.training, start.clone()
    encoded = [context.lm.format.dialogues(own) for own in examples]
    orders = [_order(training, len(own), context.seed, n) for own, n in zip(examples, names, strict=True)]
    moments = Moments.zeros(numbers)
    for step in range(max(map(len, orders), default=0)):
        busy = [k for k, order in enumerate(orders) if step < len(order)]
        leaf = numbers[busy].requires_grad_()
        backward(context, layout, expand(leaf), [[encoded[k][i] for i in orders[k][step]] for k in busy])
        assert leaf.grad is not None
        rates = [training.learning_rate * (1 - step / len(orders[k])) for k in busy]
        adamw_(numbers, leaf.grad, moments, busy, rates, 0.0)
        after(numbers)
    if not numbers.isfinite().all():
        raise TrainingFailedError(f"the training of {context.config.name} diverged")
    return numbers


def _order(training: TrainingConfig, count: int, seed: int, name: str) -> list[list[int]]:
    return schedule(count, training.batch_size, training.epochs, derive_seed(seed, name, "personal"))
