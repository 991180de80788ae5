"""Whole small federations, to the bit as they were when `tests/golden/make.py` was run last."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from golden.make import CASES, FAST, Record, here, made, moved, stored

TOLERANCE = 1e-3  # of a figure, where versions or instructions are others; with AVX2 all six digits were the same


def compared(name: str, now: Record, records: list[Record]) -> None:
    """To the bit with the record of this kind of machine; by figures with any other, and says so."""
    assert records, "no record at all; run tests/golden/make.py"
    record = records[0]
    before = record["cases"].get(name)
    assert before, f"no record of {name!r}; run tests/golden/make.py"
    if record["made_by"] == here():
        told = moved(before, now)
        assert not told, f"{name} has moved; if it should, run tests/golden/make.py --reason …\n" + "\n".join(told)
        return
    others = {key: x for key, x in here().items() if x != record["made_by"].get(key)}
    warnings.warn(f"{name}: compared by figures alone, there is no record of {others}", stacklevel=2)
    assert now["figures"].keys() == before["figures"].keys()
    for what, was in before["figures"].items():
        assert now["figures"][what] == pytest.approx(was, rel=TOLERANCE, abs=1e-4), what


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES])
def test_a_federation_ends_where_it_ended(name: str, tmp_path: Path) -> None:
    compared(name, made(name, tmp_path), stored())


def a_record(**figures: float) -> Record:
    return {"figures": figures, "events": {"round.releases": "a"}, "arrays": {"shared": "b"}}


def test_a_bit_that_moves_is_told_and_another_machine_is_held_to_the_figures() -> None:
    before, elsewhere = a_record(nll=4.0), here() | {"capability": "another"}
    ours, theirs = ([{"made_by": by, "cases": {"x": before}}] for by in (here(), elsewhere))
    compared("x", a_record(nll=4.0), ours)
    other_bit = a_record(nll=4.0) | {"arrays": {"shared": "c"}}
    with pytest.raises(AssertionError, match="arrays: shared is another"):
        compared("x", other_bit, ours)
    with pytest.raises(AssertionError, match=r"figures: nll: 4\.0 → 4\.001"):
        compared("x", a_record(nll=4.001), ours)
    with pytest.raises(AssertionError, match=r"events: round\.releases is gone"):
        compared("x", a_record(nll=4.0) | {"events": {}}, ours)
    with pytest.warns(UserWarning, match=r"by figures alone, .*'capability'"):
        compared("x", other_bit, theirs)
    with pytest.warns(UserWarning, match="by figures alone"), pytest.raises(AssertionError, match="nll"):
        compared("x", a_record(nll=4.2), theirs)
    for nothing in ([], [{"made_by": here(), "cases": {}}]):
        with pytest.raises(AssertionError, match="no record"):
            compared("x", before, nothing)
