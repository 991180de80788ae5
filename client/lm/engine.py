"""One frozen language model with the adapters of many devices, on token ids: read, continue, differentiate, train.

Every method takes the examples of a whole cohort and does them together, several devices in one pass; a device's
numbers do not depend on its company beyond rounding. Needs torch and transformers only. Not covered: dropout,
several GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from client.lm import attention, layers
from client.lm.adapter import Adapters
from client.lm.cache import KeyValues
from client.lm.decode import Decoding
from client.lm.loss import logits, token_losses
from client.lm.memory import Allowance, keep_freed_memory
from client.lm.optimizer import Moments, adamw_
from client.lm.packing import Example, Pack, Rectangle, Texts, owned_by

CONTINUING = 4  # times as many tokens when nothing is kept for a derivative


@dataclass(frozen=True)
class Lesson:
    """What one device trains on: its examples and the batches, as indices, in their order."""

    examples: Sequence[Example]
    batches: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """Of the longest batch."""
        return max((sum(self.examples[i].length for i in batch) for batch in self.batches), default=0)


@dataclass(frozen=True)
class Training:
    """What came of the lessons."""

    adapters: Adapters
    losses: list[list[float]]  # of each device and step, nats per token
    failed: dict[int, str] = field(default_factory=dict)  # devices that are as they were before, and why


class Engine:
    """The frozen base, held once, and the operations on stacked adapters."""

    def __init__(self, model: PreTrainedModel, targets: Sequence[str] = (), max_batch_tokens: int = 2048) -> None:
        """Adapts the model in place; raises `UnsupportedModelError` for one that it cannot reproduce."""
        model.train(False)
        self.model = model.requires_grad_(False)
        self.device, self.dtype = model.device, model.dtype
        if self.device.type == "cpu":
            keep_freed_memory()
        self.head = layers.head_of(model)
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        expected = layers.probe(model)
        self.modules = layers.adapt(model, targets)
        model.set_attn_implementation(attention.NAME)
        self.allowance = Allowance(max_batch_tokens)
        self._check(expected)

    def active(self, adapters: Sequence[Adapters], owned: Rectangle) -> AbstractContextManager[None]:
        """The adapters switched on: row k of a stack for the tokens of owner k, one row for all."""
        return layers.active(self.modules, adapters, owned, self.dtype)

    # -- reading ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def hidden(self, examples: Sequence[Example]) -> Iterator[tuple[int, torch.Tensor]]:
        """Index and last hidden states (n, H) of each example, adapters off."""
        order = sorted(range(len(examples)), key=lambda i: -examples[i].length)

        def read(group: list[int]) -> tuple[torch.Tensor, ...]:
            chosen = [examples[i] for i in group]
            pack = Pack(chosen, [0] * len(chosen), self.device)
            hidden = self._forward(pack.ids, pack.positions, pack.texts)
            return torch.split(hidden, list(pack.texts.lengths))

        for group, found in self.allowance.each(order, _by_tokens([e.length for e in examples]), read):
            yield from zip(group, found, strict=True)

    @torch.inference_mode()
    def score(self, examples: Sequence[Example], slots: Sequence[int], adapters: Sequence[Adapters]) -> list[float]:
        """Summed NLL, nats, of each example's reply under the adapters of its device."""
        found = [0.0] * len(examples)

        def measure(group: list[int]) -> list[float]:
            pack = Pack([examples[i] for i in group], [slots[i] for i in group], self.device)
            with self.active([a.pick(pack.owners) for a in adapters], pack.owned):
                losses: list[float] = self._losses(pack).tolist()
                return losses

        lengths = [e.length for e in examples]
        for group, losses in self.allowance.each(_grouped(examples, slots), _by_tokens(lengths), measure):
            for i, loss in zip(group, losses, strict=True):
                found[i] = loss
        return found

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        slots: Sequence[int],
        adapters: Sequence[Adapters],
        *,
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        stop_id: int,
    ) -> list[list[int]]:
        """Ids that follow each prompt, without the stop token; row i draws from `seeds[i]` alone."""
        examples = [Example(tuple(p), (), (0, len(p)), False) for p in prompts]
        replies: dict[int, list[int]] = {}

        def continued(group: list[int]) -> list[list[int]]:
            decoding = Decoding([seeds[i] for i in group], max_new_tokens, temperature, stop_id, self.device)
            pack = Pack([examples[i] for i in group], [slots[i] for i in group], self.device)
            self._decode(pack, decoding, adapters)
            return decoding.replies

        room = [(e.length + max_new_tokens) // CONTINUING for e in examples]
        for group, ids in self.allowance.each(_grouped(examples, slots), _by_tokens(room), continued):
            replies.update(zip(group, ids, strict=True))
        return [replies[i] for i in range(len(prompts))]

    def _decode(self, pack: Pack, decoding: Decoding, adapters: Sequence[Adapters]) -> None:
        texts = Texts(pack.texts.lengths, self.device, ordered=True)
        lengths = torch.tensor(texts.lengths, device=self.device)  # (R,)
        cache = KeyValues(lengths, max(texts.lengths) + decoding.ids.shape[1])
        with self.active([a.pick(pack.owners) for a in adapters], pack.owned):
            hidden = self._forward(pack.ids, pack.positions, texts, cache)[lengths.cumsum(0) - 1]  # (R, H)
        decoding.take(self._logits(hidden))
        while decoding.running:
            cache.drop_to(decoding.drop_finished())
            owners, owned = owned_by([pack.slots[i] for i in decoding.rows.tolist()], self.device)
            with self.active([a.pick(owners) for a in adapters], owned):
                while decoding.steady:
                    cache.advance()
                    hidden = self._forward(decoding.last[None], cache.lengths[None], None, cache)
                    decoding.take(self._logits(hidden))

    # -- learning -----------------------------------------------------------------------------------------------

    def row_gradients(
        self,
        trained: Adapters,
        frozen: Sequence[Adapters],
        examples: Sequence[Example],
        slots: Sequence[int],
        weights: Sequence[float],
    ) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Gradient of each example's weighted loss in its own copy of its device's row.

        Yields groups: indices of the examples, gradients (R, P), summed token losses (R,) in nats. The loss of
        an example is `weight · Σ NLL over its own reply tokens`: no example can rescale another, which is what
        bounds its influence once its gradient is clipped.
        """
        order = sorted(range(len(examples)), key=lambda i: -examples[i].length)

        def differentiate(group: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            pack = Pack([examples[i] for i in group], range(len(group)), self.device)  # each its own owner
            devices = [slots[i] for i in group]
            rows = trained.rows[devices if len(trained.rows) > 1 else [0] * len(group)].detach().requires_grad_(True)
            weight = torch.tensor([weights[i] for i in group], device=self.device)
            with torch.enable_grad():
                with self.active([*(a.pick(devices) for a in frozen), Adapters(trained.layout, rows)], pack.owned):
                    losses = self._losses(pack)
                (gradient,) = torch.autograd.grad((losses * weight).sum(), rows)
            return gradient, losses.detach()

        for group, found in self.allowance.each(order, _by_tokens([e.length for e in examples]), differentiate):
            yield group, *found

    def finetune(
        self,
        trained: Adapters,
        frozen: Sequence[Adapters],
        lessons: Sequence[Lesson],
        rates: Sequence[Sequence[float]],
        weight_decay: float = 0.0,
    ) -> Training:
        """Trains the row of each device on its lesson, by AdamW on the mean loss over the tokens of each batch.

        Device k does step s on `lessons[k].batches[s]` at rate `rates[k][s]`. Devices are taken in blocks of like
        lessons, a block through all of its steps, so that the optimizer's state exists for one block at a time.
        A device whose loss or adapter stops being a number keeps the row that it came with and is named in `failed`.
        """
        rows, losses = trained.rows.clone(), [list[float]() for _ in lessons]
        busy = [k for k, x in enumerate(lessons) if x.batches]
        busy.sort(key=lambda k: (len(lessons[k].batches), lessons[k].tokens), reverse=True)

        def train(block: list[int]) -> tuple[torch.Tensor, list[list[float]]]:
            own = [a.pick(block) for a in frozen]
            work, pace = [lessons[k] for k in block], [rates[k] for k in block]
            return self._train_block(Adapters(trained.layout, trained.rows[block]), own, work, pace, weight_decay)

        failed: dict[int, str] = {}
        for block, (learned, found) in self.allowance.each(busy, _by_tokens([x.tokens for x in lessons]), train):
            sound = learned.isfinite().all(1).tolist()
            for place, k in enumerate(block):
                losses[k] = found[place]
                reason = _objection(found[place], sound[place])
                if reason:
                    failed[k] = reason
                else:
                    rows[k] = learned[place]
        return Training(Adapters(trained.layout, rows), losses, failed)

    def _train_block(
        self,
        start: Adapters,
        frozen: Sequence[Adapters],
        lessons: Sequence[Lesson],
        rates: Sequence[Sequence[float]],
        weight_decay: float,
    ) -> tuple[torch.Tensor, list[list[float]]]:
        """Rows (K, P) and losses of devices in the order of falling numbers of steps."""
        rows, losses = start.rows.clone(), [list[float]() for _ in lessons]
        moments = Moments.zeros(rows)
        for step in range(len(lessons[0].batches)):
            moving = sum(step < len(x.batches) for x in lessons)  # the first ones: the others are done
            batches = [[x.examples[i] for i in x.batches[step]] for x in lessons[:moving]]
            gradient, loss = self._step_gradient(Adapters(start.layout, rows), frozen, batches)
            adamw_(rows, gradient, moments, [r[step] for r in rates[:moving]], weight_decay)
            for own, value in zip(losses, loss.tolist(), strict=False):
                own.append(value)
        return rows, losses

    def _step_gradient(
        self, trained: Adapters, frozen: Sequence[Adapters], batches: Sequence[Sequence[Example]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient (M, P) and value (M,) of each device's mean loss over the tokens of its own batch."""
        pairs = [(k, e) for k, batch in enumerate(batches) for e in batch]
        tokens = torch.tensor([float(max(1, sum(e.targets for e in batch))) for batch in batches], device=self.device)
        value = torch.zeros(len(batches), device=self.device)
        parts = []
        for group in _by_tokens([e.length for _, e in pairs])(range(len(pairs)), self.allowance.tokens):
            pack = Pack([pairs[i][1] for i in group], [pairs[i][0] for i in group], self.device)
            rows = trained.rows[pack.owners[0] : pack.owners[-1] + 1].detach().requires_grad_(True)
            with torch.enable_grad():
                with self.active([*(a.pick(pack.owners) for a in frozen), Adapters(trained.layout, rows)], pack.owned):
                    losses = self._losses(pack) / tokens[pack.slots]
                parts.append((pack.owners, torch.autograd.grad(losses.sum(), rows)[0]))
            value.index_add_(0, torch.tensor(pack.slots, device=self.device), losses.detach())
        if len(parts) == 1:
            return parts[0][1], value
        gradient = torch.zeros_like(trained.rows[: len(batches)])
        for owners, part in parts:
            gradient[owners[0] : owners[-1] + 1] += part
        return gradient, value

    # -- forward ------------------------------------------------------------------------------------------------

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, texts: Texts | None, cache: KeyValues | None = None
    ) -> torch.Tensor:
        """Last hidden states (N, H) of tokens (1, N)."""
        out = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False, texts=texts, cache=cache)
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return logits(hidden, self.head.weight, self.head.bias, self.softcap)

    def _losses(self, pack: Pack) -> torch.Tensor:
        """Σ NLL over the targets of each example, (R,) nats; only targets pass the head."""
        places, ids, rows = pack.targets
        hidden = self._forward(pack.ids, pack.positions, pack.texts)[places]  # (M, H)
        losses = token_losses(hidden, self.head.weight, self.head.bias, ids, self.softcap)
        return torch.zeros(len(pack.examples), device=self.device).index_add(0, rows, losses)

    @torch.inference_mode()
    def _check(self, expected: torch.Tensor) -> None:
        """Refuses a model that packed texts and our own loss do not reproduce."""
        found = [self._logits(h) for _, h in self.hidden(layers.PROBES)]
        error = float((torch.cat(found).float() - expected).norm() / expected.norm())
        if not error < (1e-3 if self.dtype == torch.float32 else 5e-2):
            raise layers.UnsupportedModelError(
                f"{type(self.model).__name__} computes attention or logits in a way that is not supported: "
                f"packed texts differ by {error:.2g} of the logits' norm"
            )


Split = Callable[[Sequence[int], int], list[list[int]]]


def _by_tokens(lengths: Sequence[int]) -> Split:
    """Cuts indices, in their order, into groups of at most so many tokens, or of one index."""

    def split(items: Sequence[int], most: int) -> list[list[int]]:
        groups: list[list[int]] = []
        room = 0
        for i in items:
            room -= lengths[i]
            if not groups or room < 0:
                groups.append([])
                room = most - lengths[i]
            groups[-1].append(i)
        return groups

    return split


def _grouped(examples: Sequence[Example], slots: Sequence[int]) -> list[int]:
    """The examples' indices, those of a device together, devices with the most tokens first."""
    tokens: dict[int, int] = {}
    for example, slot in zip(examples, slots, strict=True):
        tokens[slot] = tokens.get(slot, 0) + example.length
    return sorted(range(len(examples)), key=lambda i: (-tokens[slots[i]], slots[i], -examples[i].length))


def _objection(losses: Sequence[float], sound: bool) -> str:
    """Why a device's training does not count; empty when it does."""
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            return f"the loss of step {step} is {loss}"
    return "" if sound else "the adapter is not finite"
