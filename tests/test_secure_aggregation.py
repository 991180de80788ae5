"""Secure aggregation: what a server learns, what it cannot be told, and that a round ends rightly or not at all."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest, norm

from florilegium.privacy.secure_aggregation import rounded_noise
from florilegium.privacy.secure_aggregation.adverts import Advert, certified, pair_seed
from florilegium.privacy.secure_aggregation.config import SecureAggregationConfig, why_not_summed
from florilegium.privacy.secure_aggregation.keys import (
    agreed,
    identity_key,
    is_signed,
    is_usable,
    mask,
    opened,
    public_key,
    sealed,
    signed,
)
from florilegium.privacy.secure_aggregation.neighbours import (
    COMPLETE,
    RoundRefusedError,
    SumLimits,
    neighbourhoods,
    reach,
)
from florilegium.privacy.secure_aggregation.rounded_noise import (
    LEAST_SHARE,
    SumCode,
    TooFewBitsError,
    aliasing,
    packed,
    packed_bytes,
    rotated,
    sum_code,
    total_variation,
    turned_back,
    unpacked,
)
from florilegium.privacy.secure_aggregation.session import Scene, Session, restored, stored
from florilegium.privacy.secure_aggregation.sharing import PRIME, joined, split
from florilegium.privacy.secure_aggregation.wire import read_advert, read_shares_reply, reply_bytes
from florilegium.server.secure_sum import SecureSum
from florilegium.simulation.benchmarks.secure_aggregation import measure

BITS, WIDTH = 16, 5
REGISTRAR = identity_key(b"r" * 32)


def secret(*purpose: object) -> bytes:
    return np.random.Generator(np.random.Philox(key=abs(hash(purpose)) % 2**63)).bytes(32)


def device(
    name: str, survivors: int, colluding: int = 0, number: int = 1, salt: str = "", devices: int = 12
) -> Session:
    """One that the registrar knows."""
    own = identity_key(name.encode().ljust(32, b"."))
    public = REGISTRAR.public_key().public_bytes_raw()
    scene = Scene("us", number, name, public, SumLimits(devices, survivors, colluding))
    certificate = certified(REGISTRAR, "us", name, own.public_key().public_bytes_raw())
    return Session(scene, f"{name}{salt}".encode().ljust(32, b"s"), own, certificate)


@dataclass
class Play:
    """A round of an honest server with these devices; `gone` at which step each of some is lost."""

    survivors: int
    names: Sequence[str] = tuple("abcdefgh")
    colluding: int = 0
    gone: Mapping[str, str] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = SumLimits(max(12, len(self.names)), self.survivors, self.colluding)
        self.sessions = {n: device(n, self.survivors, self.colluding, devices=limits.devices) for n in self.names}
        self.server = SecureSum(("us", 1), WIDTH, BITS, limits, REGISTRAR.public_key().public_bytes_raw())
        self.numbers = {n: np.arange(WIDTH) * 100 - 7 * k - 50 for k, n in enumerate(self.names)}

    def there(self, names: Sequence[str], step: str) -> list[str]:
        steps = ("keys", "shares", "masked", "confirm", "unmask")
        return [n for n in names if n not in self.gone or steps.index(self.gone[n]) > steps.index(step)]

    def until(self, step: str = "end") -> np.ndarray | None:
        server = self.server
        for n in self.there(self.names, "keys"):
            server.take_advert(n, self.sessions[n].advert)
        server.close_keys()
        for n in self.there(server.names, "shares"):
            server.take_shares(n, self.sessions[n].shares(server.names, server.adverts_for(n)))
        if step == "masked":
            return None
        for n in self.there(server.members, "masked"):
            self.sessions[n].receive(server.members, server.inbox(n))
            server.take_masked(n, self.sessions[n].masked(self.numbers[n], BITS))
        if step == "confirm":
            return None
        for n in self.there(server.came, "confirm"):
            server.take_confirmation(n, self.sessions[n].confirm(server.came))
        if step == "unmask":
            return None
        for n in self.there(list(server.confirmations), "unmask"):
            server.take_parts(n, self.sessions[n].unmask(server.confirmations_for(n)))
        return server.total()

    def sum_of(self, names: Sequence[str]) -> np.ndarray:
        return sum(self.numbers[n] for n in names) & (2**BITS - 1)


# -- the sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["", "keys", "shares", "masked", "confirm", "unmask"])
def test_the_sum_is_of_those_whose_numbers_came_whoever_is_lost_at_which_step(step: str) -> None:
    play = Play(6, gone={"c": step, "f": step} if step else {})
    found = play.until()
    came = [n for n in play.names if n not in "cf" or step in ("", "confirm", "unmask")]
    assert sorted(play.server.came) == came
    assert found is not None and (found == play.sum_of(came)).all()


@pytest.mark.parametrize("step", ["keys", "shares", "masked", "confirm", "unmask"])
def test_with_too_few_there_is_no_sum(step: str) -> None:
    play = Play(6, gone=dict.fromkeys("abcd", step))
    with pytest.raises(RoundRefusedError, match="not-confirmed" if step == "confirm" else "too-few"):
        play.until()


def test_every_order_of_arrival_gives_the_same_sum_to_the_bit() -> None:
    one, other = Play(6), Play(6, names=tuple("hgfedcba"))
    other.numbers = one.numbers
    assert (one.until() == other.until()).all()


def test_above_a_size_devices_have_neighbours_and_the_sum_is_the_same() -> None:
    names = [f"d{k:03d}" for k in range(COMPLETE + 12)]
    play = Play(130, names=names, gone={names[k]: "masked" for k in range(0, 50, 10)})
    found = play.until()
    assert len(play.server.adverts_for(names[1])) < 100 and found is not None
    assert (found == play.sum_of([n for n in names if n not in play.gone])).all()


def test_masked_numbers_alone_are_uniform_whatever_they_are_of() -> None:
    """20,000 numbers of 8 bits behind their masks: each of 256 values as often; the numbers themselves are all 3."""
    names = tuple("abc")
    sessions = {n: device(n, 3) for n in names}
    server = SecureSum(("us", 1), 20_000, 8, SumLimits(12, 3), REGISTRAR.public_key().public_bytes_raw())
    for n in names:
        server.take_advert(n, sessions[n].advert)
    server.close_keys()
    for n in names:
        server.take_shares(n, sessions[n].shares(server.names, server.adverts_for(n)))
    sent = []
    for n in names:
        sessions[n].receive(server.members, server.inbox(n))
        sent.append(sessions[n].masked(np.full(20_000, 3), 8))
        assert chisquare(np.bincount(sent[-1], minlength=256)).pvalue > 1e-3
    two = (sent[0] + sent[1]) % 256  # and so are those of all but one together
    assert chisquare(np.bincount(two, minlength=256)).pvalue > 1e-3
    assert chisquare(np.bincount((two + sent[2]) % 256, minlength=256)).pvalue > 1e-3  # each has a mask of its own


def test_parts_of_a_secret_give_it_back_and_fewer_give_something_else() -> None:
    """By hand: with the polynomial 5 + 3 x + 2 x² the parts at 1, 2, 3 are 10, 19, 32."""
    parts = split((5).to_bytes(32, "big"), 3, [1, 2, 3], [3, 2])
    assert [int.from_bytes(part, "big") for part in parts.values()] == [10, 19, 32]
    assert joined(parts) == (5).to_bytes(32, "big")
    assert PRIME == 2**256 + 297 and pow(3, PRIME - 1, PRIME) == 1 and pow(5, PRIME - 1, PRIME) == 1
    largest = b"\xff" * 32
    many = split(largest, 4, range(1, 8), [PRIME - 1, 7, 2**255])
    for some in itertools.combinations(many, 4):
        assert joined({x: many[x] for x in some}) == largest
    with pytest.raises(ValueError, match="different"):
        split(largest, 4, [1, 2, 2, 3], [1, 2, 3])


def test_fewer_parts_than_the_threshold_say_nothing_of_a_secret() -> None:
    """Any two parts of three fit every secret: for each there is one polynomial."""
    parts = split((5).to_bytes(32, "big"), 3, [1, 2, 3], [3, 2])
    for other in (0, 5, 77):
        # the polynomial of degree 2 through (0, other) and the parts at 1 and 2, found by solving for its coefficients
        y1, y2 = (int.from_bytes(parts[x], "big") - other for x in (1, 2))
        a2 = (y2 - 2 * y1) * pow(2, -1, PRIME) % PRIME
        a1 = (y1 - a2) % PRIME
        again = split(other.to_bytes(32, "big"), 3, [1, 2, 3], [a1, a2])
        assert (again[1], again[2]) == (parts[1], parts[2])


# -- a server that lies -----------------------------------------------------------------------------------------------


def refused(say: Callable[[], object], why: str) -> None:
    with pytest.raises(RoundRefusedError, match=f"^{why}$"):
        say()


def test_a_device_that_the_registrar_does_not_know_is_not_spoken_with() -> None:
    play = Play(6)
    stranger = identity_key(b"x" * 32)
    for advert in (
        replace(
            device("h", 6).advert, certificate=certified(stranger, "us", "h", stranger.public_key().public_bytes_raw())
        ),
        Session(
            play.sessions["h"].scene, b"x" * 32, stranger, play.sessions["h"].certificate
        ).advert,  # h's certificate
        replace(device("h", 6).advert, sharing_key=public_key(b"z" * 32)),  # the server's own key
        replace(device("h", 6, number=2).advert),  # of another round
    ):
        adverts = {n: s.advert for n, s in play.sessions.items()} | {"h": advert}
        refused(lambda adverts=adverts: play.sessions["a"].shares(play.names, adverts), "not-registered")
    adverts = {n: s.advert for n, s in play.sessions.items()}
    refused(
        lambda: play.sessions["a"].shares(play.names, {k: v for k, v in adverts.items() if k != "h"}), "not-registered"
    )
    assert play.sessions["a"].shares(play.names, adverts)  # and of the honest round it is still part


def test_the_same_device_is_not_two() -> None:
    play = Play(6)
    twin = play.sessions["a"]
    own = identity_key(b"a".ljust(32, b"."))
    sybil = Session(
        replace(twin.scene, device="i"),
        b"i" * 32,
        own,
        certified(REGISTRAR, "us", "i", own.public_key().public_bytes_raw()),
    )
    adverts = {n: s.advert for n, s in play.sessions.items()} | {"i": sybil.advert}
    refused(lambda: play.sessions["b"].shares([*play.names, "i"], adverts), "twice-the-same")
    refused(lambda: play.sessions["b"].shares([*play.names, "h"], adverts), "not-its-round")  # one named twice


def test_fewer_devices_than_its_owner_wants_are_refused_at_every_step() -> None:
    small = Play(3, names=tuple("abcd"))
    strict = device("d", 6)
    adverts = {n: s.advert for n, s in small.sessions.items()} | {"d": strict.advert}
    refused(lambda: strict.shares(list("abcd"), adverts), "too-few")
    play = Play(6)
    play.until("masked")
    a, server = play.sessions["a"], play.server
    five = [n for n in server.members if n in "abcde"]
    refused(lambda: a.receive(five, {n: server.inbox("a")[n] for n in five if n != "a"}), "too-few")
    a.receive(server.members, server.inbox("a"))
    a.masked(play.numbers["a"], BITS)
    refused(lambda: a.confirm(five), "too-few")
    refused(lambda: device("a", 2).shares(list("ab"), adverts), "too-few")  # two never


def test_a_step_that_was_answered_is_not_answered_otherwise() -> None:
    play = Play(5)
    play.until("confirm")
    a, server = play.sessions["a"], play.server
    with_other = server.adverts_for("a") | {"h": device("h", 5, salt="again").advert}
    assert a.shares(server.names, server.adverts_for("a")) == a.shares(server.names, server.adverts_for("a"))
    refused(lambda: a.shares(server.names, with_other), "told-two-stories")
    refused(lambda: a.shares(server.names[:-1], server.adverts_for("a")), "told-two-stories")
    again = a.masked(play.numbers["a"], BITS)
    a.receive(server.members, server.inbox("a"))
    assert (again == a.masked(play.numbers["a"], BITS)).all()
    some = {n: text for n, text in server.inbox("a").items() if n != "h"}
    refused(lambda: a.receive([n for n in server.members if n != "h"], some), "told-two-stories")
    first = a.confirm(list("abcdefg"))
    assert first == a.confirm(list("abcdefg"))
    refused(lambda: a.confirm(list("abcdefh")), "told-two-stories")
    refused(lambda: a.confirm(list("abcdef")), "told-two-stories")


def test_steps_out_of_their_order_are_refused() -> None:
    play = Play(6)
    a = play.sessions["a"]
    refused(lambda: a.receive(play.names, {}), "out-of-order")
    refused(lambda: a.masked(play.numbers["a"], BITS), "out-of-order")
    refused(lambda: a.confirm(play.names), "out-of-order")
    refused(lambda: a.unmask({}), "out-of-order")


def test_a_server_never_has_both_secrets_of_a_device_that_is_alive() -> None:
    """It tells half of them that h came, and half that it did not: neither list is confirmed by enough of them."""
    play = Play(5)
    play.until("confirm")
    lists = {n: list("abcdefgh") if n in "abcd" else list("abcdefg") for n in "abcdefg"}
    signed = {n: play.sessions[n].confirm(lists[n]) for n in "abcdefg"}
    for n in "abcdefg":
        mine = {m: signed[m] for m in "abcdefg" if lists[m] == lists[n]}
        refused(lambda n=n, mine=mine: play.sessions[n].unmask(mine), "not-confirmed")
        refused(lambda n=n: play.sessions[n].unmask(signed), "not-confirmed")
        refused(
            lambda n=n, mine=mine: play.sessions[n].unmask(dict.fromkeys("abcdefgh", next(iter(mine.values())))),
            "not-confirmed",
        )


def test_two_sums_of_one_round_cannot_be_had_by_telling_each_half_that_others_are_missing() -> None:
    """Eight devices, two of them lost. To the half `abc` the server says that all parts came but those of `def`, and
    the other way round: the masks within each half then cancel by themselves, with those of `gh`, whose keys are told.
    Each half would have the noise of three alone. None of them confirms.
    """
    play = Play(5)
    play.until("masked")
    server = play.server
    halves = {n: [m for m in play.names if m not in ("def" if n in "abc" else "abc")] for n in "abcdef"}
    for n, members in halves.items():
        inbox = {m: server.shares[m][n] for m in members if m != n}
        play.sessions[n].receive(members, inbox)
        play.sessions[n].masked(play.numbers[n], BITS)
    for n in "abcdef":
        refused(lambda n=n: play.sessions[n].confirm(list("abcdef")), "not-its-round")
        refused(lambda n=n: play.sessions[n].confirm([m for m in halves[n] if m in "abcdef"]), "too-few")


def test_devices_that_were_told_of_others_do_not_understand_each_other() -> None:
    """To `abcd` the server says that there are six devices, to `e` and `f` that there are eleven: with what the others
    of those then reveal of `e` and `f` it would have the sum of four, where each wants six.
    """
    names = tuple("abcdefghijkl")
    sessions = {n: device(n, 6) for n in names}
    adverts = {n: s.advert for n, s in sessions.items()}
    lists = dict.fromkeys("abcd", "abcdef") | {"e": "abcdeghijkl", "f": "abcdfghijkl"}
    sealed_for = {n: sessions[n].shares(lists[n], {m: adverts[m] for m in lists[n]}) for n in "abcdef"}
    inbox = {m: sealed_for[m]["a"] for m in "bcdef"}
    refused(lambda: sessions["a"].receive("abcdef", inbox), "bad-shares")


def test_devices_that_were_told_of_other_keys_do_not_understand_each_other() -> None:
    """Both are of `h`, of two sessions, and signed by it."""
    play = Play(6)
    one, other = (device("h", 6, salt=salt).advert for salt in ("", "again"))
    told = {n: s.advert for n, s in play.sessions.items()}
    from_b = play.sessions["b"].shares(play.names, told | {"h": other})
    others = {n: play.sessions[n].shares(play.names, told | {"h": one}) for n in "acdefgh"}
    inbox = {n: others[n]["a"] for n in "cdefgh"} | {"b": from_b["a"]}
    refused(lambda: play.sessions["a"].receive(play.names, inbox), "bad-shares")


def test_a_key_is_written_in_one_way_and_makes_nothing_known() -> None:
    """With its highest bit set, or above the field, it is another device's double; of small order it is nobody's."""
    play = Play(6)
    doubled = bytearray(play.sessions["b"].advert.masking_key)
    doubled[31] |= 0x80
    for key in (bytes(doubled), bytes(32), (2**255 - 19).to_bytes(32, "little"), b"\xff" * 32, b"\1" + bytes(31)):
        assert not is_usable(key)
        for of in ("sharing_key", "masking_key"):
            own = play.sessions["h"].identity
            false = replace(play.sessions["h"].advert, **{of: key})
            keys = [k.hex() for k in (false.sharing_key, false.masking_key, false.own_mask_hash)]
            false = replace(false, signature=signed(own, "keys", ["us", 1, "h", *keys]))
            adverts = {n: s.advert for n, s in play.sessions.items()} | {"h": false}
            refused(lambda adverts=adverts: play.sessions["a"].shares(play.names, adverts), "not-registered")
    assert play.until() is not None  # nothing of that was kept


def test_no_two_pairs_have_a_mask_in_common() -> None:
    """By what they are called, by their keys, by who takes part."""
    keys = {n: bytes([k]) * 32 for k, n in enumerate("abc", start=1)}
    adverts = {n: replace(device(n, 3).advert, masking_key=public_key(key)) for n, key in keys.items()}
    twin = adverts | {"c": adverts["b"]}  # who says that b's key is his
    one = pair_seed(keys["a"], ("a", "b"), adverts, ["x"])
    assert one == pair_seed(keys["b"], ("b", "a"), adverts, ["x"])
    assert one not in (
        pair_seed(keys["a"], ("a", "c"), twin, ["x"]), pair_seed(keys["a"], ("a", "b"), adverts, ["y"]),
        pair_seed(keys["a"], ("a", "c"), adverts, ["x"]),
        pair_seed(b"\7" * 32, ("a", "b"), adverts, ["x"]),  # by somebody who knows all that was said
    )  # fmt: skip


def test_the_masks_of_pairs_hide_where_own_masks_are_known() -> None:
    """Whoever knows the seeds of all own masks still sees uniform numbers of each device, and of any two of three."""
    names, sessions = tuple("abc"), {n: device(n, 3) for n in "abc"}
    adverts = {n: s.advert for n, s in sessions.items()}
    sealed_by = {n: sessions[n].shares(names, adverts) for n in names}
    bare = []
    for n in names:
        sessions[n].receive(names, {m: sealed_by[m][n] for m in names if m != n})
        sent = sessions[n].masked(np.full(20_000, 3), 8)
        bare.append((sent - mask(sessions[n]._key("own mask"), 20_000)) % 256)
    for some in (bare[0], bare[1], bare[0] + bare[1], bare[1] + bare[2]):
        assert chisquare(np.bincount(some % 256, minlength=256)).pvalue > 1e-3
    assert ((bare[0] + bare[1] + bare[2]) % 256 == 9).all()  # all three together: the sum


def test_sealed_parts_are_for_one_pair_of_eyes_and_fewer_than_needed_are_nothing() -> None:
    play = Play(5)
    play.until("masked")
    sessions, server = play.sessions, play.server
    for reader in "cdefgh":
        with pytest.raises(RoundRefusedError, match="bad-shares"):
            sessions[reader]._opened("b", server.shares["b"]["a"])
    threshold = sessions["a"].neighbourhood.threshold
    parts = sessions["b"]._parts()
    for half, of in ((slice(0, 33), "own mask"), (slice(33, 66), "masking")):
        some = {k: parts[n][half] for k, n in enumerate("abcdefgh", start=1)}
        kept = sessions["b"]._key(of)
        assert joined({k: some[k] for k in range(1, threshold + 1)}) == kept
        assert len(set(some.values())) == 8 and kept not in {part[1:] for part in some.values()}
        for count in range(1, threshold):
            try:
                found = joined({k: some[k] for k in range(1, count + 1)})
            except ValueError:
                continue
            assert found != kept
    apart = {int.from_bytes(p[:33], "big") - int.from_bytes(p[33:], "big") for p in parts.values()}
    assert len({d % PRIME for d in apart}) == 8  # polynomials of their own: a part of one tells nothing of the other
    ways = [("a", "b"), ("b", "a"), ("a", "c"), ("c", "a")]
    assert len({sessions["a"]._channel(*way) for way in ways}) == 4


def test_a_session_is_of_one_round_of_one_federation() -> None:
    one = device("a", 3)
    for other in (device("a", 3, number=2), replace(one, scene=replace(one.scene, federation="them"))):
        assert not {one._key(k) for k in ("sharing", "masking", "own mask")} & {
            other._key(k) for k in ("sharing", "masking", "own mask")
        }
        assert other.advert.signature != one.advert.signature
    play, again = Play(5), Play(5)
    again.sessions = {n: replace(s, scene=replace(s.scene, round=2)) for n, s in again.sessions.items()}
    again.server.of = ("us", 2)
    play.until("unmask")
    again.until("confirm")
    for n in again.server.came:
        again.sessions[n].confirm(again.server.came)
    refused(lambda: again.sessions["a"].unmask(play.server.confirmations), "not-confirmed")


def test_the_same_masks_never_hide_two_rows() -> None:
    play = Play(5)
    play.until("confirm")
    refused(lambda: play.sessions["a"].masked(play.numbers["a"] + 1, BITS), "twice-the-same")
    refused(lambda: play.sessions["a"].masked(play.numbers["a"], BITS + 1), "twice-the-same")


def test_more_devices_than_the_owner_has_agreed_to_are_no_round_of_his() -> None:
    """A server that invents names would have a sparse graph, whose neighbourhoods need fewer parts."""
    play = Play(5)
    adverts = {n: s.advert for n, s in play.sessions.items()}
    refused(lambda: play.sessions["a"].shares([*play.names, *"uvwxy"], adverts), "not-its-round")


def test_a_stored_session_goes_on_where_it_was() -> None:
    play = Play(5)
    play.until("unmask")
    a = play.sessions["a"]
    again = restored(device("a", 5), json.loads(json.dumps(stored(a))))
    assert again.unmask(play.server.confirmations_for("a")) == a.unmask(play.server.confirmations_for("a"))
    refused(lambda: again.masked(play.numbers["a"] + 1, BITS), "twice-the-same")
    refused(lambda: again.confirm(list("abcdef")), "told-two-stories")
    assert "73" * 8 not in json.dumps(stored(a))  # nothing of the seed


def test_confirmations_are_of_the_same_parts_too() -> None:
    """One device was told of other members than the rest; its signature under the same survivors is none for them."""
    play = Play(5, gone={"h": "masked"})
    play.until("masked")
    server = play.server
    for n in "abcdefg":
        members = list("abcdefg") if n == "g" else list("abcdefgh")
        play.sessions[n].receive(members, {m: server.shares[m][n] for m in members if m != n})
        play.sessions[n].masked(play.numbers[n], BITS)
    signed = {n: play.sessions[n].confirm(list("abcdefg")) for n in "abcdefg"}
    few = {n: signed[n] for n in "cdefg"}  # five are needed, and the one of `g` is none here
    refused(lambda: play.sessions["a"].unmask(few), "not-confirmed")
    assert play.sessions["a"].unmask(signed)
    refused(lambda: play.sessions["g"].unmask(signed), "not-confirmed")


def test_the_parts_that_leave_are_of_one_secret_of_each_device() -> None:
    play = Play(6, gone={"h": "masked"})
    play.until()
    a = play.sessions["a"]
    for owner, part in play.server.parts["a"].items():
        both = play.sessions[owner]._parts()["a"]
        assert part == (both[33:] if owner == "h" else both[:33])
    assert a.unmask(play.server.confirmations_for("a")) == play.server.parts["a"]  # asked again: the same


def test_parts_sealed_for_another_device_or_round_are_not_taken() -> None:
    play = Play(6)
    play.until("masked")
    a, server = play.sessions["a"], play.server
    for text in (server.shares["b"]["c"], server.shares["c"]["a"], b"\0" * 82, server.shares["b"]["a"][:-1]):
        refused(lambda text=text: a.receive(server.members, server.inbox("a") | {"b": text}), "bad-shares")
    a.receive(server.members, server.inbox("a"))  # nothing was lost by that


# -- a device that lies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["a", "h"])
def test_a_false_part_ends_the_round_without_a_sum_and_never_with_a_wrong_one(of: str) -> None:
    """Of exactly as many parts as are needed one is false; with two more the right ones are found among them."""
    play = Play(5, gone={"h": "masked"})
    play.until("unmask")
    server = play.server
    for n in "abcdefg":
        if n == "f":
            refused(server.total, "bad-parts")
        parts = dict(play.sessions[n].unmask(server.confirmations_for(n)))
        if n == "b":
            parts[of] = bytes(32) + b"\7"
        server.take_parts(n, parts)
    assert (server.total() == play.sum_of("abcdefg")).all()


def test_what_other_devices_would_refuse_the_server_leaves_out() -> None:
    play = Play(5)
    with pytest.raises(ValueError, match="registered"):
        play.server.take_advert("a", replace(play.sessions["a"].advert, signature=bytes(64)))
    play.until("confirm")
    with pytest.raises(ValueError, match="signed"):
        play.server.take_confirmation("a", bytes(64))
    assert not play.server.confirmations


def test_what_comes_twice_or_from_nobody_is_left_out() -> None:
    play = Play(6)
    play.until("confirm")
    before = play.server._total.copy()
    play.server.take_masked("a", np.ones(WIDTH, np.uint32))  # once more
    play.server.take_masked("z", np.ones(WIDTH, np.uint32))
    play.server.take_shares("a", {"b": b""})
    assert (play.server._total == before).all() and sorted(play.server.came) == list(play.names)


# -- thresholds -------------------------------------------------------------------------------------------------------


@given(count=st.integers(3, 150), data=st.data())
@settings(max_examples=25, deadline=None)
def test_no_two_sets_of_parts_can_be_had_of_a_neighbourhood(count: int, data: st.DataObject) -> None:
    """An honest holder gives one part, a colluding one both: h + c parts in all, and twice the threshold is more."""
    colluding = data.draw(st.integers(0, count // 3))
    survivors = data.draw(st.integers(count // 2 + 1, count))
    names = tuple(f"d{k:03d}" for k in range(count))
    if why_not_summed(count, survivors, colluding):
        with pytest.raises(RoundRefusedError):
            neighbourhoods(names, SumLimits(count, survivors, colluding))
        return
    limits = SumLimits(count, survivors, colluding)
    against = colluding if limits.complete else reach(count, survivors, colluding)[1]
    around = neighbourhoods(names, limits)
    for name, found in around.items():
        assert 2 * found.threshold > len(found.holders) + against and name in found.holders
        assert all(name in around[other].holders for other in found.holders)  # both ways
        if len(found.holders) == count:
            assert found.threshold <= survivors


@pytest.mark.slow
def test_large_rounds_have_few_neighbours() -> None:
    """With a tenth lost and a twentieth in league, by the hypergeometric tail."""
    found = {n: reach(n, 9 * n // 10, n // 20)[0] for n in (1_000, 10_000, 100_000)}
    assert found[1_000] < found[10_000] < found[100_000] < 200


@pytest.mark.parametrize(
    ("devices", "survivors", "colluding", "told"),
    [(2, 2, 0, "3 at least"), (8, 9, 0, "not more than"), (8, 4, 0, "must survive, 5"), (8, 6, 5, "3 must be honest"),
     (9, 6, 3, "must survive, 7")],
)  # fmt: skip
def test_numbers_that_protect_nobody_are_refused(devices: int, survivors: int, colluding: int, told: str) -> None:
    assert told in why_not_summed(devices, survivors, colluding)
    assert not why_not_summed(8, 6, 2)


# -- integers and noise -----------------------------------------------------------------------------------------------


def test_a_rotation_keeps_lengths_and_comes_back() -> None:
    row = np.random.default_rng(0).normal(size=37)
    turned = rotated(row, 5)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(row))
    assert turned_back(turned, 5) == pytest.approx(row) and not np.allclose(turned, rotated(row, 6))
    spike = np.zeros(4096)
    spike[7] = 1.0
    assert np.abs(rotated(spike, 0)).max() < 0.03  # √(2 / P) = 0.022: no number stands out


@given(bits=st.integers(8, 32), numbers=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
@settings(deadline=None)
def test_packed_numbers_come_back(bits: int, numbers: list[int]) -> None:
    low = np.array(numbers, np.uint64).astype(np.uint32) & np.uint32(2**bits - 1)
    sent = packed(low, bits)
    assert sent.size == packed_bytes(len(numbers), bits) and (unpacked(sent, len(numbers), bits) == low).all()


def test_the_sum_of_integers_is_the_sum_of_rows() -> None:
    """Five rows of norm 1 in 300 numbers, noise of 0.02 a device: off by the noise and the rounding alone."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(5, 300))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    code, noise = sum_code(300, 5, 1.0, 0.02, rotation=9), rng.normal(size=(5, 300))
    total = sum(code.encoded(row, z) for row, z in zip(rows, noise, strict=True)) & (2**code.bits - 1)
    expected = rows.sum(0) + 0.02 * turned_back(noise.sum(0), 9)
    assert code.decoded(total) == pytest.approx(expected, abs=5 * code.unit)
    assert (code.decoded(total) - expected).std() == pytest.approx(code.unit * math.sqrt(5 / 12), rel=0.15)
    assert code.share_std / code.unit >= LEAST_SHARE


