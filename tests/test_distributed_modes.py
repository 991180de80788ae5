"""Whole federations in the modes whose noise devices add together: what the sum carries, and whom it protects."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from flwr.app import MessageType

from florilegium.client import shared_training
from florilegium.client.calibration import moved_l2, planned_event, share_std, sum_code
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.flower_replies import answer
from florilegium.client.lm.model import LanguageModel
from florilegium.client.secure_sessions import FolderSessions, SimulatedSessions
from florilegium.privacy.release import ReleaseRefusedError
from florilegium.privacy.reply_gate import check_masked_reply, check_step
from florilegium.privacy.secure_aggregation.neighbours import RoundRefusedError
from florilegium.privacy.secure_aggregation.rounded_noise import turned_back
from florilegium.server.strategy import NoReleaseError
from florilegium.simulation.audit.checks import named, noise, without_noise
from florilegium.simulation.audit.recorded_coins import Recorded
from florilegium.simulation.config import ExperimentConfig, load_config
from florilegium.simulation.data.population import User
from florilegium.simulation.engines.cohort_grid import CohortGrid
from florilegium.simulation.engines.in_memory import (
    Federated,
    InMemory,
    RecordingGrid,
    federate_in_memory,
    passing_ledger,
)
from florilegium.simulation.engines.strategy import new_strategy
from florilegium.simulation.engines.workers import Cohort
from florilegium.simulation.rounds import Recorder, federate
from florilegium.simulation.runs.folder import RunFolder
from florilegium.simulation.settings import ConfigError

DEVICES = 6
FLORILEGIUM = str(Path(sys.executable).parent / "florilegium")
BASE: dict[str, Any] = {
    "rounds": 2,
    "model": {"dtype": "float32", "limits": {"prompt_tokens": 16, "reply_tokens": 16}},
    "data": {"users": DEVICES},
    "selection": {"policy": "fifo", "bins": 4},
    "shared": {"pool_capacity": 6, "adapter": {"targets": ["v_proj"]}, "batch_size": 4},
    "privacy": {"clip_norm_l2": 0.05},
}
MODES = ["user-distributed", "example-distributed"]


def configured(mode: str, **sections: Any) -> ExperimentConfig:
    told = {**BASE, **sections, "privacy": {**BASE["privacy"], "mode": mode, **sections.get("privacy", {})}}
    return ExperimentConfig.model_validate(told)


def streams_of(people: Sequence[User]) -> list[list[Dialogue]]:
    return [list(people[k % 2].stream[8 * (k // 2) : 8 * (k // 2) + 8]) for k in range(DEVICES)]


def played(
    lm: LanguageModel, config: ExperimentConfig, streams: Sequence[Sequence[Dialogue]], *, masked: bool = False
) -> Federated:
    return federate_in_memory(lm, config, config.server, named(streams), config.seed, at_once=True, masked=masked)


@pytest.mark.parametrize("mode", MODES)
def test_the_sum_has_the_noise_that_one_trusted_server_would_add(
    lm: LanguageModel, people: list[User], mode: str
) -> None:
    """σ C of a device, or of a dialogue, in the sum of six, whoever adds it; each device a sixth of its square."""
    config = configured(mode)
    seen = played(lm, config, streams_of(people))
    together = planned_event(config).noise_multiplier * moved_l2(config)
    assert share_std(config) == pytest.approx(together / math.sqrt(DEVICES))
    if mode == "user-distributed":
        assert together == planned_event(configured("user-central")).noise_multiplier * 0.05
    for check in noise(config, seen):
        assert check.passed and check.control_caught, check
    plain = played(lm, without_noise(config), streams_of(people))
    each = (seen.cohort.changes[0] - plain.cohort.changes[0]).double().std(1)  # (K,)
    assert each.numpy() == pytest.approx(np.full(DEVICES, share_std(config)), rel=0.06)  # nobody adds another's share
    assert all(o.epsilon and 5 < o.epsilon <= 8 for o in seen.cohort.observations[1].values())
    assert {n: (f.releases, f.silent, f.refused) for n, f in seen.facts.items()} == {n: (6, 0, {}) for n in (1, 2)}


@pytest.mark.parametrize("mode", MODES)
def test_the_noise_holds_with_the_fewest_survivors_that_do_not_collude(
    lm: LanguageModel, people: list[User], mode: str
) -> None:
    """Of six, five are to survive and one may collude: four shares are what a server would add; six are √(6 / 4)."""
    config = configured(mode, secure_aggregation={"survivors": 5, "colluding": 1})
    assert share_std(config) == pytest.approx(share_std(configured(mode)) * math.sqrt(6 / 4))
    seen = played(lm, config, streams_of(people))
    assert all(check.passed for check in noise(config, seen))


@pytest.mark.parametrize("mode", MODES)
def test_a_device_or_dialogue_replaced_moves_the_sum_by_its_bound(
    lm: LanguageModel, people: list[User], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same coins and noise in both worlds: what is left is what was clipped, 2 C at most.

    Control: the same without clipping.
    """
    streams, others = streams_of(people), streams_of(people)[::-1]
    instead = [list(stream) for stream in streams]
    if mode == "user-distributed":
        instead[1] = others[0]
    else:
        instead[1][2] = Dialogue(instead[1][2].id, others[0][3].prompt, others[0][3].response)
    fine = {"secure_aggregation": {"bits": 32}, "shared": {**BASE["shared"], "sampling_rate": 1.0}, "rounds": 1}
    config = configured(mode, **fine)

    def moved() -> float:
        one, other = (played(lm, config, s).cohort.changes[0].double() for s in (streams, instead))
        assert (one - other)[[0, 2, 3, 4, 5]].abs().max() < 1e-6
        return float((one - other)[1].norm()) / moved_l2(config)

    assert 0 < moved() <= 2.001
    monkeypatch.setattr(shared_training, "clipped_sum", lambda rows, clip: rows.double().sum(0))
    assert moved() > 2.5


