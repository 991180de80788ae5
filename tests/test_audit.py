"""The audit: bounds and figures by hand, fair coins, attacks that work where nothing protects, caught controls."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.special import ndtr

from florilegium.client.calibration import planned_event
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.packing import Example
from florilegium.client.state import DeviceState
from florilegium.privacy.plan import RoundPlan
from florilegium.simulation.audit import checks, hostile_adapters, one_run_audit
from florilegium.simulation.audit.attack_metrics import Ceiling, judge
from florilegium.simulation.audit.attacks import membership
from florilegium.simulation.audit.audit import HONEST, NO_NOISE, Auditor, AuditWork
from florilegium.simulation.audit.bounds import (
    auc_ceiling,
    gaussian_epsilon,
    gaussian_epsilon_of_trials,
    gaussian_one_run_epsilon,
    one_run_epsilon,
)
from florilegium.simulation.audit.canaries import hide, plant
from florilegium.simulation.audit.checks import named, without_noise
from florilegium.simulation.audit.inventory import inventory, wire
from florilegium.simulation.audit.inversion import LISTED, reconstructed
from florilegium.simulation.audit.one_run_audit import (
    DeviceCoins,
    DialogueCoins,
    Guesses,
    Mistake,
    explained,
    worst_case,
)
from florilegium.simulation.audit.recorded_coins import Recorded
from florilegium.simulation.audit.report import audit_run
from florilegium.simulation.cli.main import main
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.data.population import DataConfig, load_population
from florilegium.simulation.engines.in_memory import federate_in_memory
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.folder import RunFolder, create
from florilegium.simulation.settings import ConfigError

CONFIG = ExperimentConfig.model_validate({
    "rounds": 2,
    "model": {"dtype": "float32", "limits": {"prompt_tokens": 16, "reply_tokens": 16}},
    "data": {"users": 4, "split": "development", "max_pairs": 40},
    "selection": {"policy": "fifo", "bins": 4},
    "shared": {"pool_capacity": 16, "adapter": {"targets": ["v_proj"]}},
})  # fmt: skip


@pytest.fixture(scope="module")
def streams() -> list[list[Dialogue]]:
    return [list(user.stream[:24]) for user in load_population(CONFIG.data, seed=0)]


# -- figures by hand ----------------------------------------------------------------------------------------------


def test_one_run_bounds_by_hand() -> None:
    """Half of the guesses right shows nothing; all of 1,000 right shows what the binomial tail of 0.05 allows."""
    assert one_run_epsilon(1000, 1000, 500, 1e-5) == 0
    # P[all 1,000 right] = p^1000 ≥ 0.05 for p ≥ 0.05^(1/1000) = 0.99701, ε = ln(p / (1 − p)) = 5.81; δ takes a little
    assert 5.6 < one_run_epsilon(1000, 1000, 1000, 1e-5) < 5.81
    assert one_run_epsilon(1000, 100, 90, 1e-5) < one_run_epsilon(1000, 100, 95, 1e-5)
    assert one_run_epsilon(1000, 100, 95, 1e-2) < one_run_epsilon(1000, 100, 95, 1e-5)


def test_a_gaussian_of_unit_shift_is_known() -> None:
    """µ = 1 is ε = 4.38 at δ = 1e-5 (Dong et al. 2019, Corollary 1), and a bound for Gaussians is the sharper one."""
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.377, abs=0.01)
    assert gaussian_one_run_epsilon(1000, 1000, 800, 1e-5) > one_run_epsilon(1000, 1000, 800, 1e-5)


def test_a_bound_with_abstention_is_that_of_its_authors() -> None:
    """420 right of 500 guesses among 1,000 (`FDPAnalysisNode` of facebookresearch/PrivacyGuard, on a grid: 2.52)."""
    assert gaussian_one_run_epsilon(1000, 500, 420, 1e-5) == pytest.approx(2.52, abs=0.01)
    assert gaussian_one_run_epsilon(1000, 500, 250, 1e-5) == 0  # half of the guesses right shows nothing
    assert gaussian_one_run_epsilon(1000, 20, 20, 1e-5) > gaussian_one_run_epsilon(1000, 20, 19, 1e-5) > 1


@pytest.mark.parametrize(
    ("guesses", "percent", "of_answers"), [(20, (0.5, 1.7), 0.02), (100, (0.0, 0.4), 0.01), (500, (0.0, 0.02), 0.01)]
)
def test_a_bound_with_abstention_is_seldom_above_the_truth(
    guesses: int, percent: tuple[float, float], of_answers: float
) -> None:
    """1,000 coins, each seen through a mechanism that is µ-GDP for µ = 0.5: at most 5 % may refute the truth.

    Through Gaussian noise, with guesses on the most extreme of what is seen; and as randomized responses, which are
    told right with Φ(µ / 2) and all alike. The first is what abstaining costs, and the method's own share.
    """
    rng, half, trials, mu = np.random.default_rng(0), guesses // 2, 3000, 0.5
    truth = gaussian_epsilon(mu, 1e-5)
    coins = rng.random((trials, 1000)) < 0.5
    seen = (coins * mu + rng.normal(size=coins.shape)).argsort(1)
    coins = np.take_along_axis(coins, seen, 1)
    right = coins[:, -half:].sum(1) + (~coins[:, :half]).sum(1)
    answers = rng.binomial(guesses, ndtr(mu / 2), 100_000)
    least = min(c for c in range(guesses + 1) if gaussian_one_run_epsilon(1000, guesses, c, 1e-5) > truth)
    above, of_coins = 100 * (right >= least).mean(), 100 * (answers >= least).mean()
    print(f"{guesses} guesses of 1,000: above the truth in {above:.2f} % of trials, {of_coins:.2f} % of answers")
    assert percent[0] <= above <= percent[1] and of_coins <= of_answers


def test_a_bound_of_independent_coins_by_hand() -> None:
    """µ = 1 is told apart with Φ(1/2) = 0.69146: as many of a million guesses prove nearly all of its ε of 4.38."""
    assert gaussian_epsilon_of_trials(1_000_000, 691_462, 1e-5) == pytest.approx(4.36, abs=0.02)
    assert gaussian_epsilon_of_trials(1000, 500, 1e-5) == 0
    assert gaussian_epsilon_of_trials(1000, 691, 1e-5) < 4.36


@pytest.mark.parametrize(("eps", "ceiling"), [(1, 0.731), (2, 0.881), (4, 0.982), (8, 0.9997)])
def test_ceilings_of_pure_privacy_by_hand(eps: float, ceiling: float) -> None:
    """Without δ the curve has one corner, at 1 / (1 + e^ε): the area is e^ε / (1 + e^ε)."""
    assert auc_ceiling(eps, 0.0) == pytest.approx(ceiling, abs=1e-3)


@pytest.mark.parametrize(("eps", "ceiling"), [(1, 0.575), (2, 0.639), (4, 0.743), (8, 0.881)])
def test_the_ceiling_of_a_gaussian_mechanism(eps: float, ceiling: float) -> None:
    """Of one release at δ = 1e-5 it is far below that of (ε, δ) alone."""
    settings = {"mode": "user-local", "epsilon": eps}
    config = ExperimentConfig.model_validate({"rounds": 1, "privacy": settings})
    assert Ceiling.of(config).auc == pytest.approx(ceiling, abs=3e-3)


def test_the_figures_of_an_attack_by_hand() -> None:
    """Members 3, 4, 1 and strangers 0, 2: of six pairs only 1 < 2 is the wrong way round."""
    found = judge("x", np.array([3.0, 4.0, 1.0, 0.0, 2.0]), np.array([True, True, True, False, False]), Ceiling())
    assert found.auc == pytest.approx(5 / 6)
    assert found.tpr_at_fpr[0.01] == pytest.approx(2 / 3)
    assert found.within and (found.members, found.strangers) == (3, 2)


def test_a_leak_of_a_few_is_seen_where_the_area_shows_nothing() -> None:
    """One in fifty of what was met is given away whole: the AUC hardly moves, the rate at few false alarms tells."""
    config = ExperimentConfig.model_validate({"rounds": 1, "privacy": {"mode": "user-local", "epsilon": 1.0}})
    scores, member = np.random.default_rng(0).normal(size=4000), np.arange(4000) < 2000
    assert judge("guessing", scores, member, Ceiling.of(config)).within
    scores[:40] = 100 + np.arange(40)
    found = judge("a few", scores, member, Ceiling.of(config))
    assert found.auc < 0.53 < found.auc_ceiling and not found.within


def test_exposure_by_hand() -> None:
    """Above all three that were not met: log2 4 = 2 bits; below all of them: 0; above two: 1."""
    scores, members = np.array([9.0, 0.0, 2.5, 1.0, 2.0, 3.0]), np.array([True, True, True, False, False, False])
    assert Guesses(scores, members).exposure() == pytest.approx((2 + 0 + 1) / 3)
    assert Guesses(scores[3:], np.array([False, False, True])).exposure() == pytest.approx(np.log2(3))


def test_coins_are_explained_by_hand() -> None:
    """Two coins that change the same number, and one that changes another: least squares tells them apart."""
    differences = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    coins = torch.tensor([0.5, -0.5, -0.5], dtype=torch.float64)
    assert explained(coins @ differences, differences, 0.0) == pytest.approx(coins.numpy(), abs=1e-6)
    assert abs(explained(coins @ differences, differences, 10.0)).max() < 0.01  # nothing is believed under much noise


# -- coins --------------------------------------------------------------------------------------------------------


def test_a_coin_hides_one_of_two_and_the_other_stands_in_the_same_place(streams: list[list[Dialogue]]) -> None:
    met, canaries = hide(streams, 0.5, seed=3)
    assert [len(m) for m in met] == [18] * 4 and len(canaries) == 4 * 12
    for c in canaries:
        assert (c.dialogue in met[c.device]) == c.member
    pairs = zip(canaries[::2], canaries[1::2], strict=True)  # the one that was met and the hidden one
    earlier = sum(streams[a.device].index(a.dialogue) < streams[b.device].index(b.dialogue) for a, b in pairs)
    assert 6 < earlier < 18


def test_canaries_take_places_by_coins(streams: list[list[Dialogue]]) -> None:
    planted, canaries = plant(streams, 40, seed=1)
    assert [len(p) for p in planted] == [24] * 4 and len(canaries) == 40
    assert 10 < sum(c.member for c in canaries) < 30
    for c in canaries:
        assert (c.dialogue in planted[c.device]) == c.member
    with pytest.raises(ConfigError, match=r"96 dialogues have no place for 97 canaries.*more devices"):
        plant(streams, 97, seed=1)


def test_devices_of_an_audit_train_on_canaries_as_their_coins_say(
    lm: LanguageModel, streams: list[list[Dialogue]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On those that were met, on no other one, and not on the dialogues in whose places they stand."""
    trained: list[Example] = []
    gradients = Engine.dp_gradients

    def training(self: Engine, adapters: object, frozen: object, batches: list[list[Example]]) -> object:
        trained.extend(e for batch in batches for e in batch)
        return gradients(self, adapters, frozen, batches)  # type: ignore[arg-type]

    coins = DialogueCoins(lm, CONFIG, streams[:1], 8, seed=0)
    monkeypatch.setattr(Engine, "dp_gradients", training)
    one_run_audit._played(lm, without_noise(worst_case(CONFIG, 8.0)), coins.planted, one_run_audit.NONE, 0)
    assert {c.member for c in coins.known} == {True, False}
    for c in coins.known:
        (place,) = [d for d in coins.streams[c.device] if d.id == c.dialogue.id]
        canary, real = lm.format.dialogues([c.dialogue, place])
        assert (canary in trained, real in trained) == (c.member, not c.member)