def test_a_sum_as_large_as_it_may_be_does_not_wrap() -> None:
    """Each of nine devices says the same row of the greatest norm, all in one number or in all."""
    for width, spread in ((1, 1), (50, 1), (50, 50)):
        row = np.zeros(width)
        row[:spread] = 1 / math.sqrt(spread)
        code = sum_code(width, 9, 1.0, 0.01)
        total = 9 * code.encoded(row, np.full(width, 3.0))
        assert np.abs(total).max() < 2 ** (code.bits - 1)
        assert code.decoded(total & (2**code.bits - 1)) == pytest.approx(
            9 * (row + 0.01 * turned_back(np.full(width, 3.0), 0)), abs=9 * code.unit
        )


def test_a_width_in_bits_that_could_wrap_is_refused_with_one_that_does_not() -> None:
    needed = sum_code(3072, 200, 1.0, 0.1).bits
    with pytest.raises(TooFewBitsError, match=f"that takes {needed} of at most 32 bits; set it to {needed}, or 0"):
        sum_code(3072, 200, 1.0, 0.1, bits=needed - 1)
    assert sum_code(3072, 200, 1.0, 0.1, bits=needed + 3).unit == pytest.approx(
        sum_code(3072, 200, 1.0, 0.1).unit / 8, rel=0.1
    )
    with pytest.raises(TooFewBitsError, match="clip to a smaller norm"):
        sum_code(10, 100_000, 1e9, 1e-3)


