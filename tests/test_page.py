"""The agent's page in a real browser: every control, by mouse and by keyboard, at a phone's width."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from florilegium.client.agent.agent import Agent
from florilegium.client.agent.config import new_config
from florilegium.client.agent.daemon import showing
from florilegium.client.agent.device import Device
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.signature import new_key, public_half
from florilegium.client.agent.terms import Terms
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.places import base_hash
from florilegium.client.personalization.acceptance import AcceptanceConfig
from florilegium.privacy.plan import RoundPlan

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
PHONE: Any = {"width": 390, "height": 844}
DESK: Any = {"width": 1280, "height": 900}
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel) -> Iterator[tuple[Agent, str]]:
    """An agent with a few dialogues and a release behind it, and its page's address."""
    home, config = DeviceFolder(tmp_path_factory.mktemp("page") / "device"), new_config(ModelConfig(name="nano"))
    config = config.model_copy(update={"acceptance": AcceptanceConfig(share=0)})
    agent = Agent(Device(home, config, lm, home.make(config)))
    agent.consent("learn", True)
    agent.consent("federate", True)
    for prompt, wanted in (("Do you like apples?", "Only green ones."), ("What shall we cook?", "Soup with ginger.")):
        agent.rate(agent.device.vault.add(prompt, "hm", "").id, False, wanted)
    agent.device.vault.add("<b>Is this bold?</b><script>alert(1)</script>", "no", "")
    agent.learn()
    agent.join(Terms(name="orchard", base=base_hash("nano"), operator=public_half(new_key())), "127.0.0.1:9092")
    agent.contribute([config.name], agent.device.context.shared_layout.start(0), RoundPlan(1, 0))
    with showing(agent, 0):
        yield agent, agent.page_address


@pytest.fixture
def page(shown: tuple[Agent, str]) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_context(viewport=PHONE).new_page()
        opened.on("dialog", lambda dialog: dialog.accept())
        problems: list[str] = []
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("request", lambda request: problems.append(request.url) if "127.0.0.1" not in request.url else None)
        opened.goto(shown[1])
        expect(opened.locator("#about")).to_contain_text(shown[0].device.config.name)
        yield opened
        assert not problems
        browser.close()


def test_a_talk_is_streamed_judged_and_learned_from(page: Page, shown: tuple[Agent, str]) -> None:
    agent, before = shown[0], shown[0].device.vault.count()
    page.get_by_label("You say").fill("Do you like music?")
    page.keyboard.press("Enter")
    turn = page.locator(".turn").last
    up = turn.get_by_role("button", name="a good reply", exact=True)
    up.click()
    expect(up).to_have_attribute("aria-pressed", "true")
    turn.get_by_label("what you would have said").fill("Only loud music.")
    turn.get_by_role("button", name="This is what I would have said").click()
    expect(page.locator("#about")).to_contain_text("1 new")
    page.get_by_role("button", name="Learn now").click()
    expect(page.locator("#progress")).to_contain_text("learned from", timeout=60_000)
    expect(page.locator("#items")).to_contain_text("Only loud music.")
    assert agent.device.vault.count() == before + 1 and agent.device.vault.turns()[-1].wanted == "Only loud music."


def test_what_is_kept_is_text_with_its_scores_and_can_be_erased(page: Page, shown: tuple[Agent, str]) -> None:
    items = page.locator("#items > li")
    expect(items.filter(has_text="Do you like apples?")).to_contain_text("EOE")
    expect(items.filter(has_text="<b>Is this bold?</b>")).to_have_count(1)  # as it was said, not as markup
    count = items.count()
    items.filter(has_text="<b>Is this bold?</b>").get_by_role("button", name="Erase").click()
    expect(page.locator("#progress")).to_contain_text("erased", timeout=60_000)
    expect(items).to_have_count(count - 1)
    expect(page.locator("#progress")).to_contain_text("1 releases were sent before and cannot be recalled")


