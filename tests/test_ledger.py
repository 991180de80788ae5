"""The ledger: nothing is spent before it is written, nothing is written twice, and what was changed is noticed."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from shutil import copy

import pytest

from florilegium.privacy.accounting import Event, epsilon
from florilegium.privacy.ledger import (
    ANSWERED,
    BEHIND,
    BROKEN,
    GRANTED,
    MISSING,
    OTHER_TERMS,
    OTHER_UNIT,
    SPENT,
    TWICE,
    Budget,
    Entry,
    Ledger,
    LedgerError,
    Request,
    dialogue_name,
)
from florilegium.privacy.modes import PrivacyConfig

GENESIS = "ab" * 32
EVENT = Event(2.0, 0.5, 4)
LIFE = Budget(100.0, 1e-5, "replace-one", "device")
DIALOGUES = Budget(100.0, 1e-5, "replace-one", "dialogue")


def request(round_number: int = 1, received: str = "adapter", device: str = "d", **more: object) -> Request:
    facts = {"genesis": GENESIS, "experiment": "e", "event": EVENT} | more
    return Request(device=device, round=round_number, received=received, **facts)  # type: ignore[arg-type]


def refusals(ledger: Ledger, *requests: Request, budget: Budget = LIFE) -> list[str]:
    return [a.refusal for r in requests for a in ledger.reserve([r], budget)]


def entries(ledger: Ledger, device: str = "d") -> int:
    account = ledger.account(device, GENESIS)
    assert account
    return len(account.entries)


def test_a_round_is_paid_for_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    assert refusals(ledger, request(), request()) == [GRANTED, GRANTED]
    assert entries(ledger) == 1
    assert entries(Ledger(tmp_path / "ledger.db")) == 1  # as another process finds it


def test_what_would_be_drawn_anew_is_not_granted_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    assert refusals(ledger, *[request(repeatable=False)] * 2, request(2, repeatable=False)) == [
        GRANTED,
        ANSWERED,
        GRANTED,
    ]


def test_two_payments_of_a_round_have_two_heads(tmp_path: Path) -> None:
    """A device that is set back with its ledger: the head of its other payment is not known to it."""
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.reserve([request(repeatable=False)], LIFE)
    copy(tmp_path / "ledger.db", tmp_path / "old.db")
    [paid] = ledger.reserve([request(2, repeatable=False)], LIFE)
    old = Ledger(tmp_path / "old.db")
    [again] = old.reserve([request(2, repeatable=False)], LIFE)
    assert paid.refusal == again.refusal == GRANTED and paid.head != again.head
    assert refusals(old, request(3, repeatable=False, heads=(paid.head,))) == [BEHIND]
    assert refusals(old, request(3, repeatable=False, heads=(again.head,))) == [GRANTED]
    assert [Ledger(tmp_path / n).account("d", GENESIS) is None for n in ("ledger.db", "old.db")] == [False, False]


def test_what_is_drawn_as_before_has_the_head_of_before(tmp_path: Path) -> None:
    """A simulation that is resumed equals one that was not stopped."""
    heads = {Ledger(tmp_path / name).reserve([request()], LIFE)[0].head for name in ("a.db", "b.db")}
    assert len(heads) == 1


def test_who_asks_twice_at_once_is_refused_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    company = [request(device="a"), request(device="b"), request(2, device="a"), request(device="c")]
    answers = ledger.reserve(company, LIFE)
    assert [a.refusal for a in answers] == [TWICE, GRANTED, TWICE, GRANTED]
    assert [entries(ledger, device) for device in "abc"] == [0, 1, 1]
    assert refusals(ledger, request(device="a")) == [GRANTED]


def test_who_looks_meanwhile_breaks_nothing(tmp_path: Path) -> None:
    """A page that asks for the account while a round is paid for, in another thread."""
    ledger, over = Ledger(tmp_path / "ledger.db"), threading.Event()

    def look() -> None:
        while not over.is_set():
            ledger.accounts([("d", GENESIS)])

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert refusals(ledger, *(request(n) for n in range(1, 61))) == [GRANTED] * 60
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert entries(ledger) == 60 == entries(Ledger(tmp_path / "ledger.db"))


def test_another_adapter_or_a_round_before_the_last_gets_nothing(tmp_path: Path) -> None:
    """The same noise on two adapters would cancel. A round that nobody has paid for is there, whatever came before."""
    ledger = Ledger(tmp_path / "ledger.db")
    found = refusals(ledger, request(2), request(2, "other"), request(1), request(2), request(3), request(1))
    assert found == [GRANTED, ANSWERED, GRANTED, ANSWERED, GRANTED, ANSWERED]
    assert entries(ledger) == 3
    assert refusals(ledger, request(3, event=Event(1.0, 0.5, 4))) == [ANSWERED]
    assert refusals(ledger, request(1, experiment="another")) == [GRANTED]


def test_a_life_ends_with_the_last_affordable_release(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    budget = Budget(epsilon([EVENT] * 3, 1e-5) + 1e-9, 1e-5, "replace-one", "device")
    found = refusals(ledger, *(request(n) for n in range(1, 6)), budget=budget)
    assert found == [GRANTED] * 3 + [SPENT] * 2
    account = ledger.account("d", GENESIS)
    assert account and account.spent(budget) == pytest.approx(budget.epsilon)
    assert refusals(ledger, request(7, device="other"), budget=budget) == [GRANTED]


def test_steps_without_noise_are_within_no_budget(tmp_path: Path) -> None:
    for budget in (LIFE, DIALOGUES):
        asked = request(event=Event(0.0, 0.5, 1), dialogues=("a",))
        assert refusals(Ledger(tmp_path / f"{budget.of}.db"), asked, budget=budget) == [SPENT]


def test_a_dialogue_is_retired_and_the_device_goes_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    budget = Budget(epsilon([EVENT] * 2, 1e-5) + 1e-9, 1e-5, "replace-one", "dialogue")
    pools = [("a", "b"), ("a", "c"), ("a", "c"), ("a", "c")]
    answers = [ledger.reserve([request(n, dialogues=p)], budget)[0] for n, p in enumerate(pools, start=1)]
    assert [a.refusal for a in answers] == [GRANTED, GRANTED, GRANTED, SPENT]
    assert [set(a.dialogues) for a in answers] == [{"a", "b"}, {"a", "c"}, {"c"}, set()]
    [again] = ledger.reserve([request(3, dialogues=("a", "c"))], budget)
    assert again.dialogues == {"c"}
    account = ledger.account("d", GENESIS)
    assert account and account.spent(budget) == pytest.approx(epsilon([EVENT] * 2, 1e-5))
    assert len(account.events_of(dialogue_name(GENESIS, "b"))) == 1


def test_what_is_spent_under_other_terms_is_not_added_to_what_no_theorem_covers(tmp_path: Path) -> None:
    """Terms made after releases could be made for what these left open: only new dialogues pay under them."""
    ledger, other = Ledger(tmp_path / "ledger.db"), Event(2.5, 0.25, 4)
    [first] = ledger.reserve([request(1, dialogues=("a", "b"))], DIALOGUES)
    [second] = ledger.reserve([request(2, dialogues=("b", "c"), event=other)], DIALOGUES)
    assert (first.dialogues, second.dialogues) == ({"a", "b"}, {"c"})
    assert refusals(ledger, request(3, dialogues=("a",), event=other), budget=DIALOGUES) == [OTHER_TERMS]
    assert refusals(ledger, request(4, dialogues=("a", "c")), budget=DIALOGUES) == [GRANTED]
    account = ledger.account("d", GENESIS)
    assert account and [e.event for e in account.entries] == [EVENT, other, EVENT]


def test_gaussians_without_sampling_are_added_whatever_their_noise(tmp_path: Path) -> None:
    """Those of a device's whole change: Gaussian DP has a filter, and 3.0 after 2.0 is one of µ² = 1 + 4/9."""
    events = [Event(2.0, 1.0, 1), Event(3.0, 1.0, 1)]
    budget = Budget(epsilon(events, 1e-5) + 1e-9, 1e-5, "replace-one", "device")
    ledger = Ledger(tmp_path / "ledger.db")
    asked = [request(n, event=e) for n, e in enumerate([*events, events[1]], start=1)]
    assert refusals(ledger, *asked, budget=budget) == [GRANTED, GRANTED, SPENT]