@pytest.mark.parametrize("mode", MODES)
def test_a_device_whose_budget_is_spent_gives_nothing_to_a_sum(
    lm: LanguageModel, people: list[User], mode: str
) -> None:
    seen = played(lm, configured(mode, privacy={"releases": 1}), streams_of(people))
    assert seen.facts[1].releases == 6 and seen.facts[2].releases == 0
    assert seen.facts[2].refused == {"no-release": 6}
    assert torch.equal(seen.shared, seen.cohort.received[1])


def test_what_leaves_a_device_is_masked_and_of_one_size(lm: LanguageModel, people: list[User]) -> None:
    config = configured("user-distributed", rounds=1)
    seen = played(lm, config, streams_of(people), masked=True)
    assert torch.equal(seen.shared, played(lm, config, streams_of(people)).shared)  # without masks: the same sum
    code = sum_code(config, seen.context.schema, 1, config.seed)
    arrays = [m.content.array_records["arrays"]["masked"].numpy() for m in seen.sent if "arrays" in m.content]
    assert [a.shape for a in arrays] == [(code.size_bytes,)] * DEVICES
    for array in arrays:  # bytes as often as each other: no number of the change, which is near zero, is in them
        counts = np.bincount(array, minlength=256)
        assert (counts - array.size / 256).std() < 2 * math.sqrt(array.size / 256)
    steps = [set(m.content.config_records["header"]) for m in seen.sent if "arrays" not in m.content]
    assert {frozenset(s) for s in steps} == {
        frozenset({"advert"}), frozenset({"to", "shares"}), frozenset({"signature"}), frozenset({"of", "parts"}),
        frozenset({"adopted"}), frozenset({"device"}),
    }  # fmt: skip
    observed = {o.upload_bytes for o in seen.cohort.observations[0].values()}
    assert observed == {code.size_bytes + 256 + 5 * 82 + 64 + 6 * 33}


