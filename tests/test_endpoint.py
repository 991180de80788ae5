"""The endpoint for programs, by OpenAI's own client against an agent with the bundled model."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from test_agent import decrypted, made, reopened
from typer.testing import CliRunner

from florilegium.client.agent.api_tokens import MOST, ApiTokens
from florilegium.client.agent.cli import app as device_app
from florilegium.client.agent.daemon import listening, showing
from florilegium.client.agent.device import restore
from florilegium.client.agent.errors import AgentError
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.openai_api import AT_ONCE
from florilegium.client.lm.model import LanguageModel

HELLO: list[Any] = [{"role": "user", "content": "Do you like music?"}]


@pytest.fixture
def home() -> Iterator[DeviceFolder]:
    """Wherever the tests run, as the path of a socket has a bound."""
    with TemporaryDirectory(prefix="device-") as folder:
        yield DeviceFolder(Path(folder) / "home")


@pytest.fixture
def door(home: DeviceFolder, lm: LanguageModel) -> Iterator[SimpleNamespace]:
    """An agent with a token, and OpenAI's client that has it."""
    agent = made(home, lm)
    token = agent.tokens.new("editor")
    with home.locked(), listening(agent), showing(agent, 0) as address:
        client = openai.OpenAI(base_url=f"{address}v1", api_key=token, max_retries=0, timeout=60)
        yield SimpleNamespace(agent=agent, client=client, token=token, url=f"{address}v1")
        client.close()


def asked(door: SimpleNamespace, messages: list[Any] = HELLO, **more: Any) -> Any:
    return door.client.chat.completions.create(model="nano", messages=messages, **more)


