"""A round as phases over a cohort: each takes states and returns new ones with what was observed.

    stream → observe → annotate → descend → learn_shared → release   (then the server aggregates)
                       synthesize → learn_personal                   (on the new shared adapter)

What the shared adapter's training does is in `client.private_training`.

The control flow of a device is plain Python; whatever touches the language model is one call for all devices.
A device that is deployed is a cohort of one. Every phase is a function of its arguments: repeated, it gives the
same result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue, Echo
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.batching import schedule, schedule_steps
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.observation import Observation
from florilegium.client.selection.buffer import candidate
from florilegium.client.selection.lexicons import load_lexicons
from florilegium.client.state import DeviceState, StateError, States
from florilegium.client.synthesize import Request, Written
from florilegium.client.synthesize import synthesize as write_similar
from florilegium.client.token_weights import by_contrast, by_recency
from florilegium.privacy.common.registry import naming
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.seeds import derive_seed


def observe(
    states: States, arrived: Sequence[Sequence[Dialogue]], plan: RoundPlan, context: CohortContext
) -> tuple[States, list[Observation]]:
    """Takes what came in: into the buffer by the policy, into the pool by coins. The replies are not looked at.

    What was said before a dialogue is in the buffer with it, and not in the pool, where one's words are one dialogue's.
    """
    selection = context.config.selection
    lexicons = load_lexicons(selection.lexicons)
    texts = [d.in_context.prompt for dialogues in arrived for d in dialogues]
    features = iter(context.lm.embed(texts, [selection.reading]))
    after, notes = [], []
    for state, dialogues in zip(states, arrived, strict=True):
        if state.buffer.config != selection:
            raise StateError(f"device {state.id} has selected by other settings; start it anew or restore [selection]")
        rng = np.random.Generator(np.random.Philox(key=derive_seed(context.seed, state.id, plan.round, "policy")))
        buffer, pool, accepted, truncated = state.buffer, state.pool, 0, 0
        for dialogue in dialogues:
            feature = next(features)
            with naming(state.id):
                buffer, taken = buffer.offer(candidate(dialogue.in_context, feature, lexicons, selection), rng)
            pool = pool.offer(dialogue.id, dialogue.prompt, state.secret)
            accepted, truncated = accepted + taken, truncated + feature.truncated
        after.append(replace(state, buffer=buffer, pool=pool, arrived=state.arrived + len(dialogues)))
        seen = Observation(
            arrived=len(dialogues),
            accepted=accepted,
            buffered=len(buffer),
            buffer_bytes=buffer.size_bytes,
            truncated=truncated,
        )
        notes.append(seen)
    return after, notes


def annotate(states: States, context: CohortContext) -> tuple[States, list[Observation]]:
    """Asks each user for the reply to what is kept until there is one, and forgets those of dropped dialogues.

    Of the buffer at most `annotations_per_round` are asked, chosen by coins that do not look at the data; the others
    wait for a later round.
    """
    limit = context.config.selection.annotations_per_round
    after, notes = [], []
    for state in states:
        pool = [i for i, _ in state.pool.slots]
        waiting = [k.id for k in state.buffer.bins if k.id not in state.replies and k.id not in pool]
        if limit and math.isfinite(state.buffer.capacity):
            waiting = sorted(waiting, key=lambda i: derive_seed(context.seed, state.id, i, "ask"))[:limit]
        kept = [k.id for k in state.buffer.bins if k.id in state.replies] + waiting + pool
        replies = {i: reply for i in kept if (reply := state.replies.get(i) or context.user(state.id, i))}
        before = state.echoes & state.replies.keys()
        echoes = frozenset(i for i, reply in replies.items() if isinstance(reply, Echo) or i in before)
        asked = state.annotations + sum(i not in state.replies for i in replies)
        after.append(replace(state, replies=replies, echoes=echoes, annotations=asked))
        notes.append(Observation(annotations=asked))
    return after, notes


def synthesize_pool(states: States, context: CohortContext) -> tuple[States, list[Observation]]:
    """Writes dialogues like each one of the pool that is new there, and whose reply is its user's own.

    Each is judged by its own original alone: no dialogue decides what becomes of another.
    """
    only = {"per_dialogue": context.config.shared.synthetic, "accept": "paper"}  # a batch's rounding decides nothing
    settings = context.config.synthesis.model_copy(update=only)
    own = {s.id: s.own for s in states}
    fresh = [(s, i, p) for s in states for i, p in s.pool.slots if i in own[s.id] and i not in s.pool_synthetic]
    requests = [
        Request(f"{s.id}/{i}", (p, s.replies[i]), derive_seed(context.seed, s.id, i, "descendants"))
        for s, i, p in fresh
    ]
    made = {r.device: w.kept for r, w in zip(requests, write_similar(requests, [], context.lm, settings), strict=True)}
    after = [
        replace(
            s,
            pool_synthetic={
                i: made.get(f"{s.id}/{i}", s.pool_synthetic.get(i, ())) for i, _ in s.pool.slots if i in own[s.id]
            },
        )
        for s in states
    ]
    return after, [Observation(descendants=sum(map(len, s.pool_synthetic.values()))) for s in after]


def synthesize(states: States, plan: RoundPlan, context: CohortContext) -> tuple[States, list[Observation]]:
    """Writes dialogues like each newly buffered one; the checks may throw all of them away."""
    fresh = [(s, k) for s in states for k in s.annotated if k.id not in s.synthetic]
    requests = [
        Request(s.id, (k.prompt, s.replies[k.id]), derive_seed(context.seed, s.id, k.id, "synthesis")) for s, k in fresh
    ]
    known = [(s.id, text) for s in states for made in s.synthetic.values() for pair in made for text in pair]
    known += [(s.id, text) for s in states for k in s.annotated for text in (k.prompt, s.replies[k.id])]
    written = write_similar(requests, known, context.lm, context.config.synthesis)
    made: dict[str, dict[str, Written]] = {s.id: {} for s in states}
    for (state, kept), found in zip(fresh, written, strict=True):
        made[state.id][kept.id] = found
    after, notes = [], []
    for state in states:
        own = made[state.id]
        synthetic = {k.id: own[k.id].kept if k.id in own else state.synthetic[k.id] for k in state.annotated}
        rejected = sum((w.rejected for w in own.values()), Counter[str]())
        after.append(replace(state, synthetic=synthetic))
        seen = Observation(
            synthetic_kept=sum(len(w.kept) for w in own.values()),
            synthetic_rejected=rejected.total(),
            synthetic_reasons=dict(rejected),
        )
        notes.append(seen)
    return after, notes


def learn_personal(
    states: States, received: torch.Tensor | None, plan: RoundPlan, context: CohortContext
) -> tuple[States, list[Observation]]:
    """Trains each personal adapter on what is buffered, the received shared adapter (P,) frozen beneath it, if any."""
    config, lm = context.config.personal, context.lm
    beneath = [] if received is None else frozen_adapters(received, [s.id for s in states], context)
    sets = _weighted(states, [_lesson(state, plan, context) for state in states], beneath, context)
    start = [_start(state, context) for state in states]
    rates = [[config.learning_rate * (1 - s / len(x.batches)) for s in range(len(x.batches))] for x in sets]
    trained = lm.engine.finetune(
        lm.adapters(context.personal_layout, torch.stack(start)),
        beneath,
        sets,
        rates,
        config.weight_decay,
    )
    rows = trained.adapters.rows.cpu()
    after = [replace(s, personal=row.clone()) for s, row in zip(states, rows, strict=True)]
    return after, [
        Observation(
            personal_loss_first=x[0] if x else None,
            personal_loss_last=x[-1] if x else None,
            personal_examples=len(training_set.examples),
            personal_steps=len(training_set.batches),
            personal_tokens=_tokens(training_set),
            personal_failed=trained.failed.get(k),
        )
        for k, (x, training_set) in enumerate(zip(trained.losses, sets, strict=True))
    ]


def _weighted(
    states: States, sets: Sequence[TrainingSet], beneath: Sequence[Adapters], context: CohortContext
) -> list[TrainingSet]:
    """The lessons with the weights of their tokens, where the settings ask for any."""
    config, found = context.config.personal, list(sets)
    if config.token_contrast:
        own = context.lm.adapters(context.personal_layout, torch.stack([s.personal for s in states]))
        lessons = [x.examples for x in sets]
        weights = by_contrast(context.lm, lessons, own, beneath, config.token_contrast)
        found = [replace(x, weights=of) for x, of in zip(found, weights, strict=True)]
    if config.half_life:
        found = [replace(x, weights=_aged(s, x, config.half_life)) for s, x in zip(states, found, strict=True)]
    return found


def _aged(state: DeviceState, lesson: TrainingSet, half_life: float) -> list[list[float]]:
    """The weights of a lesson, each times its original's by recency; the buffer has the newest last."""
    factors = iter(by_recency(len(state.annotated), half_life))
    of_examples = [f for k in state.annotated for f in [next(factors)] * (1 + len(state.synthetic.get(k.id, ())))]
    whole = lesson.weights_of(range(len(lesson.examples)))
    return [[factor * w for w in of] for factor, of in zip(of_examples, whole, strict=True)]


