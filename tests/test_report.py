"""The report of a run, from event lists written by hand: no model, no engine."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from florilegium.privacy.accounting import Event as Spent
from florilegium.privacy.accounting import epsilon
from florilegium.simulation.reports.figures import (
    MINUS,
    device_totals,
    differences,
    epsilon_spent,
    gain_distribution,
    gains_by_arm,
    learning_curves,
    spread,
    timing,
)
from florilegium.simulation.reports.html import duration, signed, size
from florilegium.simulation.reports.run_report import (
    MOST_DEVICES_LISTED,
    collect,
    flattened,
    outcome,
    render_report,
    verdict,
)
from florilegium.simulation.runs.arms import ARMS
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import (
    ArmComparison,
    ClassCosts,
    DataFacts,
    DataQuartile,
    DeviceResult,
    DeviceRound,
    Evaluation,
    Event,
    FairnessFigures,
    MeanGain,
    ModelFacts,
    NewcomersComparison,
    NewcomersEvaluation,
    PrivacyFacts,
    RoundEnd,
    RunEnd,
    RunStart,
    ShownReply,
    WorldFairness,
    append,
)
from florilegium.simulation.runs.mean_observer import bystander
from florilegium.simulation.runs.timing import wall_by_phase

PRIVACY = PrivacyFacts(
    mode="example-local", unit="one dialogue", adjacency="replace-one", trust="server untrusted", epsilon_budget=8.0,
    delta=1e-5, noise_multiplier=1.1, clip_norm_l2=1.0, sampling_rate=0.25, steps_per_round=8, accountant="PLD",
)  # fmt: skip
RUN = RunStart(
    time=1767600000, name="quickstart", engine="cohort", seed=0, devices=2, rounds=2,
    model=ModelFacts(name="nano", parameters=2557632, architecture="LlamaForCausalLM"),
    data=DataFacts(name="chitchat", split="test", people=2, held_out=16, held_out_met=1),
    hardware="2 cores, cpu", versions={"florilegium": "0.1.0", "torch": "2.13.0"}, privacy=PRIVACY,
    config={"training": {"lr": 1e-3, "targets": ["q_proj", "v_proj"]}, "privacy": {"epsilon_budget": 8.0}},
)  # fmt: skip
END = RunEnd(wall_s=130.2, peak_rss_bytes=1_500_000_000, tokens_trained=812345, interrupted=False)
DASH = "\N{EN DASH}"
SCRIPT = "<script>alert('x')</script>"


def device_round(round: int, device: str = "u1", epsilon: float | None = 1.0, upload_bytes: int = 100) -> DeviceRound:
    return DeviceRound(
        round=round, device=device, arrived=20, accepted=14, buffered=14, annotations=14 * round, synthetic_kept=10,
        synthetic_rejected=4, truncated=0, personal_loss_first=4.3, personal_loss_last=4.1, tokens_trained=3000,
        upload_bytes=upload_bytes, epsilon=epsilon,
    )  # fmt: skip


def finished_round(round: int, signal_to_noise: float = 2.0, releases: int = 2) -> RoundEnd:
    return RoundEnd(
        round=round, devices=2, releases=releases, refused={}, seconds={"observe": 1.5, "learn_shared": 4.5},
        signal_to_noise=signal_to_noise, signal_to_noise_floor=0.2, change_norm_l2=0.1, shared_norm_l2=0.41,
        download_bytes=100,
    )  # fmt: skip


def test_where_the_time_went_by_hand() -> None:
    """Two processes worked 16 s in the 10 s of a round, of which 2 were a control's: 8 are shared as the work is."""
    done = {"observe": 4.0, "learn_shared": 12.0, "control": 2.0, "evaluate": 0.0}
    first = replace(finished_round(1), seconds=done, wall_s=10.0)
    second = replace(finished_round(2), seconds={**done, "evaluate": 3.0}, wall_s=20.0)
    end = RunEnd(wall_s=24.5, peak_rss_bytes=1, tokens_trained=1, devices_bytes=1, interrupted=False)
    found = wall_by_phase([first, second], end)
    assert found == {
        "learn_shared": 9.75,
        "after the last round": 4.5,
        "control": 4.0,
        "observe": 3.25,
        "evaluate": 3.0,
    }
    assert sum(found.values()) == end.wall_s
    assert wall_by_phase([finished_round(1), second], end) == {}  # made before rounds told it