def posted(door: SimpleNamespace, body: Any, path: str = "chat/completions", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    own = {"authorization": f"Bearer {door.token}", **headers}
    return httpx.post(f"{door.url}/{path}", content=content, headers=own, timeout=60)


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_a_token_is_shown_once_kept_as_a_hash_and_revoked(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    token = agent.tokens.new("editor")
    assert token.encode() not in decrypted(home.vault, home.read_key(agent.device.config))
    assert token not in str(agent.tokens.listed()) and [t["name"] for t in agent.tokens.listed()] == ["editor"]
    again = reopened(agent)
    assert again.tokens.knows(token) and not again.tokens.knows(token[:-1]) and not again.tokens.knows("")
    with pytest.raises(AgentError, match="there is a token 'editor'"):
        again.tokens.new("editor")
    for name in ("", "a b", "x" * 65, "<b>"):
        with pytest.raises(AgentError, match="no name of a token"):
            again.tokens.new(name)
    again.tokens.revoke("editor")
    assert not again.tokens.knows(token) and not ApiTokens(again.device.vault).knows(token)
    with pytest.raises(AgentError, match="there is no token 'editor'"):
        again.tokens.revoke("editor")
    for k in range(MOST):
        again.tokens.new(f"n{k}")
    with pytest.raises(AgentError, match="the most"):
        again.tokens.new("more")


def test_a_revoked_token_does_not_come_back_with_a_copy(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    token = agent.tokens.new("editor")
    agent.learn()
    agent.device.vault.copy_to(home.good_copy)
    agent.tokens.revoke("editor")
    restore(home)
    assert not reopened(agent).tokens.knows(token)


def test_the_commands_make_list_and_revoke_tokens(door: SimpleNamespace) -> None:
    def told(*words: str) -> str:
        done = CliRunner().invoke(device_app, [*words, "--home", str(door.agent.device.folder.path)])
        assert done.exit_code == 0, done.output
        return done.output

    new = told("token", "new", "phone")
    assert door.agent.tokens.knows(new.split()[0]) and f"{door.url} takes it" in new and "learns from" in new
    assert "phone" in told("token", "list") and new.split()[0] not in told("token", "list")
    told("token", "revoke", "phone")
    assert not door.agent.tokens.knows(new.split()[0])


def test_each_token_opens_its_own_paths_alone(door: SimpleNamespace) -> None:
    api, page = door.url.replace("/v1", "/api"), door.agent.page_token
    for key in ("", "guess", page, f"{door.token}x", "é"):
        reply = httpx.get(f"{door.url}/models", headers={"authorization": f"Bearer {key}".strip().encode()})
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    own = {"authorization": f"Bearer {door.token}"}
    for path in ("status", "dialogues", "export", "tokens"):
        assert httpx.get(f"{api}/{path}", headers=own).status_code == 401
    for path in (
        "/v1/../api/status",
        "//v1/../api/status",
        "/v1/%2e%2e/api/status",
        "/api/status?/v1/",
        "/api%2fstatus",
    ):
        reply = httpx.Client().get(door.url.removesuffix("/v1") + path, headers=own)
        assert reply.status_code in (401, 404) and "device" not in reply.json()
    for foreign in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}, {"host": "evil.example"}):
        refused = httpx.get(f"{door.url}/models", headers={**own, **foreign})
        assert refused.status_code == 403 and refused.json()["error"]["type"] == "permission_error"
    assert httpx.get(f"{door.url}/models", headers=own).headers["x-content-type-options"] == "nosniff"
    door.agent.tokens.revoke("editor")
    with pytest.raises(openai.AuthenticationError, match="device token new"):
        asked(door)


# -- chats ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_kept_and_rated_like_any_other(door: SimpleNamespace) -> None:
    reply = asked(door, temperature=0.0, max_tokens=12)
    (turn,) = door.agent.device.vault.turns()
    assert turn.prompt == "Do you like music?" and turn.said == reply.choices[0].message.content
    assert reply.choices[0].finish_reason in ("stop", "length") and reply.usage.completion_tokens <= 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.model_extra["florilegium"] == {"dialogue": turn.id}
    door.agent.rate(turn.id, False, "Only loud music.")
    assert door.agent.learn()["personal_examples"] >= 1


def test_a_streamed_chat_is_the_one_that_is_not(door: SimpleNamespace) -> None:
    whole = asked(door, temperature=0.0, store=False)
    pieces = list(asked(door, temperature=0.0, stream=True, stream_options={"include_usage": True}, store=False))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    assert len(pieces) > 4 and pieces[-1].usage == whole.usage and not pieces[-1].choices
    assert [p.choices[0].finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 2) + [
        whole.choices[0].finish_reason
    ]
    assert pieces[0].choices[0].delta.role == "assistant" and len({p.id for p in pieces}) == 1


def test_a_reply_that_is_cut_off_says_so_and_a_seed_repeats(door: SimpleNamespace) -> None:
    cut = asked(door, max_completion_tokens=3, temperature=0.0)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3
    drawn = [asked(door, seed=seed, temperature=1.5).choices[0].message.content for seed in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("way", ["store", "header", "no consent"])
def test_what_is_temporary_leaves_nothing(door: SimpleNamespace, way: str) -> None:
    marker = "xylophone-7731"
    door.agent.consent("learn", way != "no consent")
    more: dict[str, Any] = {"store": {"store": False}, "header": {"extra_headers": {"X-Florilegium-Temporary": "1"}}}
    for stream in (False, True):
        reply = asked(door, [{"role": "user", "content": f"I play the {marker}."}], stream=stream, **more.get(way, {}))
        assert list(reply) if stream else "florilegium" not in (reply.model_extra or {})
    home = door.agent.device.folder
    assert not door.agent.device.vault.count()
    assert marker.encode() not in decrypted(home.vault, home.read_key(door.agent.device.config))


def test_a_program_that_sends_its_whole_chat_stays_in_one_conversation(door: SimpleNamespace) -> None:
    first = asked(door).choices[0].message.content
    chat = [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": first}]
    asked(door, [*chat, {"role": "user", "content": "Which?"}])
    asked(door, [{"role": "user", "content": "Good morning!"}])
    branched = [*chat, {"role": "user", "content": [{"type": "text", "text": "Who plays?"}]}]
    asked(door, branched)
    one, two, other, branch = door.agent.device.vault.turns()
    assert (
        one.conversation == two.conversation and len({one.conversation, other.conversation, branch.conversation}) == 3
    )
    assert two.prompt == "Which?" and branch.prompt == "Who plays?"
    under = {t.id for t in door.agent.said_under([one.id])}
    assert under == {t.id for t in (two, branch) if t.said}  # both were said with it in sight


def test_instructions_and_earlier_lines_are_seen_before_the_prompt(
    door: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(door.agent.device.lm, "reply", lambda asked, *_: seen.append(asked) or "so it is")
    lines = [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "e"),
    ]
    asked(door, [{"role": role, "content": text} for role, text in lines])
    assert seen == ["Be brief.\nc\nd\ne"]  # two lines of context, as on the page


def test_who_leaves_in_the_middle_ends_the_work(door: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, go = Event(), Event()

    def reply(asked: str, on: Any, sampling: Any, seed: int, told: Any) -> str:
        try:
            told("a")
            go.wait(10)
            for k in range(1000):
                told("a" * (k + 2))
                Event().wait(0.01)
        finally:
            ended.set()
        return "whole"

    monkeypatch.setattr(door.agent.device.lm, "reply", reply)
    stream = asked(door, stream=True)
    next(iter(stream))
    stream.close()
    go.set()
    assert ended.wait(5) and door.agent.device.vault.count() == 0


def test_so_many_wait_and_the_next_is_told_to_come_again(
    door: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = Event()
    monkeypatch.setattr(door.agent.device.lm, "reply", lambda *_: go.wait(30) and "so it is")
    threads = [Thread(target=asked, args=(door,), kwargs={"stream": k % 2 == 0}, daemon=True) for k in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        refused = posted(door, {"model": "nano", "messages": "none of them"})
        assert refused.status_code == 400  # is read before it waits
        full = posted(door, {"model": "nano", "input": "a"}, "embeddings") if _ > 50 else None
        if full is not None and full.status_code == 429:
            assert full.headers["retry-after"] == "1" and full.json()["error"]["type"] == "rate_limit_error"
            break
        Event().wait(0.02)
    else:
        raise AssertionError("nobody was told to wait")
    go.set()
    for thread in threads:
        thread.join(20)
    assert asked(door).choices[0].message.content == "so it is"


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({"model": "gpt-4o"}, 404, "the model 'nano' alone"),
        ({"model": None}, 400, "`model` must be"),
        ({"messages": []}, 400, "`messages` must be a list"),
        ({"messages": [{"role": "user", "content": "a"}] * 1001}, 400, "1 to 1,000"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "must have a role"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "must be the user's"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "parts of type text",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "nothing to reply to"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "5,000 characters"),
        ({"n": 2}, 400, "'n' is not supported here; only 1 is"),
        ({"tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
        ({"stop": ["x"]}, 400, "'stop' is not supported"),
        ({"logprobs": True}, 400, "'logprobs' is not supported"),
        ({"top_p": 0.5}, 400, "'top_p' is not supported"),
        ({"spell": 1}, 400, "'spell' is not supported"),
        ({"max_tokens": 100_000}, 400, "1 to 1,024"),
        ({"max_tokens": True}, 400, "1 to 1,024"),
        ({"temperature": 3}, 400, "from 0 to 2"),
        ({"temperature": float("nan")}, 400, "not JSON"),
        ({"seed": 2**70}, 400, "64 bits"),
        ({"store": "no"}, 400, "store must be true or false"),
        ({"stream": 1}, 400, "stream must be true or false"),
        ({"stream_options": {"more": 1}}, 400, "include_usage alone"),
    ],
)
def test_what_cannot_be_done_is_said_in_openais_form(
    door: SimpleNamespace, changes: dict[str, Any], status: int, told: str
) -> None:
    reply = posted(door, {"model": "nano", "messages": HELLO, **changes})
    error = reply.json()["error"]
    assert (
        reply.status_code == status and told in error["message"] and set(error) == {"message", "type", "param", "code"}
    )
    assert door.agent.device.vault.count() == 0
    if status == 400 and isinstance(changes.get("messages"), list) and "said" not in told:
        streamed = posted(door, {"model": "nano", "messages": HELLO, **changes, "stream": True})
        assert streamed.status_code == 400  # what is wrong from the beginning has its status, streamed or not


def test_other_requests_are_refused_in_openais_form(door: SimpleNamespace) -> None:
    assert posted(door, b"x" * 300_000).status_code == 413
    assert posted(door, b"[1]").json()["error"]["type"] == "invalid_request_error"
    assert posted(door, {"model": "nano", "messages": HELLO}, **{"x-florilegium-temporary": "maybe"}).status_code == 400
    for path in ("completions", "responses", "files", "models/gpt-4o"):
        assert posted(door, {}, path).status_code == 404
    with pytest.raises(openai.NotFoundError):
        door.client.models.retrieve("gpt-4o")
    unread = httpx.get(f"{door.url}/chat/completions", headers={"authorization": f"Bearer {door.token}"})
    assert unread.status_code == 404 and unread.json()["error"]["code"] == "unknown_url"


# -- models and embeddings --------------------------------------------------------------------------------------------


def test_the_model_is_listed(door: SimpleNamespace) -> None:
    (listed,) = door.client.models.list()
    assert listed.id == "nano" and door.client.models.retrieve("nano") == listed


def test_embeddings_are_of_length_one_and_the_base_models(door: SimpleNamespace, lm: LanguageModel) -> None:
    texts = ["Do you like apples?", "Do you like pears?", "The engine needs oil."]
    reply = door.client.embeddings.create(model="nano", input=texts)  # which asks for base64
    rows = np.array([row.embedding for row in reply.data])
    expected = [f.readings["mean"].vector.float().numpy() for f in lm.embed(texts)]
    for row, own in zip(rows, expected, strict=True):
        np.testing.assert_allclose(row, own / np.linalg.norm(own), atol=1e-6)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] and door.agent.device.vault.count() == 0
    plain = posted(door, {"model": "nano", "input": texts[0]}, "embeddings").json()["data"][0]["embedding"]
    np.testing.assert_allclose(plain, rows[0], atol=1e-6)
    coded = posted(door, {"model": "nano", "input": texts[0], "encoding_format": "base64"}, "embeddings").json()
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4"), np.array(plain, np.float32)
    )
    for wrong in ([], "", ["a"] * 65, [1, 2], ["x" * 5000], None):
        assert posted(door, {"model": "nano", "input": wrong}, "embeddings").status_code == 400
    assert posted(door, {"model": "nano", "input": "a", "dimensions": 3}, "embeddings").status_code == 400


# -- temporary chats on the command line ------------------------------------------------------------------------------


def test_a_temporary_chat_of_the_command_line_leaves_nothing(
    door: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(door.agent.device.lm, "reply", lambda asked, *_: seen.append(asked) or "so it is")
    home = str(door.agent.device.folder.path)
    done = CliRunner().invoke(device_app, ["chat", "--temporary", "--home", home], input="one\ntwo\n\n")
    assert done.exit_code == 0 and "[" not in done.output and seen == ["one", "one\nso it is\ntwo"]
    assert door.agent.device.vault.count() == 0
    done = CliRunner().invoke(device_app, ["chat", "--home", home], input="one\n\n")
    assert done.exit_code == 0 and door.agent.device.vault.count() == 1


# -- a front end that people use --------------------------------------------------------------------------------------

MODELS = "- model_id: mine\n  model_name: nano\n  api_base: {url}\n  api_key_name: mine\n"


@pytest.mark.slow
def test_a_front_end_from_a_registry_talks_with_it(door: SimpleNamespace, tmp_path: Path) -> None:
    """`llm` (https://llm.datasette.io), installed into an environment of its own."""
    venv.create(tmp_path / "env", with_pip=True)
    run = tmp_path / "env" / "bin"
    installed = subprocess.run([run / "pip", "install", "-q", "llm>=0.27"], capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"llm cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "extra-openai-models.yaml").write_text(MODELS.format(url=door.url))
    (tmp_path / "llm" / "keys.json").write_text(json.dumps({"mine": door.token}))
    given = {**os.environ, "LLM_USER_PATH": str(tmp_path / "llm")}

    def said(*words: str) -> str:
        line = [run / "llm", *words]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=given, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    first = said("-m", "mine", "-o", "temperature", "0", "Do you like music?")
    second = said("-m", "mine", "-c", "-o", "temperature", "0", "--no-stream", "Which?")
    one, two = door.agent.device.vault.turns()
    assert (one.prompt, one.said.strip()) == ("Do you like music?", first) and two.said.strip() == second
    assert one.conversation == two.conversation


def test_a_device_that_never_made_a_token_lets_nobody_in(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    with showing(agent, 0) as address:
        for key in ("", agent.page_token, "None", "[]", "{}"):
            reply = httpx.get(f"{address}v1/models", headers={"authorization": f"Bearer {key}".strip()})
            assert reply.status_code == 401 and "device token new" in reply.json()["error"]["message"]