def test_the_profile_is_edited_and_settings_are_kept(page: Page, shown: tuple[Agent, str]) -> None:
    agent = shown[0]
    page.get_by_label("interest 1", exact=True).fill("green apples")
    page.get_by_role("button", name="Save the profile").click()
    expect(page.get_by_label("interest 1", exact=True)).to_have_value("green apples")
    page.get_by_label("at night").check()
    page.wait_for_function("document.querySelector('input[value=night]').checked")
    page.reload()
    expect(page.get_by_label("at night")).to_be_checked()
    assert agent.profile.interests[0].text == "green apples" and agent.device.learns == "night"


def test_what_has_left_is_shown_and_a_federation_is_left(page: Page, shown: tuple[Agent, str]) -> None:
    expect(page.locator("#sent")).to_contain_text("orchard")
    expect(page.locator("#budget")).to_contain_text("of 8 is spent")
    shown[0].turn_away("a question that its operator did not sign")
    page.reload()
    expect(page.locator("#federation")).to_contain_text("1 × a question that its operator did not sign")
    page.get_by_role("button", name="Leave the federation").click()
    expect(page.locator("#federation")).to_contain_text("in no federation")
    assert shown[0].device.membership is None


def test_it_works_by_keyboard_and_fits_a_phone(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("body").press("Tab")
    reached = set()
    for _ in range(60):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.slice(0, 20)"))
        page.keyboard.press("Tab")
    assert {"prompt", "learn", "export", "erase-all"} <= reached


def test_the_export_is_downloaded(page: Page, tmp_path: Path) -> None:
    with page.expect_download() as started:
        page.locator("#export").click()
    started.value.save_as(tmp_path / "mine.zip")
    assert (tmp_path / "mine.zip").stat().st_size > 1000


def test_another_page_cannot_speak_for_its_owner(page: Page, shown: tuple[Agent, str]) -> None:
    """With the owner's cookie in the same browser: a form of another origin, and a fetch."""
    address = shown[1].partition("/?")[0]
    other = page.context.new_page()
    other.goto("data:text/html,<p>evil")
    told = {"method": "POST", "mode": "no-cors", "credentials": "include", "body": '{"item": "learn", "given": false}'}
    url = f"{address}/api/consent"
    other.evaluate("([url, told]) => fetch(url, told).catch(() => null)", [url, told])
    field = """<input name='{"item": "learn", "given": false, "x": "' value='"}'>"""
    other.set_content(f"<form method=post enctype=text/plain action={url}>{field}<button>win</button></form>")
    other.get_by_text("win").click()
    other.wait_for_load_state()
    assert "error" in other.content() or "403" in other.content() or "401" in other.content()
    assert shown[0].device.consents["learn"]


def test_replies_that_may_hold_what_is_erased_are_listed_and_asked_about(page: Page, shown: tuple[Agent, str]) -> None:
    agent, (cooking,) = shown[0], shown[0].device.vault.turns("WHERE prompt = 'What shall we cook?'")
    quoting = [
        agent.device.vault.add(f"And then, {k}?", f"Soup with <b>ginger</b>, {k}.", "", after=1).id for k in "ab"
    ]
    count = len(agent.said_under([cooking.id]))
    assert count >= 2
    page.reload()
    button, dialog = page.get_by_role("button", name="Erase: What shall we cook?"), page.locator("#under")
    button.click()
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text(f"{count} replies of the model")
    expect(dialog.locator("li")).to_have_count(count)
    expect(dialog).to_contain_text("Soup with <b>ginger</b>, a.")  # as text
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert agent.device.vault.turn(cooking.id) and agent.device.vault.turn(quoting[0]).said
    button.click()
    dialog.get_by_role("button", name="Erase these replies too").click()
    expect(page.locator("#progress")).to_contain_text(f"erased, with {count} replies", timeout=60_000)
    assert [agent.device.vault.turn(i).said for i in quoting] == ["", ""]
    with pytest.raises(KeyError):
        agent.device.vault.turn(cooking.id)


class Neighbour(BaseHTTPRequestHandler):
    """Somebody else's server on another port of this machine: what it is told, and a page that tries the agent's."""

    told: ClassVar[list[str]] = []
    target: ClassVar[str] = ""

    def do_GET(self) -> None:
        self.told.append(f"{self.path} {dict(self.headers)}")
        page = f"""<!doctype html><iframe id="f" src="{self.target}"></iframe>
<img src="{self.target}api/status"><script src="{self.target}api/export"></script>"""
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(page.encode())

    def log_message(self, *_: Any) -> None:
        pass


def test_another_port_of_this_machine_learns_nothing(page: Page, shown: tuple[Agent, str]) -> None:
    """The token is not in the page's address any more, goes to no other port, and a frame or a script gets nothing."""
    agent, address = shown
    assert "token" not in page.url and agent.page_token not in page.content()
    page.reload()
    expect(page.locator("#about")).to_contain_text(agent.device.config.name)
    Neighbour.told, Neighbour.target = [], address.partition("#")[0]
    with ThreadingHTTPServer(("127.0.0.1", 0), Neighbour) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        other = f"http://127.0.0.1:{server.server_address[1]}/"
        page.goto(other)
        ask = "async (to) => { try { return await (await fetch(to)).text() } catch (e) { return `refused: ${e}` } }"
        assert page.evaluate(ask, Neighbour.target + "api/export").startswith("refused")
        send = """async (to) => { try { await fetch(to, {method: 'POST', mode: 'no-cors',
            body: '{"item": "learn", "given": false}'}); return 'sent' } catch (e) { return `refused: ${e}` } }"""
        page.evaluate(send, Neighbour.target + "api/consent")
        assert page.evaluate("sessionStorage.getItem('token')") is None
        assert not page.frames[1].locator("#about").count()  # the page is not shown in a frame
        server.shutdown()
    assert Neighbour.told and not any(agent.page_token in line for line in Neighbour.told)
    assert agent.device.consents["learn"]


# -- earlier conversations, temporary ones, Markdown -------------------------------------------------------------------

WRITTEN = """# Soup

Take **ginger** and `1 < 2 & "x"`:

- a *pumpkin*
- <img src=x onerror=alert(1)>

```
<script>alert(2)</script>
```
> see [here](javascript:alert(3)) and ![this](http://evil.example/x.png)"""


def test_a_reply_is_markdown_and_never_markup(page: Page, shown: tuple[Agent, str]) -> None:
    agent = shown[0]
    agent.device.vault.add("How is it made?", WRITTEN, "recipe")
    page.reload()
    page.get_by_text("Earlier conversations").click()
    page.get_by_role("button", name="How is it made?").click()
    said = page.locator(".turn .said").last
    expect(said.locator(".heading")).to_have_text("Soup")
    expect(said.locator("strong")).to_have_text("ginger")
    expect(said.locator("code").first).to_have_text('1 < 2 & "x"')
    expect(said.locator("li")).to_have_text(["a pumpkin", "<img src=x onerror=alert(1)>"])
    expect(said.locator("pre")).to_have_text("<script>alert(2)</script>")
    expect(said.locator("blockquote")).to_contain_text(
        "here (javascript:alert(3)) and this (http://evil.example/x.png)"
    )
    assert page.evaluate("document.querySelectorAll('.said img, .said script, .said a, .said iframe').length") == 0
    sources = resources.files("florilegium.client.agent") / "page"
    assert not any("innerHTML" in (sources / f"{n}.js").read_text("utf-8") for n in ("page", "markdown", "charts"))


def test_earlier_conversations_are_there_on_return_and_are_searched(page: Page, shown: tuple[Agent, str]) -> None:
    agent = shown[0]
    for k in range(25):
        agent.device.vault.add(f"Question {k:02d}", f"answer {k:02d}", f"talk-{k}")
    agent.device.vault.add("100% sure_of it?", "yes", "odd")
    page.reload()
    page.get_by_label("You say").fill("Where were we?")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("button", name="a good reply", exact=True)).to_have_count(1)
    page.reload()
    expect(page.locator(".turn .you")).to_have_text(["Where were we?"])  # as it was left
    page.get_by_text("Earlier conversations").click()
    entries = page.locator("#conversations button")
    expect(entries).to_have_count(20)
    expect(entries.first).to_contain_text("Where were we?")
    page.get_by_role("button", name="Older ones").click()
    expect(entries.filter(has_text="Question 00")).to_have_count(1)
    page.get_by_label("Words that were said").fill("ANSWER 07")
    page.keyboard.press("Enter")
    expect(entries).to_have_count(1)
    entries.first.click()
    expect(page.locator(".turn .you")).to_have_text(["Question 07"])
    for sought, count in (("0% sure_", 1), ("100_ sure", 0), ("no such words", 0)):
        page.get_by_label("Words that were said").fill(sought)
        page.keyboard.press("Enter")
        expect(entries).to_have_count(count)
    expect(page.locator("#found")).to_have_text("nothing was said with these words")


