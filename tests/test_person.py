"""Measures of persons: each by hand, on people who differ in one thing alone, and on a run of nine people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from florilegium import load_run
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.config import ReplyConfig, SamplingConfig
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.devices.simulated import load_devices
from florilegium.simulation.evaluation.arms import Arms, Rows
from florilegium.simulation.evaluation.metrics import holm, score_users
from florilegium.simulation.evaluation.person.evidence import MOST, Evidence, Questions, judged, like_replies
from florilegium.simulation.evaluation.person.measures import (
    Measure,
    Texts,
    choices,
    distinct_pairs,
    lost,
    rank,
    style,
    tokens,
)
from florilegium.simulation.evaluation.person.neutral import NEUTRAL
from florilegium.simulation.evaluation.person.style import (
    CharacterStyle,
    Likelihood,
    WordStyle,
    joined,
    of_others,
    ranks,
    rights,
)
from florilegium.simulation.evaluation.person.verdict import events
from florilegium.simulation.experiment import run_experiment
from florilegium.simulation.reports.terminal import render_summary
from florilegium.simulation.runs.arms import PERSON
from florilegium.simulation.runs.events import PersonComparison, PersonMeasure, PersonResult
from florilegium.simulation.runs.folder import RunFolder

CONTENT = ("soup", "rain", "ships", "cheese", "river", "lamp", "garden", "music")
FUNCTION = ("the", "and", "but", "so", "well", "just", "of", "to")


def people(count: int, habit: float, replies: int = 48, seed: int = 0) -> list[list[str]]:
    """Who say the same things: with a `habit` each has function words that they use more often than others do."""
    rng, found = np.random.default_rng(seed), []
    for k in range(count):
        chances = np.ones(len(FUNCTION))
        chances[[k % 8, (3 * k + 1 + k // 8) % 8]] += habit
        chances /= chances.sum()
        found.append([
            " ".join(w for _ in range(5) for w in (rng.choice(FUNCTION, p=chances), rng.choice(CONTENT)))
            for _ in range(replies)
        ])  # fmt: skip
    return found


def shared_out(said: Sequence[Sequence[str]], **generated: Sequence[Sequence[str]]) -> Texts:
    """The last eight of each are held out."""
    return Texts([t[:-8] for t in said], [t[-8:] for t in said], generated)


# -- whose texts ---------------------------------------------------------------------------------------------------


def test_ranks_and_rights_by_hand() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.2, 0.1], [0.3, 0.2, 0.1]])
    assert ranks(scores, range(3)) == [1.0, 0.75, 0.0]
    assert rights(scores, range(3)) == [1.0, 0.5, 0.0]
    # each person's column among the others' rows: person 0 in rows 1 and 2, and so on
    assert of_others(scores, ranks) == pytest.approx([(0.75 + 1.0) / 2, (0.0 + 0.5) / 2, (0.5 + 0.0) / 2])


@pytest.mark.parametrize("of", [WordStyle.of, CharacterStyle.of])
def test_who_differs_in_function_words_alone_is_told_apart(of: Any) -> None:
    """And who does not is not: what they talk of is the same for all."""
    for habit, least, most in ((12.0, 0.85, 1.0), (0.0, 0.3, 0.7)):
        texts = shared_out(people(16, habit))
        scores = of([joined(t) for t in texts.known]).scores([joined(t) for t in texts.later])
        assert least <= np.mean(ranks(scores, range(16))) <= most, habit
        assert 0.3 < np.mean(of_others(scores, ranks)) < 0.6


def test_who_differs_in_spelling_alone_is_told_by_characters() -> None:
    """Words are compared in lower case; endings and capitals are characters."""
    plain = people(8, 0.0)
    spelt = [[t.upper() if k % 2 else t for t in said] for k, said in enumerate(plain)]
    known, later = [joined(t[:-4]) for t in spelt], [joined(t[-4:]) for t in spelt]
    alike = CharacterStyle.of(known).scores(later)
    own = np.array([[k % 2 == j % 2 for j in range(8)] for k in range(8)])
    assert alike[own].min() > alike[~own].max()
    by_words = WordStyle.of(known).scores(later)
    assert by_words[own].min() < by_words[~own].max()


def test_a_text_without_words_is_nobodys() -> None:
    texts = people(4, 5.0)
    for of in (WordStyle.of, CharacterStyle.of):
        assert not of([joined(t) for t in texts]).scores(["", "  "]).any()  # type: ignore[operator]
    assert Likelihood.of_characters([joined(t) for t in texts]).score(0, "ab") == 0


def test_a_likelihood_ratio_by_hand() -> None:
    """Everybody: 3 of 4 are a, with one more of each and one for what is new: (3 + 1) / (4 + 2 + 1) = 4 / 7."""
    by = Likelihood.of([["a", "a"], ["a", "b"]])
    rate = 4 / 7
    assert by.ratio(0, "a") == pytest.approx(np.log((2 + 200 * rate) / 202 / rate))
    assert by.ratio(1, "a") < 0 < by.ratio(0, "a") and by.ratio(1, "b") > 0 > by.ratio(0, "b")


def test_style_of_generated_replies_lies_between_floor_and_ceiling() -> None:
    """An arm that writes as its people do reaches the ceiling, one that writes as their neighbours do is below."""
    said = people(16, 12.0)
    theirs = [t[-8:] for t in people(16, 12.0, seed=1)]
    found = {m.name: m for m in style(shared_out(said, own=theirs, neighbours=[*theirs[1:], theirs[0]]))}
    assert set(found) <= PERSON.keys()
    for kind in ("words", "characters"):
        measure = found[f"style-{kind}"]
        assert measure.tells and measure.replies == 8 and 1 <= measure.needed <= 8
        assert np.mean(measure.arms["own"]) == pytest.approx(np.mean(measure.ceiling), abs=0.1)
        assert np.mean(measure.arms["neighbours"]) < np.mean(measure.arms["own"]) - 0.2 and np.mean(measure.floor) < 0.6


def test_people_who_are_all_alike_are_not_told_apart_and_the_measure_is_not_reported() -> None:
    said = people(16, 0.0)
    made = style(shared_out(said, personal=[t[-8:] for t in said], base=[t[-8:] for t in said]))
    assert not any(m.tells for m in made) and {m.needed for m in made} == {0}
    told = list(events(made, [f"d{k}" for k in range(16)]))
    assert len(told) == len(made)  # no comparison, no device's figures
    for event in told:
        assert isinstance(event, PersonMeasure) and event.mean_per_user is event.ci95 is None
        assert event.note.startswith("not reported") and event.floor is not None and event.ceiling is not None


# -- what the model expects ----------------------------------------------------------------------------------------


def evidence(own: float, by_adapter: list[float], gain: Sequence[float] = (0.0, 0.0, 0.0)) -> Evidence:
    """Two queries: of the first the own reply is the likeliest of ten, of the second of two of four by `personal`."""
    first, second = [1.0, *[2.0] * 9], [3.0, 2.0, *[4.0] * 8]
    after = [[2.0 - g for g in gain[:2]], [2.0 - gain[2]]]
    return Evidence(
        {"base": [second, second], "personal": [first, second]}, [[7, 8], [9]],
        {"base": [[2.0, 2.0], [2.0]], "personal": after}, by_adapter, {"base": 1.0, "personal": 1.0 + own},
    )  # fmt: skip


def test_which_of_k_is_mine_by_hand() -> None:
    """Of two replies one is found by the personal adapter, none by the base."""
    said = people(3, 12.0)
    asked = [[[Dialogue("", "?", said[k][-1 - q]), *[Dialogue("", "?", said[(k + 1 + i % 2) % 3][i]) for i in range(9)]]
              for q in range(2)] for k in range(3)]  # fmt: skip
    found = {m.name: m for m in choices(said, asked, [evidence(0.0, [0.0])] * 3)}
    assert found.keys() == {"choice-4", "choice-10"} and found["choice-4"].replies == 2
    for measure in found.values():
        assert measure.arms == {"base": [0.0] * 3, "personal": [0.5] * 3}
        assert np.mean(measure.ceiling) > np.mean(measure.floor)
    few = [[c[:5] for c in of] for of in asked]
    assert [m.name for m in choices(said, few, [evidence(0.0, [0.0])] * 3)] == ["choice-4"]


def test_the_rank_of_ones_own_adapter_by_hand() -> None:
    """Losses (person, adapter): the first person's own is best, the second's worst, the third's in between."""
    losses = [[1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [1.0, 3.0, 2.0]]
    like = [Measure(n, {}, [0.5] * 3, [0.9] * 3) for n in ("style-characters", "style-characters-right")]
    place, first = rank([evidence(0.0, row) for row in losses], like)
    assert place.arms == {"personal": [1.0, 0.0, 0.5], "shuffled": [0.5, 0.5, 1.0]}
    assert first.arms["personal"] == [1.0, 0.0, 0.0] and place.ceiling == [0.9] * 3


def test_gains_on_ones_own_tokens_by_hand() -> None:
    """Token 7 is the first person's, 9 the second's, 8 everybody's; both replies are 7 8 and 9."""
    known = [[[7, 8] * 200], [[9, 8] * 200]]
    own, other = tokens(known, [evidence(0.0, [0.0], (0.5, 0.1, 0.3)), evidence(0.0, [0.0], (0.5, 0.1, 0.3))])
    assert own.arms["personal"] == pytest.approx([0.5, 0.3])
    assert other.arms["personal"] == pytest.approx([(0.1 + 0.3) / 2, (0.5 + 0.1) / 2])
    assert own.gate and own.gate[1] == pytest.approx([1 / 3, 1 / 3]) and not own.tells  # others say them as often
    assert own.about == "33% of one's own later tokens, 33% of others'"


def test_what_was_lost_by_hand() -> None:
    """Each adapter on the other two people's replies; the base has lost 2 a token everywhere."""
    rows = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
    said = [["a b a b", "c d"], ["a b c", "d e f"], ["x", ""]]
    found = {m.name: m for m in lost([evidence(0.25, row) for row in rows], Texts(said, said, {"personal": said}))}
    assert found["others-nll"].arms == {"base": [2.0] * 3, "personal": [(4 + 7) / 2, (2 + 8) / 2, (3 + 6) / 2]}
    assert found["neutral-nll"].arms == {"base": [1.0] * 3, "personal": [1.25] * 3}
    assert found["repetition"].arms["personal"] == pytest.approx([(1 / 3 + 0) / 2, 0, 0])
    assert found["distinct-2"].arms["personal"] == pytest.approx([3 / 4, 1, 0])
    assert all(m.tells for m in found.values())


def test_comparisons_are_one_family_and_too_few_replies_are_told() -> None:
    places = {"personal": [1.0, 0.9, 0.8, 0.9], "shuffled": [0.5, 0.4, 0.5, 0.4]}
    one = Measure("rank", places, [0.5] * 4, [0.9, 0.8, 1.0, 1.0], replies=2, needed=4)
    two = Measure("neutral-nll", {"base": [1.0, 2.0, 3.0, 4.0], "personal": [1.1, 2.0, 3.2, 3.9]})
    found = list(events([one, two], list("abcd")))
    first, second = (e for e in found if isinstance(e, PersonComparison))
    assert (first.metric, first.better, first.than) == ("rank", "personal", "shuffled") and first.users_better == 4
    assert (second.metric, second.than, second.users_better) == ("neutral-nll", "base", 1)
    from scipy import stats

    ps = [float(stats.ttest_rel(m.arms["personal"], m.arms[t]).pvalue) for m, t in ((one, "shuffled"), (two, "base"))]
    assert [first.p_holm, second.p_holm] == pytest.approx(holm(ps)) and first.p_holm == pytest.approx(2 * ps[0])
    notes = [e.note for e in found if isinstance(e, PersonMeasure) and e.metric == "rank"]
    assert notes == ["too few replies: real ones tell these people apart from 4 a person"] * 2
    results = {(e.device, e.arm): e.values for e in found if isinstance(e, PersonResult)}
    assert results["b", "personal"] == {"rank": 0.9, "neutral-nll": 2.0} and results["b", "base"] == {
        "neutral-nll": 2.0
    }


def test_candidates_are_others_replies_to_the_likest_prompts() -> None:
    held_out = [
        [Dialogue("a0", "do you like soup", "yes"), Dialogue("a1", "do you like soup", "mine too")],
        [Dialogue("b0", "do you like soup", "no"), Dialogue("b1", "ships sail", "they do")],
        [Dialogue("c0", "soup", "hot"), Dialogue("c1", "do you like soup", "no ")],
    ]
    (first, *_), *_ = like_replies(held_out, 1)
    assert [d.response for d in first] == ["yes", "no ", "hot", "they do"]  # once, and none of one's own
    assert {d.prompt for d in first} == {"do you like soup"}
    many = [[Dialogue(f"{k}", "soup", f"reply {k}")] for k in range(20)]
    assert all(
        len(own[0]) == MOST and own[0][0].response == f"reply {k}" for k, own in enumerate(like_replies(many, 3))
    )


# -- a run ---------------------------------------------------------------------------------------------------------

PEOPLE, REPLIES = 9, 12


@dataclass(frozen=True)
class Made:
    folder: RunFolder
    config: ExperimentConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Nine people who each have a word that they begin with; devices learn alone, from eight replies each."""
    folder = tmp_path_factory.mktemp("person")
    words = ("indeed", "lol", "haha", "sir", "maybe", "truly", "okay", "hmm", "friend")
    said = [
        {"user": f"u{k}", "time": t, "prompt": f"what about {CONTENT[(k * t) % 8]}?",
         "response": f"{words[k]} {words[k]} i like {CONTENT[(t + k) % 8]}"}
        for k in range(PEOPLE) for t in range(REPLIES)
    ]  # fmt: skip
    (folder / "people.jsonl").write_text("\n".join(map(json.dumps, said)), encoding="utf-8")
    config = ExperimentConfig.model_validate({
        "rounds": 1, "workers": 1, "model": {"dtype": "float32", "limits": {"prompt_tokens": 16, "reply_tokens": 16}},
        "data": {"name": str(folder / "people.jsonl"), "users": PEOPLE, "split": "all", "min_pairs": REPLIES},
        "server": {"rule": "none"}, "synthesis": {"per_dialogue": 0},
        "personal": {"adapter": {"rank": 4, "alpha": 8.0}, "learning_rate": 1e-2, "epochs": 4},
        "evaluation": {
            "every_round": False, "pooled_epochs": 0, "rouge_queries_per_user": 3,
            "sampling": {"max_new_tokens": 8, "contrast": 1.0}, "person": {"people": 8, "replies": 2},
        },
    })  # fmt: skip
    run_experiment(config, folder / "run")
    return Made(RunFolder(folder / "run"), config)


def test_a_run_tells_whose_its_adapters_are(run: Made) -> None:
    """Eight of nine people are measured on two replies; each has an adapter that knows their word."""
    told = list(run.folder.events_of(PersonMeasure))
    assert {e.metric for e in told} == PERSON.keys()
    assert {e.users for e in told} == {8} == {run.config.evaluation.person.people}
    by = {(e.metric, e.arm): e for e in told}
    own = by["rank", "personal"]
    assert own.replies == 2 == run.config.evaluation.person.replies and own.mean_per_user is not None
    assert own.mean_per_user > 0.9 and (by["rank", "shuffled"].mean_per_user or 0) < 0.7
    assert by["style-words", "personal"].replies == 3 and (by["style-words", "personal"].ceiling or 0) > 0.9
    compared = {(e.metric, e.than): e for e in run.folder.events_of(PersonComparison)}
    assert compared["rank", "shuffled"].p_holm < 0.05
    assert (by["own-tokens", "personal"].mean_per_user or 0) > (by["own-tokens", "shuffled"].mean_per_user or 0)


def test_contrast_is_of_the_replies_that_are_measured(run: Made) -> None:
    """The personal arm's replies are those of a contrast of this strength and cut; the base's are plain."""
    devices = load_devices(run.folder)
    lm, names, plain = devices.context.lm, list(devices.users)[:8], SamplingConfig(max_new_tokens=8)
    queries = [d for n in names for d in devices.users[n].held_out[:3]]
    slots = [k for k in range(8) for _ in range(3)]
    stack = [lm.adapters(devices.context.personal_layout, torch.stack([devices.state(n).personal for n in names]))]
    found = {(e.device, e.arm): e.values["distinct-2"] for e in run.folder.events_of(PersonResult)}

    def distinct(on: Any, sampling: SamplingConfig) -> list[float]:
        texts = lm.generate([q.prompt for q in queries], slots, on, sampling, [0] * 24)
        return [distinct_pairs(texts[3 * k : 3 * k + 3]) for k in range(8)]

    assert [found[n, "personal"] for n in names] == distinct(stack, run.config.evaluation.sampling)
    assert [found[n, "base"] for n in names] == distinct([], plain)
    said = [
        lm.generate([q.prompt for q in queries], slots, stack, how, [0] * 24)
        for how in (run.config.evaluation.sampling, plain, ReplyConfig(max_new_tokens=8, contrast=1.0, plausible=0.9))
    ]
    assert said[0] != said[1] and said[0] != said[2]


def test_the_table_the_page_and_frames_have_them(run: Made, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    result = load_run(run.folder.path)
    assert len(result.summary.person) == len(list(run.folder.events_of(PersonMeasure)))
    Console(width=200).print(render_summary(result.summary))
    shown = capsys.readouterr().out
    assert "whose it is: 8 people" in shown and "rank of one's adapter" in shown
    page = result.report.read_text(encoding="utf-8")
    assert 'aria-label="Table of measures of persons"' in page and "rank of one&#39;s adapter" in page
    frame = result.frame("person_result")
    assert set(frame["arm"]) == {"base", "personal", "shuffled"} and "values_rank" in frame.columns
    assert len(frame) == 24 and frame[frame["arm"] == "personal"]["values_rank"].notna().all()


def test_what_is_found_of_a_person_is_what_each_arm_says_of_their_replies(run: Made) -> None:
    """The matrix' diagonal and each of its columns, choices and tokens against plain scoring."""
    devices = load_devices(run.folder)
    names, lm, context = list(devices.users)[:4], devices.context.lm, devices.context
    rows = torch.stack([devices.state(n).personal for n in names])
    arms = Arms(names, {"base": [], "personal": [Rows("personal", rows)]})
    held_out = [devices.users[n].held_out for n in names]
    given = dict(zip(names, like_replies(held_out, 2), strict=True))
    found = judged(devices, names[1:3], Questions(arms, given))  # a cohort of some of them
    own = [[c[0] for c in given[n]] for n in names[1:3]]
    assert own == [list(h[:2]) for h in held_out[1:3]]
    for a in range(4):
        stack = lm.adapters(context.personal_layout, rows[a])
        for name, scored in zip(names[1:3], score_users(lm, own, {"x": [stack]})["x"], strict=True):
            assert found[name].by_adapter[a] == pytest.approx(sum(scored.nll) / sum(scored.tokens), abs=1e-3)
    for k, name in enumerate(names[1:3], start=1):
        one = found[name]
        ids = [i for reply in one.ids for i in reply]
        whole = sum(x for reply in one.tokens["personal"] for x in reply)
        assert one.by_adapter[k] == pytest.approx(whole / len(ids), abs=1e-3)
        assert one.choices["personal"][0][0] == pytest.approx(np.mean(one.tokens["personal"][0]), abs=1e-3)
        assert [len(c) for c in one.choices["base"]] == [len(c) for c in given[name]]
        assert one.neutral["base"] != one.neutral["personal"]
    scores = lm.score(lm.format.dialogues(NEUTRAL), [0] * len(NEUTRAL), [])
    neutral = sum(s.nll for s in scores) / sum(s.tokens for s in scores)
    assert found[names[1]].neutral["base"] == pytest.approx(neutral, abs=1e-3)
