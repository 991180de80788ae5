"""A gradient follows, to the bit, from its own dialogue, the received adapter and public values: nothing else may reach
it, for a server that crafts the adapter can make rounding as large as it likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import AdapterLayout, Adapters
from florilegium.client.lm.config import AdapterConfig, ModelConfig, TextLimits
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.packing import LEAST_WIDTH, OwnPack, own_rows, own_width
from florilegium.privacy.dpsgd import clipped_sum

CLIP = 1.0
POOL = [Dialogue(str(k), "are you there?", "yes, i am") for k in range(12)]
REPLACED = 7
OTHERS = {
    "same length": ("are you home?", "no, i was"),
    "shorter": ("a", "b"),
    "longer": ("are you there, and how was the concert that you told me of last week?", "loud, but rather good"),
    "empty": ("", ""),
    "huge": ("word " * 4000, "no " * 4000),
    "control": ("<|im_end|><|im_start|>", "</s>"),
}
DEFAULT = AdapterConfig(rank=4, alpha=64, factors="b", targets=("v_proj",))
WIDE = AdapterConfig(rank=8, alpha=16)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8", "int4"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    limits = TextLimits(prompt_tokens=40, reply_tokens=24)
    kind = {"dtype": "float32", "weights": request.param} if "int" in request.param else {"dtype": request.param}
    return LanguageModel.load(ModelConfig.model_validate({**kind, "device": "cpu", "limits": limits}))


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def honest(lm: LanguageModel, layout: AdapterLayout) -> torch.Tensor:
    return layout.start(1) + 0.05 * torch.randn(layout.width, generator=torch.Generator().manual_seed(2))


def trap(lm: LanguageModel, layout: AdapterLayout) -> torch.Tensor:
    """What is of one direction in layer 0 drowns all else but rounding; layer 1 makes gradients of that rounding.

    Layer 0's value is M in a direction u whatever the text says: after the next norm there is u, and rounding. Layer 1
    looks at what is orthogonal to u, and multiplies it by M'.
    """
    rows = torch.zeros(1, layout.width)
    first, second = (next(p for p in layout.split(rows) if f".{n}.self_attn" in p[0]) for n in (0, 1))
    generator = torch.Generator().manual_seed(3)
    size = lm.engine.model.config.hidden_size // lm.engine.model.config.num_attention_heads
    direction = torch.zeros(first[2].shape[-2])  # of one head: others look elsewhere, and would turn it
    direction[:size] = torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=0)
    first[2].view(-1, layout.rank)[:, 0] = 1e9 * direction / layout.scale
    layers = lm.engine.model.model.layers  # type: ignore[union-attr]
    projection = getattr(layers[0].self_attn.o_proj, "base", layers[0].self_attn.o_proj)
    u = torch.nn.functional.normalize(projection.weight.double() @ direction.double(), dim=0)
    seen = second[1].reshape(layout.rank, -1).double() @ (layers[1].input_layernorm.weight.double() * u)  # A's of it
    basis, _ = torch.linalg.qr(torch.cat([seen[:, None], torch.eye(layout.rank).double()], 1))
    out = second[2].view(-1, layout.rank)
    into = torch.nn.functional.normalize(torch.randn(len(out), layout.rank - 1, generator=generator), dim=0)
    out.copy_((1e23 * into.double() @ basis[:, 1 : layout.rank].T / layout.scale).float())
    return rows[0]


def large(lm: LanguageModel, layout: AdapterLayout) -> torch.Tensor:
    return 30 * honest(lm, layout)


def gradients(lm: LanguageModel, layout: AdapterLayout, row: torch.Tensor, pool: list[Dialogue]) -> torch.Tensor:
    found, _ = lm.engine.dp_gradients(lm.adapters(layout, row), [], [lm.format.dialogues(pool)])
    return found[0]  # (b, P)


def finite(found: torch.Tensor) -> torch.Tensor:
    """As a noisy step takes it: what is not finite counts as zero."""
    return torch.where(torch.isfinite(found).all(1, keepdim=True), found, 0.0)


@pytest.mark.parametrize("crafted", [honest, large, trap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("config", [DEFAULT, WIDE], ids=["default", "all layers"])
def test_a_replaced_dialogue_changes_no_bit_of_the_others(
    model: LanguageModel,
    threads: None,
    config: AdapterConfig,
    crafted: Callable[[LanguageModel, AdapterLayout], torch.Tensor],
) -> None:
    if crafted is trap and config is WIDE:
        pytest.skip("the trap is for the default adapter's layers")
    if model.config.weights != "float" and (crafted is large or torch.get_num_threads() > 1):
        pytest.skip("coded weights are made numbers as in the other cases")
    layout = model.lora_layout(config)
    row = crafted(model, layout)
    before = gradients(model, layout, row, POOL)
    assert before.isfinite().all()
    assert before.any() or (crafted is trap and model.engine.dtype == torch.bfloat16)  # too coarse for it
    rest = [k for k in range(len(POOL)) if k != REPLACED]
    for what, (prompt, response) in OTHERS.items():
        pool = [Dialogue(d.id, prompt, response) if k == REPLACED else d for k, d in enumerate(POOL)]
        after = gradients(model, layout, row, pool)
        assert torch.equal(before[rest], after[rest]), what
        moved = clipped_sum(finite(before).double(), CLIP) - clipped_sum(finite(after).double(), CLIP)
        assert float(moved.norm()) <= 2 * CLIP * (1 + 1e-6), what


def test_control_in_a_pass_whose_shape_depends_on_the_texts_a_dialogue_reaches_the_others() -> None:
    """By rounding, of which the trap makes what the machine's kernels allow: up to a hundred times the bound."""
    lm = LanguageModel.load(ModelConfig(dtype="float32", device="cpu"))
    layout = lm.lora_layout(DEFAULT)
    row = trap(lm, layout)

    def together(pool: list[Dialogue]) -> torch.Tensor:
        examples = lm.format.dialogues(pool)
        rows = row.expand(len(pool), -1).clone().requires_grad_(True)
        pack = lm.engine.pack(examples, range(len(pool)))
        with lm.engine.active([Adapters(layout, rows)], pack.owned, pack.texts):
            losses = lm.engine.losses(pack) / torch.tensor([e.targets for e in examples])
            (found,) = torch.autograd.grad(losses.sum(), rows)
        return found

    pool = [Dialogue(str(k), "ok?", "yes") for k in range(64)]
    longer = [Dialogue(d.id, *OTHERS["longer"]) if k == REPLACED else d for k, d in enumerate(pool)]
    rest = [k for k in range(len(pool)) if k != REPLACED]
    assert not torch.equal(together(pool)[rest], together(longer)[rest])


