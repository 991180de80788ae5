"""A language model that reads and writes texts, for many devices at once; `engine` does the work on token ids."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from florilegium.client.lm import layers
from florilegium.client.lm.adapter import AdapterLayout, Adapters, Layout, layout
from florilegium.client.lm.config import AdapterConfig, ModelConfig, ReplyConfig, SamplingConfig, Trained
from florilegium.client.lm.contrast import Contrast
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.features import FEATURES, Feature, HiddenStates
from florilegium.client.lm.hub import default_device, load
from florilegium.client.lm.ia3 import ScalingLayout
from florilegium.client.lm.packing import Example
from florilegium.client.lm.processor import multiplies_bfloat16
from florilegium.client.lm.quantised import layers_of
from florilegium.client.lm.soft_prompt import PromptLayout
from florilegium.client.lm.text import ChatFormat

log = logging.getLogger(__name__)
PROBE = "The weather was fine on Monday, so we walked along the river and bought bread."  # what an engine is tried with
MEASURED = 128  # rows and columns of the matrices whose product is timed


@dataclass(frozen=True)
class Features:
    """What selection knows about a text: from the base model alone, so that old ones stay comparable."""

    readings: Mapping[str, Feature]  # by name, as asked for
    token_norms: torch.Tensor  # (n,) L2 norm of each token's last hidden state
    truncated: bool


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of one reply."""

    nll: float  # nats, summed over the reply's tokens
    tokens: int


def lora_layout(
    engine: Engine,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = (),
    factors: Trained = "both",
    public_seed: int = 0,
) -> AdapterLayout:
    """The layout of LoRA adapters of this rank and of scale alpha / rank (Hu et al. 2021, arXiv 2106.09685).

    `targets` are endings of the names of the layers; none: all that the engine adapts. Of the `factors` A and B both
    or one is trained; a frozen one follows from `public_seed`, and lies on the model's device. Raises
    `UnsupportedModelError` for targets that no layer has, and for a rank that none can have.
    """
    chosen = layers.adapted_layers(engine.modules, targets)
    layers.check_rank(rank, chosen)
    made = layout(chosen, rank, alpha, factors, public_seed)
    made.frozen.update({name: x.to(engine.device) for name, x in made.frozen.items()})
    return made


