"""Dialogues as token ids: the chat template, the limits, and batches of rows of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from client.dialogue import Dialogue
from privacy.config import Config

PROMPT_MARK, REPLY_MARK = "prompt⁣mark", "reply⁣mark"


class TextLimits(Config):
    """How much of a text a model gets to see. One place, so that training and evaluation agree."""

    prompt_tokens: int = Field(64, ge=1, description="longer prompts lose their beginning")
    reply_tokens: int = Field(64, ge=1, description="longer replies lose their end")


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt in its template and of the reply that follows, the end mark included."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    words: tuple[int, int]  # the first and the one past the last token of the user's words within `prompt`
    truncated: bool

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.reply)


class ChatFormat:
    """Turns texts into examples with the tokenizer's own chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: TextLimits) -> None:
        self.tokenizer, self.limits = tokenizer, limits
        messages = [{"role": "user", "content": PROMPT_MARK}, {"role": "assistant", "content": REPLY_MARK}]
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
        before, _, rest = rendered.partition(PROMPT_MARK)
        between, _, after = rest.partition(REPLY_MARK)
        if not between or REPLY_MARK not in rendered:
            raise ValueError("the chat template drops the user's or the assistant's text; set [model] chat_template")
        self.before, self.between = self._ids(before), self._ids(between)
        self.after = self._ids(after.rstrip()) or (int(tokenizer.eos_token_id),)
        self.stop_id = self.after[0]

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompts(self, texts: Sequence[str]) -> list[Example]:
        """Examples without a reply, for generation and embedding."""
        return self._examples(texts, [()] * len(texts), [False] * len(texts))

    def dialogues(self, dialogues: Sequence[Dialogue]) -> list[Example]:
        """Prompts with the recorded replies, for training and scoring."""
        limit = self.limits.reply_tokens
        encoded = self._batch([d.response for d in dialogues])
        replies = [(*ids[:limit], *(self.after if len(ids) <= limit else ())) for ids in encoded]
        return self._examples([d.prompt for d in dialogues], replies, [len(ids) > limit for ids in encoded])

    def _examples(self, texts: Sequence[str], replies: Sequence[tuple[int, ...]], cut: Sequence[bool]) -> list[Example]:
        limit, start = self.limits.prompt_tokens, len(self.before)
        examples = []
        for ids, reply, was_cut in zip(self._batch(texts), replies, cut, strict=True):
            words = ids[-limit:]
            prompt = (*self.before, *words, *self.between)
            truncated = was_cut or len(ids) > limit
            examples.append(Example(prompt, reply, (start, start + len(words)), truncated))
        return examples

    def _batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer([t.strip() for t in texts], add_special_tokens=False)["input_ids"]
        return ids


@dataclass(frozen=True)
class Batch:
    """Rows of ids, padded on the right, and where in them the targets are."""

    ids: torch.Tensor  # (R, T)
    mask: torch.Tensor  # (R, T), 1 on real tokens
    target_rows: torch.Tensor  # (M,)
    target_columns: torch.Tensor  # (M,), the position *before* the target
    targets: torch.Tensor  # (M,)


def pad(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """One padded batch. The targets are the tokens of the replies; the prompt is context only."""
    width = max(e.length for e in examples)
    ids = torch.full((len(examples), width), pad_id)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for i, e in enumerate(examples):
        ids[i, : e.length] = torch.tensor([*e.prompt, *e.reply])
        mask[i, : e.length] = 1
        rows += [i] * len(e.reply)
        columns += range(len(e.prompt) - 1, e.length - 1)
        targets += e.reply
    tensors = (ids, mask, torch.tensor(rows), torch.tensor(columns), torch.tensor(targets))
    return Batch(*(t.to(device) for t in tensors))


def by_length(examples: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    """Indices of examples in groups of like length whose padded size is at most `max_tokens` (one row at least)."""
    order = sorted(range(len(examples)), key=lambda i: -examples[i].length)
    group: list[int] = []
    for i in order:
        if group and examples[group[0]].length * (len(group) + 1) > max_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