@settings(max_examples=12, deadline=None)
@given(
    texts=st.lists(st.tuples(st.text(max_size=60), st.text(max_size=40)), min_size=2, max_size=6),
    devices=st.integers(1, 3),
)
def test_alone_is_as_in_the_company_of_other_dialogues(
    lm: LanguageModel, texts: list[tuple[str, str]], devices: int
) -> None:
    layout = lm.lora_layout(DEFAULT)
    rows = torch.stack([honest(lm, layout) * (k + 1) for k in range(devices)])
    dialogues = [Dialogue(str(k), *pair) for k, pair in enumerate(texts)]
    batches = [lm.format.dialogues(dialogues) for _ in range(devices)]
    together, _ = lm.engine.dp_gradients(lm.adapters(layout, rows), [], batches)
    few, _ = lm.engine.dp_gradients(lm.adapters(layout, rows), [], [batch[:1] for batch in batches])
    for of_all, of_one in zip(together, few, strict=True):
        assert torch.equal(of_all[0], of_one[0])


def test_less_memory_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of tokens that is a setting may: it is public. What a full memory does may not."""
    lm = LanguageModel.load(ModelConfig(dtype="float32", device="cpu"))
    layout = lm.lora_layout(DEFAULT)
    before = gradients(lm, layout, honest(lm, layout), POOL)
    monkeypatch.setattr(lm.engine.token_budget, "tokens", 16)  # as if it had been halved, again and again
    assert torch.equal(before, gradients(lm, layout, honest(lm, layout), POOL))


def test_where_kernels_do_not_keep_rows_apart_each_example_goes_alone(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, seen = lm.lora_layout(DEFAULT), []
    monkeypatch.setattr(lm.engine, "_apart", {})
    monkeypatch.setattr(lm.engine, "rows_apart", lambda *_: False)
    whole = lm.engine._own_gradients

    def noting(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(args[-1])
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(lm.engine, "_own_gradients", noting)
    gradients(lm, layout, honest(lm, layout), POOL)
    assert seen == [1] * len(POOL)


@given(length=st.integers(1, 5000))
def test_a_width_follows_from_a_length_and_there_are_few(length: int) -> None:
    width = own_width(length)
    assert max(length, LEAST_WIDTH) <= width <= max(LEAST_WIDTH, 1.5 * length)
    assert own_width(width) == width and width % 8 == 0
    assert len({own_width(n) for n in range(1, 1025)}) == 13


def test_a_private_pass_is_a_rectangle_whatever_stands_in_it(lm: LanguageModel) -> None:
    one, other = lm.format.dialogues([POOL[0], Dialogue("x", *OTHERS["same length"])])
    few, many = OwnPack([one], 4, lm.engine.device), OwnPack([other, one, other], 4, lm.engine.device)
    assert few.ids.shape == many.ids.shape == (1, 4 * own_width(one.length))
    assert len(few.places) == one.targets and len(many.places) == one.targets + 2 * other.targets
    losses = torch.arange(1.0, 1 + len(many.places))
    assert many.summed(losses).tolist() == [
        float(part.sum()) for part in losses.split([other.targets, one.targets, other.targets])
    ]


@pytest.mark.parametrize(
    ("examples", "most", "rows"),
    [(1, 0, 1), (1, 8, 1), (2, 8, 2), (3, 8, 4), (5, 8, 4), (6, 8, 8), (6, 7, 4), (99, 8, 8)],
)
def test_rows_are_a_power_of_two_and_few_are_fillers(examples: int, most: int, rows: int) -> None:
    assert own_rows(examples, most) == rows


def test_a_pass_that_changes_a_bit_of_what_an_example_has_alone_is_noticed(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, whole = lm.lora_layout(DEFAULT), lm.engine._own_gradients
    assert lm.engine.rows_apart(layout, 32, 2)

    def coarser(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found, losses = whole(*args)
        return (found.bfloat16().float() if args[-1] > 1 else found), losses

    monkeypatch.setattr(lm.engine, "_own_gradients", coarser)
    assert not lm.engine.rows_apart(layout, 32, 2)


def test_targets_that_change_with_their_place_go_through_the_head_alone(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen, layout = lm.engine._token_losses, set[int](), lm.lora_layout(DEFAULT)
    assert lm.engine.targets_apart()

    def by_place(hidden: torch.Tensor, targets: torch.Tensor, piece: int = 0) -> torch.Tensor:
        seen.add(piece)
        return whole(hidden, targets, piece) * (1 + 1e-6 * torch.arange(len(hidden)) * (piece > 1))

    monkeypatch.setattr(lm.engine, "_apart", {})
    monkeypatch.setattr(lm.engine, "_token_losses", by_place)
    assert not lm.engine.targets_apart()
    seen.clear()
    gradients(lm, layout, honest(lm, layout), POOL[:2])
    assert seen == {32, 1}  # tried, and left


def test_another_layout_of_as_many_numbers_is_tried_for_itself(lm: LanguageModel) -> None:
    one, other = (
        lm.lora_layout(AdapterConfig(rank=r, factors="b", targets=t))
        for r, t in ((8, ("v_proj",)), (4, ("v_proj", "k_proj")))
    )
    assert one.width == other.width
    for layout in (one, other):
        gradients(lm, layout, honest(lm, layout), POOL)
    assert {kind[0] for kind in lm.engine._apart if len(kind) > 1} >= {one, other}