def rounded_shares(std: float, at: Sequence[float], window: int) -> np.ndarray:
    """P(Σ round(x_i + N(0, s²)) = k) for k in ±window, by convolving what each device says."""
    k = np.arange(-window, window + 1)
    found = np.zeros(2 * window + 1)
    found[window] = 1.0
    for x in at:
        one = norm.cdf((k + 0.5 - x) / std) - norm.cdf((k - 0.5 - x) / std)
        found = np.convolve(found, one)[window : 3 * window + 1]
    return found


def rounded_once(std: float, at: Sequence[float], window: int) -> np.ndarray:
    """P(round(x + N(0, n s²) + U_1 + … + U_{n−1}) = k): the box n times over the normal, on a fine grid."""
    fine = 400
    grid = np.arange(-(window + 4) * fine, (window + 4) * fine + 1) / fine
    density = norm.pdf((grid - sum(at)) / (std * math.sqrt(len(at)))) / (std * math.sqrt(len(at)))
    box = np.ones(fine + 1) / fine
    box[0] = box[-1] = 0.5 / fine
    for _ in at:
        density = np.convolve(density, box, mode="same")
    return density[4 * fine :: fine][: 2 * window + 1]


@pytest.mark.parametrize("at", [(0.5, 0.5, 0.5), (0.25, 0.25, 0.5), (0.0, 0.3, -0.7), (0.5, -0.5, 0.5, -0.5)])
def test_rounded_shares_are_a_gaussian_mechanism_rounded_once(at: tuple[float, ...]) -> None:
    """What the accounting rests on, at shares far smaller than are ever used, where the distance can be seen at all.

    With shares of 0.25 units it is large, which shows that the test can see it; at 1 unit it is below this machine's
    precision, as the bound (which is for 2 units and more) says of 2.
    """
    apart = {s: np.abs(rounded_shares(s, at, 40) - rounded_once(s, at, 40)).sum() / 2 for s in (0.25, 0.5, 1.0)}
    assert apart[0.25] > 1e-3 > 100 * apart[1.0] and apart[0.25] > apart[0.5] >= apart[1.0] - 1e-12
    assert apart[1.0] < 2e-6  # of the grid
    assert total_variation(1, 3, 2.0) < 1e-9 and total_variation(10**7, 1000, LEAST_SHARE) < 1e-30