def test_a_temporary_chat_leaves_nothing(page: Page, shown: tuple[Agent, str]) -> None:
    agent, before = shown[0], shown[0].device.vault.turns()
    page.get_by_label("Temporary").check()
    for prompt in ("My pin is 4711-zebra", "What is my pin?"):
        page.get_by_label("You say").fill(prompt)
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".turn .said").last).not_to_have_text("…")
        expect(page.get_by_label("You say")).to_be_enabled()
    expect(page.locator(".turn.temporary")).to_have_count(2)
    expect(page.get_by_role("button", name="a good reply", exact=True)).to_have_count(0)
    assert agent.device.vault.turns() == before
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)


def test_it_says_because_of_what(page: Page, shown: tuple[Agent, str]) -> None:
    agent, config = shown[0], shown[0].device.config
    agent.device.config = config.model_copy(update={"recall": 1})
    agent.device.vault.add("My <b>zeppelin</b> is in the barn", "ok", "hangar")
    try:
        page.get_by_label("You say").fill("Where is the zeppelin?")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".because")).to_contain_text("“My <b>zeppelin</b> is in the barn”")
    finally:
        agent.device.config = config


# -- learning, seen ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_learning_shows_what_it_did_and_is_taken_back(page: Page, shown: tuple[Agent, str]) -> None:
    agent = shown[0]
    config = agent.device.config
    agent.device.config = config.model_copy(update={"acceptance": AcceptanceConfig(share=0.5, risk=1e-6)})
    try:
        turns = [agent.device.vault.add(f"Is <i>number {k}</i> even?", "hm", "") for k in range(12)]
        for turn in turns:
            agent.rate(turn.id, False, "Yes, I dare say.")
        with agent.device.vault.open() as connection:
            connection.execute("UPDATE dialogue SET id = 'e' || number WHERE cycle IS NULL")
        page.reload()
        page.get_by_role("button", name="Learn now").click()
        expect(page.locator("#progress")).to_contain_text("learned from", timeout=120_000)
        trial = page.locator("#trial")
        expect(trial).to_contain_text("nats a token before")
        expect(page.locator("#shown > li")).to_have_count(3)
        expect(page.locator("#shown > li").first).to_contain_text("<i>number")
        expect(page.locator("#shown > li").first).to_contain_text("what you wrote")
        expect(page.locator("#learning-chart svg")).to_have_count(1)
        personal = agent.device.state().personal.clone()
        page.get_by_role("button", name="Go back to the adapter").click()
        expect(page.locator("#progress")).to_contain_text("the adapter before the last learning is used")
        expect(page.get_by_role("button", name="Go back to the adapter")).to_be_hidden()
        assert agent.device.state().personal.ne(personal).any()
    finally:
        agent.device.config = config


