"""What will work with a model, tried on it: adapters of many devices, DP, writing, weights in bits, export.

LoRA is compared with what it must be equal to: two devices together with each alone, the adapted model with plain
PEFT's. Weights in bits are looked at in one layer, other kinds of adapters only run. Not covered: whether it learns
well, how fast it is, what memory a cohort takes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import nn

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import AdapterLayout, Adapters
from florilegium.client.lm.config import AdapterConfig, ModelConfig
from florilegium.client.lm.hub import load
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.packing import Example
from florilegium.client.lm.peft_format import write_peft
from florilegium.client.lm.places import base_of
from florilegium.client.lm.quantised import GROUP, QuantisedLinear, Weights
from florilegium.privacy.common.errors import UserError, first_line

TALKS = [
    Dialogue("1", "What did you do on Sunday?", "I was at the sea, and it rained."),
    Dialogue("2", "Do you like jazz?", "Not really."),
    Dialogue("3", "Tell me about your cat.", "She sleeps all day."),
]
OWNERS, USERS = (0, 1, 1), 2
FAMILIES = (  # by their type in transformers: those that `tests/test_families.py` compares with PEFT
    "llama", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "granite", "hyperclovax", "olmo",
    "olmo2", "gpt_neox", "mistral", "cohere", "cohere2",
)  # fmt: skip
ROOM = {torch.float32: 1e-3, torch.bfloat16: 0.3}  # for differences by rounding, as a share
SPREAD = 0.02  # of the numbers in the adapters that are tried
LOST = {"int8": 0.1, "int4": 0.5}  # of the losses, where the base was in bits and PEFT's is not
CODED: dict[Weights, float] = {"int8": 0.05, "int4": 0.3}  # of a layer's weights
RANK, ALPHA = 2, 8.0
WRITTEN = 6  # tokens


@dataclass(frozen=True)
class Tried:
    """A part, whether it works, and what was found. What is not `needed` may be lacking."""

    part: str
    works: bool
    told: str
    needed: bool = True


class WrongError(Exception):
    """A part gives something else than it must."""


def check(config: ModelConfig) -> Iterator[Tried]:
    """Each part of a model as it is tried; none after the first where it cannot be loaded."""
    found: list[LanguageModel] = []
    yield _tried("loading", lambda: _loaded(config, found))
    if not found:
        return
    lm = found.pop()
    yield Tried("packed texts", True, f"{lm.engine.error:.1g} of the logits' norm away from the model's own")
    layout, examples = lm.lora_layout(AdapterConfig(rank=RANK, alpha=ALPHA)), lm.format.dialogues(TALKS)
    numbers = torch.randn(USERS, layout.width, generator=torch.Generator().manual_seed(0))
    adapters = lm.adapters(layout, SPREAD * numbers)
    yield _tried("adapters of many", partial(_many, lm, adapters, examples))
    yield _tried("DP gradients", partial(_private, lm, adapters, examples))
    yield _tried("writing", partial(_written, lm, adapters))
    yield _tried("int8 weights", partial(_in_bits, lm, "int8"), needed=False)
    yield _tried("int4 weights", partial(_in_bits, lm, "int4"), needed=False)
    yield _tried("(IA)³ adapters", partial(_other_kind, lm, "ia3"), needed=False)
    yield _tried("soft prompts", partial(_other_kind, lm, "prompt"), needed=False)
    expected = [score.nll for score in lm.score(examples, [0] * len(examples), [adapters.pick([0])])]
    exported, where = layout, (str(lm.engine.device), lm.engine.dtype)
    del lm, layout  # the model is loaded a second time
    yield _tried("export to PEFT", partial(_exported, config, where, exported, adapters.rows[0], examples, expected))


def _tried(part: str, attempt: Callable[[], str], needed: bool = True) -> Tried:
    try:
        return Tried(part, True, attempt(), needed)
    except Exception as error:  # noqa: BLE001  # whatever stops it is what is told
        kind = "" if isinstance(error, WrongError | UserError) else f"{type(error).__name__}: "
        return Tried(part, False, f"{kind}{first_line(error)}", needed)


def _loaded(config: ModelConfig, found: list[LanguageModel]) -> str:
    lm = LanguageModel.load(config)
    found.append(lm)
    family = lm.engine.model.config.get_text_config().model_type
    tested = "one of the families that are tested" if family in FAMILIES else "of a family that no test has"
    kind = str(lm.engine.dtype).removeprefix("torch.")
    size = f"{lm.parameters:,} parameters, {lm.parameter_bytes / 1e6:,.0f} MB as {kind}"
    return f"{lm.architecture}, {tested}; {size}"


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far numbers are from what they must be, as a share of the norm."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def _within(lm: LanguageModel, apart: float, what: str) -> str:
    """Raises `WrongError` where what must be the same differs by more than rounding."""
    if not apart < ROOM[lm.engine.dtype]:
        raise WrongError(f"{what} differ by {apart:.2g} of their norm")
    return f"{what} differ by {apart:.1g} of their norm"


def _many(lm: LanguageModel, adapters: Adapters, examples: Sequence[Example]) -> str:
    batches = [[e for e, owner in zip(examples, OWNERS, strict=True) if owner == user] for user in range(USERS)]
    weights = [[1.0] * len(batch) for batch in batches]
    together, _ = lm.engine.gradient(adapters, [], batches, weights)
    alone = [
        lm.engine.gradient(adapters.pick([user]), [], [batches[user]], [weights[user]])[0][0] for user in range(USERS)
    ]
    return _within(lm, _apart(together, torch.stack(alone)), "gradients of two devices in one pass and of each alone")


def _private(lm: LanguageModel, adapters: Adapters, examples: Sequence[Example]) -> str:
    """Of each text twice, once of each device: those of one width go through one pass."""
    texts, owners = [*examples, *examples], [*OWNERS, *(1 - owner for owner in OWNERS)]

    def rows(chosen: Sequence[int]) -> torch.Tensor:
        found = torch.zeros(len(chosen), adapters.layout.width, device=lm.engine.device)
        some, slots = [texts[i] for i in chosen], [owners[i] for i in chosen]
        for group, gradient, _ in lm.engine.row_gradients(adapters, [], some, slots, [1.0] * len(chosen)):
            found[group] = gradient
        return found

    every = range(len(texts))
    together = rows(every)
    if different := [i for i in every if not torch.equal(together[i], rows([i])[0])]:
        raise WrongError(f"the gradient of dialogue {different[0]} depends on its company")
    batches = [[texts[i] for i in every if owners[i] == user] for user in range(USERS)]
    whole, _ = lm.engine.gradient(adapters, [], batches, [[1.0] * len(batch) for batch in batches])
    summed = torch.zeros_like(whole).index_add_(0, torch.tensor(owners, device=whole.device), together)
    told = _within(lm, _apart(summed, whole), "their sum and the gradient of the batch")
    return f"each is to the bit what it is alone; {told}"


def _written(lm: LanguageModel, adapters: Adapters) -> str:
    """Each token that is written with a cache must be the likeliest by all that is before it, read anew."""
    prompts = [example.prompt for example in lm.format.prompts([talk.prompt for talk in TALKS])]
    replies = lm.engine.generate(
        prompts, OWNERS, [adapters], seeds=range(len(prompts)), max_new_tokens=WRITTEN, temperature=0.0,
        stop=lm.format.stop,
    )  # fmt: skip
    texts = [Example(prompt, tuple(ids), (0, 1), False) for prompt, ids in zip(prompts, replies, strict=True)]
    worst = 0.0
    for i, hidden in lm.engine.hidden(texts, [adapters], OWNERS):
        with torch.inference_mode():
            scores = lm.engine.logits(hidden[len(prompts[i]) - 1 : -1]).float()  # (n, V)
        if len(ids := torch.tensor(replies[i], device=scores.device)):
            lost = scores.amax(-1) - scores.gather(1, ids[:, None])[:, 0]
            worst = max(worst, float((lost / (scores.amax(-1) - scores.mean(-1))).max()))
    if not worst < ROOM[lm.engine.dtype]:
        raise WrongError(f"a token is written that is not the likeliest: {worst:.2g} of the largest score less")
    return f"{sum(map(len, replies))} tokens, each the likeliest; a reply ends with {list(lm.format.stop)}"


def _in_bits(lm: LanguageModel, weights: Weights) -> str:
    bases = [module.base for module in lm.engine.modules.values()]
    layers = [base for base in bases if isinstance(base, nn.Linear)]
    if not layers:
        return f"the model is held in {lm.config.weights}"
    if weights == "int4" and (odd := [layer.in_features for layer in layers if layer.in_features % GROUP]):
        raise WrongError(f"a layer has {odd[0]} inputs, which is no multiple of {GROUP}")
    apart = _apart(QuantisedLinear(layers[0], weights).weight.float(), layers[0].weight.float())
    if not apart < CODED[weights]:
        raise WrongError(f"the first layer's weights differ by {apart:.2g} of their norm")
    return f"the first layer's weights differ by {apart:.1g}"


def _other_kind(lm: LanguageModel, kind: Literal["ia3", "prompt"]) -> str:
    layout = lm.layout(AdapterConfig(kind=kind))
    scores = lm.score(lm.format.dialogues(TALKS), [0] * len(TALKS), [lm.adapters(layout, layout.start(0))])
    if not all(math.isfinite(score.nll) for score in scores):
        raise WrongError("losses of replies are not finite")
    return f"runs, {layout.width:,} numbers a device"


def _exported(
    config: ModelConfig,
    where: tuple[str, torch.dtype],
    layout: AdapterLayout,
    row: torch.Tensor,
    examples: Sequence[Example],
    expected: Sequence[float],
) -> str:
    """The summed NLL of each reply by plain PEFT, which reads the adapter from its folder, must be ours."""
    from peft import PeftModel

    device, dtype = where
    plain, _ = load(config.name, dtype=dtype, device=device, chat_template=config.chat_template)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about itself
        write_peft(Path(folder), layout, row, base_of(config.name))
        adapted = PeftModel.from_pretrained(plain, folder)
    found = [_nll(adapted, example, device) for example in examples]
    apart = _apart(torch.tensor(found), torch.tensor(expected))
    if not apart < (ROOM[dtype] if config.weights == "float" else LOST[config.weights]):
        raise WrongError(f"losses of replies by plain PEFT differ by {apart:.2g}")
    return f"losses of replies by plain PEFT differ by {apart:.1g}"


@torch.inference_mode()
def _nll(model: nn.Module, example: Example, device: str) -> float:
    ids = torch.tensor([example.prompt + example.reply], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(example.prompt) - 1 : -1].float()
    return float(nn.functional.cross_entropy(logits, ids[0, len(example.prompt) :], reduction="sum"))
