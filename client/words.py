"""The words of a text in any script.

Words are runs of letters and digits with their marks, in lower case. Chinese, Japanese, Thai, Lao, Khmer and Burmese
are written without spaces between words: there each character counts, with the marks on it. Not covered: finding
words in such scripts.
"""

from __future__ import annotations

import unicodedata

import regex

UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_CHARACTER = rf"[[\p{{L}}\p{{N}}]&&{UNSPACED}]\p{{M}}*"
_SPACED = rf"[[\p{{L}}\p{{N}}]--{UNSPACED}][[\p{{L}}\p{{N}}\p{{M}}\u200c\u200d]--{UNSPACED}]*"
_LETTER = rf"[\p{{L}}&&{UNSPACED}]\p{{M}}*"
_WORD = regex.compile(rf"{_CHARACTER}|{_SPACED}", regex.V1)
_UNIT = regex.compile(rf"{_CHARACTER}[^\s\p{{L}}\p{{N}}]*|[\S--{UNSPACED}]+", regex.V1)
_BARE = regex.compile(rf"{_LETTER}|(?<!\S)[[\p{{L}}\p{{M}}]--{UNSPACED}]+(?!\S)", regex.V1)


def words(text: str) -> list[str]:
    """Those of a text, in their order.

    >>> words("Don't stop: café №1, 你好!"), words("हिन्दी में")
    (['don', 't', 'stop', 'café', '1', '你', '好'], ['हिन्दी', 'में'])
    """
    found: list[str] = _WORD.findall(unicodedata.normalize("NFC", text.lower()))
    return found


def count(text: str) -> int:
    """How long a text is: what stands between spaces, and each character of a script that has none.

    >>> count("it's a well-known fact."), count("我有三只猫。"), count("")
    (4, 5, 0)
    """
    return len(_UNIT.findall(text))


def bare(text: str) -> list[str]:
    """What stands between spaces and is letters alone, as it is written; each letter of a script without spaces.

    >>> bare("Well, it is fine"), bare("हिन्दी में 2"), bare("你好，我")
    (['it', 'is', 'fine'], ['हिन्दी', 'में'], ['你', '好', '我'])
    """
    found: list[str] = _BARE.findall(text)
    return found
