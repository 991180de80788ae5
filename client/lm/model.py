"""One frozen language model with the adapters of many devices: embed, score, generate, gradients, fine-tune.

Every method takes the rows of a whole cohort and does them together; a row's numbers do not depend on its
company beyond rounding. Not covered: dropout, packing of several texts into one row, several GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from client.lm import layers
from client.lm.adapter import AdapterConfig, AdapterLayout, Adapters, layout
from client.lm.generate import SamplingConfig, decode
from client.lm.hub import default_device, load
from client.lm.optimizer import Moments, adamw_
from client.lm.text import Batch, ChatFormat, Example, TextLimits, by_length, pad
from privacy.config import Config


class ModelConfig(Config):
    """Which language model, and how it reads."""

    name: str = Field("nano", description="nano, smollm2-135m, a hub id or a folder")
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16)$", description="auto: float32 on CPU, else bfloat16")
    device: str = Field("auto", pattern="^(auto|cpu|cuda(:[0-9]+)?)$")
    chat_template: str = Field("", description="for a tokenizer that has none: plain, or a Jinja template")
    targets: tuple[str, ...] = Field((), description="endings of the linear layers to adapt; empty: all but the head")
    limits: TextLimits = TextLimits()
    max_batch_tokens: int = Field(2048, ge=64, description="padded tokens in one pass; small ones fit a CPU cache")


@dataclass(frozen=True)
class Features:
    """What selection knows about a text: from the base model alone, so that old ones stay comparable."""

    embedding: torch.Tensor  # (H,) mean of the last hidden states over the text's tokens
    token_norms: torch.Tensor  # (n,) L2 norm of each token's last hidden state
    truncated: bool


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of one reply."""

    nll: float  # nats, summed over the reply's tokens
    tokens: int


@dataclass(frozen=True)
class Lesson:
    """What one device trains on: its examples and the batches, as indices, in their order."""

    examples: Sequence[Example]
    batches: Sequence[Sequence[int]]