class LanguageModel:
    """The frozen base, held once, its tokenizer, and what they do with texts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
        self.config, self.tokenizer = config, tokenizer
        words: list[int] = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        self.engine = Engine(model, config.targets, config.max_batch_tokens, config.checkpointing, words)
        self.format = ChatFormat(tokenizer, config)

    @classmethod
    def load(cls, config: ModelConfig) -> LanguageModel:
        """Raises `client.lm.places.ModelError` or `UnsupportedModelError` with the way out."""
        device = default_device() if config.device == "auto" else config.device
        fallback = "bfloat16" if multiplies_bfloat16(device) else "float32"
        dtype = getattr(torch, fallback if config.dtype == "auto" else config.dtype)
        if dtype == torch.bfloat16 and fallback != "bfloat16":
            log.warning(
                "model.dtype = 'bfloat16' is emulated on this processor: %.2g GFLOPS, float32 %.2g; 'auto' takes that",
                gflops(torch.bfloat16), gflops(torch.float32),
            )  # fmt: skip
        model, tokenizer = load(
            config.name, dtype=dtype, device=device, chat_template=config.chat_template, weights=config.weights
        )
        return cls(model, tokenizer, config)

    @property
    def name(self) -> str:
        """What the settings call the base model."""
        return self.config.name

    @property
    def architecture(self) -> str:
        """The model's class in transformers."""
        return type(self.engine.model).__name__

    @property
    def parameters(self) -> int:
        """How many numbers the frozen base has."""
        coded = sum(x.in_features * x.out_features for x in layers_of(self.engine.model))
        return coded + sum(p.numel() for p in self.engine.model.parameters())

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the frozen base in memory."""
        coded = (b for x in layers_of(self.engine.model) for b in x.buffers())
        return sum(p.nbytes for p in (*self.engine.model.parameters(), *coded))

    @property
    def hidden_size(self) -> int:
        """H, the width of the hidden states."""
        return int(self.engine.model.config.get_text_config().hidden_size)

    def layout(self, config: AdapterConfig) -> Layout:
        """The layout of adapters of this model, of any kind."""
        if config.kind == "ia3":
            return ScalingLayout(layers.scaled_layers(self.engine.modules, self.engine.model))
        if config.kind == "prompt":
            vocabulary = self.engine.embedding.weight
            return PromptLayout(config.virtual_tokens, vocabulary.shape[1], vocabulary)
        return self.lora_layout(config)

    def lora_layout(self, config: AdapterConfig, public_seed: int = 0) -> AdapterLayout:
        """That of LoRA; frozen factors lie on the model's device. Raises `UnsupportedModelError`."""
        return lora_layout(self.engine, config.rank, config.alpha, config.targets, config.factors, public_seed)

    def adapters(self, layout: Layout, rows: torch.Tensor) -> Adapters:
        """Rows (K, P) or (P,) as float32 adapters on the model's device."""
        return Adapters(layout, rows.reshape(-1, layout.width).to(self.engine.device, torch.float32))

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], readings: Collection[str] = ("mean",)) -> list[Features]:
        """Features of each text with the readings of `client.lm.features` that are named, adapters off."""
        examples = self.format.prompts(texts)
        found: dict[int, Features] = {}
        for i, hidden in self.engine.hidden(examples):
            first, last = examples[i].words
            start = max(1, first)  # of what has something before it
            ids = torch.tensor(examples[i].prompt[start:last], device=hidden.device)
            sight = HiddenStates(hidden[first:last].float(), hidden[start - 1 : last - 1], ids, self.engine.logits)
            read = {name: FEATURES[name](sight) for name in readings}
            found[i] = Features(read, sight.hidden.norm(dim=1).cpu(), examples[i].truncated)
        return [found[i] for i in range(len(texts))]

    def score(self, examples: Sequence[Example], slots: Sequence[int], adapters: Sequence[Adapters]) -> list[Score]:
        """NLL of each example's reply under the adapters of its device."""
        losses = self.engine.score(examples, slots, adapters)
        return [Score(loss, e.targets) for loss, e in zip(losses, examples, strict=True)]

    def generate(
        self,
        prompts: Sequence[str],
        slots: Sequence[int],
        adapters: Sequence[Adapters],
        sampling: SamplingConfig,
        seeds: Sequence[int],
    ) -> list[str]:
        """A reply to each prompt; row i draws from `seeds[i]` alone. Greedy at temperature 0.

        A `ReplyConfig` may ask for a contrast with the model without adapters; where none are on there is none.
        """
        return self._continued(prompts, slots, adapters, sampling, seeds) if prompts else []

    def reply(
        self,
        prompt: str,
        adapters: Sequence[Adapters],
        sampling: SamplingConfig,
        seed: int,
        told: Callable[[str], None],
    ) -> str:
        """A reply to one person, of which `told` hears as it grows: each time all of it so far."""

        def grown(_: list[int], ids: list[list[int]]) -> None:
            text = self._decoded(ids)[0]
            if not text.endswith("\ufffd"):  # half a character
                told(text)

        return self._continued([prompt], [0], adapters, sampling, [seed], grown)[0]

    def _continued(
        self,
        prompts: Sequence[str],
        slots: Sequence[int],
        adapters: Sequence[Adapters],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        told: Callable[[list[int], list[list[int]]], None] | None = None,
    ) -> list[str]:
        contrast = Contrast(sampling.contrast, sampling.plausible) if isinstance(sampling, ReplyConfig) else None
        ids = self.engine.generate(
            [e.prompt for e in self.format.prompts(prompts)],
            slots,
            adapters,
            seeds=seeds,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            stop=self.format.stop,
            told=told,
            contrast=contrast,
        )
        return self._decoded(ids)

    def _decoded(self, replies: list[list[int]]) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(replies, skip_special_tokens=True)]


def gflops(dtype: torch.dtype) -> float:
    """Of a product of small matrices on the CPU, measured now: milliseconds, or tens of them where it is emulated."""
    x = torch.ones(MEASURED, MEASURED, dtype=dtype)
    x @ x  # kernels are made at the first
    began = time.perf_counter()
    x @ x
    return 2 * MEASURED**3 / (time.perf_counter() - began) / 1e9
