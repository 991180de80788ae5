"""Dialogues as token ids: the chat template and the limits.

A dialogue is one text to the tokenizer, so that its ids are those of the tokenizer's own `apply_chat_template`; which
are the prompt's and which the reply's is told by the places of the tokens in that text. Where the template ends with
spaces before a prompt or a reply, they are the text's: they become one token with its first word.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.control import Spelling, plain
from florilegium.client.lm.packing import Example
from florilegium.client.lm.places import ModelError
from florilegium.client.lm.template import render

PROMPT_MARK, REPLY_MARK = "prompt⁣mark", "reply⁣mark"
PROBES = (  # what is tried with every tokenizer; the replies end in different ways
    ("What is 2 + 2?", "4"),
    ("one  line\n\nand another", 'I have 3 cats, said "Ann"'),
    ("Привет, मित्र, 你好 🙂", "Это не важно!"),
    ("naïve", "it's fine."),
)
CHARACTERS = 16  # for each token that is kept, at first; the words around a cut are not looked at
SPARE = 16  # tokens that must come out beyond those that are kept, where a text was cut


@dataclass(frozen=True)
class Part:
    """What of a text is encoded."""

    text: str
    cut: bool

    def enough(self, tokens: int, limit: int) -> bool:
        """Whether the kept tokens are those of the whole text."""
        return not self.cut or tokens >= limit + SPARE


class ChatFormat:
    """Turns texts into examples with the tokenizer's own chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
        """Raises `ModelError` where what the template and the tokenizer make of a dialogue cannot be taken apart."""
        self.tokenizer, self.config, self.limits = tokenizer, config, config.limits
        before, between, after = self._around()
        try:
            self.spelling = Spelling(tokenizer, tokenizer.get_chat_template())
        except Exception as error:  # whatever stops the library of tokenizers
            raise self._refusal(f"its tokenizer cannot be used: {error}") from error
        marked = self.spelling.marked
        self.before, self.opening = marked(before), marked(between.rstrip(" "))
        self.gap = between[len(between.rstrip(" ")) :]
        self.after = marked(after.rstrip() or str(tokenizer.eos_token))
        self._check(ended=bool(after.strip()))
        self.stop = self._stop()

    def length(self, text: str) -> int:
        """Tokens of a text alone."""
        return len(self._encode([plain(text)])[0].ids)

    def beginning(self, text: str, tokens: int) -> str:
        """At most so many tokens of a text."""
        whole, reach = plain(text), (tokens + SPARE) * CHARACTERS
        while True:
            part = _start(whole, reach)
            offsets = self._encode([part.text])[0].offsets
            if part.enough(len(offsets), tokens):
                return part.text[: offsets[tokens][0]] if len(offsets) > tokens else text
            reach *= CHARACTERS

    def prompts(self, texts: Sequence[str]) -> list[Example]:
        """Examples without a reply, for generation and embedding."""
        return self._examples([plain(t).strip() for t in texts], None)

    def dialogues(self, dialogues: Sequence[Dialogue]) -> list[Example]:
        """Prompts with the recorded replies, for training and scoring."""
        return self._examples(
            [plain(d.prompt).strip() for d in dialogues], [plain(d.response).strip() for d in dialogues]
        )

    def _examples(self, prompts: Sequence[str], replies: Sequence[str] | None) -> list[Example]:
        """One call of the tokenizer for all, of no more of each text than the limits will keep.

        It is called again for texts of which too few tokens came out.
        """
        found: dict[int, Example] = {}
        left, reach = list(range(len(prompts))), CHARACTERS
        most = (self.limits.prompt_tokens + SPARE, self.limits.reply_tokens + SPARE)
        while left:
            asked = [_end(prompts[i], most[0] * reach) for i in left]
            said = [_start(replies[i], most[1] * reach) for i in left] if replies is not None else []
            made = self._cut(asked, said)
            found.update({i: example for i, example in zip(left, made, strict=True) if example})
            left, reach = [i for i in left if i not in found], reach * CHARACTERS
        return [found[i] for i in range(len(prompts))]

    def _cut(self, asked: Sequence[Part], said: Sequence[Part]) -> list[Example | None]:
        """Examples within the limits; none where a text was cut too short."""
        replies = [s.text for s in said] if said else [None] * len(asked)
        encoded = self._encode([self._text(a.text, r) for a, r in zip(asked, replies, strict=True)])
        return [
            self._example(e, a, said[i] if said else None) for i, (e, a) in enumerate(zip(encoded, asked, strict=True))
        ]

    def _example(self, encoded: Encoding, asked: Part, said: Part | None) -> Example | None:
        ids, limits = encoded.ids, self.limits
        first, last, border, end = self._borders(encoded, asked.text, said.text if said else "")
        words, reply = ids[first:last], ids[border:end]
        if not asked.enough(len(words), limits.prompt_tokens):
            return None
        if said and not said.enough(len(reply), limits.reply_tokens):
            return None
        kept = words[-limits.prompt_tokens :]
        ending = ids[end:] if len(reply) <= limits.reply_tokens else ()
        return Example(
            (*ids[:first], *kept, *ids[last:border]),
            (*reply[: limits.reply_tokens], *ending) if said else (),
            (first, first + len(kept)),
            len(kept) < len(words) or len(reply) > limits.reply_tokens,
        )

    def _borders(self, encoded: Encoding, prompt: str, reply: str) -> tuple[int, int, int, int]:
        """The first token of the prompt's words, the one past them, the reply's first, the end mark's first.

        A token that is partly of the words or of the reply is theirs.
        """
        starts, ends = zip(*encoded.offsets, strict=True) if len(encoded) else ((), ())
        words = len(self.before.rstrip(" "))
        opening = len(self.before) + len(prompt)
        gap = opening + len(self.opening)
        after = gap + len(self.gap) + len(reply)
        last = bisect_left(starts, opening)
        return (
            min(bisect_right(ends, words), last),
            last,
            max(bisect_right(ends, gap), last),
            bisect_left(starts, after),
        )

    def _text(self, prompt: str, reply: str | None) -> str:
        asked = f"{self.before}{prompt}{self.opening}"
        return asked if reply is None else f"{asked}{self.gap}{reply}{self.after}"

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        return self.spelling.encode(texts)

    # -- what the template says, and whether it can be relied on ----------------------------------------------------

    def _around(self) -> tuple[str, str, str]:
        """What the template writes before the prompt, between prompt and reply, and after the reply."""
        rendered = render(self.tokenizer, PROMPT_MARK, REPLY_MARK, self.config.date)
        before, _, rest = rendered.partition(PROMPT_MARK)
        between, _, after = rest.partition(REPLY_MARK)
        if not between or REPLY_MARK not in rendered:
            raise self._refusal("its chat template drops the user's or the assistant's text")
        return before, between, after

    def _check(self, ended: bool) -> None:
        """Of every probe the ids are the tokenizer's own, and the prompt's are those that it has without a reply."""
        for prompt, reply in PROBES:
            (alone, whole) = self._encode([self._text(prompt, None), self._text(prompt, reply)])
            *_, border, end = self._borders(whole, prompt, reply)
            ids = whole.ids if ended else whole.ids[:end]  # an end mark that the template lacks is ours
            rendered = render(self.tokenizer, prompt, reply, self.config.date)
            expected: list[int] = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
            if ids != expected[: len(ids)] or alone.ids != whole.ids[:border] or not border < end:
                raise self._refusal(f"of the tokens of its chat template with {reply!r} no part is the reply's alone")

    def _stop(self) -> tuple[int, ...]:
        """What ends a reply: the first control token of the end mark, else what it is after every reply."""
        endings = []
        for prompt, reply in PROBES:
            (whole,) = self._encode([self._text(prompt, reply)])
            endings.append(whole.ids[self._borders(whole, prompt, reply)[-1] :])
        control = [i for i in endings[0] if i in self.spelling.ids]
        if control:
            return (control[0],)
        alike = 0
        while alike < min(map(len, endings)) and len({ids[-alike - 1] for ids in endings}) == 1:
            alike += 1
        if not alike:
            raise self._refusal("its chat template ends replies with other tokens each time")
        return tuple(endings[0][-alike:])

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(
            f"model {self.config.name!r}: {reason}; set [model] chat_template to 'plain' or to a Jinja template that "
            "ends replies with eos_token, or take a model with a fast tokenizer (tokenizer.json)"
        )


def _start(text: str, characters: int) -> Part:
    return Part(text[:characters], len(text) > characters)


def _end(text: str, characters: int) -> Part:
    return Part(text[-characters:], len(text) > characters)