def test_a_sum_is_of_the_dialogues_that_coins_drew(lm: LanguageModel, people: list[User]) -> None:
    """A device's part less its own noise is what the same coins give in `none`, which is tested by itself."""
    config = configured("example-distributed", rounds=1, secure_aggregation={"bits": 32})
    coins, streams = Recorded(), named(streams_of(people))
    seen, plain = (
        federate_in_memory(lm, c, c.server, streams, c.seed, at_once=True, coins=coins)
        for c in (config, without_noise(config))
    )
    assert any(0 < row.sum() < len(row) for row in coins.drawn.values())
    code = sum_code(config, seen.context.schema, 1, config.seed)
    for k, name in enumerate(streams):
        draws = np.random.Generator(np.random.Philox(key=coins.noise_keys[name, 1])).standard_normal(code.width)
        part = seen.cohort.changes[0][k].double().numpy() - turned_back(code.share_std * draws, code.rotation)
        assert part == pytest.approx(plain.cohort.changes[0][k].numpy(), abs=1e-3 * moved_l2(config))


@pytest.mark.parametrize("kind", [SimulatedSessions, FolderSessions])
@pytest.mark.parametrize("secret", ["seed", "os"])
def test_a_round_has_one_chance_once_masked_numbers_have_left(
    lm: LanguageModel, tmp_path: Path, kind: type[SimulatedSessions], secret: str
) -> None:
    """A second sum of the same numbers, of one device less, would tell that one's. Before that keys are made anew."""
    config = configured("user-distributed", privacy={"secret": secret})
    context = CohortContext.of(lm, config, 0, lambda device, dialogue: "")
    sessions = kind(context, folder=tmp_path / "s") if kind is FolderSessions else kind(context)
    names = [f"d{k}" for k in range(DEVICES)]
    first = sessions.begin("d0", 1).advert
    assert (sessions.begin("d0", 1).advert == first) == (secret == "seed")
    adverts = {n: sessions.begin(n, 1).advert for n in names}
    sealed = {n: sessions.at(n, 1).shares(names, adverts) for n in names}
    session = sessions.at("d0", 1)
    session.shares(names, adverts)
    session.receive(names, {n: sealed[n]["d0"] for n in names[1:]})
    session.masked(np.arange(5), 16)
    sessions.keep(session)
    with pytest.raises(RoundRefusedError, match="out-of-order"):
        sessions.begin("d0", 1)
    with pytest.raises(RoundRefusedError, match="out-of-order"):
        sessions.at("d9", 1)
    if isinstance(sessions, FolderSessions):
        assert session.seed.hex() in (tmp_path / "s" / "d0-00001.json").read_text()
        session.unmasked = ("d1",)
        sessions.keep(session)
        assert (tmp_path / "s" / "d0-00001.json").read_text() == "{}"
        with pytest.raises(RoundRefusedError, match="out-of-order"):
            sessions.begin("d0", 1)


