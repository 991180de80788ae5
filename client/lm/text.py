"""Dialogues as token ids: the chat template and the limits."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from client.dialogue import Dialogue
from client.lm.config import TextLimits
from client.lm.packing import Example

PROMPT_MARK, REPLY_MARK = "prompt⁣mark", "reply⁣mark"


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

    def length(self, text: str) -> int:
        """Tokens of a text alone."""
        return len(self._ids(text))

    def beginning(self, text: str, tokens: int) -> str:
        """At most so many tokens of a text."""
        ids = self._ids(text)
        return text if len(ids) <= tokens else str(self.tokenizer.decode(list(ids[:tokens])))

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
        sound = [t.encode("utf-8", "replace").decode().strip() for t in texts]  # of half a surrogate pair, a "?"
        ids: list[list[int]] = self.tokenizer(sound, add_special_tokens=False)["input_ids"]
        return ids