def evaluation(round: int, arm: str, value: float, metric: str = "nll") -> Evaluation:
    return Evaluation(
        round=round, arm=arm, metric=metric, mean_per_user=value, mean_per_query=value,
        ci95=(value - 0.2, value + 0.2), final=False, users=2, queries=16,
    )  # fmt: skip


def comparison(
    better: str,
    difference: float,
    ci95: tuple[float, float],
    metric: str = "nll",
    than: str = "base",
    users_better: int = 1,
) -> ArmComparison:
    return ArmComparison(
        metric=metric, better=better, than=than, mean_difference=difference, ci95=ci95, users=2,
        users_better=users_better,
    )  # fmt: skip


def result(device: str, arm: str, nll: float) -> DeviceResult:
    return DeviceResult(device=device, arm=arm, nll=nll, rouge1=0.08, queries=8, mean_length_tokens=11.5)


def replies(device: str = "u1", text: str = "hello") -> ShownReply:
    return ShownReply(device=device, prompt=text, recorded=text, before=text, after=text)


def told(events: list[Event]) -> list[str]:
    return verdict(collect(events))


def render(folder: Path, events: list[Event], tail: bytes = b"") -> str:
    (folder / "metrics.jsonl").write_bytes(b"")
    append(folder / "metrics.jsonl", events)
    with (folder / "metrics.jsonl").open("ab") as stream:
        stream.write(tail)
    return render_report(folder).read_text(encoding="utf-8")


# ---- a whole run, drawn from a seed ----

PROMPTS = [
    ("any plans for the weekend?", "hiking if the rain stops, or tea and a book", "i am not sure", "hiking i think :)"),
    ("what do you do for work", "i fix bikes :) mostly old steel ones", "i work in a office", "i fix old bikes"),
    ("Do you like cooking?", "only soups haha. leek and potato is my thing", "Yes, I like to cook.", "only soups haha"),
]


def sample_run(devices: int = 8, rounds: int = 3, seed: int = 0) -> list[Event]:
    """Every kind of event as an engine writes them, with numbers that look like those of a small run."""
    rng = random.Random(seed)
    names = [f"u{i:04d}" for i in range(devices)]
    base = {name: rng.gauss(4.3, 0.35) for name in names}
    effect = {"base": 0.0, "shared": -0.004, "local": -0.045, "personal": -0.055, "shuffled": 0.02, "pooled": -0.09}
    shift = {arm: {n: rng.gauss(by, 0.03 if by else 0.0) for n in names} for arm, by in effect.items()}
    rouge = {arm: {n: max(0.0, rng.gauss(0.08, 0.03)) for n in names} for arm in effect}

    def evaluated(round: int, arm: str, progress: float) -> Evaluation:
        nll = [base[n] + progress * shift[arm][n] for n in names]
        return replace(evaluation(round, arm, mean(nll)), ci95=_interval(nll), users=devices, queries=8 * devices)

    events: list[Event] = [replace(RUN, devices=devices, rounds=rounds), evaluated(0, "base", 1)]
    events += [evaluated(0, "shared", 0), evaluated(0, "personal", 0), evaluated(0, "local", 0)]
    for r in range(1, rounds + 1):
        for i, name in enumerate(names):
            kept = rng.randint(4, 14)
            work = {"accepted": rng.randint(6, 16), "synthetic_kept": kept, "synthetic_rejected": 14 - kept}
            spent = 2.5 * r**0.5 * (1 + 0.05 * (i % 3))
            events.append(replace(device_round(r, name, round(spent, 3), 16512), **work, tokens_trained=200 * kept))
        seconds = {"observe": 1.2, "annotate": 0.1, "synthesize": 5.0, "learn_shared": 4.1, "release": 0.1,
                   "learn_personal": 9.0, "aggregate": 0.02, "evaluate": 3.0}  # fmt: skip
        jittered = {phase: s * rng.uniform(0.9, 1.1) * devices / 64 for phase, s in seconds.items()}
        events.append(replace(finished_round(r, 0.8), seconds=jittered, devices=devices, download_bytes=16512))
        arms = ("shared", "local", "personal") if r < rounds else tuple(effect)
        events += [evaluated(r, arm, (r / rounds) ** 0.6) for arm in arms]
    events += [evaluation(rounds, arm, mean(rouge[arm].values()), "rouge1") for arm in effect]
    for arm in effect:
        events += [replace(result(n, arm, base[n] + shift[arm][n]), rouge1=rouge[arm][n]) for n in names]
    pairs = [(arm, "base") for arm in list(effect)[1:]] + [("personal", "shuffled"), ("personal", "local")]
    for metric, values, sign in (("nll", shift, 1), ("rouge1", rouge, -1)):
        for better, than in pairs:
            gaps = [values[better][n] - values[than][n] for n in names]
            won = sum(sign * gap < 0 for gap in gaps)
            paired = comparison(better, mean(gaps), _interval(gaps), metric, than, won)
            events.append(replace(paired, users=devices))
    for name in names[:2]:
        texts = [dict(zip(("prompt", "recorded", "before", "after"), p, strict=True)) for p in PROMPTS]
        events += [replace(replies(name), **text) for text in texts]
    in_rounds = sum(sum((e.seconds or {}).values()) for e in events if isinstance(e, RoundEnd))
    return [*events, replace(END, wall_s=1.1 * in_rounds)]


