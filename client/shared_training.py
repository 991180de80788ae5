"""How a device trains its copy of the shared adapter, with every other adapter off, as `privacy.modes` wants it.

By noisy clipped steps over a uniform pool, or by clipping its whole change, with the noise on the device, on the
server, or a share of it, as integers of a sum. What it costs is paid for before (`client.private_training`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from florilegium.client.calibration import planned_event
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.batching import schedule_steps
from florilegium.client.lm.packing import Example
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.state import DeviceState
from florilegium.privacy.dpsgd import PrivateRow, clipped_sum
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.seeds import derive_seed

if TYPE_CHECKING:
    from florilegium.client.context import CohortContext

Texts = list[tuple[Dialogue, ...]]  # of each dialogue, itself and what was made from it: one example
# Trains devices on what was received (P,); their changes by name
Learn = Callable[[Sequence[DeviceState], torch.Tensor, RoundPlan, "CohortContext"], dict[str, torch.Tensor]]


# -- one dialogue -------------------------------------------------------------------------------------------------


def noisy_steps(
    states: Sequence[DeviceState], received: torch.Tensor, plan: RoundPlan, context: CohortContext
) -> dict[str, torch.Tensor]:
    """DP-SGD on a Poisson sample of the pool. A dialogue and what was made from it are clipped as one example."""
    before = context.shared_rows(received, [s.id for s in states]).expand(len(states), -1)  # (K, P)
    whole, places = before.clone(), places_of(states, plan, context)
    rows = {s.id: _private_row(s, row[places[s.id]], plan, context) for s, row in zip(states, whole, strict=True)}
    sets, weights = _examples(states, context), context.weights(received)
    for step in range(context.config.shared.steps_per_round):
        for state, row in zip(states, whole, strict=True):
            row[places[state.id]] = rows[state.id].row
        drawn = _drawn(states, sets, step, plan, context)
        found = _gradients(drawn, context.lm.adapters(context.shared_layout, whole), weights, context)
        for state, gradients in zip(states, found, strict=True):
            rows[state.id].step(gradients[:, places[state.id]])
    return {s.id: rows[s.id].row - old[places[s.id]] for s, old in zip(states, before, strict=True)}


Examples = list[list[Example]]  # of each dialogue, the texts that are one example; none where nothing is known


def _examples(states: Sequence[DeviceState], context: CohortContext) -> list[Examples]:
    source = _pooled if context.config.shared.source == "pool" else _buffered
    return [[context.lm.format.dialogues(texts) for texts in source(s)] for s in states]


def _drawn(
    states: Sequence[DeviceState], sets: Sequence[Examples], step: int, plan: RoundPlan, context: CohortContext
) -> list[Examples]:
    """A Poisson sample of each device's examples."""
    chosen = [context.coins.sample(s, len(of), plan, step, context) for s, of in zip(states, sets, strict=True)]
    return [[example for i in some if (example := of[i])] for some, of in zip(chosen, sets, strict=True)]


def places_of(states: Sequence[DeviceState], plan: RoundPlan, context: CohortContext) -> dict[str, torch.Tensor]:
    """(P,) of each device: the numbers that it trains in this round."""
    ranks = {s.id: context.rank_of(s.id) for s in states}
    of_rank = {rank: torch.from_numpy(context.schema.places(plan.round, rank)) for rank in set(ranks.values())}
    return {device: of_rank[rank] for device, rank in ranks.items()}


def _gradients(
    batches: Sequence[Sequence[list[Example]]], adapters: Adapters, weights: list[Adapters], context: CohortContext
) -> list[torch.Tensor]:
    """Of each device (b, P): the mean over an example's texts of the gradient of each text's own mean loss."""
    flat = [[text for example in batch for text in example] for batch in batches]
    found, _ = context.lm.engine.dp_gradients(adapters, weights, flat)
    means = []
    for gradients, batch in zip(found, batches, strict=True):
        owner = torch.tensor([i for i, example in enumerate(batch) for _ in example], dtype=torch.long)
        weight = torch.tensor([1 / len(example) for example in batch for _ in example])
        mean = torch.zeros(len(batch), gradients.shape[1])
        means.append(mean.index_add_(0, owner, gradients * weight[:, None]))
    return means


def _private_row(state: DeviceState, received: torch.Tensor, plan: RoundPlan, context: CohortContext) -> PrivateRow:
    shared = context.config.shared
    return PrivateRow(
        received,
        learning_rate=shared.learning_rate,
        clip_norm_l2=context.config.privacy.clip_norm_l2,
        noise_multiplier=planned_event(context.config).noise_multiplier,
        expected_batch=shared.sampling_rate * shared.pool_capacity,
        key=context.coins.noise_key(state, plan, context),
        proximal=shared.proximal,
    )


def _pooled(state: DeviceState) -> Texts:
    """Of each slot of the pool the original, with the user's own reply, and its synthetic descendants.

    A slot whose reply is not known, or is the model's, has nothing to learn, and keeps its coin: it changes no other's.
    """
    own = state.own
    return [
        tuple(Dialogue(i, *pair) for pair in ((prompt, own[i]), *state.pool_synthetic.get(i, ()))) if i in own else ()
        for i, prompt in state.pool.slots
    ]


