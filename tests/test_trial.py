"""What was learned is tried on replies that were held back, kept or taken back, and its owner can go back."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_agent import SAID, SERVER, TERMS, all_after_each_cut, decrypted, door, made, reopened, talked
from typer.testing import CliRunner

from florilegium.client.agent import shared_trial, trial
from florilegium.client.agent.agent import Agent
from florilegium.client.agent.cli import app as device_app
from florilegium.client.agent.errors import AgentError
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.lm.model import LanguageModel
from florilegium.client.personalization.acceptance import AcceptanceConfig, is_held_back, judged
from florilegium.privacy.plan import RoundPlan
from florilegium.simulation.benchmarks.acceptance import CYCLES, Arm, Life
from florilegium.simulation.data.population import User

assert door  # a fixture
MODEST = 0.035  # of noise in a server's adapter

MORE = (
    ("Tea or coffee?", "Tea, with a leaf of mint."),
    ("Is it raining?", "Only behind the hills."),
    ("Who called?", "My sister, about the boat."),
    ("Seen my keys?", "Under the blue hat, as ever."),
    ("How is the book?", "Slow, but I like the sailor."),
    ("When is supper?", "When the bell of the church rings."),
)


@pytest.fixture
def home(tmp_path: Path) -> DeviceFolder:
    return DeviceFolder(tmp_path / "device")


def holding(home: DeviceFolder, lm: LanguageModel, share: float = 0.5, **rules: Any) -> Agent:
    """A device that has learned once and then heard more, of which some is held back with the next learning."""
    agent = made(home, lm, acceptance=AcceptanceConfig(share=share, **rules))
    synthesis = agent.device.config.device.synthesis.model_copy(update={"per_dialogue": 0})
    agent.device.config = agent.device.config.model_copy(
        update={"device": agent.device.config.device.model_copy(update={"synthesis": synthesis})}
    )
    agent.device.vault.set_fact("seed", 5)
    talked(agent)
    agent.learn()
    talked(agent, MORE * 2)
    with agent.device.vault.open() as connection:  # whose coins fall the same each time
        connection.execute("UPDATE dialogue SET id = 'd' || number WHERE cycle IS NULL")
    return agent


def harmful(agent: Agent) -> None:
    """From now on learning makes of the adapter what nobody wants."""
    device = agent.device.config.device
    personal = device.personal.model_copy(update={"learning_rate": 0.3, "epochs": 3})
    device = device.model_copy(update={"personal": personal})
    agent.device.config = agent.device.config.model_copy(update={"device": device})


# -- the rule ---------------------------------------------------------------------------------------------------------


def test_an_update_is_taken_back_beyond_what_chance_alone_brings() -> None:
    """d = 0.1, 0.2, 0.3: mean 0.2, s = 0.1, error 0.1/√3 = 0.0577, t(0.8; 2) = 1.0607: bound 0.0612."""
    worse = judged([1.0, 1.0, 1.0], [1.1, 1.2, 1.3], 0.2)
    assert not worse.accepted and worse.error == pytest.approx(0.1 / math.sqrt(3)) and worse.replies == 3
    assert (worse.before, worse.after, worse.difference) == pytest.approx((1.0, 1.2, 0.2))
    mixed = judged([1.0, 1.0, 1.0], [1.2, 0.9, 1.0], 0.2)  # mean 0.0333, s = 0.1528: error 0.0882, bound 0.0935
    assert mixed.accepted and not judged([1.0, 1.0, 1.0], [1.2, 0.9, 1.0], 0.5).accepted  # 0.5: whenever worse
    assert judged([1.0, 2.0], [0.9, 1.9], 0.5).accepted and judged([1.0, 2.0], [1.0, 2.0], 0.5).accepted


def test_too_few_replies_take_nothing_back_and_what_is_no_number_does() -> None:
    assert judged([], [], 0.2).accepted and judged([1.0], [9.0], 0.2).accepted
    assert judged([1.0], [9.0], 0.2).error == math.inf and math.isnan(judged([], [], 0.2).before)
    assert not judged([1.0, 1.0], [math.nan, 1.0], 0.2).accepted
    with pytest.raises(ValueError, match="the same ones"):
        judged([1.0], [1.0, 2.0], 0.2)


@pytest.mark.parametrize("risk", [0.05, 0.2, 0.5])
def test_what_changes_nothing_is_taken_back_with_the_risk_that_was_said(risk: float) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(4000, 6))
    taken_back = np.mean([not judged(np.zeros(6).tolist(), d.tolist(), risk).accepted for d in drawn])
    assert abs(taken_back - risk) < 4 * math.sqrt(risk * (1 - risk) / 4000)


def test_the_coin_is_each_dialogues_own() -> None:
    held = [is_held_back(3, f"d{k}", 0.2) for k in range(5000)]
    assert abs(np.mean(held) - 0.2) < 0.03 and held == [is_held_back(3, f"d{k}", 0.2) for k in range(5000)]
    assert held != [is_held_back(4, f"d{k}", 0.2) for k in range(5000)]
    assert not any(is_held_back(3, f"d{k}", 0.0) for k in range(100))
    assert all(is_held_back(3, f"d{k}", 0.5) for k in range(200) if is_held_back(3, f"d{k}", 0.2))


# -- on a device ------------------------------------------------------------------------------------------------------


def test_a_reply_that_is_held_back_is_learned_from_by_nobody_until_its_turn(
    home: DeviceFolder, lm: LanguageModel
) -> None:
    agent = holding(home, lm, learnings=2)
    assert not agent.device.vault.held()  # nothing of the first learning
    first = agent.learn()
    held = agent.device.vault.held()
    assert 0 < len(held) < 12 and agent.status()["held_back"] == len(held) == first["trial"]["replies"]
    assert not held & agent.device.state().replies.keys() and not held & agent.device.state().synthetic.keys()
    kept = {k["id"]: k for k in agent.kept()}
    assert all(kept[i]["held_back"] and not kept[i]["reply"] for i in held & kept.keys())
    waiting = [i for i in held if i in {k.id for k in agent.device.state().buffer.bins}]
    agent.learn()  # the second that it is tried with
    assert not held & agent.device.state().replies.keys()
    assert not agent.device.vault.held()  # its turn is over
    agent.learn()
    assert set(waiting) <= agent.device.state().replies.keys()


def test_nothing_is_learned_with_what_is_held_back_in_sight(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm, acceptance=AcceptanceConfig(share=0.5))
    talked(agent)
    agent.learn()
    turns = [agent.device.vault.add(f"question {k}", "hm", "talk") for k in range(8)]
    for turn in turns:
        agent.rate(turn.id, False, f"answer {turn.prompt}")
    agent.learn()
    held = agent.device.vault.held()
    contexts = {k["id"]: k["prompt"] for k in agent.kept()}
    assert held and len(held) < 8
    for turn, later in pairwise(turns):
        if later.id in contexts:
            assert (f"answer {turn.prompt}" in contexts[later.id]) == (turn.id not in held)


def test_what_helps_is_kept_and_what_harms_is_taken_back(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = holding(home, lm)
    agent.learn()
    good, seen = agent.device.state().personal.clone(), len(agent.device.state().buffer)
    harmful(agent)
    talked(agent, (("And now?", "To bed."),))
    page = agent.learn()
    assert page["trial"]["decision"] == "taken back" and page["trial"]["after"] > page["trial"]["before"]
    assert torch.equal(agent.device.state().personal, good) and len(agent.device.state().buffer) > seen
    assert agent.device.cycle == 3 and agent.device.vault.turns("WHERE cycle IS NULL") == []
    told = agent.trials()
    assert [t["decision"] for t in told["trials"]] == ["untried", "kept", "taken back"] and len(told["shown"]) == 3
    for shown in told["shown"]:
        assert (shown["prompt"], shown["wanted"]) in (*MORE, ("And now?", "To bed.")) and shown["said_before"] != shown[
            "said_after"
        ]
    assert reopened(agent).trials() == told
    assert agent.device.vault.said_under(talked(agent, SAID[:1])) == []  # what was taken back has taught nothing


def test_a_servers_adapter_that_harms_is_not_used(home: DeviceFolder, lm: LanguageModel) -> None:
    """Loud weights, no numbers, and a little worse: each refused once, while learning goes on without it."""
    agent = holding(home, lm)
    agent.learn()
    agent.join(TERMS, SERVER)
    layout = agent.device.context.shared_layout
    start = layout.start(TERMS.seed)
    noise = torch.randn(layout.width, generator=torch.Generator().manual_seed(0))
    evil = {"loud": start + 30 * noise, "nan": start.clone(), "modest": start + MODEST * noise}
    evil["nan"][7] = math.nan
    said = agent.chat("Tea?", temporary=True, seed=1).said
    for version, (name, row) in enumerate(evil.items(), 1):
        agent.adopt([""], row, RoundPlan(version, version))
        personal = agent.device.state().personal.clone()
        before = trial.learned_now(agent.device, agent.device.state())
        used, _, met = shared_trial.tried_newest(agent.device, before)
        assert used is None and met and (met.decision, met.version) == ("refused", version), name
        if name == "modest":
            assert met.before and met.after and 0 < met.after - met.before < 0.5 and met.replies >= 2
            talked(agent, (("And now?", "To bed."),))
            learned = agent.learn()
            assert learned["shared trial"] == agent.trials()["shared"][-1] and learned["trial"]["decision"] == "kept"
            assert not torch.equal(agent.device.state().personal, personal)  # the server does not end learning
            assert "shared trial" not in agent.learn() and len(agent.trials()["shared"]) == 1  # nor is it tried again
        else:
            assert agent.chat("Tea?", temporary=True, seed=1).said == said
    assert agent.device.used() == (None, 0) and agent.device.newest()[1] == 3
    (sent,) = agent.contribute([""], evil["modest"], RoundPlan(1, 1))
    assert sent is not None  # a round is answered at the adapter that it sends
    agent.adopt([""], start, RoundPlan(3, 3))  # B is 0: nothing is changed
    assert agent.learn()["shared trial"]["decision"] == "kept"
    assert torch.equal(agent.device.used()[0], start)


def test_a_servers_adapter_waits_for_replies_and_is_tried_on_learned_ones(
    home: DeviceFolder, lm: LanguageModel
) -> None:
    """With nothing held back, on all the owner has said, by itself; with less than two replies, not at all."""
    agent = made(home, lm, acceptance=AcceptanceConfig(share=0.5))
    agent.join(TERMS, SERVER)
    layout = agent.device.context.shared_layout
    noise = torch.randn(layout.width, generator=torch.Generator().manual_seed(0))
    agent.adopt([""], layout.start(0) + noise, RoundPlan(1, 1))
    before = trial.learned_now(agent.device, agent.device.state())
    used, _, met = shared_trial.tried_newest(agent.device, before)
    assert used is None and met and met.decision == "waits for replies"
    talked(agent)
    used, _, met = shared_trial.tried_newest(agent.device, before)
    assert used is None and met and (met.decision, met.replies) == ("refused", len(SAID))
    agent.device.config = agent.device.config.model_copy(update={"acceptance": AcceptanceConfig(share=0)})
    used, version, met = shared_trial.tried_newest(agent.device, before)
    assert used is not None and version == 1 and met and met.decision == "untried"


def test_its_owner_goes_back_once(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = holding(home, lm, share=0.0)
    with_one = agent.device.state().personal.clone()
    agent.learn()
    assert not torch.equal(agent.device.state().personal, with_one)
    agent.go_back()
    assert torch.equal(reopened(agent).device.state().personal, with_one)
    assert [t["decision"] for t in agent.trials()["trials"]] == ["untried", "undone by its owner"]
    with pytest.raises(AgentError, match="no adapter to go back to"):
        agent.go_back()
    agent.learn()
    assert agent.trials()["can_go_back"]


def test_erasing_reaches_what_trials_showed_and_the_adapter_before(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = holding(home, lm)
    agent.learn()
    held = sorted(agent.device.vault.held())
    (turn,) = agent.device.vault.turns("WHERE id = ?", (held[0],))
    with agent.device.vault.open() as connection:
        connection.execute("UPDATE shown SET said_after = 'the tin under the stairs, 4711-zebra'")
    assert b"4711-zebra" in decrypted(home.vault, home.read_key(agent.device.config))
    figures = [{**t} for t in agent.trials()["trials"]]
    agent.erase([turn.id])
    assert turn.id not in agent.device.vault.held() and set(held[1:]) == agent.device.vault.held()
    told = agent.trials()
    assert not told["shown"] and not told["can_go_back"] and told["trials"] == figures
    for path in home.path.glob("*.db"):
        assert b"4711-zebra" not in decrypted(path, home.read_key(agent.device.config))
    assert not set(held) & agent.device.state().replies.keys()  # nor is it learned from on the way


@pytest.mark.slow
def test_a_power_cut_in_a_learning_that_is_taken_back_leaves_what_was_before_or_after(
    home: DeviceFolder, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = holding(home, lm)
    agent.learn()
    good = agent.device.state().personal.clone()
    harmful(agent)
    talked(agent, (("And now?", "To bed."),))
    agent = all_after_each_cut(agent, lambda a: a.learn() if a.device.cycle < 3 else None, monkeypatch)
    assert torch.equal(agent.device.state().personal, good) and agent.device.vault.fact(trial.LEARNINGS, 0) == 3
    assert [t["decision"] for t in agent.trials()["trials"]] == ["untried", "kept", "taken back"]
    agent = all_after_each_cut(agent, lambda a: a.go_back() if a.trials()["can_go_back"] else None, monkeypatch)
    assert [t["decision"] for t in agent.trials()["trials"]] == ["untried", "undone by its owner", "taken back"]


def test_the_commands_show_trials_and_go_back(door: Any) -> None:
    home = ["--home", str(door.agent.device.folder.path)]
    talked(door.agent)
    for _ in range(2):
        done = CliRunner().invoke(device_app, ["learn", *home])
        assert done.exit_code == 0 and "kept untried" in done.output
    assert "untried" in CliRunner().invoke(device_app, ["trials", *home]).output
    assert CliRunner().invoke(device_app, ["revert", *home]).exit_code == 0
    again = CliRunner().invoke(device_app, ["revert", *home])
    assert again.exit_code == 1 and "no adapter to go back to" in str(again.exception)


# -- in simulation ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_people_live_through_trials(lm: LanguageModel, people: list[User]) -> None:
    some = [User(u.id, u.stream[:24], u.held_out[:4]) for u in people]
    counted, nll = Life(lm, some, Arm(0.5, 0.5), "server", 0).lived()
    updates, worse, saved, better, cost = counted
    assert updates == 2 * (CYCLES - 1) and worse + better <= updates and saved <= worse and cost <= better
    _, untested = Life(lm, some, Arm(0.0), "server", 0).lived()
    assert saved > 0 and np.mean(nll) < np.mean(untested) - 0.1  # noise beneath is not kept
