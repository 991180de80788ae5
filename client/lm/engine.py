"""One frozen language model with the adapters of many devices, on token ids: read, continue, differentiate, train.

Every method does the examples of a whole cohort together, many devices in one pass; a device's numbers depend on its
company by rounding only. Needs torch and transformers, nothing else. Not covered: dropout, several GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import itemgetter

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from florilegium.client.lm import attention, layers
from florilegium.client.lm.adapter import Adapters, Layout
from florilegium.client.lm.batching import by_device, by_tokens
from florilegium.client.lm.cache import KeyValues
from florilegium.client.lm.contrast import Contrast, contrasted
from florilegium.client.lm.decode import Decoding
from florilegium.client.lm.loss import logits, token_losses
from florilegium.client.lm.norms import replace_norms
from florilegium.client.lm.optimizer import Moments, adamw_
from florilegium.client.lm.packing import (
    OWN_PIECE,
    OWN_TOKENS,
    Example,
    OwnPack,
    Pack,
    Rectangle,
    Texts,
    own_rows,
    own_width,
    owned_by,
)
from florilegium.client.lm.soft_prompt import PromptLayout, behind
from florilegium.client.lm.token_budget import TokenBudget, keep_freed_memory
from florilegium.client.lm.training_data import TrainingResult, TrainingSet, objection

TOKENS = {  # in one pass, if it is not said: what fits the caches of a CPU, what fills a GPU
    ("cpu", torch.float32): 2048,
    ("cpu", torch.bfloat16): 4096,
    ("cuda", torch.float32): 16384,
    ("cuda", torch.bfloat16): 32768,
}
CONTINUING = 4  # times as many tokens when nothing is kept for a derivative
PASSES_PER_BLOCK = 4  # of training: more make passes of devices that are more alike, and more optimizer state
LARGE = 0.1  # numbers of the adapters with which it is tried whether examples go apart
OFF = -1  # whose a text is that no adapter is on for
EVEN = 8  # numbers of owners in a pass are multiples of it, so that there are few shapes


class Engine:
    """The frozen base, held once, and the operations on stacked adapters."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Sequence[str] = (),
        max_batch_tokens: int = 0,
        checkpointing: bool = False,
        probe_ids: Sequence[int] = (),
    ) -> None:
        """Adapts the model in place; raises `UnsupportedModelError` for one that it cannot reproduce.

        That is tried with the tokens `probe_ids` of a text; without any, with some from the middle of the vocabulary.
        """
        model.train(False)
        self.model = model.requires_grad_(False)
        self.device, self.dtype = model.device, model.dtype
        if self.device.type == "cpu" and not checkpointing:
            keep_freed_memory()
        layers.refuse_coupling(model)
        layers.refuse_states(model)
        self.head = layers.head_of(model)
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        probes = layers.probes(len(self.head.weight), probe_ids)
        expected = layers.own_logits(model, probes)
        self.modules, self.embedding = layers.adapt(model, targets), layers.adapt_embedding(model)
        self.adaptable = layers.Adaptable(self.modules, self.embedding)
        replace_norms(model)
        if checkpointing:
            layers.forget_activations(model)
        self.reading = attention.attend_packed(model)
        self.token_budget = TokenBudget(max_batch_tokens or TOKENS.get((self.device.type, self.dtype), 2048))
        self.most_tokens = self.token_budget.tokens  # as set: what is left of them when memory was short says something
        self._apart: dict[tuple[object, ...], bool] = {}  # whether rows of a kind of pass do not reach each other
        self._check(probes, expected)

    def pack(self, examples: Sequence[Example], slots: Sequence[int]) -> Pack:
        """The examples as one pass; those of one device follow each other."""
        return Pack(examples, slots, self.device, filled=self.dtype != torch.float32)

    @contextmanager
    def active(
        self, adapters: Sequence[Adapters], owned: Rectangle, texts: Texts | None, cache: KeyValues | None = None
    ) -> Iterator[None]:
        """The adapters switched on, row k of a stack for the tokens of owner k, one row for all; the texts laid open.

        A derivative is taken within it: what was forgotten of a pass is then computed again.
        """
        with self.adaptable.active(adapters, owned, self.dtype), self.reading.of(texts, cache):
            yield

    def prompted(self, examples: Sequence[Example], adapters: Sequence[Adapters]) -> Sequence[Example]:
        """The examples, behind the virtual tokens of a soft prompt that is among the adapters."""
        for adapter in adapters:
            if isinstance(adapter.layout, PromptLayout):
                return behind(adapter.layout, examples)
        return examples

    # -- reading ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def hidden(
        self, examples: Sequence[Example], adapters: Sequence[Adapters] = (), slots: Sequence[int] = ()
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Index and last hidden states (n, H) of each example, under the adapters of its device, or without any.

        Those of a soft prompt come first.
        """
        slots, examples = slots or [0] * len(examples), self.prompted(examples, adapters)

        def read(group: list[int]) -> tuple[torch.Tensor, ...]:
            chosen = [examples[i] for i in group]
            pack = self.pack(chosen, [slots[i] for i in group])
            with self.active([a.pick(pack.owners) for a in adapters], pack.owned, pack.texts):
                hidden, lengths = self._forward(pack.ids, pack.positions), [e.length for e in chosen]
            return torch.split(hidden[: sum(lengths)], lengths)

        lengths = [e.length for e in examples]
        for group, found in self.token_budget.each(by_device(examples, slots), by_tokens(lengths), read):
            yield from zip(group, found, strict=True)

    def mean_inputs(
        self, names: Sequence[str], examples: Sequence[Example], adapters: Sequence[Adapters] = ()
    ) -> dict[str, torch.Tensor]:
        """What each of these adapted layers is given, (in,), on the mean over the tokens of all examples.

        `adapters` of one row each are on for all of them.
        """
        sums = {name: torch.zeros(self.modules[name].base.in_features) for name in names}
        length = 0  # of the example that is being read; what follows in a pass fills it up

        def watched(name: str) -> RemovableHandle:
            def hook(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
                sums[name] += given[0].flatten(0, -2)[:length].float().sum(0).cpu()

            return self.modules[name].register_forward_pre_hook(hook)

        handles = [watched(name) for name in names]
        try:
            for example in examples:
                length = example.length
                list(self.hidden([example], adapters))
        finally:
            for handle in handles:
                handle.remove()
        return {name: total / max(1, sum(e.length for e in examples)) for name, total in sums.items()}

    @torch.inference_mode()
    def score(self, examples: Sequence[Example], slots: Sequence[int], adapters: Sequence[Adapters]) -> list[float]:
        """Summed NLL, nats, of each example's reply under the adapters of its device."""
        found, examples = [0.0] * len(examples), self.prompted(examples, adapters)

        def measure(group: list[int]) -> list[float]:
            pack = self.pack([examples[i] for i in group], [slots[i] for i in group])
            with self.active([a.pick(pack.owners) for a in adapters], pack.owned, pack.texts):
                losses: list[float] = self.losses(pack).tolist()
                return losses

        lengths = [e.length for e in examples]
        for group, losses in self.token_budget.each(by_device(examples, slots), by_tokens(lengths), measure):
            for i, loss in zip(group, losses, strict=True):
                found[i] = loss
        return found

    @torch.inference_mode()
    def token_losses(
        self, examples: Sequence[Example], slots: Sequence[int], adapters: Sequence[Adapters]
    ) -> list[list[float]]:
        """NLL, nats, of each target of each example's reply under the adapters of its device."""
        found, examples = [list[float]() for _ in examples], self.prompted(examples, adapters)

        def measure(group: list[int]) -> list[list[float]]:
            chosen = [examples[i] for i in group]
            pack = self.pack(chosen, [slots[i] for i in group])
            with self.active([a.pick(pack.owners) for a in adapters], pack.owned, pack.texts):
                return [part.tolist() for part in self.target_losses(pack).split([e.targets for e in chosen])]

        lengths = [e.length for e in examples]
        for group, losses in self.token_budget.each(by_device(examples, slots), by_tokens(lengths), measure):
            for i, loss in zip(group, losses, strict=True):
                found[i] = loss
        return found

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        slots: Sequence[int],
        adapters: Sequence[Adapters],
        *,
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        stop: Sequence[int],
        told: Callable[[list[int], list[list[int]]], None] | None = None,
        contrast: Contrast | None = None,
    ) -> list[list[int]]:
        """Ids that follow each prompt, up to the tokens of `stop`; row i draws from `seeds[i]` alone.

        `told` hears after each token which prompts are being continued, and how far. With a `contrast` each prompt is
        in the pass a second time, with no adapter on.
        """
        bare = [Example(tuple(p), (), (0, len(p)), False) for p in prompts]
        examples, replies = self.prompted(bare, adapters), dict[int, list[int]]()
        contrast = contrast if adapters and contrast and contrast.strength else None

        def continued(group: list[int]) -> list[list[int]]:
            decoding = Decoding([seeds[i] for i in group], max_new_tokens, temperature, stop, self.device)
            beside = [bare[i] for i in group] if contrast else []
            pack = self.pack(
                [*(examples[i] for i in group), *beside], [*(slots[i] for i in group), *[OFF] * len(beside)]
            )
            for _ in self._decoded(pack, decoding, adapters, contrast):
                if told:
                    told(group, decoding.replies)
            return decoding.replies

        room = [(e.length + max_new_tokens) // CONTINUING for e in examples]
        for group, ids in self.token_budget.each(by_device(examples, slots), by_tokens(room), continued):
            replies.update(zip(group, ids, strict=True))
        return [replies[i] for i in range(len(prompts))]

    def _decoded(
        self, pack: Pack, decoding: Decoding, adapters: Sequence[Adapters], contrast: Contrast | None
    ) -> Iterator[None]:
        """Token by token; the texts of `OFF`, behind all others, are those of the contrast, in the same order."""
        texts = Texts(pack.texts.lengths, self.device, ordered=True)
        slots = [slot for slot in pack.slots if slot != OFF]
        lengths = torch.tensor([e.length for e in pack.examples], device=self.device)  # (R,), or (2 R,)
        cache = KeyValues(lengths, decoding.ids.shape[1])
        owners, owned = owned_by(slots, self.device, [e.length for e in pack.examples[: len(slots)]])
        with self.active([a.pick(owners) for a in adapters], owned, texts, cache):
            hidden = self._forward(pack.ids, pack.positions)[lengths.cumsum(0) - 1]  # (R, H), or (2 R, H)
        decoding.take(self._next(hidden, contrast))
        yield
        while decoding.running:
            before = len(decoding.rows)
            kept = decoding.drop_finished()
            cache.drop_to(torch.cat([kept, kept + before]) if contrast else kept)
            owners, owned = owned_by([slots[i] for i in decoding.rows.tolist()], self.device)
            with self.active([a.pick(owners) for a in adapters], owned, None, cache):
                while decoding.steady:
                    cache.advance()
                    last = decoding.last.repeat(2) if contrast else decoding.last
                    hidden = self._forward(last[None], cache.lengths[None])
                    decoding.take(self._next(hidden, contrast))
                    yield

    def _next(self, hidden: torch.Tensor, contrast: Contrast | None) -> torch.Tensor:
        """Logits (R, V) of hidden states (R, H), or of (2 R, H), of which the second half is without adapters."""
        found = self.logits(hidden)
        if contrast is None:
            return found
        personal, base = found.chunk(2)
        return contrasted(personal, base, contrast)

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
        an example is `weight · Σ NLL over its own reply tokens`. To the bit, its gradient follows from itself, its
        row and what is frozen alone: no other example can rescale it, nor reach it through rounding, which a crafted
        adapter could make as large as it likes. That is what bounds its influence once the gradient is clipped.
        """
        examples = self.prompted(examples, [*frozen, trained])

        def differentiate(group: list[int], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
            own, *others = (
                Adapters(a.layout, a.rows[[slots[i] if len(a.rows) > 1 else 0 for i in group]])
                for a in (trained, *frozen)
            )
            return self._own_gradients(own, others, [examples[i] for i in group], [weights[i] for i in group], rows)

        by_width: dict[int, list[int]] = {}
        for i, example in enumerate(examples):
            by_width.setdefault(own_width(example.length), []).append(i)
        for width, some in sorted(by_width.items(), reverse=True):
            while some:
                rows = self._rows_for(trained.layout, frozen, width, len(some))
                group, some = some[:rows], some[rows:]
                yield group, *differentiate(group, rows)

    def _rows_for(self, layout: Layout, frozen: Sequence[Adapters], width: int, examples: int) -> int:
        """In a pass of so many rows each example has the gradient that it has alone."""
        rows = own_rows(examples, min(OWN_TOKENS, self.most_tokens) // width)
        kind = layout, tuple(a.layout for a in frozen), width, torch.get_num_threads()
        while rows > 1 and not self._tried((*kind, rows), partial(self.rows_apart, layout, width, rows, frozen)):
            rows //= 2
        return rows

    def _tried(self, kind: tuple[object, ...], attempt: Callable[[], bool]) -> bool:
        """Whether kernels keep rows apart in passes of this kind: tried once."""
        if kind not in self._apart:
            self._apart[kind] = attempt()
        return self._apart[kind]

    def rows_apart(self, layout: Layout, width: int, rows: int, frozen: Sequence[Adapters] = ()) -> bool:
        """Whether an example's gradient is, to the bit, what it is alone: at each place of a pass, others beside it."""
        generator, vocabulary = torch.Generator().manual_seed(width), self.embedding.weight.shape[0]
        ids = torch.randint(vocabulary, (rows + 1, width), generator=generator).tolist()
        one, *others = [Example(tuple(i[: width // 2]), tuple(i[width // 2 : width - k % 3]), (0, 1), False)
                        for k, i in enumerate(ids)]  # fmt: skip
        numbers = layout.start(width) + LARGE * torch.randn(rows + 1, layout.width, generator=generator)
        own, beneath = Adapters(layout, numbers.to(self.device)), [a.pick([0]) for a in frozen]
        alone, _ = self._own_gradients(own.pick([0]), beneath, [one], [1.0], 1)
        beneath = [Adapters(a.layout, a.rows.expand(rows, -1)) for a in beneath]
        for first in (0, 1):  # at every second place, then at the others
            places = set(range(first, rows, 2))
            company = [one if k in places else others[k] for k in range(rows)]
            adapters = own.pick([0 if k in places else k + 1 for k in range(rows)])
            together, _ = self._own_gradients(adapters, beneath, company, [1.0] * rows, rows)
            if not all(torch.equal(together[k], alone[0]) for k in places):
                return False
        return True

    def targets_apart(self) -> bool:
        """Whether a target's loss and its derivative are the same to the bit at each place of a piece for the head."""
        generator, (vocabulary, size) = torch.Generator().manual_seed(0), self.head.weight.shape
        hidden = torch.randn(OWN_PIECE, size, generator=generator).to(self.device, self.dtype)
        targets = torch.randint(vocabulary, (OWN_PIECE,), generator=generator).to(self.device)

        def through(places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            rows = hidden[places].requires_grad_(True)
            losses = self._token_losses(rows, targets[places], OWN_PIECE)
            return losses.detach(), torch.autograd.grad(losses.sum(), rows)[0]

        mixed, alike = through(list(range(OWN_PIECE))), through([0] * OWN_PIECE)
        return all(bool((of_all == first[0]).all()) for first, of_all in zip(mixed, alike, strict=True))

    def _own_gradients(
        self,
        adapters: Adapters,
        frozen: Sequence[Adapters],
        examples: Sequence[Example],
        weights: Sequence[float],
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients (n, P) and summed token losses (n,) of n examples of one width, each with a row of its own."""
        pack, count = OwnPack(examples, rows, self.device), len(examples)
        piece = OWN_PIECE if self._tried((torch.get_num_threads(),), self.targets_apart) else 1
        parameters = _filled(adapters, rows).rows.detach().clone().requires_grad_(True)
        weight = torch.tensor(weights, device=self.device)
        active = [*(_filled(a, rows) for a in frozen), Adapters(adapters.layout, parameters)]
        with torch.enable_grad(), self.active(active, pack.owned, pack.texts):
            hidden = self._forward(pack.ids, pack.positions)[pack.places]  # (M, H)
            losses = pack.summed(self._token_losses(hidden, pack.targets, piece))
            (gradient,) = torch.autograd.grad((losses * weight).sum(), parameters)
        return gradient[:count], losses.detach()

    def dp_gradients(
        self, trained: Adapters, frozen: Sequence[Adapters], batches: Sequence[Sequence[Example]]
    ) -> tuple[list[torch.Tensor], list[float]]:
        """Of each device, the gradient (b_k, P) of every example's own mean token loss, and the mean of these losses.

        On the CPU, in the order of the examples.
        """
        examples, slots = [e for batch in batches for e in batch], [k for k, batch in enumerate(batches) for _ in batch]
        weights = [1 / max(1, e.targets) for e in examples]
        found = torch.zeros(len(examples), trained.layout.width)
        losses = torch.zeros(len(examples))
        for group, gradient, loss in self.row_gradients(trained, frozen, examples, slots, weights):
            found[group], losses[group] = gradient.cpu(), loss.cpu()
        losses *= torch.tensor(weights)
        sizes = [len(batch) for batch in batches]
        means = [float(own.mean()) if len(own) else 0.0 for own in losses.split(sizes)]
        return list(found.split(sizes)), means

    def finetune(
        self,
        trained: Adapters,
        frozen: Sequence[Adapters],
        sets: Sequence[TrainingSet],
        rates: Sequence[Sequence[float]],
        weight_decay: float = 0.0,
        proximal: float = 0.0,
        anchor: torch.Tensor | None = None,
    ) -> TrainingResult:
        """Trains the row of each device on its lesson, by AdamW on the mean loss over the tokens of each batch.

        The mean is weighted where the lesson has weights.

        Device k does step s on `lessons[k].batches[s]` at rate `rates[k][s]`. Devices are taken in blocks of like
        lessons, a block through all of its steps, so that the optimizer's state exists for one block at a time;
        each step goes in passes of devices with batches of like size. `proximal` is μ of μ/2 ‖row − anchor‖², added
        to the loss (FedProx, arXiv 1812.06127; Ditto, arXiv 2012.04221): the anchor is (K, P) or (1, P), if none is
        given the rows as they come.
        A device whose loss or adapter stops being a number keeps the row that it came with and is named in `failed`.
        """
        rows, losses = trained.rows.clone(), [list[float]() for _ in sets]
        sets = [replace(x, examples=self.prompted(x.examples, [*frozen, trained])) for x in sets]
        anchors = trained if anchor is None else Adapters(trained.layout, anchor)
        busy = [k for k, x in enumerate(sets) if x.batches]
        busy.sort(key=lambda k: (len(sets[k].batches), sets[k].tokens), reverse=True)

        def train(block: list[int]) -> tuple[torch.Tensor, list[list[float]]]:
            own, near = [a.pick(block) for a in frozen], anchors.pick(block)
            work, pace = [sets[k] for k in block], [rates[k] for k in block]
            start = Adapters(trained.layout, trained.rows[block])
            return self._train_block(start, own, work, pace, weight_decay, proximal, near)

        failed: dict[int, str] = {}
        room = [x.tokens // PASSES_PER_BLOCK for x in sets]
        for block, (learned, found) in self.token_budget.each(busy, by_tokens(room), train):
            sound = learned.isfinite().all(1).tolist()
            for place, k in enumerate(block):
                losses[k] = found[place]
                reason = objection(found[place], sound[place])
                if reason:
                    failed[k] = reason
                else:
                    rows[k] = learned[place]
        return TrainingResult(Adapters(trained.layout, rows), losses, failed)

    def _train_block(
        self,
        adapters: Adapters,
        frozen: Sequence[Adapters],
        sets: Sequence[TrainingSet],
        rates: Sequence[Sequence[float]],
        weight_decay: float,
        proximal: float,
        near: Adapters,
    ) -> tuple[torch.Tensor, list[list[float]]]:
        """Rows (K, P), trained in place, and losses of devices in the order of falling numbers of steps."""
        rows, losses = adapters.rows, [list[float]() for _ in sets]
        moments = Moments.zeros(rows)
        for step in range(len(sets[0].batches)):
            batches = [[x.examples[i] for i in x.batches[step]] for x in sets if step < len(x.batches)]
            sizes = [sum(e.length for e in batch) for batch in batches]
            order = sorted(range(len(batches)), key=lambda k: -sizes[k])  # so that those of a pass are alike
            for group in by_tokens(sizes, EVEN)(order, self.token_budget.tokens):
                chosen, own = [batches[k] for k in group], [a.pick(group) for a in frozen]
                if any(sets[k].weights for k in group):
                    of_targets = [sets[k].weights_of(sets[k].batches[step]) for k in group]
                    weights = [_mean_of_weights(of_batch) for of_batch in of_targets]
                    gradient, loss = self._gradient(adapters.pick(group), own, chosen, weights, of_targets)
                else:
                    weights = [_mean_of_tokens(batch) for batch in chosen]
                    gradient, loss = self._gradient(adapters.pick(group), own, chosen, weights)
                if proximal:
                    gradient.add_(rows[group] - near.pick(group).rows, alpha=proximal)  # ∇ μ/2 ‖row − anchor‖²
                adamw_(rows, gradient, moments, group, [rates[k][step] for k in group], weight_decay)
                for k, value in zip(group, loss.tolist(), strict=True):
                    losses[k].append(value)
        return rows, losses

    def gradient(
        self,
        trained: Adapters,
        frozen: Sequence[Adapters],
        batches: Sequence[Sequence[Example]],
        weights: Sequence[Sequence[float]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient (M, P) and value (M,) of each device's Σ weight · NLL over the examples of its own batch, nats.

        A weight may be negative: the loss of a pair, of which one is preferred, has such a gradient.
        """
        asked = [self.prompted(batch, [*frozen, trained]) for batch in batches]
        return self._gradient(trained, frozen, asked, weights)

    def _gradient(
        self,
        trained: Adapters,
        frozen: Sequence[Adapters],
        batches: Sequence[Sequence[Example]],
        weights: Sequence[Sequence[float]],
        of_targets: Sequence[Sequence[Sequence[float]]] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `gradient`, of examples that are behind their soft prompt, if there is one.

        Of each example's targets the NLL may have weights of its own: `of_targets`, by device and example.
        """
        pairs = [(k, e) for k, batch in enumerate(batches) for e in batch]
        spread = [some for of_batch in of_targets for some in of_batch]
        weight = torch.tensor([w for of_batch in weights for w in of_batch], device=self.device)
        value = torch.zeros(len(batches), device=self.device)
        gradient: torch.Tensor | None = None
        for group in by_tokens([e.length for _, e in pairs])(range(len(pairs)), self.token_budget.tokens):
            pack = self.pack([pairs[i][1] for i in group], [pairs[i][0] for i in group])
            rows = trained.rows.detach().requires_grad_(True)
            with torch.enable_grad():
                own = Adapters(trained.layout, rows).pick(pack.owners)
                with self.active([*(a.pick(pack.owners) for a in frozen), own], pack.owned, pack.texts):
                    losses = self.losses(pack, [spread[i] for i in group] if spread else ()) * weight[group]
                    (part,) = torch.autograd.grad(losses.sum(), rows)
            value.index_add_(0, torch.tensor(list(pack.slots), device=self.device), losses.detach())
            gradient = part if gradient is None else gradient.add_(part)
        return torch.zeros_like(trained.rows) if gradient is None else gradient, value

    # -- forward ------------------------------------------------------------------------------------------------

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Last hidden states (N, H) of tokens (1, N); to be called while their texts are `active`."""
        out = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, V) of hidden states (N, H) in the model's type."""
        return logits(hidden.to(self.dtype), self.head.weight, self.head.bias, self.softcap, self.scale)

    def losses(self, pack: Pack, weights: Sequence[Sequence[float]] = ()) -> torch.Tensor:
        """Σ NLL over the targets of each example, (R,) nats, each times its weight; only targets pass the head."""
        found = self.target_losses(pack)
        if weights:
            found = found * torch.tensor([w for of in weights for w in of], device=self.device)
        return torch.zeros(len(pack.examples), device=self.device).index_add(0, pack.targets[2], found)

    def target_losses(self, pack: Pack) -> torch.Tensor:
        """NLL of every target of the examples, in their order, (M,) nats."""
        places, ids, _ = pack.targets
        hidden = self._forward(pack.ids, pack.positions)[places]  # (M, H)
        return self._token_losses(hidden, ids)

    def _token_losses(self, hidden: torch.Tensor, targets: torch.Tensor, piece: int = 0) -> torch.Tensor:
        return token_losses(hidden, self.head.weight, self.head.bias, targets, self.softcap, piece, self.scale)

    @torch.inference_mode()
    def _check(self, probes: Sequence[Example], expected: torch.Tensor) -> None:
        """Refuses a model that packed texts and our own loss do not reproduce."""
        hidden = torch.cat([h for _, h in self.hidden(probes)])
        count, windows = self.model.config.get_text_config().num_hidden_layers, self.reading.windows
        if len(windows) < count:
            raise layers.UnsupportedModelError(
                f"{len(windows)} of {count} layers of {type(self.model).__name__} attend as transformers' "
                f"models can be told to: in the others the texts that are packed in one pass would mix"
            )
        if untold := [i for i in layers.windowed(self.model) if not windows.get(i)]:
            raise layers.UnsupportedModelError(
                f"layer {untold[0]} of {type(self.model).__name__} attends within a window or chunk that it does not "
                f"tell: longer texts would be read otherwise than it was trained to"
            )
        self.scale, self.error = self._nearest_scale(hidden, expected)
        if not self.error < (1e-3 if self.dtype == torch.float32 else 0.3):  # bfloat16 in 30 layers: 0.02 of a text
            raise layers.UnsupportedModelError(
                f"{type(self.model).__name__} computes attention or logits in a way that is not supported: "
                f"packed texts differ by {self.error:.2g} of the logits' norm"
            )

    def _nearest_scale(self, hidden: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
        """The scale with which our logits of hidden states are the model's own, and how far they are then."""
        errors = {}
        for scale in layers.logit_scales(self.model):
            found = logits(hidden, self.head.weight, self.head.bias, self.softcap, scale).float()
            errors[scale] = float((found - expected).norm() / expected.norm())
        return min(errors.items(), key=itemgetter(1))


def _filled(adapters: Adapters, rows: int) -> Adapters:
    """With rows of zeros behind, up to so many."""
    return Adapters(adapters.layout, torch.nn.functional.pad(adapters.rows, (0, 0, 0, rows - len(adapters.rows))))


def _mean_of_tokens(batch: Sequence[Example]) -> list[float]:
    """Weights with which the summed losses of a batch are the mean over its tokens."""
    return [1 / max(1, sum(e.targets for e in batch))] * len(batch)


def _mean_of_weights(of_targets: Sequence[Sequence[float]]) -> list[float]:
    """Weights with which the weighted losses of a batch are a weighted mean over its tokens."""
    return [1 / max(1e-9, sum(map(sum, of_targets)))] * len(of_targets)
