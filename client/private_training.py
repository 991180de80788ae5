"""How a device trains its copy of the shared adapter, with every other adapter off, and what of it may leave.

What is protected decides how (`privacy.modes`): one dialogue, by noisy clipped steps over a uniform pool; or one
device, by clipping its whole change, with the noise on the device or on the server. Before any training the ledger
is asked: a device whose account does not allow it learns for itself alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING

import torch

from florilegium.client.calibration import planned_event
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.batching import schedule_steps
from florilegium.client.lm.packing import Example
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.observation import Observation
from florilegium.client.state import DeviceState
from florilegium.privacy.dpsgd import PrivateRow
from florilegium.privacy.ledger import Answer, Request
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Release
from florilegium.privacy.seeds import derive_seed

if TYPE_CHECKING:
    from florilegium.client.context import CohortContext

Texts = list[tuple[Dialogue, ...]]  # of each dialogue, itself and what was made from it: one example
# Trains devices on what was received (P,); their changes by name
Learn = Callable[[Sequence[DeviceState], torch.Tensor, RoundPlan, "CohortContext"], dict[str, torch.Tensor]]


def train_shared(
    states: list[DeviceState],
    received: torch.Tensor,
    plan: RoundPlan,
    context: CohortContext,
    learn: Learn | None = None,
) -> tuple[list[DeviceState], list[torch.Tensor | None], list[Observation]]:
    """Trains each device's copy of the received adapter (P,); what it costs is in the ledger before.

    Returns the change of each device, of what travels in this round, None for one whose account does not allow it.
    `learn` gives the changes, already bounded as the mode demands, where something else is trained than our own.
    """
    answers = reserve(states, received, plan, context)
    after = [_charged(s, a, context) for s, a in zip(states, answers, strict=True)]
    able = [s for s, a in zip(after, answers, strict=True) if not a.refusal]
    learn = learn or (noisy_steps if context.config.privacy.by_dialogue else clipped_change)
    changes = learn(able, received, plan, context) if able else {}
    return after, [changes.get(s.id) for s in states], _observed(after, answers, context)


def release(
    changes: Sequence[torch.Tensor | None],
    states: Sequence[DeviceState],
    received: torch.Tensor,
    plan: RoundPlan,
    context: CohortContext,
) -> tuple[list[DeviceState], list[Release | None]]:
    """What leaves each device, and that it keeps a copy until the round is over.

    Raises `ReleaseRefusedError` for anything that is not of the agreed form.
    """
    asked = fingerprint(received)
    after = [replace(s, sent=change, asked=asked) for s, change in zip(states, changes, strict=True)]
    return after, [_sent(state, asked, plan, context) for state in after]


def resend(state: DeviceState, received: torch.Tensor, plan: RoundPlan, context: CohortContext) -> Release | None:
    """The release that this device made in this round for this adapter, bit by bit; None for another one.

    It is never computed again: rounded otherwise, under the same noise, it would tell what the noise hides.
    """
    return _sent(state, fingerprint(received), plan, context)


def _sent(state: DeviceState, asked: str, plan: RoundPlan, context: CohortContext) -> Release | None:
    if state.sent is None or state.asked != asked:
        return None
    schema = context.schema.of_round(plan.round, context.rank_of(state.id))
    return Release.of(state.sent.numpy(), plan.version, state.head, schema)


def fingerprint(received: torch.Tensor) -> str:
    """SHA-256 of a shared adapter (P,): whether a server asks the same again."""
    return sha256(received.numpy().tobytes()).hexdigest()


def reserve(
    states: Sequence[DeviceState], received: torch.Tensor, plan: RoundPlan, context: CohortContext
) -> list[Answer]:
    """Asks the ledger for what the round will spend; what it grants is on the disk."""
    event, asked = planned_event(context.config), fingerprint(received)
    requests = [
        Request(
            device=s.id,
            genesis=s.genesis,
            experiment=context.experiment,
            round=plan.round,
            received=asked,
            event=event,
            dialogues=tuple(i for i, _ in s.pool.slots),
            heads=tuple(head for head in (s.head, plan.heads.get(s.id, "")) if head),
            repeatable=context.config.privacy.secret != "os",
        )
        for s in states
    ]
    return context.accounts.reserve(requests, context.config.privacy.budget)


def _charged(state: DeviceState, answer: Answer, context: CohortContext) -> DeviceState:
    """With the account's new head, and without the dialogues whose budget is spent."""
    if answer.refusal:
        return state
    retiring = context.config.privacy.budget.of == "dialogue"
    return replace(state, head=answer.head, pool=state.pool.only(answer.dialogues) if retiring else state.pool)


