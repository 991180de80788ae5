"""The operator's page and metrics: what they tell, and to whom."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from playwright.sync_api import expect, sync_playwright
from prometheus_client.parser import text_string_to_metric_families
from test_deployment import free_port
from test_doors import Device, public_of
from test_invitation import server_in
from test_page import CHROMIUM, DESK, FLAGS, PHONE
from typer.testing import CliRunner

from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.terms import read_terms
from florilegium.simulation.cli.server import app as server_app
from florilegium.simulation.deployment.activity import Activity
from florilegium.simulation.deployment.certificates import CA, CERTIFICATE, KEY, STATUS_LINK, STATUS_TOKEN
from florilegium.simulation.deployment.https_server import Allowed, device_server
from florilegium.simulation.deployment.link import Link
from florilegium.simulation.deployment.register import admit, admitted
from florilegium.simulation.deployment.status import Status
from florilegium.simulation.deployment.status_page import showing_status
from florilegium.simulation.runs.events import RoundEnd
from florilegium.simulation.runs.folder import RunFolder


def ended(number: int, releases: int, **refused: int) -> RoundEnd:
    codes = {code.replace("_", "-"): devices for code, devices in refused.items()}
    return RoundEnd(round=number, releases=releases, silent=1, refused=codes, signal_to_noise=None, change_norm_l2=1.0)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Status, str]]:
    """A server with two rounds behind it, a device that is there, one that is not, a stranger at the door; its page."""
    folder, port = server_in(tmp_path_factory.mktemp("status")), free_port()
    alice, bob, stranger = (
        Device(ec.generate_private_key(ec.SECP384R1()), f"127.0.0.1:{port}", folder / CA) for _ in range(3)
    )
    for name, device in (("alice", alice), ("bob", bob)):
        admit(folder, name, public_of(device))
    RunFolder(folder).record_all([ended(1, 3), ended(2, 1, too_large=2, too_few=1)])
    terms = read_terms(folder / "terms.toml").model_copy(update={"min_devices": 2})
    link, activity = Link(), Activity()
    link.set_admitted(admitted(folder))
    with (
        device_server(
            link, "127.0.0.1", port, folder / CERTIFICATE, folder / KEY, Allowed(), activity=activity
        ) as door,
        showing_status(Status(folder, terms, link, activity, door), 0) as address,
    ):
        assert alice.activate().status_code == 200 and stranger.post("pull-messages", b"").status_code == 401
        assert stranger.activate().status_code != 200
        with stranger.client() as client:
            for _ in range(2):
                assert client.get("/secret?q=what-a-stranger-says").status_code == 404
        yield Status(folder, terms, link, activity, door), address


def asked(address: str, path: str, token: str = "", **heads: str) -> httpx.Response:
    shown = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.get(address.partition("#")[0].rstrip("/") + path, headers={**shown, **heads}, trust_env=False)


def test_metrics_are_read_by_prometheus_own_parser(shown: tuple[Status, str]) -> None:
    """With the token in the folder's file, as a scraper has it; no name of a device is among them."""
    status, address = shown
    answer = asked(address, "/metrics", (status.folder / STATUS_TOKEN).read_text())
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert all(family.documentation and family.name.startswith("florilegium_") for family in families.values())
    values = {(s.name.removeprefix("florilegium_"), *s.labels.values()): s.value
              for family in families.values() for s in family.samples}  # fmt: skip
    for name, value in {
        "rounds_agreed": 3, "rounds_total": 2, "rounds_not_aggregated_total": 1, "releases_total": 4,
        "silent_devices_total": 2, "last_round_releases": 1, "devices_admitted": 2, "devices_connected": 1,
    }.items():  # fmt: skip
        assert values[name,] == value, name
    assert values["refused_releases_total", "too-large"] == 2 and values["refused_releases_total", "too-few"] == 1
    assert values["turned_away_requests_total", "Not Found"] == 2
    assert values["turned_away_requests_total", "this key is not admitted"] == 2
    assert (
        families["florilegium_rounds"].type == "counter" and families["florilegium_devices_connected"].type == "gauge"
    )
    assert not any(word in answer.text for word in ("alice", "bob", "what-a-stranger-says", "127.0.0.1"))