def test_dialogues_are_not_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    [answer] = Ledger(path).reserve([request(dialogues=("my-secret-dialogue",))], DIALOGUES)
    assert answer.dialogues == {"my-secret-dialogue"}
    assert b"my-secret-dialogue" not in b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert dialogue_name(GENESIS, "x") != dialogue_name("cd" * 32, "x")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE entry SET noise_multiplier = 9 WHERE number = 1",
        "UPDATE entry SET steps = 0 WHERE number = 0",
        "UPDATE entry SET dialogues = x'' WHERE number = 1",
        "UPDATE entry SET round = 7 WHERE number = 2",
        "UPDATE entry SET unit = 'device' WHERE number = 2",
        "DELETE FROM entry WHERE number = 1",
        "DELETE FROM entry WHERE number = 0",
    ],
)
def test_a_changed_account_pays_for_nothing(tmp_path: Path, change: str) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    asked = [request(n, device=d, dialogues=("a",)) for n in (1, 2, 3) for d in ("d", "other")]
    assert set(refusals(ledger, *asked, budget=DIALOGUES)) == {GRANTED}
    with sqlite3.connect(ledger.path) as connection:
        connection.execute(f"{change} AND device = 'd'")
    fresh = Ledger(ledger.path)
    assert refusals(fresh, request(4), request(4, device="other"), budget=DIALOGUES) == [BROKEN, GRANTED]
    assert fresh.account("d", GENESIS) is None