def _buffered(state: DeviceState) -> Texts:
    """Of each bin the original, with the user's own reply."""
    own = state.own
    return [(Dialogue(k.id, k.prompt, own[k.id]),) for k in state.annotated if k.id in own]


# -- one device ---------------------------------------------------------------------------------------------------


def clipped_change(
    states: Sequence[DeviceState], received: torch.Tensor, plan: RoundPlan, context: CohortContext
) -> dict[str, torch.Tensor]:
    """Trains without noise, then clips the whole change; in `user-local` the device adds the noise itself."""
    config = context.config
    sigma = planned_event(config).noise_multiplier if config.privacy.mode == "user-local" else 0.0
    changes = {}
    for state, change in zip(states, _learned(states, received, plan, context), strict=True):
        one_step = PrivateRow(
            torch.zeros_like(change), learning_rate=1.0, clip_norm_l2=config.privacy.clip_norm_l2,
            noise_multiplier=sigma, expected_batch=1.0, key=context.coins.noise_key(state, plan, context),
        )  # fmt: skip
        one_step.step(-change[None])
        changes[state.id] = one_step.row
    return changes


def _learned(
    states: Sequence[DeviceState], received: torch.Tensor, plan: RoundPlan, context: CohortContext
) -> list[torch.Tensor]:
    """The change of each device, of what travels, as AdamW makes it."""
    config = context.config
    sets = [_lesson(s, plan, context) for s in states]
    rates = [[config.shared.adamw_learning_rate] * len(training_set.batches) for training_set in sets]
    before = context.shared_rows(received, [s.id for s in states]).expand(len(states), -1)  # (K, P)
    start, places = context.lm.adapters(context.shared_layout, before), places_of(states, plan, context)
    learned = context.lm.engine.finetune(start, context.weights(received), sets, rates, proximal=config.shared.proximal)
    trained = learned.adapters.rows.cpu()
    return [(row - old)[places[s.id]] for s, old, row in zip(states, before, trained, strict=True)]


def _lesson(state: DeviceState, plan: RoundPlan, context: CohortContext) -> TrainingSet:
    shared = context.config.shared
    source = _pooled if shared.source == "pool" else _buffered
    dialogues = [d for texts in source(state) for d in texts]
    seed = derive_seed(context.seed, state.id, plan.round, "shared-order")
    return TrainingSet(
        context.lm.format.dialogues(dialogues),
        schedule_steps(len(dialogues), shared.batch_size, shared.steps_per_round, seed),
    )


# -- parts of a sum -----------------------------------------------------------------------------------------------


def change_in_a_sum(
    states: Sequence[DeviceState], received: torch.Tensor, plan: RoundPlan, context: CohortContext
) -> dict[str, torch.Tensor]:
    """A device's whole change, clipped, with its share of the noise, as integers (P,) int64."""
    clip = context.config.privacy.clip_norm_l2
    changes = zip(states, _learned(states, received, plan, context), strict=True)
    return {s.id: _coded(clipped_sum(_finite(change[None]), clip), s, plan, context) for s, change in changes}


def gradients_in_a_sum(
    states: Sequence[DeviceState], received: torch.Tensor, plan: RoundPlan, context: CohortContext
) -> dict[str, torch.Tensor]:
    """The step of a Poisson sample of the pool, each dialogue clipped, with a share of the noise, as integers (P,)."""
    shared, clip = context.config.shared, context.config.privacy.clip_norm_l2
    rows = context.shared_rows(received, [s.id for s in states]).expand(len(states), -1).clone()  # (K, P)
    drawn = _drawn(states, _examples(states, context), 0, plan, context)
    found = _gradients(drawn, context.lm.adapters(context.shared_layout, rows), context.weights(received), context)
    places = places_of(states, plan, context)
    per_dialogue = -shared.learning_rate / (shared.sampling_rate * shared.pool_capacity)
    return {
        s.id: _coded(per_dialogue * clipped_sum(_finite(gradients[:, places[s.id]]), clip), s, plan, context)
        for s, gradients in zip(states, found, strict=True)
    }


def _finite(rows: torch.Tensor) -> torch.Tensor:
    """What is not a number counts as zero: it must not decide over the others."""
    return torch.where(torch.isfinite(rows).all(dim=1, keepdim=True), rows, 0.0)


def _coded(row: torch.Tensor, state: DeviceState, plan: RoundPlan, context: CohortContext) -> torch.Tensor:
    code = context.sum_code(plan.round)
    draws = np.random.Generator(np.random.Philox(key=context.coins.noise_key(state, plan, context)))
    return torch.from_numpy(code.encoded(row.numpy(), draws.standard_normal(code.width)))


LEARNING: dict[tuple[bool, bool], Learn] = {  # by whether noise is added together, and whether dialogues are protected
    (False, True): noisy_steps,
    (False, False): clipped_change,
    (True, True): gradients_in_a_sum,
    (True, False): change_in_a_sum,
}
