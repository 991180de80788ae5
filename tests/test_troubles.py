"""Troubles of streams: exact shares in their places, held-out replies as they were, one seed one stream."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from florilegium.client.dialogue import Dialogue
from florilegium.client.selection.lexicons import load_lexicons
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.population import DataConfig, Replies, User, cut, draw
from florilegium.simulation.data.troubles import (
    GREETINGS,
    ONE_WORD,
    PASTED,
    Kind,
    TroublesConfig,
    edited,
    troubled,
)

KINDS: tuple[Kind, ...] = tuple(k for k in get_args(Kind) if k != "none")


SUBJECTS = ("apples", "trains", "rivers", "clocks", "violins", "bridges", "winter", "horses", "kitchen", "stamps")


def said_by(person: str, count: int) -> tuple[Dialogue, ...]:
    """Dialogues with a subject of ten, each with words of its own."""
    return tuple(
        Dialogue(f"{person}:{i}:1", f"{person} asks {i} of {SUBJECTS[i % 10]}", f"{person} says {i}", float(i), "talk")
        for i in range(count)
    )


OWN, OTHERS = said_by("ann", 40), tuple(said_by(p, 40) for p in ("bob", "cat", "dan", "eve", "fay"))


def with_trouble(kind: Kind, share: float, seed: int = 0) -> tuple[Dialogue, ...]:
    return troubled(OWN, OTHERS, TroublesConfig(kind=kind, share=share), np.random.default_rng(seed))


def places(stream: tuple[Dialogue, ...]) -> list[int]:
    """Where something was replaced."""
    return [i for i, d in enumerate(stream) if d != OWN[i]]


@pytest.mark.parametrize("kind", KINDS)
@given(share=st.floats(0.01, 0.6), seed=st.integers(0, 2**31))
def test_a_share_is_exact_and_the_rest_is_as_it_was(kind: Kind, share: float, seed: int) -> None:
    if kind == "topic-burst":
        share = min(share, 0.5)  # of 200 dialogues of others each subject has 20
    stream = with_trouble(kind, share, seed)
    assert len(places(stream)) == round(share * 40) and len({d.id for d in stream}) == 40
    assert [d.time for d in stream] == [d.time for d in OWN]
    assert all(d.id == f"{OWN[i].id}~{kind}" for i, d in enumerate(stream) if i in places(stream))
    assert stream == with_trouble(kind, share, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_other_dice_give_another_stream(kind: Kind) -> None:
    assert with_trouble(kind, 0.5, 0) != with_trouble(kind, 0.5, 1)


def test_a_near_duplicate_lacks_one_word_of_one_that_is_left() -> None:
    stream = with_trouble("near-duplicates", 0.6)
    left = [d for i, d in enumerate(stream) if i not in places(stream)]
    sources = Counter[str]()
    for copy in (stream[i] for i in places(stream)):
        of = [d for d in left if not Counter(copy.response.split()) - Counter(d.response.split())]
        of = [d for d in of if (Counter(d.prompt.split()) - Counter(copy.prompt.split())).total() == 1]
        assert of and not Counter(copy.prompt.split()) - Counter(of[0].prompt.split())
        sources.update([of[0].id])
    assert sources.total() == 24
    assert len({edited("one two three", np.random.default_rng(s)) for s in range(20)}) == 3
    alone = edited("yes", np.random.default_rng(0))
    assert alone.startswith("yes") and alone != "yes"


def test_greetings_and_boilerplate_are_of_their_lists() -> None:
    greetings, pasted = with_trouble("greetings", 0.25), with_trouble("boilerplate", 0.25)
    assert all(greetings[i].prompt in GREETINGS and greetings[i].response in ONE_WORD for i in places(greetings))
    assert all({pasted[i].prompt, pasted[i].response} <= set(PASTED) for i in places(pasted))


def test_other_peoples_dialogues_are_theirs_word_for_word_and_each_comes_once() -> None:
    stream = with_trouble("other-people", 0.6)
    theirs = {(d.prompt, d.response) for said in OTHERS for d in said}
    found = [(stream[i].prompt, stream[i].response) for i in places(stream)]
    assert set(found) <= theirs and len(set(found)) == 24
    assert len({prompt.split()[0] for prompt, _ in found}) > 1, "of several people"


def test_a_burst_is_one_run_about_one_thing() -> None:
    stream = with_trouble("topic-burst", 0.5)
    found = places(stream)
    assert found == list(range(found[0], found[0] + 20))
    assert len({stream[i].prompt.split()[-1] for i in found}) == 1, "of twenty there are"


def test_before_a_drift_another_person_speaks() -> None:
    stream = with_trouble("drift", 0.6)
    assert places(stream) == list(range(24)) and len({d.prompt.split()[0] for d in stream[:24]}) == 1
    assert [d.prompt.split()[2] for d in stream[:24]] == [str(i) for i in range(24)], "from the beginning"


def test_junk_is_words_of_the_list_in_no_order() -> None:
    stream, listed = with_trouble("junk", 0.25), set().union(*load_lexicons(("general",)).values())
    junk = [stream[i] for i in places(stream)]
    assert all(len(d.prompt.split()) >= 16 and set(d.prompt.split()) <= listed for d in junk if "'" not in d.prompt)
    assert len({d.prompt for d in junk}) == len(junk)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_replies_are_never_touched_and_held_out_nowhere_else(kind: Kind) -> None:
    replies = Replies({f"u{k}": said_by(f"u{k}", 40) for k in range(12)}, anonymous=False, empty=0, repeated=0)
    clean = DataConfig(users=3, split="all", min_pairs=40, held_out_share=0.25, queries_per_user=5)
    config = clean.model_copy(update={"troubles": TroublesConfig(kind=kind, share=0.5)})
    before, after = draw(replies, clean, 1), draw(replies, config, 1)
    assert [(u.id, u.held_out) for u in after] == [(u.id, u.held_out) for u in before]
    assert all(isinstance(u, User) and len(u.stream) == 30 for u in after)
    changed = [sum(a != b for a, b in zip(x.stream, y.stream, strict=True)) for x, y in zip(after, before, strict=True)]
    assert changed == [15, 15, 15]
    hidden = {d.response for said in replies.by_user.values() for d in said[len(cut(said, clean)[0]) :]}
    assert not hidden & {d.response for u in after for d in u.stream}


def test_a_kind_needs_a_share_and_a_share_a_kind() -> None:
    for wrong in ({"kind": "junk"}, {"share": 0.5}, {"kind": "junk", "share": 1.0}, {"kind": "noise", "share": 0.5}):
        with pytest.raises(ValidationError):
            TroublesConfig.model_validate(wrong)


@pytest.mark.parametrize("kind", ["other-people", "topic-burst", "drift"])
def test_too_few_other_people_are_told(kind: Kind) -> None:
    with pytest.raises(DataError, match="lower share"):
        troubled(OWN, [said_by("bob", 3)], TroublesConfig(kind=kind, share=0.5), np.random.default_rng(0))


def test_nothing_is_changed_where_nothing_is_asked(tmp_path: Path) -> None:
    assert troubled(OWN, OTHERS, TroublesConfig(), np.random.default_rng(0)) == OWN
