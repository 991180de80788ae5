"""Adapters as a server would craft them: what of one dialogue reaches the gradients of the others through rounding.

A server sends the shared adapter, and so chooses the function whose gradient is taken. In exact arithmetic no dialogue
reaches another's gradient, whatever the function; in floating point a pass whose shape follows from all of its texts
rounds them otherwise when one of them changes, and an adapter can make whole gradients of that: one layer drowns all
that a text says in one direction, so that beside it there is nothing but rounding, and a later one looks at what is
beside that direction and multiplies it. Not covered: what a server learns from many rounds of such adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from florilegium.client.config import DeviceConfig
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import AdapterLayout, Adapters
from florilegium.client.lm.model import LanguageModel
from florilegium.privacy.dpsgd import clipped_sum
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.audit.checks import BOUND, Check

DROWNING, REVEALED = 1e9, 1e16  # sizes of what else is about 1
ROUNDING = 1e-5  # of the largest: what is smaller is hardly more than rounding
LARGE = 1.5  # numbers of an adapter that are about 0.05 in an honest one
POOL, REPLACED = 32, 7
SAID = Dialogue("", "ok?", "yes")  # by all of a pool but one: what a server may know
INSTEAD = {
    "shorter": ("a", "b"),
    "longer": ("and how was the concert that you told me of last week, before it began?", "loud, but rather good"),
    "empty": ("", ""),
    "huge": ("word " * 2000, "no " * 2000),
}
INTO_THE_STREAM = ("v_proj", "o_proj", "down_proj", "query_key_value", "dense")  # layers whose output is added to it
Gradients = torch.Tensor  # (b, P)


def reach(lm: LanguageModel, config: DeviceConfig, seed: int) -> list[Check]:
    """One dialogue of a pool replaced by shorter, longer, empty and huge ones, under each crafted adapter.

    No bit of another's gradient may move, nor the clipped sum by more than 2 C. Controls: a pass that holds all texts
    as they are, one behind the other; no clipping.
    """
    if not config.privacy.by_dialogue:
        return []
    pool = [replace(SAID, id=str(k)) for k in range(POOL)]
    worlds = [[*pool[:REPLACED], Dialogue("x", *texts), *pool[REPLACED + 1 :]] for texts in INSTEAD.values()]
    layout = lm.lora_layout(config.shared.adapter, public_seed=derive_seed(seed, "shared"))
    clip, changed, uneven, moved, loose = config.privacy.clip_norm_l2, 0, 0, 0.0, 0.0
    for row in crafted(lm, layout, pool, seed).values():
        own, shared = even(lm, layout, row, pool), together(lm, layout, row, pool)
        for other in worlds:
            now = even(lm, layout, row, other)
            changed += _changed(own, now)
            uneven += _changed(shared, together(lm, layout, row, other))
            moved = max(moved, _moved(own, now, clip) / clip)
            loose = max(loose, _moved(own, now, float("inf")) / clip)
    title = "under crafted adapters: "
    return [
        Check(f"{title}other gradients that one dialogue reaches", changed, 0, 0, "passes of uneven shape", uneven),
        Check(f"{title}one dialogue replaced moves the clipped sum, C", moved, 0.0, BOUND, "no clipping", loose),
    ]


def crafted(lm: LanguageModel, layout: AdapterLayout, pool: Sequence[Dialogue], seed: int) -> dict[str, torch.Tensor]:
    """By name, adapters (P,) of a server that wants to know one dialogue of a device, all else of which it knows."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "crafted") >> 1)
    start = layout.start(derive_seed(seed, "shared"))
    found = {"large": start + LARGE * torch.randn(layout.width, generator=generator)}
    return found | ({"trap": trap(lm, layout, start, pool, generator)} if layout.trains_b else {})