@pytest.mark.parametrize(("devices", "share"), [(3, 2.0), (8, 2.0), (8, 3.0)])
def test_the_bound_on_characteristic_functions_holds(devices: int, share: float) -> None:
    """Against the tuples themselves, m in −2 … 2, on a grid of θ: Σ of Π |q(θ + 2πm)| over the uneven ones."""
    for theta in np.linspace(-math.pi, math.pi, 41):
        each = np.exp(-((share * (theta + 2 * math.pi * np.arange(-2, 3))) ** 2) / 2)
        assert each.sum() ** devices - (each**devices).sum() <= aliasing(devices, share)
    with pytest.raises(ValueError, match="three of two units"):
        aliasing(2, 4.0)


@pytest.mark.parametrize("survivors", [3, 5, 8])
def test_the_noise_of_a_sum_is_that_of_its_devices(survivors: int) -> None:
    """Of s √n, whoever is lost: 30,000 numbers; with one device's share left out it is seen."""
    rng = np.random.default_rng(survivors)
    width, std = 30_000, 0.5
    code = sum_code(width, 8, 1.0, std)
    row = rng.normal(size=width) / math.sqrt(width)

    def noise(silent: int) -> np.ndarray:
        total = np.zeros(width, np.int64)
        for k in range(survivors):
            total += code.encoded(row, rng.normal(size=width) * (k >= silent))
        return code.decoded(total & (2**code.bits - 1)) - survivors * row

    expected = math.sqrt(survivors * (std**2 + code.unit**2 / 12))
    assert noise(0).std() == pytest.approx(expected, rel=0.015)
    assert kstest(noise(0) / expected, "norm").pvalue > 1e-3
    assert noise(1).std() < 0.95 * expected and kstest(noise(1) / expected, "norm").pvalue < 1e-3


