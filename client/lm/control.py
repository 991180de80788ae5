"""Control tokens have a spelling of their own, so that what a person writes is text, whatever it looks like.

A copy of the tokenizer knows them by that spelling alone: noncharacters of Unicode, which stand in no text. Everything
else of it is the original's, so that ids are those of the original. Not covered: tokenizers without a fast form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

FIRST, LAST = "\ufdd0", "\ufdef"  # of the noncharacters that Unicode keeps out of texts (its chapter 23.7)
_NONCHARACTER = re.compile(f"[{FIRST}-{LAST}]")
_SHAPE = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)  # what the field writes control tokens as


class Spelling:
    """The control tokens of a tokenizer with a chat template, and the copy to which only `marked` ones are such."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        """Raises `ValueError` for a tokenizer that cannot be copied."""
        backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError("it has no fast form, which tells where in a text each token stands")
        known = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content}
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        listed = {*special, *tokenizer.all_special_tokens, *(getattr(tokenizer, "chat_control_tokens", None) or ())}
        control = [t for t in known if t in listed or _is_marker(t, template)]
        self.ids = frozenset(known[t] for t in control)
        self._spelled = {t: _spelled(n) for n, t in enumerate(control)}
        longest_first = sorted(map(re.escape, control), key=len, reverse=True)
        self._control = re.compile("|".join(longest_first) or r"(?!)")
        self._copy = _copied(backend, self._spelled)
        lost = [t for t in control if self._copy.token_to_id(self._spelled[t]) != known[t]]
        if lost:
            raise ValueError(f"its control token {lost[0]!r} cannot be told from text that looks like it")

    def marked(self, text: str) -> str:
        """A template's own text, with its control tokens as such."""
        return self._control.sub(lambda found: self._spelled[found[0]], text)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Ids and places of tokens, without any that the tokenizer would add; one call for many texts."""
        return self._copy.encode_batch(list(texts), add_special_tokens=False)


def plain(text: str) -> str:
    """A person's text with a "?" for half a surrogate pair, and a "\ufffd" for a noncharacter."""
    return _NONCHARACTER.sub("\ufffd", text.encode("utf-8", "replace").decode())


def _is_marker(token: str, template: str) -> bool:
    """Whether an added token that is not said to be special is a mark of the template's, not a word or some spaces."""
    return bool(token.strip()) and (token in template or bool(_SHAPE.fullmatch(token)))


def _spelled(number: int) -> str:
    digits = "".join(chr(ord(FIRST) + 1 + int(digit)) for digit in str(number))
    return f"{FIRST}{digits}{FIRST}"


def _copied(backend: Tokenizer, spelled: Mapping[str, str]) -> Tokenizer:
    """The tokenizer with other spellings of some tokens; nothing is added, cut or filled up."""
    state: dict[str, Any] = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["content"] = spelled.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        for old, new in spelled.items():
            if old in model["vocab"]:
                model["vocab"][new] = model["vocab"].pop(old)
    else:  # Unigram's
        model["vocab"] = [[spelled.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in spelled:
        model["unk_token"] = spelled[model["unk_token"]]
    state.update(truncation=None, padding=None, post_processor=None)
    return Tokenizer.from_str(json.dumps(state))