def test_the_page_is_for_who_has_the_token(shown: tuple[Status, str]) -> None:
    """What is shown without it holds nothing; another host, another origin and another token are refused."""
    status, address = shown
    token = address.partition("#token=")[2]
    assert asked(address, "/api/status", token).json()["federation"] == "orchard"
    for path in ("/api/status", "/metrics", "/nothing"):
        assert asked(address, path).status_code == asked(address, path, "no" + token).status_code == 401
        assert asked(address, path, token, host="evil.example").status_code == 403
        assert asked(address, path, token, origin="http://evil.example").status_code == 403
    for path in ("/", "/status.css", "/status.js"):
        answer = asked(address, path)
        assert answer.status_code == 200 and "alice" not in answer.text and "http" not in answer.text
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    told = status.told()
    assert [r["told"] for r in told["rounds"]] == ["3 releases", "not aggregated: 1 releases of the 2 that it needs, "
                                                  "2 too-large"]  # fmt: skip
    assert [(d["name"], d["connected"], d["heard"] is None) for d in told["devices"]] == [
        ("alice", True, False), ("bob", False, True)]  # fmt: skip
    assert "what-a-stranger-says" not in json.dumps(told)


def test_the_address_is_its_operators_alone_and_goes_with_the_server(shown: tuple[Status, str]) -> None:
    status, address = shown
    link, token = status.folder / STATUS_LINK, status.folder / STATUS_TOKEN
    assert link.stat().st_mode & 0o777 == token.stat().st_mode & 0o777 == 0o600
    done = CliRunner().invoke(server_app, ["page", str(status.folder)])
    assert done.output.strip() == address and address.endswith(token.read_text())
    taken = int(address.partition("#")[0].rstrip("/").rpartition(":")[2])
    other = server_in(status.folder / "other")
    again = Status(other, status.terms, status.link, status.activity, status.door)
    with pytest.raises(DeviceError, match=f"port {taken} of 127.0.0.1 is taken"), showing_status(again, taken):
        pass
    with showing_status(again, 0) as first:
        assert (other / STATUS_LINK).exists()
    none = CliRunner().invoke(server_app, ["page", str(other)])
    assert isinstance(none.exception, DeviceError) and "no server runs" in str(none.exception)
    with showing_status(again, 0) as second:  # a scraper's token stays
        assert first.partition("#")[2] == second.partition("#")[2] != address.partition("#")[2]
    (other / STATUS_TOKEN).chmod(0o640)
    with pytest.raises(DeviceError, match="others may read"), showing_status(again, 0):
        pass


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium")
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_the_page_in_a_browser(shown: tuple[Status, str], viewport: Any, tmp_path: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page, problems = browser.new_context(viewport=viewport).new_page(), list[str]()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if "127.0.0.1" not in request.url else None)
        page.goto(shown[1])
        expect(page.locator("#about")).to_contain_text("orchard, nano")
        expect(page.locator("#done")).to_have_text("2 of 3 rounds are over; a round needs 2 releases")
        rows = page.locator("#rounds tbody tr")
        expect(rows).to_have_count(2)
        expect(rows.first).to_contain_text("2 too-large, 1 too-few")
        expect(rows.first).to_contain_text("not aggregated")
        expect(page.locator("#devices tbody tr").first).to_contain_text("connected")
        expect(page.locator("#devices tbody tr").last).to_contain_text("not since the start")
        expect(page.locator("#refusals")).to_contain_text("this key is not admitted")
        assert page.url.endswith("/") and page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        page.screenshot(path=os.environ.get("SCREENSHOT", str(tmp_path)) + f"-{viewport['width']}.png", full_page=True)
        page.evaluate("sessionStorage.clear()")
        page.goto(shown[1].partition("#")[0])
        expect(page.locator("#error")).to_contain_text("florilegium server page")
        assert not problems
        browser.close()