class SameInSteps(Recorded):
    """Coins of a round's first step in all of its steps."""

    def sample(self, state: DeviceState, count: int, plan: RoundPlan, step: int, context: CohortContext) -> list[int]:
        first = super().sample(state, count, plan, 0, context)
        self.samples[state.id, plan.round, step] = count, first
        return first


class SameInRounds(Recorded):
    def sample(self, state: DeviceState, count: int, plan: RoundPlan, step: int, context: CohortContext) -> list[int]:
        first = super().sample(state, count, RoundPlan(1, 0), step, context)
        self.samples[state.id, plan.round, step] = count, first
        return first


class SameInDevices(Recorded):
    def sample(self, state: DeviceState, count: int, plan: RoundPlan, step: int, context: CohortContext) -> list[int]:
        first = super().sample(replace(state, id="device-0"), count, plan, step, context)
        self.samples[state.id, plan.round, step] = count, first
        return first


class OneSize(Recorded):
    def sample(self, state: DeviceState, count: int, plan: RoundPlan, step: int, context: CohortContext) -> list[int]:
        chosen = np.random.default_rng(len(self.samples)).choice(count, size=count // 2, replace=False).tolist()
        self.samples[state.id, plan.round, step] = count, chosen
        return chosen


@pytest.mark.parametrize("secret", ["seed", "os"])
@pytest.mark.parametrize(
    ("kind", "caught"),
    [
        (Recorded, ""),
        (SameInSteps, "coins that fell alike in two steps"),
        (SameInRounds, "coins that fell alike in two rounds"),
        (SameInDevices, "coins that fell alike in two devices"),
        (OneSize, "samples' sizes"),
    ],
)
def test_coins_are_audited_as_they_fell(lm: LanguageModel, kind: type[Recorded], caught: str, secret: str) -> None:
    """Eight devices with 64 slots, two rounds of two steps: each mistake is seen by the check that is for it."""
    config = CONFIG.model_copy(update={"privacy": CONFIG.privacy.model_copy(update={"secret": secret})})
    coins = kind()
    context = replace(CohortContext.of(lm, config, 0, lambda device, dialogue: ""), coins=coins)
    states = [context.new_state(f"device-{k}") for k in range(8)]
    for number in (1, 2):
        for step in (0, 1):
            for state in states:
                first = coins.sample(state, 64, RoundPlan(number, 0), step, context)
                if kind is Recorded:
                    assert coins.sample(state, 64, RoundPlan(number, 0), step, context) is first  # in another world
    found = checks.sampling(coins, config.shared.sampling_rate)
    assert len(found) == 5 and all(c.control_caught for c in found)
    failed = [c.name for c in found if not c.passed]
    assert any(caught in name for name in failed) if caught else not failed, failed


def test_noise_that_two_releases_share_is_seen_by_hand() -> None:
    """Of 40 releases, among them one that repeats another, or its negative; of independent ones nothing is said."""
    rows = list(np.random.default_rng(0).normal(size=(40, 1000)))
    [honest] = checks._alike(rows, 0.0)
    assert honest.passed and honest.control_caught and honest.figure < 0.2
    for repeated in (rows[3], -rows[3], rows[3] + rows[4]):
        [found] = checks._alike([*rows, repeated], 0.0)
        assert not found.passed and found.figure > 0.6


@pytest.mark.parametrize("at_once", [1, 3, 40])
def test_what_is_compared_block_by_block_is_compared_with_all(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The greatest of the matrix of all; and the one pair that is alike, wherever it is."""
    rows = list(np.random.default_rng(0).normal(3, 1, size=(11, 50)))
    monkeypatch.setattr(checks, "NUMBERS", 50 * at_once)
    assert checks._greatest_correlation(rows) == pytest.approx(np.abs(np.triu(np.corrcoef(rows), 1)).max())
    for place in (0, 4, 10):
        twin = [*rows[:place], 2 - 5 * rows[6], *rows[place:]]
        assert checks._greatest_correlation(twin) == pytest.approx(1)
    [unvaried] = checks._alike([*rows, np.full(50, 0.0)], 0.0)  # a release without noise
    assert not unvaried.passed


def test_sizes_spread_the_same_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, sizes, found = [60] * 7, [30, 28, 35, 31, 26, 30, 33], []
    for numbers in (7 * 10_000, 7 * 999, 1):
        monkeypatch.setattr(checks, "NUMBERS", numbers)
        found += checks._sizes(counts, sizes, 0.5)
    assert len(found) == 3 and found[0] == found[1] == found[2]


# -- hostile adapters ---------------------------------------------------------------------------------------------


def test_no_crafted_adapter_lets_a_dialogue_reach_others_but_in_uneven_passes(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostile_adapters, "INSTEAD", {k: hostile_adapters.INSTEAD[k] for k in ("longer", "empty")})
    reached, moved = hostile_adapters.reach(lm, CONFIG, seed=0)
    assert reached.passed and reached.control_caught, reached
    assert moved.passed and moved.control_caught and moved.figure > 0.1, moved


@pytest.mark.parametrize(
    ("kind", "head_size"), [("Gemma3TextConfig", 8), ("Qwen3Config", 16), ("LlamaConfig", 10)]
)  # of 40 numbers in four heads: of a size of their own, below or above 40 / 4, or without one
def test_a_trap_drowns_one_head_of_any_model(lm: LanguageModel, kind: str, head_size: int) -> None:
    sizes = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1}
    own = {"head_dim": head_size} if head_size != 10 else {}
    config = getattr(transformers, kind)(**sizes, **own, intermediate_size=48, vocab_size=len(lm.tokenizer))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    other = LanguageModel(model, lm.tokenizer, lm.config)
    layout = other.lora_layout(CONFIG.shared.adapter, public_seed=1)
    row = hostile_adapters.crafted(other, layout, [hostile_adapters.SAID] * 4, 0)["trap"]
    drowned = next(b[0] for name, _, b in layout.split(row[None]) if name.endswith("v_proj"))
    assert int((drowned != 0).any(1).sum()) == head_size <= len(drowned)


def test_a_trap_makes_of_rounding_what_no_other_adapter_does(lm: LanguageModel) -> None:
    """Embeddings that differ by 1e-6 of themselves: ten thousand times as much, and more, in a gradient of norm 1."""
    layout = lm.lora_layout(CONFIG.shared.adapter, public_seed=1)
    pool, moved = [hostile_adapters.SAID] * 4, {}
    for name, row in {**hostile_adapters.crafted(lm, layout, pool, 0), "honest": layout.start(0) + 0.05}.items():
        found = [hostile_adapters.even(lm, layout, row, pool)]
        hook = lm.engine.embedding.register_forward_hook(
            lambda _, given, out: out * (1 + 1e-6 * torch.cos(torch.arange(out.shape[-1])))
        )
        found.append(hostile_adapters.even(lm, layout, row, pool))
        hook.remove()
        one, other = (torch.nn.functional.normalize(g, dim=1) for g in found)
        moved[name] = float((one - other).norm(dim=1).max())
    assert moved["honest"] < 1e-4 and moved["large"] < 1e-2 < moved["trap"], moved  # how much, processors differ in


# -- attacks and checks on real federations -----------------------------------------------------------------------


@pytest.mark.slow
def test_attacks_work_where_nothing_protects_and_stay_below_the_ceiling(
    lm: LanguageModel, streams: list[list[Dialogue]]
) -> None:
    met, canaries = hide(streams, 1.0, seed=0)
    member = np.array([c.member for c in canaries])
    private = CONFIG.model_copy(update={"privacy": CONFIG.privacy.model_copy(update={"epsilon": 1.0})})
    found = {}
    for name, config in (("plain", without_noise(CONFIG)), ("private", private)):
        seen = federate_in_memory(lm, config, config.server, named(met), 0, at_once=True)
        scores = membership(seen, canaries)
        assert set(map(len, scores.values())) == {len(canaries)}
        found[name] = judge("", scores["gradient, releases"], member, Ceiling.of(config))
    assert found["plain"].ci95[0] > 0.7
    assert found["private"].within and found["private"].auc < 0.7
    assert found["private"].auc_ceiling < 0.6 < found["plain"].auc_ceiling


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["example-local", "user-local", "user-central"])
def test_an_attacker_of_one_run_finds_every_coin_without_noise_and_few_with_it(
    lm: LanguageModel, streams: list[list[Dialogue]], mode: str
) -> None:
    privacy = CONFIG.privacy.model_copy(update={"mode": mode, "clip_norm_l2": 0.05 if "user" in mode else 1.0})
    config = worst_case(CONFIG.model_copy(update={"privacy": privacy}), 1.0)
    coins = DialogueCoins if mode == "example-local" else DeviceCoins
    one_run = coins(lm, config, streams, 16, seed=0)
    plain = one_run.guessed(without_noise(config))
    assert len(plain.scores) == 16 and ((plain.scores > 0) == plain.members).all()
    private = one_run.guessed(config)
    assert ((private.scores > 0) == private.members).mean() < 0.95
    noise = planned_event(config).noise_multiplier * privacy.clip_norm_l2
    loose = one_run.guessed(without_noise(config), Mistake(unclipped=True, added_noise=noise))
    assert len(loose.scores) == 16


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "mode", ["example-local", *(pytest.param(m, marks=SLOW) for m in ("user-local", "user-central"))]
)
def test_checks_pass_and_their_controls_are_caught(lm: LanguageModel, streams: list[list[Dialogue]], mode: str) -> None:
    """With secrets from the operating system, and so little noise that coins tossed anew would show beside it."""
    changes = {"mode": mode, "secret": "os", "epsilon": 50.0, "clip_norm_l2": 0.05 if "user" in mode else 1.0}
    config = CONFIG.model_copy(update={"privacy": CONFIG.privacy.model_copy(update=changes)})
    coins = Recorded()
    seen = federate_in_memory(lm, config, config.server, named(streams), 0, at_once=True, coins=coins)
    proofs = [*checks.noise(config, seen), *checks.sampling(coins, config.shared.sampling_rate)]
    proofs.append(checks.coupling(lm, config, streams[0][:5], streams[1], 0))
    assert len(proofs) == (9 if mode == "example-local" else 5)
    for check in proofs:
        assert check.passed and check.control_caught, check


@pytest.mark.slow
def test_a_reply_can_be_read_out_of_a_release_without_noise_alone(
    lm: LanguageModel, streams: list[list[Dialogue]]
) -> None:
    (private, chance), (plain, _) = (
        reconstructed(lm, config, streams, targets=2, seed=0) for config in (CONFIG, without_noise(CONFIG))
    )
    assert chance == 1 / LISTED and private <= 0.2 and plain >= 0.3


def test_every_byte_that_devices_send_is_accounted_for(lm: LanguageModel, streams: list[list[Dialogue]]) -> None:
    """The messages' kinds, their sizes, and none of what people said in them, as it is, in base64 or as token ids."""
    seen = federate_in_memory(lm, CONFIG, CONFIG.server, named(streams), 0)
    sent = inventory(seen)
    assert [(s.answers, s.messages) for s in sent] == [("query", 4), ("train", 8), ("evaluate", 8)]
    width = seen.context.shared_layout.width
    assert [s.array_bytes for s in sent] == [0, 4 * width, 0]
    assert all(s.wire_bytes - s.array_bytes < 1500 for s in sent)
    everything = b"".join(wire(m) for m in seen.sent)
    for dialogue in (d for stream in streams for d in stream):
        for text in (t for t in (dialogue.prompt, dialogue.response) if len(t) > 12):
            ids = np.array(lm.tokenizer(text)["input_ids"][:4])
            for form in (
                text.encode(),
                base64.b64encode(text.encode())[:-4],
                zlib.compress(text.encode()),
                ids.astype("<i4").tobytes(),
                ids.astype("<i8").tobytes(),
                ids.astype("<f2").tobytes(),
            ):
                assert form not in everything


def test_the_parts_of_an_audit_are_the_same_by_one_process_and_by_two(
    lm: LanguageModel, streams: list[list[Dialogue]]
) -> None:
    """Some of them, to the bit; with two, whoever listens is told how far it is."""
    few, found = [stream[:8] for stream in streams[:2]], list[dict[str, Any]]()
    for workers in (1, 2):
        told: list[str] = []
        auditor, coins = Auditor(lm, CONFIG, few, told.append, workers), DialogueCoins(lm, CONFIG, few, 4, CONFIG.seed)
        parts = auditor._parts(coins)
        some = {name: parts[name] for name in (HONEST, NO_NOISE)}
        found.append(auditor._computed(AuditWork(some, told.append), coins.held_bytes))
        assert all(" of 2 parts done, " in phase for phase in told) == (workers == 2) and told
    one, two = found
    for name in (HONEST, NO_NOISE):
        assert one[name].members.tolist() == two[name].members.tolist()
        assert one[name].scores.tolist() == two[name].scores.tolist()


def test_a_run_without_a_claim_is_not_audited(tmp_path: Path) -> None:
    run = create(
        tmp_path / "run", CONFIG.model_copy(update={"privacy": CONFIG.privacy.model_copy(update={"mode": "none"})})
    )
    with pytest.raises(RunError, match="claims nothing"):
        audit_run(run, 4, 100, lambda phase: None)
    with pytest.raises(RunError, match="no run to audit"):
        audit_run(RunFolder(tmp_path / "nowhere"), 4, 100, lambda phase: None)


@pytest.mark.slow
def test_the_command_audits_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen devices, 160 canaries, by the command line: the object that programs read, and the page."""
    data = DataConfig.model_validate({**CONFIG.data.model_dump(), "users": 16})
    run = create(tmp_path / "run", CONFIG.model_copy(update={"data": data, "workers": 2}))
    monkeypatch.setattr("sys.argv", ["florilegium", "audit", str(run.path), "--canaries", "160", "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((run.path / "audit.json").read_text())
    assert left.value.code == (0 if found["passed"] else 1)
    assert 7.9 < found["epsilon_claimed"] <= 8 and 0 <= found["epsilon_lower"] < 8
    assert {c["name"] for c in found["controls"]} == {"noise / 3.3", "no noise", "no clipping"}
    assert next(c for c in found["controls"] if c["name"] == "no noise")["caught"]
    for a in found["attacks"]:
        assert 0 <= a["auc"] <= 1 and a["ci95"][0] <= a["auc_ceiling"] <= 1
        assert set(a["tpr_at_fpr"]) == {"0.01", "0.001"}
    assert all(c["passed"] and c["control_caught"] for c in found["checks"]), found["checks"]
    page = (run.path / "audit.html").read_text()
    assert "Would a mistake be found?" in page and "replace-one" in page