def _interval(values: list[float]) -> tuple[float, float]:
    half = 1.96 * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


# ---- the verdict ----


def test_verdict_sums_up_what_won_and_what_did_not() -> None:
    events = [
        RUN, finished_round(1), finished_round(2), evaluation(2, "base", 4.0),
        comparison("personal", -0.05, (-0.06, -0.04), users_better=2),
        comparison("shared", -0.004, (-0.01, 0.002)),
        comparison("personal", 0.002, (-0.004, 0.008), metric="rouge1"),
        END,
    ]  # fmt: skip
    sentences = told(events)
    assert sentences[0] == (
        "Against the base model, the personal adapter was better by 0.050 nats per token, "
        "the shared adapter was not better, and ROUGE-1 of the replies did not move."
    )
    assert sentences[2] == (
        f"The personal adapter was better than the base model: NLL {MINUS}0.050 nats per token, "
        f"95% interval {MINUS}0.060 to {MINUS}0.040; better for 2 of 2 users."
    )
    assert sentences[1].startswith("The shared adapter was not better than the base model")
    assert sentences[3].startswith("ROUGE-1 did not move from the base model to the personal adapter: +0.002")


def test_verdict_says_worse_when_an_arm_is_worse() -> None:
    sentences = told([comparison("shared", 0.03, (0.02, 0.04), users_better=0)])
    assert "the shared adapter was worse by 0.030 nats per token" in " ".join(sentences)
    assert any(s.startswith("The shared adapter was worse than the base model") for s in sentences)


@pytest.mark.parametrize(
    ("metric", "ci95", "expected"),
    [
        ("nll", (-0.02, -0.01), "better"), ("nll", (0.01, 0.02), "worse"), ("nll", (-0.01, 0.0), "unclear"),
        ("rouge1", (0.01, 0.02), "better"), ("rouge1", (-0.02, -0.01), "worse"),
        ("rouge1", (float("nan"), float("nan")), "unclear"),
    ],
)  # fmt: skip
def test_outcome_needs_an_interval_without_zero(metric: str, ci95: tuple[float, float], expected: str) -> None:
    assert outcome(comparison("personal", 0.0, ci95, metric)) == expected


def test_verdict_says_how_far_an_unfinished_run_came() -> None:
    assert told([]) == ["The run has recorded nothing yet."]
    assert told([RUN])[:2] == [
        "The run has not finished: 0 of 2 rounds are recorded.",
        "There is no evaluation yet.",
    ]
    stopped = [RUN, finished_round(1), replace(END, interrupted=True)]
    assert told(stopped)[0] == "The run was interrupted after 1 of 2 rounds."
    assert told([*stopped, RUN])[0] == "The run has not finished: 1 of 2 rounds are recorded."  # resumed


