"""Many devices in one pass get what each would have got alone, whatever its company is or goes through."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from florilegium.client.lm import layers
from florilegium.client.lm.adapter import AdapterLayout, Adapters, layout
from florilegium.client.lm.attention import _Attention, _by_sdpa
from florilegium.client.lm.batching import schedule, schedule_steps
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.decode import Decoding, _choose
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.loss import token_losses
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.packing import Example, Texts, rounded
from florilegium.client.lm.places import nano_folder
from florilegium.client.lm.processor import multiplies_bfloat16
from florilegium.client.lm.training_data import TrainingSet
from florilegium.privacy.dpsgd import PrivateRow, clipped_sum
from florilegium.simulation.benchmarks.engine import Estimate, plan
from florilegium.simulation.benchmarks.engine_workload import Workload

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@lru_cache(maxsize=2)
def engine_of(dtype: torch.dtype) -> Engine:
    return Engine(AutoModelForCausalLM.from_pretrained(str(nano_folder()), dtype=dtype), max_batch_tokens=256)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of(torch.float32)


def layout_of(engine: Engine, rank: int = 4, targets: Sequence[str] = (), factors: str = "both") -> AdapterLayout:
    return layout(layers.adapted_layers(engine.modules, targets), rank, 2.0 * rank, factors, public_seed=1)  # type: ignore[arg-type]


def example(length: int, reply: int, seed: int) -> Example:
    ids = torch.randint(8, 4000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(tuple(ids[: length - reply]), tuple(ids[length - reply :]), (0, 1), False)


def rows_of(adapters: AdapterLayout, devices: int) -> torch.Tensor:
    return torch.stack([adapters.start(k) for k in range(devices)])


def training_set(device: int, examples: int, batch: int, longest: int = 24) -> TrainingSet:
    """Texts of different lengths; the last batch may be smaller."""
    lengths = [2 + (7 * device + 5 * i) % (longest - 1) for i in range(examples)]
    made = [example(n, max(1, n // 2), 100 * device + i) for i, n in enumerate(lengths)]
    return TrainingSet(made, [list(range(i, min(i + batch, examples))) for i in range(0, examples, batch)])


def rates_of(sets: Sequence[TrainingSet]) -> list[list[float]]:
    """Every device and step has its own; small, since AdamW makes of a gradient near its ε a part of the rate."""
    return [[5e-5 / (1 + k + s) for s in range(len(x.batches))] for k, x in enumerate(sets)]


def test_the_type_is_the_one_that_the_processor_multiplies_fast() -> None:
    expected = torch.bfloat16 if multiplies_bfloat16("cpu") else torch.float32
    assert LanguageModel.load(ModelConfig(device="cpu")).engine.dtype == expected


# -- alone and together ---------------------------------------------------------------------------------------------

DEVICES = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=2, max_size=6)


@settings(max_examples=10, deadline=None)
@given(
    devices=DEVICES, rank=st.integers(1, 9), factors=st.sampled_from(["both", "b", "a"]), tokens=st.integers(16, 400)
)
def test_a_device_is_trained_as_if_it_were_alone(
    devices: list[tuple[int, int]], rank: int, factors: str, tokens: int
) -> None:
    """Random ranks, lengths, numbers of examples, batch sizes, steps and room for tokens; some have nothing to do."""
    engine = engine_of(torch.float32)
    adapters = layout_of(engine, rank, factors=factors)
    work = [training_set(k, examples, batch) for k, (examples, batch) in enumerate(devices)]
    rates, rows = rates_of(work), rows_of(adapters, len(devices))
    before = engine.token_budget.tokens
    engine.token_budget.tokens = tokens
    together = engine.finetune(Adapters(adapters, rows), [], work, rates)
    engine.token_budget.tokens = before
    for k, own in enumerate(work):
        alone = engine.finetune(Adapters(adapters, rows[k : k + 1]), [], [own], [rates[k]])
        torch.testing.assert_close(together.adapters.rows[k], alone.adapters.rows[0], atol=1e-5, rtol=0)
        assert together.losses[k] == pytest.approx(alone.losses[0], abs=1e-4)
        assert len(together.losses[k]) == len(own.batches)
        if own.batches:
            assert (together.adapters.rows[k] - rows[k]).abs().max() > 0.9 * rates[k][0]  # it did move
        else:
            assert torch.equal(together.adapters.rows[k], rows[k])


def test_company_costs_bfloat16_less_than_its_own_rounding() -> None:
    """The distance between alone and together stays below that between bfloat16 and float32."""
    trained = {}
    for dtype in (torch.float32, torch.bfloat16):
        engine = engine_of(dtype)
        adapters = layout_of(engine)
        work = [training_set(k, 4 + k % 3, 2) for k in range(5)]
        rows, rates = rows_of(adapters, 5), rates_of(work)
        trained[dtype, "together"] = engine.finetune(Adapters(adapters, rows), [], work, rates).adapters.rows
        alone = [engine.finetune(Adapters(adapters, rows[k : k + 1]), [], [work[k]], [rates[k]]) for k in range(5)]
        trained[dtype, "alone"] = torch.cat([x.adapters.rows for x in alone])
    company = (trained[torch.bfloat16, "together"] - trained[torch.bfloat16, "alone"]).norm(dim=1)
    rounding = (trained[torch.bfloat16, "alone"] - trained[torch.float32, "alone"]).norm(dim=1)
    assert (company <= rounding).all(), (company, rounding)


def test_what_another_device_learns_changes_not_one_bit(engine: Engine) -> None:
    adapters = layout_of(engine)
    rows = rows_of(adapters, 3)
    work = [training_set(k, 4, 2) for k in range(3)]
    other = TrainingSet(
        [example(e.length, len(e.reply), 999 + i) for i, e in enumerate(work[1].examples)], work[1].batches
    )
    first = engine.finetune(Adapters(adapters, rows), [], work, rates_of(work)).adapters.rows
    second = engine.finetune(Adapters(adapters, rows), [], [work[0], other, work[2]], rates_of(work)).adapters.rows
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert (first[1] - second[1]).abs().max() > 1e-5


def test_gradients_of_other_devices_are_exactly_zero(engine: Engine) -> None:
    adapters = layout_of(engine)
    rows = (rows_of(adapters, 3) + 0.01).requires_grad_(True)
    texts = [example(5 + 4 * k, 3, k) for k in range(3)]
    pack = engine.pack(texts, [0, 1, 2])
    with engine.active([Adapters(adapters, rows)], pack.owned, pack.texts):
        losses = engine.losses(pack)
    (gradient,) = torch.autograd.grad(losses[1], rows)
    assert gradient[1].abs().max() > 1e-3
    assert not gradient[0].any() and not gradient[2].any()


def test_a_shared_adapter_beneath_is_the_same_for_all_and_stays(engine: Engine) -> None:
    shared, personal = layout_of(engine, 2, ["v_proj"], "b"), layout_of(engine, 3)
    beneath = Adapters(shared, torch.randn(1, shared.width, generator=torch.Generator().manual_seed(0)) * 0.1)
    work = [training_set(k, 3, 2) for k in range(3)]
    rows, rates = rows_of(personal, 3), rates_of(work)
    together = engine.finetune(Adapters(personal, rows), [beneath], work, rates).adapters.rows
    bare = engine.finetune(Adapters(personal, rows), [], work, rates).adapters.rows
    for k in range(3):
        alone = engine.finetune(Adapters(personal, rows[k : k + 1]), [beneath], [work[k]], [rates[k]]).adapters.rows
        torch.testing.assert_close(together[k], alone[0], atol=1e-5, rtol=0)
        assert (together[k] - bare[k]).abs().max() > 1e-5


def test_the_loss_of_a_batch_is_the_mean_over_its_tokens_and_batches_come_in_order(engine: Engine) -> None:
    """Replies of 2 and of 8 tokens, then one of 3: (nll₁ + nll₂) / 10, then, after that step, nll₃ / 3."""
    adapters = layout_of(engine)
    start = Adapters(adapters, rows_of(adapters, 1) + 0.01)
    work = TrainingSet([example(9, 2, 0), example(12, 8, 1), example(7, 3, 2)], [[0, 1], [2]])
    both = engine.finetune(start, [], [work], [[1e-2, 1e-2]])
    once = engine.finetune(start, [], [TrainingSet(work.examples, [[0, 1]])], [[1e-2]]).adapters
    first, second = engine.score(work.examples[:2], [0, 0], [start])
    assert both.losses[0][0] == pytest.approx((first + second) / 10, rel=1e-5)
    (third,) = engine.score(work.examples[2:], [0], [once])
    assert both.losses[0][1] == pytest.approx(third / 3, rel=1e-5)
    assert first / 2 != pytest.approx(second / 8, rel=0.01)  # so that a mean over examples is another
    step = once.rows - start.rows
    expected, _ = engine.gradient(start, [], [work.examples[:2]], [[0.1, 0.1]])
    large = expected.abs() > 1e-3
    torch.testing.assert_close(step[large], -1e-2 * expected[large].sign(), atol=1e-5, rtol=0)  # Adam's first step


def test_each_epoch_has_every_example_once_and_the_last_batch_may_be_smaller() -> None:
    batches = schedule(5, 2, 2, seed=0)
    assert [len(batch) for batch in batches] == [2, 2, 1, 2, 2, 1]
    first, second = ([i for batch in batches[at : at + 3] for i in batch] for at in (0, 3))
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4] and first != second
    assert schedule(5, 2, 2, seed=0) == batches != schedule(5, 2, 2, seed=1)
    steps = schedule_steps(3, 2, 3, seed=0)
    order = [i for batch in steps for i in batch]
    assert [len(batch) for batch in steps] == [2, 2, 2]
    assert sorted(order[:3]) == sorted(order[3:]) == [0, 1, 2]  # one order of all after the other
    assert schedule(0, 2, 2, seed=0) == schedule_steps(0, 2, 3, seed=0) == []


@pytest.mark.parametrize(("width", "bound"), [(48, 0.1443), (192, 0.0722)])
def test_an_adapter_begins_uniform_in_one_by_the_root_of_its_inputs(width: int, bound: float) -> None:
    """1/√48 = 0.1443 and 1/√192 = 0.0722; B begins at zero, so that nothing changes yet."""
    adapters = layout((layers.AdaptedLayer("l", width, 30),), 8, 16.0)
    ((_, a, b),) = adapters.split(adapters.start(0)[None])
    assert 0.9 * bound < float(a.abs().max()) <= 1.001 * bound and not b.any()
    assert float(a.mean()) == pytest.approx(0, abs=0.15 * bound)  # σ: 0.03 and 0.015 of it
    assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_hidden_states_are_those_of_each_devices_own_adapter(engine: Engine) -> None:
    adapters = layout_of(engine)
    rows = rows_of(adapters, 3) + 0.05 * torch.randn(3, adapters.width, generator=torch.Generator().manual_seed(0))
    examples, slots = [example(5 + n, 2, n) for n in range(7)], [2, 0, 1, 1, 2, 0, 2]
    together = dict(engine.hidden(examples, [Adapters(adapters, rows)], slots))
    for i, slot in enumerate(slots):
        [(_, alone)] = engine.hidden([examples[i]], [Adapters(adapters, rows[slot : slot + 1])])
        torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=1e-4)


def test_adapters_on_different_layers_of_the_same_input_do_not_mix(engine: Engine) -> None:
    """q and v read the same hidden states; one adapter is on q, the other, with another scale and rank, on v."""
    on_q, on_v = layout_of(engine, 2, ["q_proj"]), layout(layers.adapted_layers(engine.modules, ["v_proj"]), 3, 30.0)
    on_both = layout(layers.adapted_layers(engine.modules, ["q_proj", "v_proj"]), 3, 30.0)
    q, v = rows_of(on_q, 2) + 0.05, rows_of(on_v, 1) + 0.02
    both = torch.zeros(2, on_both.width)
    for k in range(2):
        separate = {name: (a, b * 0.2) for name, a, b in on_q.split(q[k : k + 1])}  # 2 / 10, their scales
        separate |= {name: (a, b) for name, a, b in on_v.split(v)}
        for name, a, b in on_both.split(both[k : k + 1]):
            own_a, own_b = separate[name]
            a[:, : own_a.shape[1]], b[:, :, : own_b.shape[2]] = own_a, own_b
    texts = [example(9, 4, 1), example(12, 5, 2)]
    apart = engine.score(texts, [0, 1], [Adapters(on_q, q), Adapters(on_v, v)])
    assert apart == pytest.approx(engine.score(texts, [0, 1], [Adapters(on_both, both)]), abs=1e-4)
    assert apart != pytest.approx(engine.score(texts, [0, 1], []), abs=1e-2)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_continue_the_same_whoever_stops_before(engine: Engine, temperature: float) -> None:
    """Finished rows leave the batch; the others, of different lengths and devices, do not notice."""
    adapters = layout_of(engine)
    stack = Adapters(adapters, rows_of(adapters, 3) + 0.02)
    prompts = [example(3 + 5 * i, 1, i).prompt for i in range(9)]
    slots = [0, 1, 2] * 3
    longest = engine.generate(
        prompts, slots, [stack], seeds=range(9), max_new_tokens=24, temperature=temperature, stop=()
    )
    assert all(len(ids) == 24 for ids in longest)
    stop = longest[0][5]
    stopped = engine.generate(
        prompts, slots, [stack], seeds=range(9), max_new_tokens=24, temperature=temperature, stop=[stop]
    )
    assert stopped == [ids[: ids.index(stop)] if stop in ids else ids for ids in longest]
    assert len(stopped[0]) <= 5


def test_temperature_divides_and_a_token_is_the_inverse_of_the_cumulative_chances() -> None:
    """Logits (0, log 3): chances (¼, ¾); at temperature ½ (0.1, 0.9), at 2 (0.366, 0.634)."""
    logits = torch.tensor([[0.0, math.log(3)]])
    for temperature, border in ((1.0, 0.25), (0.5, 0.1), (2.0, 1 / (1 + math.sqrt(3)))):
        below, above = (_choose(logits, torch.tensor([border + d]), temperature).item() for d in (-0.01, 0.01))
        assert (below, above) == (0, 1)
    assert _choose(logits, torch.tensor([0.0]), 0).item() == 1  # greedy, whatever was drawn
    assert _choose(logits, torch.tensor([1.0]), 1.0).item() == 1


def test_a_reply_ends_before_the_whole_sequence_that_ends_it_and_never_shows_a_part_of_it() -> None:
    wanted = [[5, 7, 8, 7, 8, 9, 1], [7, 8, 9, 7, 8, 9, 3], [1, 2, 3, 4, 5, 6, 7]]  # 7 8 9 ends one
    decoding = Decoding([0, 0, 0], 7, 0.0, [7, 8, 9], torch.device("cpu"))
    told = []
    while decoding.running:
        step = len(told)
        chosen = torch.tensor([wanted[row][step] for row in decoding.rows.tolist()])
        decoding.take(torch.nn.functional.one_hot(chosen, 10))
        told.append(decoding.replies)
        if step == 3:
            assert decoding.drop_finished().tolist() == [0, 2]
    assert decoding.replies == [[5, 7, 8], [], [1, 2, 3, 4, 5, 6, 7]]
    assert [now[0] for now in told] == [[5], [5], [5], [5, 7, 8], [5, 7, 8], [5, 7, 8], [5, 7, 8]]
    assert all(now[1] == [] for now in told)


# -- private gradients ----------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any), factors=st.sampled_from(["both", "b", "a"])
)
def test_private_gradients_are_those_of_single_backward_passes(counts: list[int], factors: str) -> None:
    engine = engine_of(torch.float32)
    adapters = layout_of(engine, factors=factors)
    stack = Adapters(adapters, torch.stack([adapters.start(k) + 0.01 for k in range(len(counts))]))
    batches = [[example(3 + 4 * i + k, 2 + i, 10 * k + i) for i in range(n)] for k, n in enumerate(counts)]
    found, means = engine.dp_gradients(stack, [], batches)
    for k, batch in enumerate(batches):
        assert found[k].shape == (len(batch), adapters.width)
        singles = []
        for i, e in enumerate(batch):
            rows = stack.rows[k : k + 1].clone().requires_grad_(True)
            pack = engine.pack([e], [0])
            with engine.active([Adapters(adapters, rows)], pack.owned, pack.texts):
                loss = engine.losses(pack)[0] / e.targets
            singles.append(loss.item())
            torch.testing.assert_close(found[k][i], torch.autograd.grad(loss, rows)[0][0], atol=1e-5, rtol=0)
        assert means[k] == pytest.approx(sum(singles) / max(1, len(singles)), abs=1e-5)


def test_forgotten_activations_come_again_bit_by_bit(engine: Engine) -> None:
    """And are indeed not kept: what the pass holds for its derivative is a fraction."""
    model = AutoModelForCausalLM.from_pretrained(str(nano_folder()), dtype=torch.float32)
    forgetful, held = Engine(model, max_batch_tokens=256, checkpointing=True), []
    adapters = layout_of(engine)
    stack = Adapters(adapters, rows_of(adapters, 3) + 0.01)
    batches = [[example(20 + i, 6, 10 * k + i) for i in range(3)] for k in range(3)]
    found = []
    for one in (engine, forgetful):
        kept = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: _counted(t, kept), lambda t: t):
            private, _ = one.dp_gradients(stack, [], batches)
            together, _ = one.gradient(stack, [], batches, [[0.1] * 3] * 3)
        held.append(kept[0])
        found.append(torch.cat([*private, together]))
    assert torch.equal(*found)
    assert held[1] < held[0] / 4


def _counted(tensor: torch.Tensor, kept: list[int]) -> torch.Tensor:
    kept[0] += tensor.nbytes
    return tensor


def test_each_device_has_its_own_clipping_norm(engine: Engine) -> None:
    adapters = layout_of(engine)
    stack = Adapters(adapters, rows_of(adapters, 2) + 0.02)
    batches = [[example(9 + i, 4, i) for i in range(3)], [example(12, 5, 7)]]
    found, _ = engine.dp_gradients(stack, [], batches)
    for k, norm in enumerate((0.5, 0.01)):
        row = PrivateRow(
            stack.rows[k], learning_rate=1.0, clip_norm_l2=norm, noise_multiplier=0.0, expected_batch=1, key=k
        )
        row.step(found[k])
        moved = stack.rows[k] - row.row
        torch.testing.assert_close(moved, clipped_sum(found[k], norm).float(), atol=1e-5, rtol=0)
        assert 0 < moved.norm() <= norm * len(batches[k]) * 1.001


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_device_whose_loss_is_not_a_number_is_named_and_the_others_go_on(engine: Engine) -> None:
    adapters = layout_of(engine)
    rows = rows_of(adapters, 4)
    work = [training_set(k, 4, 2) for k in range(4)]
    sound = engine.finetune(Adapters(adapters, rows), [], work, rates_of(work))
    rows[2, 5] = math.nan
    broken = engine.finetune(Adapters(adapters, rows), [], work, rates_of(work))
    assert sound.failed == {}
    assert broken.failed == {2: "the loss of step 0 is nan"}
    assert torch.equal(broken.adapters.rows[2].nan_to_num(), rows[2].nan_to_num())  # as it came
    for k in (0, 1, 3):
        assert torch.equal(broken.adapters.rows[k], sound.adapters.rows[k])


def test_a_text_of_one_token_teaches_nothing_and_breaks_nothing(engine: Engine) -> None:
    adapters = layout_of(engine)
    one, two = Example((), (9,), (0, 0), False), Example((9,), (10,), (0, 1), False)
    assert (one.targets, two.targets) == (0, 1)
    work = [TrainingSet([one], [[0]]), TrainingSet([two, one], [[0, 1]])]
    rows = rows_of(adapters, 2)
    trained = engine.finetune(Adapters(adapters, rows), [], work, [[1e-2], [1e-2]])
    assert torch.equal(trained.adapters.rows[0], rows[0]) and trained.losses[0] == [0.0] and not trained.failed
    assert (trained.adapters.rows[1] - rows[1]).abs().max() > 1e-3
    assert engine.score([one], [0], []) == [0.0]
    assert engine.dp_gradients(Adapters(adapters, rows), [], [[one], []])[0][0].abs().max() == 0


def test_nothing_to_do_is_done(engine: Engine) -> None:
    adapters = layout_of(engine)
    rows = rows_of(adapters, 2)
    idle = engine.finetune(Adapters(adapters, rows), [], [TrainingSet([], []), TrainingSet([], [])], [[], []])
    assert torch.equal(idle.adapters.rows, rows) and idle.losses == [[], []]
    assert engine.score([], [], []) == [] and list(engine.hidden([])) == []


HUNGRY = """
import logging, resource, sys, torch
logging.basicConfig(format="%(message)s")
from transformers import AutoModelForCausalLM
from florilegium.client.lm import layers
from florilegium.client.lm.adapter import Adapters, layout
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.lm.processor import multiplies_bfloat16
from florilegium.client.lm.places import nano_folder
from florilegium.client.lm.packing import Example
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(str(nano_folder()), dtype=torch.float32)
engine = Engine(model, max_batch_tokens=int(sys.argv[1]))
adapters = layout(layers.adapted_layers(engine.modules), 2, 4.0)
rows = torch.stack([adapters.start(k) for k in range(24)])
texts = [Example(tuple(range(8 + k, 200 + k)), tuple(range(300, 500)), (0, 1), False) for k in range(24)]
work = [TrainingSet([text], [[0]]) for text in texts]
train = lambda: engine.finetune(Adapters(adapters, rows), [], work, [[1e-3]] * 24).adapters.rows
if sys.argv[2] != "0":
    engine.token_budget.tokens, most = 400, engine.token_budget.tokens
    train()  # what a small pass needs is loaded
    engine.token_budget.tokens = most
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[2]) * 2**20, resource.RLIM_INFINITY))
print(repr(float(train().double().sum())), engine.token_budget.tokens)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited by setrlimit")
@pytest.mark.slow
def test_out_of_memory_goes_on_with_smaller_passes_and_says_so_once() -> None:
    def run(tokens: int, mebibytes: int) -> tuple[float, int, str]:
        done = subprocess.run(
            [sys.executable, "-c", HUNGRY, str(tokens), str(mebibytes)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-2000:]
        total, left = done.stdout.split()
        return float(total), int(left), done.stderr

    free, _, silent = run(400, 0)
    tight, left, told = run(9600, 250)
    assert "out of memory" not in silent
    assert told.count("out of memory: going on with") == 1
    assert left < 9600
    assert tight == pytest.approx(free, abs=1e-2)


def test_what_does_not_fit_at_all_is_told_with_the_way_out(engine: Engine) -> None:
    def never(group: list[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    tokens = engine.token_budget.tokens
    with pytest.raises(MemoryError, match="smaller model or shorter texts"):
        list(engine.token_budget.each([1, 2, 3], lambda items, most: [list(items)], never))
    engine.token_budget.tokens = tokens


def test_another_error_is_not_taken_for_lack_of_memory(engine: Engine) -> None:
    def broken(group: list[int]) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(engine.token_budget.each([1], lambda items, most: [list(items)], broken))


# -- its parts ------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    heads=st.sampled_from([(3, 3), (6, 2)]),
    window=st.sampled_from([None, 5]),
)
def test_packed_attention_and_its_derivative_are_torchs(
    lengths: list[int], heads: tuple[int, int], window: int | None
) -> None:
    texts, generator = Texts(lengths, CPU), torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), h, 8) for h in (heads[0], heads[1], heads[1])]
    ours = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator)
    found = _Attention.apply(*ours, texts, 0.3, window, None)
    expected = _by_sdpa(*ours, texts, 0.3, window)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), ours),
        torch.autograd.grad((expected * weights).sum(), ours),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_losses_in_pieces_are_cross_entropy(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florilegium.client.lm.loss.PIECE", 50 * 7)  # seven tokens at a time
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 6, generator=generator, requires_grad=True)
    weight, targets = torch.randn(50, 6, generator=generator), torch.randint(0, 50, (23,), generator=generator)
    scale = torch.rand(23, generator=generator)
    logits = hidden @ weight.T
    capped = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    expected = torch.nn.functional.cross_entropy(capped, targets, reduction="none")
    found = token_losses(hidden, weight, None, targets, softcap)
    torch.testing.assert_close(found, expected)
    (mine,), (theirs,) = (torch.autograd.grad((x * scale).sum(), hidden) for x in (found, expected))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_there_are_few_rounded_sizes_and_little_is_filled_up() -> None:
    assert [rounded(n) for n in (1, 8, 9, 44, 64, 65, 1000, 2047)] == [8, 8, 16, 48, 64, 72, 1024, 2048]
    assert all(n <= rounded(n) <= max(n + 7, n * 1.125) for n in range(1, 5000))
    assert len({rounded(n) for n in range(1, 5000)}) < 80