def _observed(states: Sequence[DeviceState], answers: Sequence[Answer], context: CohortContext) -> list[Observation]:
    accounts = context.accounts.accounts([(s.id, s.genesis) for s in states])
    budget = context.config.privacy.budget
    return [
        Observation(epsilon=account.spent(budget) if account else None, refusal=a.refusal or None)
        for account, a in zip(accounts, answers, strict=True)
    ]


# -- one dialogue -------------------------------------------------------------------------------------------------


def noisy_steps(
    states: Sequence[DeviceState], received: torch.Tensor, plan: RoundPlan, context: CohortContext
) -> dict[str, torch.Tensor]:
    """DP-SGD on a Poisson sample of the pool. A dialogue and what was made from it are clipped as one example."""
    shared, weights = context.config.shared, context.weights(received)
    before = context.shared_rows(received, [s.id for s in states]).expand(len(states), -1)  # (K, P)
    whole, places = before.clone(), places_of(states, plan, context)
    rows = {s.id: _private_row(s, row[places[s.id]], plan, context) for s, row in zip(states, whole, strict=True)}
    source = _pooled if shared.source == "pool" else _buffered
    sets = {s.id: [context.lm.format.dialogues(texts) for texts in source(s)] for s in states}
    for step in range(shared.steps_per_round):
        chosen = {s.id: context.coins.sample(s, len(sets[s.id]), plan, step, context) for s in states}
        batches = [[example for i in chosen[s.id] if (example := sets[s.id][i])] for s in states]
        for state, row in zip(states, whole, strict=True):
            row[places[state.id]] = rows[state.id].row
        now = context.lm.adapters(context.shared_layout, whole)
        for state, gradients in zip(states, _gradients(batches, now, weights, context), strict=True):
            rows[state.id].step(gradients[:, places[state.id]])
    return {s.id: rows[s.id].row - old[places[s.id]] for s, old in zip(states, before, strict=True)}


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
    sets = [_lesson(s, plan, context) for s in states]
    rates = [[config.shared.adamw_learning_rate] * len(training_set.batches) for training_set in sets]
    before = context.shared_rows(received, [s.id for s in states]).expand(len(states), -1)  # (K, P)
    start, places = context.lm.adapters(context.shared_layout, before), places_of(states, plan, context)
    learned = context.lm.engine.finetune(start, context.weights(received), sets, rates, proximal=config.shared.proximal)
    trained = learned.adapters.rows.cpu()
    sigma = planned_event(config).noise_multiplier if config.privacy.mode == "user-local" else 0.0
    changes = {}
    for state, old, row in zip(states, before, trained, strict=True):
        change = (row - old)[places[state.id]]
        one_step = PrivateRow(
            torch.zeros_like(change), learning_rate=1.0, clip_norm_l2=config.privacy.clip_norm_l2,
            noise_multiplier=sigma, expected_batch=1.0, key=context.coins.noise_key(state, plan, context),
        )  # fmt: skip
        one_step.step(-change[None])
        changes[state.id] = one_step.row
    return changes


def _lesson(state: DeviceState, plan: RoundPlan, context: CohortContext) -> TrainingSet:
    shared = context.config.shared
    source = _pooled if shared.source == "pool" else _buffered
    dialogues = [d for texts in source(state) for d in texts]
    seed = derive_seed(context.seed, state.id, plan.round, "shared-order")
    return TrainingSet(
        context.lm.format.dialogues(dialogues),
        schedule_steps(len(dialogues), shared.batch_size, shared.steps_per_round, seed),
    )