def test_verdict_states_the_highest_epsilon_and_an_overspent_budget() -> None:
    within = told([RUN, device_round(1, "u1", 3.1), device_round(1, "u2", 2.0)])
    kind = "(δ = 1e-05, unit one dialogue, replace-one)"
    assert f"No device spent more than ε = 3.10 of its budget of 8 {kind}." in within
    beyond = told([RUN, device_round(1, "u1", 8.5)])
    assert f"The privacy budget was exceeded: a device spent ε = 8.50 of 8 {kind}." in beyond
    unprotected = told([replace(RUN, privacy=replace(PRIVACY, mode="none")), device_round(1, "u1", None)])
    assert "What left the devices was not protected: privacy mode none is for simulation only." in unprotected


PLAIN = {
    "server": {"rule": "mean", "products": "average", "buffer": 0},
    "shared": {"upload": "fp32"}, "privacy": {"releases": 0}, "world": {"classes": ""},
}  # fmt: skip


def of_whole_devices(noise: float = 2.0, **privacy: Any) -> RunStart:
    whole = {"mode": "user-local", "sampling_rate": 1.0, "steps_per_round": 1, "noise_multiplier": noise}
    return replace(RUN, rounds=3, privacy=replace(PRIVACY, **{**whole, **privacy}), config=PLAIN)


def rounds_of(*releases: int) -> list[RoundEnd]:
    return [finished_round(k, releases=n) for k, n in enumerate(releases, start=1)]


def test_who_sees_only_the_mean_is_promised_more_by_hand() -> None:
    """Of n = 4 releases with σ = 2 the mean has that of σ = 4; a unit is in the rounds that have fewest."""
    found = bystander(of_whole_devices(), rounds_of(9, 4, 0, 16))
    assert found and found.releases == 4
    assert found.epsilon == epsilon([Spent(4.0, 1.0, 1), Spent(6.0, 1.0, 1), Spent(8.0, 1.0, 1)], 1e-5)
    alone = bystander(of_whole_devices(), rounds_of(1, 1, 1))
    assert alone and alone.epsilon == epsilon([Spent(2.0, 1.0, 3)], 1e-5)  # a mean of one hides nothing


def test_the_quickstarts_mean_of_64() -> None:
    run = of_whole_devices(0.978515625, mode="example-local", sampling_rate=0.5)
    found = bystander(run, rounds_of(64, 64, 64))
    assert found and found.epsilon == pytest.approx(0.81, abs=0.005)
    assert found.told.startswith("ε = 0.81 towards who sees only the mean of each round's releases, 64 or more, if the")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("server", "rule", "krum"),
        ("server", "products", "residual"),
        ("server", "buffer", 8),
        ("shared", "upload", "int8"),
        ("world", "classes", "world/devices"),
    ],
)
def test_nothing_is_claimed_of_what_is_no_mean(section: str, key: str, value: Any) -> None:
    config = {**PLAIN, section: {**PLAIN[section], key: value}}
    assert bystander(replace(of_whole_devices(), config=config), rounds_of(64)) is None
    assert bystander(of_whole_devices(steps_per_round=2), rounds_of(64)) is None
    assert bystander(of_whole_devices(mode="user-central"), rounds_of(64)) is None
    assert bystander(of_whole_devices(), []) is None


def test_verdict_never_leaves_out_an_unbounded_or_unknown_epsilon() -> None:
    unbounded = told([RUN, device_round(1, "u1", float("inf")), device_round(1, "u2", 2.0)])
    assert any(s.startswith("The privacy budget was exceeded: a device spent ε = inf of 8") for s in unbounded)
    unknown = told([RUN, device_round(1, "u1", None), device_round(1, "u2", 2.0)])
    assert "The privacy spent is not known: 1 of the devices released without a recorded ε." in unknown
    assert spread(device_totals([device_round(1, "u1", float("inf"))]), "epsilon") == (float("inf"),) * 4


def test_verdict_says_when_noise_outweighed_the_update() -> None:
    assert any("0.80 in the last round" in s for s in told([RUN, finished_round(1, 3.0), finished_round(2, 0.8)]))
    assert not any("noise" in s for s in told([RUN, finished_round(1, 0.8), finished_round(2, 3.0)]))