# -- keys -------------------------------------------------------------------------------------------------------------


def test_two_devices_agree_and_nobody_else_does() -> None:
    a, b, c = (letter * 32 for letter in (b"a", b"b", b"c"))
    assert agreed(a, public_key(b)) == agreed(b, public_key(a)) != agreed(c, public_key(b))
    with pytest.raises(ValueError, match="shared key"):
        agreed(a, bytes(32))  # a point of small order: what is agreed would be known to everybody
    key = agreed(a, public_key(b))
    assert opened(key, sealed(key, b"x", ["a", "b"]), ["a", "b"]) == b"x"
    with pytest.raises(ValueError, match="sealed"):
        opened(key, sealed(key, b"x", ["a", "b"]), ["b", "a"])
    assert not is_signed(public_key(a), bytes(64), "keys", [])
    assert mask(a, 5).tolist() == mask(a, 9)[:5].tolist() != mask(b, 5).tolist()


def test_what_has_not_the_form_is_not_read() -> None:
    advert = device("a", 3).advert
    with pytest.raises(ValueError, match="not an advert"):
        read_advert(b"x")
    for to, shares in (
        (["a"], []), (["a", "a"], [bytes(82)] * 2), (["a"], ["x" * 82]), ([1], [bytes(82)]), (["a"], [bytes(81)]),
        ("a", [bytes(82)]), (["a"], bytes(82)),
    ):  # fmt: skip
        sent = {"to": to, "shares": shares}
        with pytest.raises(ValueError, match=r"not|expected|has"):
            read_shares_reply(sent)
    assert isinstance(advert, Advert) and reply_bytes(64) == 256 + 63 * 82 + 64 + 64 * 33


def test_the_benchmark_counts_what_is_sent() -> None:
    """Of 20 devices two are lost: what a device says and is told, by hand."""
    (found,) = measure([20], 40, lambda told: None).rows
    assert (found.devices, found.neighbours, found.device_ms > 0, found.server_ms > 0) == (20, 19, True, True)
    assert found.up_bytes == packed_bytes(40, found.bits) + 256 + 19 * 82 + 64 + 20 * 33
    assert found.down_bytes == 20 * 256 + 19 * 82 + 20 * 64
    assert found.flower.up_bytes > 40 * 4 and found.flower.server_ms > 0  # and it comes to the mean, or raises


def test_settings_say_what_is_wrong() -> None:
    assert SecureAggregationConfig().devices == 0
    assert SumCode(3, 4, 8, 1.0, 1.0, 0).size_bytes == 3 and rounded_noise.LEAST_BITS == 8