def trap(
    lm: LanguageModel, layout: AdapterLayout, start: torch.Tensor, pool: Sequence[Dialogue], generator: torch.Generator
) -> torch.Tensor:
    """Drowns all in one direction at an early layer, and reveals at the next of its kind what A sees beside it.

    What A sees there is looked up by running the model, as a server can that has it too.
    """
    rows = start[None].clone()
    parts = {name: b.view(-1, layout.rank) for name, _, b in layout.split(rows)}
    kind = next((k for k in INTO_THE_STREAM if any(name.endswith(k) for name in parts)), "")
    alike = [(name, b) for name, b in parts.items() if name.endswith(kind)]
    (_, first), (later, second) = alike[0], alike[-1] if len(alike) == 1 else alike[1]
    of = lm.engine.model.config.get_text_config()
    head_size = getattr(of, "head_dim", None) or of.hidden_size // of.num_attention_heads
    one_head = min(len(first), head_size) if kind == "v_proj" else len(first)  # others would turn it
    direction = torch.nn.functional.normalize(torch.randn(one_head, generator=generator), dim=0)
    first.zero_()
    first[:one_head, 0] = DROWNING * direction / layout.scale
    seen = _seen(lm, layout, rows[0], later, pool)  # (tokens, r)
    _, sizes, axes = torch.linalg.svd(seen, full_matrices=False)
    beside = axes[sizes < ROUNDING * sizes[0]]
    if len(beside):
        into = torch.randn(len(second), len(beside), generator=generator, dtype=torch.float64)
        revealing = REVEALED / float((seen @ beside.T).abs().median() + 1e-12)
        second.copy_((revealing * torch.nn.functional.normalize(into, dim=0) @ beside / layout.scale).float())
    return rows[0]


def even(lm: LanguageModel, layout: AdapterLayout, row: torch.Tensor, pool: Sequence[Dialogue]) -> Gradients:
    """As a device takes them."""
    found, _ = lm.engine.dp_gradients(lm.adapters(layout, row), [], [lm.format.dialogues(pool)])
    return found[0]


def together(lm: LanguageModel, layout: AdapterLayout, row: torch.Tensor, pool: Sequence[Dialogue]) -> Gradients:
    """The control: of one pass whose shape follows from all texts, as devices took them before."""
    examples = lm.format.dialogues(pool)
    rows = row.to(lm.engine.device).expand(len(pool), -1).clone().requires_grad_(True)
    pack = lm.engine.pack(examples, range(len(pool)))
    with torch.enable_grad(), lm.engine.active([Adapters(layout, rows)], pack.owned, pack.texts):
        losses = lm.engine.losses(pack) / torch.tensor([max(1, e.targets) for e in examples], device=rows.device)
        (found,) = torch.autograd.grad(losses.sum(), rows)
    return found.cpu()


def _seen(
    lm: LanguageModel, layout: AdapterLayout, row: torch.Tensor, layer: str, pool: Sequence[Dialogue]
) -> torch.Tensor:
    """What the factor A of a layer makes of its inputs under this adapter: (tokens of the pool, r)."""
    inputs = list[torch.Tensor]()
    factor = next(a.reshape(layout.rank, -1) for name, a, _ in layout.split(row[None]) if name == layer)
    hook = lm.engine.modules[layer].register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    try:
        for _ in lm.engine.hidden(lm.format.dialogues(pool), [lm.adapters(layout, row)]):
            pass
    finally:
        hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).cpu().double() @ factor.double().T


def _changed(one: Gradients, other: Gradients) -> int:
    """Of how many dialogues beside the replaced one the gradient is not the same to the bit."""
    same = ((one == other) | (one.isnan() & other.isnan())).all(1)
    return int((~same).sum()) - int(not same[REPLACED])


def _moved(one: Gradients, other: Gradients, clip: float) -> float:
    """How far the sum of the clipped gradients; those that are not finite count as zero, as in a noisy step."""
    sums = [clipped_sum(torch.where(g.isfinite().all(1, keepdim=True), g, 0.0).double(), clip) for g in (one, other)]
    return float((sums[0] - sums[1]).norm())