def test_an_account_of_another_secret_is_broken(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.reserve([request()], LIFE)
    for opened in (ledger, Ledger(ledger.path)):  # the process that wrote it too
        assert refusals(opened, request(2, genesis="cd" * 32)) == [BROKEN]
    assert refusals(ledger, request(2)) == [GRANTED]


def test_what_was_spent_for_another_unit_is_not_reckoned_in_this_one(tmp_path: Path) -> None:
    """Steps on sampled dialogues say nothing of what a whole device has spent, and the other way round.

    Nor does a device that is replaced, in `user-local`, of one whose part of a sum is left out.
    """
    summed = PrivacyConfig(mode="user-distributed", epsilon=100).budget
    for budgets in ((LIFE, DIALOGUES), (DIALOGUES, LIFE), (LIFE, summed), (summed, LIFE)):
        ledger = Ledger(tmp_path / f"{budgets[0].unit} {budgets[1].unit}.db")
        found = [refusals(ledger, request(n, dialogues=("a",)), budget=b)[0] for n, b in enumerate(budgets, start=1)]
        assert found == [GRANTED, OTHER_UNIT]


def test_a_head_tells_nobody_what_it_was_made_of(tmp_path: Path) -> None:
    """All else being public, whether a device has any dialogue must not be read off its head."""
    empty, full = (
        Ledger(tmp_path / f"{n}.db").reserve([request(dialogues=d)], LIFE)[0].head for n, d in enumerate(((), ("a",)))
    )
    assert empty == full  # a device's account does not hold its dialogues
    entry = Entry("e", 1, "adapter", EVENT, "device", ())
    assert entry.chained(GENESIS, GENESIS) == empty
    assert entry.chained(GENESIS, "cd" * 32) != empty  # and what it holds is hashed under the secret


def test_an_old_copy_and_a_missing_file_are_noticed_by_the_head(tmp_path: Path) -> None:
    ledger, copy = Ledger(tmp_path / "ledger.db"), tmp_path / "copy.db"
    [first] = ledger.reserve([request(1)], LIFE)
    with sqlite3.connect(ledger.path) as old, sqlite3.connect(copy) as new:
        old.backup(new)
    [second] = ledger.reserve([request(2, heads=(first.head,))], LIFE)
    later = request(3, heads=(second.head, first.head))
    assert refusals(ledger, later) == [GRANTED]
    assert refusals(Ledger(copy), later) == [BEHIND]
    assert refusals(Ledger(tmp_path / "new.db"), later) == [MISSING]
    assert refusals(Ledger(tmp_path / "new.db"), request(1)) == [GRANTED]  # a device that never spent anything


def test_a_file_that_is_no_ledger_pays_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(LedgerError, match="nothing is released"):
        Ledger(path)


# -- killed at any moment ------------------------------------------------------------------------------------------

DEVICE = """
import sys
from pathlib import Path
from florilegium.privacy.ledger import Ledger, Request, Budget
from florilegium.privacy.accounting import Event
ledger, sent = Ledger(Path(sys.argv[1]) / "ledger.db"), open(Path(sys.argv[1]) / "sent", "a")
budget = Budget(1e9, 1e-5, "replace-one", "device")
account = ledger.account("d", "ab" * 32)
assert account is not None, "the chain broke"
for n in range(len(account.entries) + 1, 10**6):
    [answer] = ledger.reserve([Request("d", "ab" * 32, "e", n, "adapter", Event(2.0, 0.5, 4))], budget)
    assert not answer.refusal, answer
    sent.write(f"{n}\\n")  # the release, which may leave only now
    sent.flush()
"""


@pytest.mark.slow
def test_a_killed_device_has_spent_all_that_it_sent(tmp_path: Path) -> None:
    """Fifty times killed at a random moment: every release that left was paid for before, and none left twice."""
    for attempt in range(50):
        device = subprocess.Popen([sys.executable, "-c", DEVICE, str(tmp_path)], cwd=Path(__file__).parent.parent)
        sent = tmp_path / "sent"
        before, began = sent.stat().st_size if sent.exists() else 0, time.monotonic()
        while not (sent.exists() and sent.stat().st_size > before) and time.monotonic() - began < 60:
            time.sleep(0.005)
        time.sleep(0.0003 * (attempt % 37))
        device.send_signal(signal.SIGKILL)
        device.wait()
    sent_rounds = [int(line) for line in sent.read_text().splitlines()]
    account = Ledger(tmp_path / "ledger.db").account("d", GENESIS)
    assert account
    paid = [e.round for e in account.entries]
    assert len(set(sent_rounds)) == len(sent_rounds) >= 50
    assert set(sent_rounds) <= set(paid)
    assert len(paid) - len(sent_rounds) <= 50  # at most one reservation was lost with each kill