class LanguageModel:
    """The frozen base, held once, and the operations on stacked adapters."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
        model.train(False)
        self.model, self.config = model.requires_grad_(False), config
        self.device, self.dtype = model.device, model.dtype
        _check_head(model)
        self.modules = layers.adapt(model, config.targets)
        self.format = ChatFormat(tokenizer, config.limits)
        self.tokenizer = tokenizer
        self.pad_id = int(tokenizer.pad_token_id)

    @classmethod
    def load(cls, config: ModelConfig) -> LanguageModel:
        """Raises `client.lm.hub.ModelError` or `UnsupportedModelError` with the way out."""
        device = default_device() if config.device == "auto" else config.device
        fallback = "float32" if device == "cpu" else "bfloat16"
        dtype = getattr(torch, fallback if config.dtype == "auto" else config.dtype)
        model, tokenizer = load(config.name, dtype=dtype, device=device, chat_template=config.chat_template)
        return cls(model, tokenizer, config)

    @property
    def name(self) -> str:
        return self.config.name

    def layout(self, config: AdapterConfig, public_seed: int = 0) -> AdapterLayout:
        """The layout of adapters of this model; frozen factors lie on the model's device."""
        made = layout(layers.adapted_layers(self.modules, config.targets), config, public_seed)
        made.frozen_a.update({name: a.to(self.device) for name, a in made.frozen_a.items()})
        return made

    def adapters(self, layout: AdapterLayout, rows: torch.Tensor) -> Adapters:
        """Rows (K, P) or (P,) as float32 adapters on the model's device."""
        return Adapters(layout, rows.reshape(-1, layout.width).to(self.device, torch.float32))

    def encode(self, prompts: Sequence[str]) -> list[Example]:
        return self.format.prompts(prompts)

    def active(self, adapters: Sequence[Adapters], slots: torch.Tensor) -> AbstractContextManager[None]:
        """The adapters of the devices `slots` (R,) switched on for one batch of R rows."""
        return self._switched_on([a.pick(slots) for a in adapters])

    def _switched_on(self, of_rows: Sequence[Adapters]) -> AbstractContextManager[None]:
        return layers.active(self.modules, of_rows, self.dtype)

    # -- reading ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> list[Features]:
        """Features of each text, adapters off."""
        examples = self.format.prompts(texts)
        found: dict[int, Features] = {}
        for group in by_length(examples, self.config.max_batch_tokens):
            batch = pad([examples[i] for i in group], self.pad_id, self.device)
            hidden = self._hidden(batch).float()  # (R, T, H)
            for row, i in enumerate(group):
                words = hidden[row, slice(*examples[i].words)]  # (n, H)
                found[i] = Features(words.mean(0).cpu(), words.norm(dim=1).cpu(), examples[i].truncated)
        return [found[i] for i in range(len(texts))]

    @torch.inference_mode()
    def score(self, examples: Sequence[Example], slots: Sequence[int], adapters: Sequence[Adapters]) -> list[Score]:
        """NLL of each example's reply under the adapters of its device."""
        found: dict[int, Score] = {}
        for group, batch, chosen in self._groups(examples, slots):
            with self.active(adapters, chosen):
                losses = self._row_sums(batch)
            for i, loss in zip(group, losses.tolist(), strict=True):
                found[i] = Score(loss, len(examples[i].reply))
        return [found[i] for i in range(len(examples))]

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        slots: Sequence[int],
        adapters: Sequence[Adapters],
        sampling: SamplingConfig,
        seeds: Sequence[int],
    ) -> list[str]:
        """A reply to each prompt; row i draws from `seeds[i]` alone. Greedy at temperature 0."""
        examples = self.format.prompts(prompts)
        replies: dict[int, str] = {}
        for group in by_length(examples, 4 * self.config.max_batch_tokens):  # no activations are kept
            rows = torch.tensor([slots[i] for i in group], device=self.device)
            with self.active(adapters, rows):
                ids = decode(
                    self.model,
                    [examples[i].prompt for i in group],
                    [seeds[i] for i in group],
                    sampling,
                    pad_id=self.pad_id,
                    stop_id=self.format.stop_id,
                )
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            replies.update({i: text.strip() for i, text in zip(group, texts, strict=True)})
        return [replies[i] for i in range(len(prompts))]

    # -- learning -----------------------------------------------------------------------------------------------

    def row_gradients(
        self,
        trained: Adapters,
        frozen: Sequence[Adapters],
        examples: Sequence[Example],
        slots: Sequence[int],
        weights: Sequence[float],
    ) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Gradient of each example's weighted loss in its own copy of its device's row.

        Yields groups: indices of the examples, gradients (R, P), summed token losses (R,) in nats. The loss of
        an example is `weight · Σ NLL over its own reply tokens`: no example can rescale another, which is what
        bounds its influence once its gradient is clipped.
        """
        for group, batch, chosen in self._groups(examples, slots):
            rows = trained.rows[chosen].detach().requires_grad_(True)  # (R, P)
            weight = torch.tensor([weights[i] for i in group], device=self.device)
            others = [a.pick(chosen) for a in frozen]
            with torch.enable_grad(), self._switched_on([*others, Adapters(trained.layout, rows)]):
                losses = self._row_sums(batch)
                (gradient,) = torch.autograd.grad((losses * weight).sum(), rows)
            yield group, gradient, losses.detach()

    def finetune(
        self,
        trained: Adapters,
        frozen: Sequence[Adapters],
        lessons: Sequence[Lesson],
        rates: Sequence[Sequence[float]],
        weight_decay: float = 0.0,
    ) -> tuple[Adapters, list[list[float]]]:
        """Trains the row of each device on its lesson; the new rows, and the loss per token of every step.

        Device k does step s on `lessons[k].batches[s]` at rate `rates[k][s]`; devices with fewer steps rest.
        """
        rows = trained.rows.clone()
        moments = Moments.zeros(rows)
        losses: list[list[float]] = [[] for _ in lessons]
        for step in range(max((len(x.batches) for x in lessons), default=0)):
            moving = [k for k, lesson in enumerate(lessons) if step < len(lesson.batches)]
            gradient, loss = self._step_gradient(Adapters(trained.layout, rows), frozen, lessons, moving, step)
            rate = torch.tensor([r[step] if step < len(r) else 0.0 for r in rates], device=self.device)
            adamw_(rows, gradient, moments, torch.tensor(moving, device=self.device), rate, weight_decay)
            for k in moving:
                losses[k].append(float(loss[k]))
        return Adapters(trained.layout, rows), losses

    def _step_gradient(
        self,
        trained: Adapters,
        frozen: Sequence[Adapters],
        lessons: Sequence[Lesson],
        moving: Sequence[int],
        step: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient (K, P) and value (K,) of each device's mean loss over the tokens of its own batch."""
        pairs = [(k, lessons[k].examples[i]) for k in moving for i in lessons[k].batches[step]]
        slots, examples = [k for k, _ in pairs], [e for _, e in pairs]
        tokens = torch.zeros(len(lessons))
        tokens.index_add_(0, torch.tensor(slots), torch.tensor([float(len(e.reply)) for e in examples]))
        tokens = tokens.to(self.device)
        gradient, value = torch.zeros_like(trained.rows), torch.zeros(len(lessons), device=self.device)
        for _, batch, chosen in self._groups(examples, slots):
            rows = trained.rows.detach().requires_grad_(True)  # (K, P)
            with torch.enable_grad(), self.active([*frozen, Adapters(trained.layout, rows)], chosen):
                losses = self._row_sums(batch) / tokens[chosen]
                gradient += torch.autograd.grad(losses.sum(), rows)[0]
            value.index_add_(0, chosen, losses.detach())
        return gradient, value

    # -- forward ------------------------------------------------------------------------------------------------

    def _groups(
        self, examples: Sequence[Example], slots: Sequence[int]
    ) -> Iterator[tuple[list[int], Batch, torch.Tensor]]:
        for group in by_length(examples, self.config.max_batch_tokens):
            batch = pad([examples[i] for i in group], self.pad_id, self.device)
            yield group, batch, torch.tensor([slots[i] for i in group], device=self.device)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states (R, T, H)."""
        out = self.model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def _row_sums(self, batch: Batch) -> torch.Tensor:
        """Σ NLL over the targets of each row, (R,) nats; only targets pass the head."""
        hidden = self._hidden(batch)[batch.target_rows, batch.target_columns]  # (M, H)
        losses = F.cross_entropy(_logits(self.model, hidden).float(), batch.targets, reduction="none")
        sums = torch.zeros(len(batch.ids), device=self.device)
        return sums.index_add(0, batch.target_rows, losses)


def schedule(count: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    """Batches of indices: each epoch a new order of all `count` examples, the last batch may be smaller."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    orders = [rng.permutation(count).tolist() for _ in range(epochs)]
    return [order[i : i + size] for order in orders for i in range(0, count, size)]


def _logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    logits: torch.Tensor = head(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


@torch.inference_mode()
def _check_head(model: PreTrainedModel) -> None:
    """Refuses a model whose logits are not its head applied to its last hidden states."""
    ids = torch.arange(4, device=model.device)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.allclose(_logits(model, hidden), model(ids, use_cache=False).logits, atol=1e-3, rtol=1e-2):
        raise layers.UnsupportedModelError(
            f"{type(model).__name__} changes its logits after the head in a way that is not supported"
        )