class ReadBack(TorchDispatchMode):
    """Counts how often a number is read out of a tensor: on a GPU each of them waits for the device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_no_device_is_waited_for_by_itself(engine: Engine) -> None:
    """As many numbers are read back for sixteen devices as for four: one a pass."""
    shape, counted = layout_of(engine), []
    for count in (4, 16):
        sets = [TrainingSet([Example((k, 5, 6), (7, 8))], [[0]] * 3) for k in range(1, count + 1)]
        rows = torch.stack([shape.start(seed=k) for k in range(count)])
        with ReadBack() as reads:
            engine.finetune(Adapters(shape, rows), [], sets, [[1e-3] * 3] * count)
        counted.append(reads.count)
    assert counted == [3, 3]


# -- the benchmark --------------------------------------------------------------------------------------------------

BARE = """
import importlib.util, sys
ABSENT = {"peft", "opacus", "flwr", "ray", "pfl", "pydantic", "chitchat_dataset"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in ABSENT else find(name, package)
"""


def bench(folder: Path, *arguments: str, bare: bool = False) -> dict[str, object]:
    """Runs the command; `bare` leaves only torch and transformers, in every process of it."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(BARE if bare else "", encoding="utf-8")
    command = [sys.executable, "-m", "florilegium", "bench", "engine", "--json", *arguments]
    path = {"PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **path})
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_the_benchmark_of_our_arm_needs_torch_and_transformers_only(tmp_path: Path) -> None:
    asked = ("--devices", "2", "--examples", "1", "--steps", "1", "--repeats", "1", "--kinds", "training")
    found = bench(tmp_path, *asked, "--dtypes", "float32,bfloat16", bare=True)
    assert {row["arm"].partition("-")[0] for row in found["training"]} == {"florilegium"}  # type: ignore[attr-defined]
    assert set(found["absent"]) >= {"peft fp32", "pfl bf16", "flower fp32"}  # type: ignore[call-overload]
    assert "No module named 'peft'" in str(found["absent"])
    assert found["limit_gflops"]["fp32"] > 1  # type: ignore[index]


BOUNDS = {  # of the difference between arms: of losses, of embeddings' sums, of the share of other tokens
    "training": 1e-5,
    "embedding": 1e-4,
    "generation": 0.05,
    "dp_training": 1e-3,
}


@pytest.mark.slow
def test_the_benchmark_measures_every_arm_and_all_learn_the_same(tmp_path: Path) -> None:
    asked = ("--devices", "2", "--examples", "1", "--steps", "1", "--repeats", "1", "--dtypes", "float32")
    found = bench(tmp_path, *asked)
    for kind, bound in BOUNDS.items():
        rows: list[dict[str, Any]] = found[kind]  # type: ignore[assignment]
        assert {row["arm"] for row in rows} >= {"florilegium", "opacus" if kind == "dp_training" else "peft"}
        for row in rows:
            assert row["devices_per_s"]["min"] > 0 and row["tokens_per_s"] > 0 and 0 < row["limit_share"] < 1.5
            for ratio in row.get("ratios", []):
                assert ratio["result_difference"] <= bound, (kind, ratio)
    arms = {row["arm"] for row in found["training"]}  # type: ignore[attr-defined]
    assert arms >= {"flower", "peft-cores", "florilegium-cores", "florilegium-one-core"}


def test_what_the_benchmark_measures() -> None:
    """Every rival meets ours with as many texts a step; shares of processes are the same devices, each once."""
    rows = plan(["training", "generation"], [1, 64, 256], [1, 4, 16], 4, ["float32"])
    ours = [(r.work.kind, r.work.devices, r.work.examples_per_step) for r in rows if r.arm == "florilegium"]
    alone, several = [("training", k, 1) for k in (1, 64, 256)], [("training", 64, 4), ("training", 16, 16)]
    assert ours == [*alone, *several, ("generation", 64, 1), ("generation", 64, 4)]
    each_core = [(r.work.devices, r.work.examples_per_step) for r in rows if r.arm == "florilegium-cores"]
    assert sorted(each_core) == [(16, 16), (64, 1), (64, 4), (256, 1)]
    contrasting = [(r.work.kind, r.work.devices, r.work.examples_per_step) for r in rows if "contrast" in r.arm]
    assert contrasting == [("generation", 64, 1), ("generation", 64, 4)]
    work = Workload("training", 5, 2, 1)
    shares = work.shares(2)
    assert [(s.first, s.devices) for s in shares] == [(0, 2), (2, 3)] and len(work.shares(9)) == 5
    assert [s.batches(k) for s in shares for k in range(s.devices)] == [work.batches(k) for k in range(5)]


def test_how_long_a_benchmark_still_takes() -> None:
    estimate = Estimate(repeats=3)
    estimate.add(60.0, warming_up=True)
    assert str(estimate) == ""
    estimate.add(60.0, warming_up=False)
    assert str(estimate) == " (about 2 min left)"
