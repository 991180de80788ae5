"""A reply is shown what its owner said elsewhere, says because of what, and erasing reaches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_agent import door, made
from typer.testing import CliRunner

from florilegium.client.agent.agent import Agent
from florilegium.client.agent.cli import app as device_app
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.recall import NEWEST, TOKENS, line_of, recalled
from florilegium.client.agent.vault import Turn
from florilegium.client.lm.model import LanguageModel

assert door  # a fixture


@pytest.fixture
def home(tmp_path: Path) -> DeviceFolder:
    return DeviceFolder(tmp_path / "device")


def remembering(home: DeviceFolder, lm: LanguageModel, **more: Any) -> tuple[Agent, list[Turn]]:
    agent = made(home, lm, **{"recall": 1, **more})
    said = (
        "My boat is called Marigold",
        "I cook soup on Mondays",
        "The dog is ill",
        "The soup was cold",
        "I like trains",
    )
    return agent, [agent.device.vault.add(text, "I see a marigold.", f"talk-{k}") for k, text in enumerate(said)]


def seen(agent: Agent, monkeypatch: pytest.MonkeyPatch, prompt: str, **more: Any) -> tuple[str, list[Turn], Turn]:
    """What the model is asked, what was recalled for it, and the turn."""
    asked, heard = list[str](), list[Turn]()
    monkeypatch.setattr(agent.device.lm, "reply", lambda text, *_: asked.append(text) or "so it is")
    turn = agent.chat(prompt, "now", recalls=heard.extend, **more)
    return asked[0], heard, turn


def test_a_reply_is_shown_what_its_owner_said_elsewhere(
    home: DeviceFolder, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, turns = remembering(home, lm)
    asked, heard, turn = seen(agent, monkeypatch, "Is the Marigold a good boat?")
    assert heard == turns[:1] and asked.endswith(") My boat is called Marigold\nIs the Marigold a good boat?")
    assert seen(agent, monkeypatch, "And trains?")[0].count("\n") == 3  # one recalled, two of the conversation
    assert agent.said_under([turns[0].id])[0].id == turn.id  # erasing it reaches the reply
    agent.erase([turns[0].id])
    asked, heard, _ = seen(agent, monkeypatch, "Is the Marigold a good boat?", temporary=True)
    assert turns[0] not in heard and "is called" not in asked


def test_what_is_no_fact_of_theirs_is_not_recalled(
    home: DeviceFolder, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, turns = remembering(home, lm)
    for k in range(30):
        agent.device.vault.add(f"The weather is number{k}", "hm", "")
    assert recalled(agent.device, "What is the time?", ()) == []  # "is" and "the" are everywhere
    assert recalled(agent.device, "Who sees?", ()) == [] and recalled(agent.device, "", ()) == []
    assert recalled(agent.device, "Soup?", {turns[1].id}) == [turns[3]]  # what is in sight is not shown twice
    agent.rate(turns[4].id, False, "The Orient Express, once.")
    assert [t.id for t in recalled(agent.device, "An express train?", ())] == [turns[4].id]
    for more in ({"before": ["x"]}, {"before": [], "temporary": True}):  # of programs, and of temporary chats
        assert seen(agent, monkeypatch, "Is the Marigold a good boat?", **more)[1] == []


def test_it_is_off_unless_it_is_asked_for_and_bounded(
    home: DeviceFolder, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, turns = remembering(home, lm, recall=0)
    *shown, asked = seen(agent, monkeypatch, "Is the Marigold a good boat?")
    assert shown == ["Is the Marigold a good boat?", []]
    agent.device.config = agent.device.config.model_copy(update={"recall": 2})
    assert {t.id for t in recalled(agent.device, "Mondays on a boat", {asked.id})} == {turns[0].id, turns[1].id}
    long = agent.device.vault.add("zebra " * 500, "", "")
    assert lm.format.length(line_of(agent.device, long)) < 3 * TOKENS
    with agent.device.vault.open() as connection:
        rows = [(f"m{k}", 0, f"prompt {k}", "said") for k in range(NEWEST)]
        connection.executemany("INSERT INTO dialogue (id, time, prompt, said) VALUES (?, ?, ?, ?)", rows)
    assert recalled(agent.device, "Is the Marigold a good boat?", ()) == []  # too long ago


def test_the_command_says_because_of_what(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    door.agent.device.config = door.agent.device.config.model_copy(update={"recall": 1})
    door.agent.device.vault.add("My boat is called Marigold", "ok", "")
    monkeypatch.setattr(door.agent.device.lm, "reply", lambda *_: "so it is")
    done = CliRunner().invoke(device_app, ["chat", "The Marigold?", "--home", str(door.agent.device.folder.path)])
    assert done.exit_code == 0 and "because you said on" in done.output and "Marigold" in done.output
