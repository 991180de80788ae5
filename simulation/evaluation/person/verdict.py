"""Whose is what the arms of a run say and expect: the measures of `person.measures`, as events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from florilegium.client.dialogue import Dialogue
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.engines.scheduler import Scheduler
from florilegium.simulation.evaluation.arms import Arms, Rows
from florilegium.simulation.evaluation.metrics import Measured, Reply, compare, holm, paired_p
from florilegium.simulation.evaluation.person.evidence import JUDGED, Evidence, Questions, judged, like_replies
from florilegium.simulation.evaluation.person.measures import (
    LOWER_IS_BETTER,
    Measure,
    Texts,
    choices,
    lost,
    rank,
    style,
    tokens,
)
from florilegium.simulation.runs.events import Event, PersonComparison, PersonMeasure, PersonResult

LEAST = 8  # people, of whom one is to be told
COMPARED = (("personal", "base"), ("personal", "shuffled"))


def whose(
    config: ExperimentConfig,
    devices: SimulatedDevices,
    scheduler: Scheduler,
    arms: Arms,
    replies: Mapping[str, Mapping[str, Sequence[Reply]]],
) -> list[Event]:
    """The events of a run's measures of persons; none where there are fewer than `LEAST` people."""
    settings = config.evaluation.person
    places = [k for k, n in enumerate(arms.names) if not replies or n in replies["base"]][: settings.people]
    if len(places) < LEAST:
        return []
    asked = _of_some(arms, places)
    candidates = like_replies([devices.users[n].held_out for n in asked.names], settings.replies)
    given = dict(zip(asked.names, candidates, strict=True))
    found: dict[str, Evidence] = scheduler.gather(judged, asked.names, Questions(asked, given))
    there = [k for k, n in enumerate(asked.names) if n in found]  # all, but for those whose failure was counted
    names = [asked.names[k] for k in there]
    evidence = [replace(found[n], by_adapter=[found[n].by_adapter[k] for k in there]) for n in names]
    texts = texts_of(devices, names, replies, settings.replies)
    known = [[e.reply for e in devices.context.lm.format.dialogues(devices.users[n].stream)] for n in names]
    return list(events(measures(texts, known, [given[n] for n in names], evidence), names))


def measures(
    texts: Texts, known: Sequence[Sequence[Sequence[int]]], candidates: Sequence[Sequence[Sequence[Dialogue]]],
    evidence: Sequence[Evidence],
) -> list[Measure]:  # fmt: skip
    """All of them; `known` are the tokens of each reply that each person's device has met."""
    of_style = style(texts)
    every = [
        *of_style, *choices(texts.known, candidates, evidence), *rank(evidence, of_style), *tokens(known, evidence),
        *lost(evidence, texts),
    ]  # fmt: skip
    return [m for m in every if m.arms]


def texts_of(
    devices: SimulatedDevices, names: Sequence[str], replies: Mapping[str, Mapping[str, Sequence[Reply]]], least: int
) -> Texts:
    """Real replies are cut to as many tokens as generated ones may have, and are to the same prompts."""
    lm, settings = devices.context.lm, devices.run.config.evaluation
    count, most = settings.rouge_queries_per_user if replies else least, settings.sampling.max_new_tokens
    return Texts(
        [[d.response for d in devices.users[n].stream] for n in names],
        [[lm.format.beginning(d.response, most) for d in devices.users[n].held_out[:count]] for n in names],
        {arm: [[r.text for r in of[n]] for n in names] for arm, of in replies.items()},
    )


def events(found: Sequence[Measure], names: Sequence[str]) -> Iterator[Event]:
    """What was measured, by arm and by device, and what was compared."""
    for measure in found:
        yield from _told(measure, len(names))
    shown = [m for m in found if m.tells]
    for arm in dict.fromkeys(arm for m in shown for arm in m.arms):
        for k, name in enumerate(names):
            yield PersonResult(device=name, arm=arm, values={m.name: m.arms[arm][k] for m in shown if arm in m.arms})
    pairs = [(m, better, than) for m in shown for better, than in COMPARED if {better, than} <= m.arms.keys()]
    differences = [(np.array(m.arms[better]) - np.array(m.arms[than])).tolist() for m, better, than in pairs]
    corrected = holm([paired_p(d) for d in differences])
    for (m, better, than), p in zip(pairs, corrected, strict=True):
        one, other = (Measured(tuple(m.arms[arm]), ()) for arm in (better, than))
        c = compare(one, other, lower_is_better=m.name in LOWER_IS_BETTER)
        yield PersonComparison(
            metric=m.name, better=better, than=than, mean_difference=c.mean_difference, ci95=c.ci95, users=c.users,
            users_better=c.users_better, p_holm=p,
        )  # fmt: skip


def _told(measure: Measure, users: int) -> Iterator[PersonMeasure]:
    """A measure under each arm, or that it is not reported."""
    floor, ceiling = (float(np.mean(x)) if len(x) else None for x in (measure.floor, measure.ceiling))
    note = measure.about
    if not measure.tells:
        note = "not reported: real replies do not tell these people apart" + (f" ({note})" if note else "")
    elif measure.needed > measure.replies:
        note = f"too few replies: real ones tell these people apart from {measure.needed} a person"
    for arm, values in measure.arms.items() if measure.tells else (("personal", ()),):
        mean = Measured(tuple(values), ()) if values else None
        yield PersonMeasure(
            metric=measure.name, arm=arm, users=users, mean_per_user=mean.mean_per_user if mean else None,
            ci95=mean.ci95 if mean else None, floor=floor, ceiling=ceiling, replies=measure.replies,
            needed=measure.needed, note=note,
        )  # fmt: skip


def _of_some(arms: Arms, places: Sequence[int]) -> Arms:
    """Of some devices, the arms that are judged."""
    chosen = list(places)

    def few(rows: Rows) -> Rows:
        return rows if rows.kind == "shared" or len(rows.rows) == 1 else Rows(rows.kind, rows.rows[chosen])

    of_each = {arm: [few(rows) for rows in parts] for arm, parts in arms.arms.items() if arm in JUDGED}
    return Arms([arms.names[k] for k in chosen], of_each)
