"""The four modes of privacy in whole federations: what is clipped, who adds noise, what travels, what a budget ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from florilegium.client.calibration import planned_event, release_noise
from florilegium.client.lm.model import LanguageModel
from florilegium.privacy.accounting import epsilon
from florilegium.privacy.seeds import derive_key
from florilegium.simulation.audit.attacks import _released
from florilegium.simulation.audit.checks import named, without_noise
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.data.population import User
from florilegium.simulation.engines.in_memory import Federated, federate_in_memory
from florilegium.simulation.studies.federated_cell import _told

CLIP = 0.05
DEVICES = 6
BASE: dict[str, Any] = {
    "rounds": 2,
    "model": {"dtype": "float32", "limits": {"prompt_tokens": 16, "reply_tokens": 16}},
    "data": {"users": DEVICES},
    "selection": {"policy": "fifo", "bins": 4},
    "shared": {"pool_capacity": 6, "adapter": {"targets": ["v_proj"]}, "batch_size": 4, "steps_per_round": 1},
    "privacy": {"clip_norm_l2": CLIP},
}


def configured(**privacy: object) -> ExperimentConfig:
    return ExperimentConfig.model_validate({**BASE, "privacy": {**BASE["privacy"], **privacy}})


def played(lm: LanguageModel, config: ExperimentConfig, people: Sequence[User]) -> Federated:
    """`DEVICES` devices with eight dialogues each, all there in the first round."""
    streams = [people[k % 2].stream[8 * (k // 2) : 8 * (k // 2) + 8] for k in range(DEVICES)]
    return federate_in_memory(lm, config, config.server, named(streams), config.seed, at_once=True)


@pytest.mark.parametrize("mode", ["user-local", "user-central"])
def test_a_users_whole_change_is_clipped_and_noised_where_the_mode_says(
    lm: LanguageModel, people: list[User], mode: str
) -> None:
    config = configured(mode=mode)
    private, plain = played(lm, config, people), played(lm, without_noise(config), people)
    norms = plain.cohort.changes[0].norm(dim=1)
    assert (norms <= CLIP + 1e-6).all() and norms.max() > 0.99 * CLIP  # long ones are cut to the bound
    std = planned_event(config).noise_multiplier * CLIP
    on_devices = (private.cohort.changes[0] - plain.cohort.changes[0]).numpy()  # (K, P)
    together = (private.aggregated[0] - plain.aggregated[0]).numpy()  # (P,)
    if mode == "user-local":
        assert on_devices.std() == pytest.approx(std, rel=0.02)
        assert np.corrcoef(on_devices[0], on_devices[1])[0, 1] == pytest.approx(0, abs=0.06)
        assert together.std() == pytest.approx(std / math.sqrt(DEVICES), rel=0.05)
    else:
        assert not on_devices.any()
        drawn = release_noise(config, 1, derive_key(0, "server")).drawn(1, together.size) / DEVICES
        assert together == pytest.approx(drawn, abs=1e-6)
        assert together.std() == pytest.approx(std / DEVICES, rel=0.05)


@pytest.mark.parametrize("mode", ["example-local", "user-local", "user-central"])
def test_a_device_whose_budget_is_spent_sends_nothing_and_the_server_copes(
    lm: LanguageModel, people: list[User], mode: str
) -> None:
    seen = played(lm, configured(mode=mode, releases=1), people)
    assert seen.cohort.changes[0].any() and not seen.cohort.changes[1].any()
    assert seen.facts[2].releases == 0 and seen.facts[2].refused == {"no-release": DEVICES}
    assert torch.equal(seen.shared, seen.cohort.received[1])  # not even noise was added to it
    observed = seen.cohort.observations[1].values()
    assert all(7.9 < (o.epsilon or 0) <= 8.0 and o.refusal == "budget-spent" for o in observed)
    assert all(o.upload_bytes == 0 for o in observed)


def test_what_clips_by_dialogue_and_by_change_differ_without_noise_too(lm: LanguageModel, people: list[User]) -> None:
    dialogue, change = (played(lm, configured(mode="none", clips=c), people) for c in ("dialogue", "change"))
    assert not torch.equal(dialogue.shared, change.shared)
    assert dialogue.facts[1].signal_to_noise is math.nan


@pytest.mark.parametrize(("factors", "ending"), [("b", "B B"), ("a", "A A"), ("alternate", "B A"), ("both", "AB AB")])
def test_the_factors_that_travel(lm: LanguageModel, people: list[User], factors: str, ending: str) -> None:
    shared = {**BASE["shared"], "adapter": {**BASE["shared"]["adapter"], "factors": factors}}
    config = ExperimentConfig.model_validate({**BASE, "shared": shared})
    seen = played(lm, config, people)
    for number, letters in enumerate(ending.split(), start=1):
        names = {name for name, _ in seen.context.schema.of_round(number).shapes}
        assert {name[-1] for name in names} == set(letters)
        places = seen.context.schema.places(number)
        changes = seen.cohort.changes[number - 1]
        assert changes[:, places].any() and not changes[:, ~places].any()


def test_correlated_noise_costs_each_device_one_release_in_so_many_rounds(
    lm: LanguageModel, people: list[User]
) -> None:
    settings = {**BASE, "rounds": 4, "server": {"noise_bands": 2}}
    config = ExperimentConfig.model_validate({**settings, "privacy": {"mode": "user-central", "releases": 2}})
    seen = played(lm, config, people)
    took_part = torch.stack([c.any(1) for c in seen.cohort.changes])  # (rounds, K)
    assert (took_part.sum(0) == 2).all() and not (took_part[0] & took_part[1]).any()
    assert torch.equal(took_part[0], took_part[2]) and torch.equal(took_part[1], took_part[3])
    assert max(o.epsilon or 0 for of_round in seen.cohort.observations for o in of_round.values()) <= 8.0


def test_what_is_told_of_a_federation_is_of_all_of_its_rounds(lm: LanguageModel, people: list[User]) -> None:
    """Half of four devices are asked in each of three rounds: d1 and d3 twice, d0 and d2 in the last one alone.

    So ε is what two releases cost, and not the one of the last page; and of the first round's releases there are two.
    """
    config = ExperimentConfig.model_validate({
        "rounds": 3,
        "model": {"dtype": "float32", "limits": {"prompt_tokens": 16, "reply_tokens": 16}},
        "data": {"users": 4},
        "shared": {"pool_capacity": 16, "adapter": {"rank": 1, "targets": ["v_proj"]}},
        "server": {"sampled_share": 0.5},
    })  # fmt: skip
    streams = {f"d{k}": people[k % 2].stream[3 * (k // 2) : 3 * (k // 2) + 3] for k in range(4)}
    seen = federate_in_memory(lm, config, config.server, streams, 0)
    asked = [sorted(of_round) for of_round in seen.cohort.observations]
    assert asked == [["d1", "d3"], ["d1", "d3"], ["d0", "d2"]]
    event, privacy = planned_event(config), config.privacy
    once, twice = (epsilon([event] * times, privacy.delta, privacy.promise.adjacency) for times in (1, 2))
    told = _told(seen)
    assert once == pytest.approx(4.330, abs=0.005) and twice == pytest.approx(6.357, abs=0.005)
    assert told["epsilon"] == pytest.approx(twice)
    sent = seen.cohort.changes[0][[1, 3]].double()
    assert not seen.cohort.changes[0][[0, 2]].any() and sent.any(1).all()
    assert told["mean_square"] == pytest.approx(float(sent.mean(0).square().sum()))
    assert told["variance"] == pytest.approx(float((sent[0] - sent[1]).square().sum() / 2))
    own = _released(seen)["own release"]
    for k, number in ((0, 2), (1, 1), (2, 2), (3, 1)):  # a device's last release, in whichever round it was
        assert torch.equal(own[k], seen.cohort.received[number] + seen.cohort.changes[number][k])