# ---- numbers ----


def test_numbers_carry_units() -> None:
    assert [size(n) for n in (999, 16512, 2_500_000, 3e9, None)] == ["999 B", "16.5 kB", "2.5 MB", "3.0 GB", DASH]
    assert [duration(s) for s in (4.06, 130.2, 7260, None)] == ["4.1 s", "2 min 10 s", "2 h 1 min", DASH]
    assert [signed(v) for v in (0.05, -0.05, -0.0001, float("nan"))] == ["+0.050", f"{MINUS}0.050", "0.000", DASH]


def test_config_is_written_as_the_keys_of_the_command_line() -> None:
    config = {"training": {"lr": 0.001, "targets": ["q", "v"]}, "seed": 0, "extra": {}}
    expected = [("training.lr", "0.001"), ("training.targets", '["q", "v"]'), ("seed", "0"), ("extra", "{}")]
    assert list(flattened(config)) == expected


def test_totals_add_bytes_and_keep_the_last_epsilon() -> None:
    totals = device_totals([device_round(1, "a", 1.0), device_round(2, "a", 1.5), device_round(1, "b", 2.0)])
    assert [(t.device, t.upload_bytes, t.releases, t.epsilon, t.annotations) for t in totals] == [
        ("b", 100, 1, 2.0, 14),
        ("a", 200, 2, 1.5, 28),
    ]
    assert spread(totals, "upload_bytes") == (100, 150, 200, 300)
    assert spread(device_totals([device_round(1, "a", None)]), "epsilon") is None


def test_gains_are_paired_by_user() -> None:
    results = [result("a", "base", 4.0), result("b", "base", 3.0)]
    results += [result("a", "shared", 3.5), result("b", "shared", 3.2)]
    assert gains_by_arm(results) == {"shared": [0.5, -0.2]}


def test_epsilon_figure_shows_the_range_and_the_budget() -> None:
    figure = epsilon_spent([device_round(1, "a", 1.0), device_round(1, "b", 3.0), device_round(1, "c", 1.5)], 8.0)
    assert {trace.name: trace.y[0] for trace in figure.data} == {"lowest": 1.0, "median": 1.5, "highest": 3.0}
    assert figure.layout.shapes[0].y0 == 8.0


# ---- the record ----


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    events = [RUN, device_round(1), finished_round(1)]
    in_the_middle_of_a_letter = '{"event":"end","name":"é'.encode()[:-1]
    assert render(tmp_path, events, in_the_middle_of_a_letter) == render(tmp_path, events)


def test_damage_inside_the_record_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is not JSON"):
        render(tmp_path, [RUN], b'{"event":"end"\n{"event":"end"}\n')


def test_a_missing_record_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="give the folder of a run"):
        render_report(tmp_path)


def test_a_round_that_was_repeated_after_a_crash_counts_once(tmp_path: Path) -> None:
    once = render(tmp_path, [RUN, device_round(1), finished_round(1)])
    assert render(tmp_path, [RUN, device_round(1), RUN, device_round(1), finished_round(1)]) == once


# ---- the page ----


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._raw = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._raw else data


def test_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    html = render(tmp_path, sample_run())
    page = Page(html)
    assert not [a for tag, a in page.tags if tag in ("link", "iframe", "img", "base", "object")]
    assert not [a for tag, a in page.tags if {"src", "srcset", "data"} & a.keys()]
    assert all((a["href"] or "").startswith("#") for _, a in page.tags if "href" in a)
    assert html.count("* plotly.js v") == 1
    assert "default-src 'none'" in html
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert len(html) < 6_000_000


def test_texts_of_people_are_escaped(tmp_path: Path) -> None:
    run = replace(RUN, name=SCRIPT, hardware=SCRIPT, config={"note": SCRIPT})
    events = [run, device_round(1, SCRIPT), finished_round(1), replies(SCRIPT, SCRIPT), result(SCRIPT, "base", 4.0)]
    events += [result(SCRIPT, "personal", 3.9), evaluation(1, SCRIPT, 4.0), comparison(SCRIPT, 0.1, [0.0, 0.2])]
    html = render(tmp_path, events)
    assert SCRIPT not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert len([tag for tag, _ in Page(html).tags if tag == "script"]) == 2  # plotly.js and our own


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path) -> None:
    assert "a?b" in render(tmp_path, [RUN, replies(text="a\ud83db")])