def frozen_adapters(received: torch.Tensor, devices: Sequence[str], context: CohortContext) -> list[Adapters]:
    """What lies frozen under personal adapters: the received one, as far as each device has room for it."""
    return [
        context.lm.adapters(context.shared_layout, context.shared_rows(received, devices)),
        *context.weights(received),
    ]


def _start(state: DeviceState, context: CohortContext) -> torch.Tensor:
    keep = context.config.personal.on_new_shared == "keep"
    return state.personal if keep else context.new_state(state.id).personal


def _tokens(training_set: TrainingSet) -> int:
    return sum(training_set.examples[i].length for batch in training_set.batches for i in batch)


def _lesson(state: DeviceState, plan: RoundPlan, context: CohortContext) -> TrainingSet:
    """Originals, each with the user's own reply, and what was made from them."""
    dialogues = [
        Dialogue(k.id, prompt, reply)
        for k in state.annotated
        for prompt, reply in ((k.prompt, state.replies[k.id]), *state.synthetic.get(k.id, ()))
    ]
    config, count = context.config.personal, len(dialogues)
    seed = derive_seed(context.seed, state.id, plan.round, "personal-order")
    if config.steps:
        batches = schedule_steps(count, config.batch_size, config.steps, seed)
    else:
        batches = schedule(count, config.batch_size, config.epochs, seed)
    return TrainingSet(context.lm.format.dialogues(dialogues), batches)