def test_a_run_in_which_no_round_comes_to_a_sum_is_none(lm: LanguageModel, people: list[User]) -> None:
    """Two of six never answer, and five are to survive."""

    class Silent(RecordingGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            kept = [m for m in messages if m.metadata.dst_node_id > 2 or m.metadata.message_type == "query"]
            yield from super().send_and_receive(kept, timeout=timeout)

    config = configured("user-distributed", secure_aggregation={"survivors": 5})
    with passing_ledger() as ledger:
        replies = {d.id: d.response for s in streams_of(people) for d in s}
        context = CohortContext.of(lm, config, 0, lambda device, dialogue: replies[dialogue], None, ledger)
        cohort = InMemory(context, named(streams_of(people)), at_once=True)
        strategy, start = new_strategy(context, config.server)
        grid = Silent(cohort, list(cohort.streams), masked=True)
        with pytest.raises(NoReleaseError, match="no round came to a sum of 5"):
            federate(grid, strategy, Recorder(), start, 2)
        facts = strategy.facts[1]
    assert (facts.releases, facts.silent, facts.refused) == (0, 2, {"too-few": 4})
    assert not any(o.epsilon for o in cohort.observations)  # nobody had begun to learn, or paid


def test_a_part_of_a_sum_has_no_way_out_but_behind_masks(lm: LanguageModel, people: list[User]) -> None:
    """A grid without sessions refuses it, and so does a device that has none."""
    config = configured("user-distributed", rounds=1)
    with passing_ledger() as ledger:
        replies = {d.id: d.response for s in streams_of(people) for d in s}
        context = CohortContext.of(lm, config, 0, lambda device, dialogue: replies[dialogue], None, ledger)
        cohort = InMemory(context, named(streams_of(people)), at_once=True)
        names = list(cohort.streams)

        def alone(job: Any, some: Sequence[str], shared: Any) -> Any:
            yield Cohort(tuple(some)), job(cohort, some, shared)

        grid = CohortGrid(alone, context.schema, names)
        strategy, start = new_strategy(context, config.server)
        strategy.greet(grid)
        asked = strategy.messages(names, 1, 0, start, MessageType.TRAIN)
        for replied in (list(grid.send_and_receive(asked)), answer(asked, names, cohort)):
            assert {str(m.content.config_records["header"].get("error")) for m in replied} == {"no-release"}
            assert not any("arrays" in m.content for m in replied)


def test_the_gate_passes_no_step_of_another_form() -> None:
    for header in ({"advert": b"x"}, {"signature": b"x" * 63}, {"of": ["a"], "parts": [b""]}, {"loss": 0.5}, {}):
        with pytest.raises(ReleaseRefusedError):
            check_step(header)
    header = {"protocol": 1, "version": 0, "head": "0" * 64}
    check_masked_reply(header, {"masked": np.zeros(5, np.uint8)}, 5)
    for wrong in (
        {"masked": np.zeros(6, np.uint8)},
        {"masked": np.zeros(5, np.float32)},
        {},
        {"x": np.zeros(5, np.uint8)},
    ):
        with pytest.raises(ReleaseRefusedError):
            check_masked_reply(header, wrong, 5)
    with pytest.raises(ReleaseRefusedError):
        check_masked_reply({**header, "loss": 1}, {"masked": np.zeros(5, np.uint8)}, 5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["privacy.mode=user-central", "secure_aggregation.bits=16"], "for the *-distributed modes"),
        (["privacy.mode=user-distributed", "server.rule=krum"], "gives a server the sum of a round"),
        (["privacy.mode=user-distributed", "shared.upload=int8"], "secure_aggregation.bits says how"),
        (["privacy.mode=example-distributed", "shared.steps_per_round=2"], "must be 1"),
        (["privacy.mode=user-distributed", "data.users=2"], "3 at least"),
        (["privacy.mode=user-distributed", "secure_aggregation.devices=10"], "below the 64 devices"),
        (["privacy.mode=user-distributed", "secure_aggregation.survivors=30"], "must survive, 33"),
        (["privacy.mode=user-distributed", "world.classes=world/devices"], "set secure_aggregation.survivors"),
        (
            ["privacy.mode=user-distributed", "secure_aggregation.devices=200", "secure_aggregation.survivors=150"],
            "above the 64 devices",
        ),
    ],
)
def test_settings_that_protect_nobody_or_cannot_be_are_refused(changes: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("*", r"\*")):
        load_config("quickstart", changes)


@pytest.mark.slow
def test_a_run_ends_with_the_same_bits_on_both_engines_and_with_any_number_of_workers(tmp_path: Path) -> None:
    """Keys and masks of many devices in one process, or of each in the process that Flower gives it; one is lost."""
    found = {}
    for name, changes in {
        "one": ["workers=1"], "two": ["workers=2"], "flower": ["engine=flower"],
    }.items():  # fmt: skip
        settings = [
            *SMALL, "data.users=5", "privacy.mode=user-distributed", "evaluation.pooled_epochs=0",
            "evaluation.rouge_queries_per_user=0", f"name={name}", *changes,
        ]  # fmt: skip
        done = subprocess.run(
            [FLORILEGIUM, "run", "quickstart", *settings], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "nobody is trusted alone" in " ".join(done.stdout.split())
        last = RunFolder(tmp_path / "runs" / name).last_shared()
        assert last is not None
        found[name] = {key: array.tobytes() for key, array in last.shared.items()}
        assert not list((tmp_path / "runs" / name).glob("sessions/*.json")) or name == "flower"
    assert found["one"] == found["two"] == found["flower"]
    seeds = [path.read_text() for path in (tmp_path / "runs" / "flower" / "sessions").glob("*.json")]
    assert seeds and set(seeds) == {"{}"}  # of rounds that are over nothing is kept