@pytest.mark.parametrize("length", range(9))
def test_unfinished_runs_give_a_report(tmp_path: Path, length: int) -> None:
    events = [
        RUN, evaluation(0, "base", 4.3), device_round(1), finished_round(1), evaluation(1, "shared", 4.2),
        result("u1", "base", 4.2), comparison("shared", -0.1, (-0.2, 0.0)), replies(), END,
    ]  # fmt: skip
    text = Page(render(tmp_path, events[:length])).text
    assert ("not finished" in text) == (length > 0)
    assert ("No arm has been evaluated yet" in text) == (length < 2)
    assert not (tmp_path / "report.html.partial").exists()


def test_page_shows_every_arm_and_what_did_not_help(tmp_path: Path) -> None:
    html = render(tmp_path, sample_run())
    text = " ".join(Page(html).text.split())
    table = html[html.index('<table class="arms">') : html.index("</table>")]
    assert re.findall(r'--arm: (#\w+)" aria-hidden="true"></span>(\w+)</span>', table) == [
        (arm.colour, name) for name, arm in ARMS.items()
    ]
    assert "the shared adapter was not better" in text
    assert "ROUGE-1 of the replies did not move" in text
    for name in ("curves", "differences", "gains", "epsilon", "timing"):
        assert f'id="plot-{name}"' in html
    for said in ("training.lr = 0.001", "one dialogue", "replace-one", "What is not covered"):
        assert said in text


# ---- each cell of the page, from a handful of events ----


def told_by_hand() -> list[Event]:
    """Two devices, two rounds, all sections; every number is another one."""
    world = WorldFairness(
        wall_s=7265.0, rounds=2,
        classes={"phone": ClassCosts(
            asked=9, answered=5, devices=2, seconds=5400.0, bytes=12_340_000, joules=6780.0, share_of_answers=1.0,
            outcomes={"answers": 5, "late": 1, "dropped-out": 2, "unavailable": 3, "too-small": 4},
            utility=MeanGain(mean=0.5, ci95=(0.25, 0.75)),
        )},
        fairness=FairnessFigures(
            utility_by_data_quartile=(
                DataQuartile(least_data=11, most_data=13, devices=2, utility=MeanGain(mean=0.125, ci95=(-0.5, 0.75))),
            ),
            jain_participation=0.8, worst_decile_utility=-0.0625,
        ),
    )  # fmt: skip

    def late(arm: str, nll: float) -> NewcomersEvaluation:
        interval = nll - 0.25, nll + 0.25
        return NewcomersEvaluation(arm=arm, metric="nll", users=3, mean_per_user=nll, mean_per_query=nll, ci95=interval)

    first, second = device_round(1, "u1", 1.25, 100), device_round(1, "u2", 2.5, 300)
    return [
        RUN, evaluation(0, "base", 4.0), evaluation(0, "personal", 4.0),
        first, replace(second, arrived=10, accepted=4, tokens_trained=500), finished_round(1, 3.0),
        evaluation(1, "personal", 3.75), device_round(2, "u1", 1.75, 100),
        replace(device_round(2, "u2", 2.5, 0), refusal="budget-spent"), finished_round(2, 0.5),
        evaluation(2, "base", 4.0), evaluation(2, "personal", 3.5), evaluation(2, "personal", 0.25, "rouge1"),
        result("u1", "base", 4.5), replace(result("u1", "personal", 3.5), mean_length_tokens=8.0),
        result("u2", "base", 3.5), result("u2", "personal", 3.75),
        comparison("personal", -0.375, (-0.5, -0.25), users_better=1),
        comparison("personal", 0.125, (-0.5, 0.75), metric="rouge1"),
        world, late("base", 4.25), late("personal", 3.25),
        NewcomersComparison(metric="nll", better="personal", than="base", mean_difference=-1.0, ci95=(-1.5, -0.5),
                            users=3, users_better=3),
        END,
    ]  # fmt: skip