def test_programs_that_have_a_token_are_listed_and_shut_out(page: Page, shown: tuple[Agent, str]) -> None:
    token = shown[0].tokens.new("editor")
    page.reload()
    expect(page.locator("#tokens")).to_contain_text("editor")
    assert token not in page.content()
    page.get_by_role("button", name="Revoke the token of editor").click()
    expect(page.locator("#tokens")).to_have_text("none")
    assert not shown[0].tokens.knows(token)


# -- looks -------------------------------------------------------------------------------------------------------------


def test_all_of_the_page_is_small_and_its_own() -> None:
    files = [f for f in (resources.files("florilegium.client.agent") / "page").iterdir() if f.name != "__pycache__"]
    assert sum(len(f.read_bytes()) for f in files) <= 150_000
    assert not any(b"https://" in f.read_bytes() for f in files)


def test_colours_are_the_owners_choice(page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    page.get_by_label("Colours").select_option("dark")
    dark = page.evaluate(paper)
    page.reload()
    expect(page.get_by_label("Colours")).to_have_value("dark")
    assert page.evaluate(paper) == dark
    page.get_by_label("Colours").select_option("light")
    assert page.evaluate(paper) != dark
    page.get_by_label("Colours").select_option("")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(paper) == dark


def test_it_is_used_by_keyboard_alone(page: Page, shown: tuple[Agent, str]) -> None:
    def to(wanted: str) -> None:
        for _ in range(400):
            if page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()") == wanted:
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach {wanted}")

    before = shown[0].device.vault.count()
    page.locator("body").press("Tab")
    to("Earlier conversations")
    page.keyboard.press("Enter")
    to("search")
    page.keyboard.type("apples")
    page.keyboard.press("Enter")
    expect(page.locator("#conversations button")).to_have_count(1)
    to("prompt")
    page.keyboard.type("By keyboard?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="a good reply", exact=True)).to_have_count(1)
    to("👍 A good reply")
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="a good reply", exact=True)).to_have_attribute("aria-pressed", "true")
    to("learn")
    page.keyboard.press("Enter")
    expect(page.locator("#progress")).to_contain_text("learned from", timeout=120_000)
    assert shown[0].device.vault.count() == before + 1


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's code, from the npm registry."""
    folder = tmp_path_factory.mktemp("axe")
    if not shutil.which("npm"):
        pytest.skip("no npm on this machine")
    packed = subprocess.run(["npm", "pack", "axe-core@4", "--silent"], cwd=folder, capture_output=True, timeout=120)
    if packed.returncode:
        pytest.skip("axe-core cannot be had from the npm registry here")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as opened:
        found = opened.extractfile("package/axe.min.js")
        assert found
        return found.read().decode()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_nothing_serious_keeps_anybody_out(
    page: Page, shown: tuple[Agent, str], axe: str, size: Any, theme: str
) -> None:
    agent = shown[0]
    if not agent.trials()["shown"]:
        agent.device.vault.add("What did I say?", WRITTEN, "seen")
    page.set_viewport_size(size)
    page.get_by_label("Colours").select_option(theme)
    page.get_by_text("Earlier conversations").click()
    page.locator("#conversations button").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    page.evaluate(axe)  # past the page's own policy, which loads nothing from elsewhere
    found = page.evaluate("axe.run()")
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert found["passes"] and not serious, [(v["id"], [n["html"] for n in v["nodes"]][:3]) for v in serious]
    if folder := os.environ.get("FLORILEGIUM_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{size['width']}-{theme}.png", full_page=True)


def test_five_thousand_dialogues_are_no_burden(page: Page, shown: tuple[Agent, str]) -> None:
    agent = shown[0]
    with agent.device.vault.open() as connection:
        connection.execute("BEGIN IMMEDIATE")
        rows = [(f"m{k}", 1e9 + k, f"c{k // 4}", f"prompt {k}", f"said {k}", k) for k in range(5000)]
        connection.executemany(
            "INSERT INTO dialogue (id, time, conversation, prompt, said, cycle) VALUES (?, ?, ?, ?, ?, ?)", rows
        )
        connection.execute("COMMIT")
    began = time.monotonic()
    page.reload()
    expect(page.locator("#about")).to_contain_text("dialogues")
    page.get_by_text("Earlier conversations").click()
    expect(page.locator("#conversations button")).to_have_count(20)
    page.get_by_label("Words that were said").fill("said 4321")
    page.keyboard.press("Enter")
    expect(page.locator("#conversations button")).to_have_count(1)
    assert time.monotonic() - began < 20
    assert page.evaluate("document.querySelectorAll('*').length") < 2000