def tables_of(html: str) -> dict[str, list[list[str]]]:
    """Rows of texts by a table's caption, as far as its first comma or full stop."""
    found = {}
    for table in re.findall(r"<table.*?</table>", html, re.S):
        caption = re.split(r"[.,]", re.sub("<[^>]*>", "", re.findall(r"<caption>.*?</caption>", table, re.S)[0]))[0]
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr.*?</tr>", table, re.S)]
        found[caption] = [[" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in row] for row in rows][1:]
    return found


def test_every_cell_of_every_table_by_hand(tmp_path: Path) -> None:
    found = tables_of(render(tmp_path, told_by_hand()))
    assert found["Held-out replies"] == [
        ["base the model as it came, no adapter", "4.000", DASH, DASH, DASH, DASH, "11.5"],
        ["personal the shared adapter and the user's own, added".replace("'", "&#39;"), "3.500",
         f"{MINUS}0.375 {MINUS}0.500 to {MINUS}0.250 better", "1 of 2", "0.250",
         f"+0.125 {MINUS}0.500 to +0.750 did not move", "9.8"],  # tokens: (8 + 11.5) / 2
    ]  # fmt: skip
    assert found["Difference is the first arm minus the second"] == [
        ["personal − base", "NLL", f"{MINUS}0.375", f"{MINUS}0.500 to {MINUS}0.250", "1 of 2", "better"],
        ["personal − base", "ROUGE-1", "+0.125", f"{MINUS}0.500 to +0.750", "1 of 2", "not better"],
    ]
    # u1 gained 4.5 − 3.5, u2 lost 3.75 − 3.5
    assert found["Gain over the base model by user"] == [
        ["personal", "2", "1", "1", f"{MINUS}0.250", "+0.375", "+1.000"]
    ]
    assert found["Per device"] == [
        ["Left the device"],
        ["Uploaded", "200 B", "250 B", "300 B", "500 B"],
        ["Releases", "1", "2", "2", "3"],  # the median is 1.5
        ["ε spent", "1.75", "2.12", "2.50", DASH],  # of each device the largest
        ["Stayed on the device"],
        ["Dialogues arrived", "30", "35", "40", "70"],
        ["Accepted into the buffer", "18", "23", "28", "46"],
        ["Annotations asked of the user", "28", "28", "28", "56"],  # 14, then 28 in all
        ["Synthesized, kept", "20", "20", "20", "40"],
        ["Synthesized, rejected", "8", "8", "8", "16"],
        ["Truncated", "0", "0", "0", "0"],
        ["Tokens trained", "3,500", "4,750", "6,000", "9,500"],
    ]
    assert found["Highest ε first"] == [
        ["u2", "2.50", "2.50, 2.50 (budget-spent)", "300 B", "1", "28", "20", "3,500"],
        ["u1", "1.75", "1.25, 1.75", "200 B", "2", "28", "20", "6,000"],
    ]
    assert found["By class of device"] == [
        ["phone", "9", "5", "1", "2", "7", "1.50", "12.34", "6.78", "2", "+0.500 +0.250 to +0.750"]
    ]
    assert found["By how much data a user has: quarters of the evaluated devices"] == [
        ["11 to 13", "2", f"+0.125 {MINUS}0.500 to +0.750"]
    ]
    assert found["NLL of held-out replies"] == [
        ["base", "4.250 4.000 to 4.500", DASH],
        ["personal", "3.250 3.000 to 3.500", f"against base {MINUS}1.000 {MINUS}1.500 to {MINUS}0.500"],
    ]


def test_every_fact_of_the_page_by_hand(tmp_path: Path) -> None:
    """As a reader's eye finds them: a term stands right before what it is of."""
    text = " ".join(Page(render(tmp_path, told_by_hand())).text.split())
    for fact in (
        "Devices2", "Rounds2 of 2", "Highest ε of a device2.50 of 8.0", "Modelnano, 2.6 million parameters",
        "1 of 16 held-out pairs stand word for word in the same user's stream",
        "Wall time2 min 10 s",
        "the server sent 100 B in the last round",
        "Budgetε = 8.00 at δ = 1e-05",
        "Noisemultiplier 1.10, clipping norm 1.00 (L2)",
        "Charged8 steps a round, Poisson sampling rate 0.25",
        "Signal to noise0.50 in round 2",
        "the rounds took 2 h 1 min",
        "index of participation is 0.80",
        f"gained least gained {MINUS}0.062",
        "mean over 3 users",
        "12.0 s in 2 rounds, 2 min 10 s in all; 1.5 GB of memory at the peak; 812,345 tokens trained",
    ):  # fmt: skip
        assert fact in text, fact


def test_every_figure_by_hand() -> None:
    record = collect(told_by_hand())
    assert {arm: e.mean_per_user for arm, e in record.latest("nll").items()} == {"base": 4.0, "personal": 3.5}
    curves = {t.name: (list(t.x), list(t.y)) for t in learning_curves(record.evaluation).data}
    assert curves == {"base": ([0, 2], [4.0, 4.0]), "personal": ([0, 1, 2], [4.0, 3.75, 3.5])}
    (bar,) = differences(record.comparison).data  # of the NLL alone
    assert (list(bar.x), bar.error_x.array[0], bar.error_x.arrayminus[0]) == ([-0.375], 0.125, 0.125)
    (box,) = gain_distribution(record.result).data
    assert (box.name, list(box.x)) == ("personal", [1.0, -0.25])
    spent = {t.name: (list(t.x), list(t.y)) for t in epsilon_spent(record.device_round, 8.0).data}
    assert spent == {
        "lowest": ([1, 2], [1.25, 1.75]), "median": ([1, 2], [1.875, 2.125]), "highest": ([1, 2], [2.5, 2.5]),
    }  # fmt: skip
    (phases,) = timing(record.round).data
    assert list(phases.x) == [3.0, 9.0] and [t.split("·")[1].strip() for t in phases.text] == ["25.0%", "75.0%"]


def test_the_last_evaluation_of_an_arm_holds_whatever_the_order_of_the_events() -> None:
    events = [evaluation(2, "personal", 3.5), evaluation(0, "personal", 4.0), evaluation(1, "shared", 3.9)]
    found = collect(events).latest("nll")
    assert [(arm, e.mean_per_user) for arm, e in found.items()] == [("shared", 3.9), ("personal", 3.5)]


def test_page_has_a_name_for_every_table_and_figure(tmp_path: Path) -> None:
    tags = Page(render(tmp_path, sample_run())).tags
    count = [tag for tag, _ in tags].count
    assert count("h1") == 1
    assert count("caption") == count("table") > 0
    assert count("figcaption") == count("figure") == 5
    ids = {a["id"] for _, a in tags if "id" in a}
    references = [a[key] for _, a in tags for key in ("aria-labelledby", "aria-describedby") if key in a]
    assert ids.issuperset(references)


def test_many_devices_are_cut_off_and_the_page_says_so(tmp_path: Path) -> None:
    many = [device_round(1, f"u{i:04d}", 1 + i / 1000) for i in range(MOST_DEVICES_LISTED + 1)]
    html = render(tmp_path, [RUN, *many, finished_round(1)])
    assert "The 200 devices with the highest ε, of 201." in html
    assert ">u0200<" in html and ">u0000<" not in html


def test_no_privacy_is_said_loudly(tmp_path: Path) -> None:
    bare = replace(PRIVACY, mode="none")
    html = render(tmp_path, [replace(RUN, privacy=bare), device_round(1, epsilon=None), finished_round(1)])
    assert "No differential privacy." in html and "no guarantee" in html


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    assert render(tmp_path, sample_run()) == render(tmp_path, sample_run())


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed; install it to draw the report in a browser")
def test_a_browser_draws_every_figure(tmp_path: Path) -> None:
    """Under the page's own policy, which forbids every load, all five figures are drawn."""
    render(tmp_path, sample_run())
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--dump-dom",
        (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert len(re.findall(r'class="plot js-plotly-plot"', drawn)) == 5


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(0.1, "no signal could be told from the noise: a ratio below 0.20"), (0.5, "its signal-to-noise ratio was 0.50")],
)
def test_a_ratio_that_cannot_be_measured_is_told_as_such(ratio: float, words: str) -> None:
    sentences = told([RUN, finished_round(1, ratio)])
    assert any(words in sentence for sentence in sentences), sentences
