"""ROUGE (Lin 2004) over words of any script: in scripts without spaces between words, over characters.

English comes out as by the library `rouge_score` alone, which knows no letters but a to z and takes every other for a
space. Not covered: stems in other languages.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from florilegium.client.words import words


class Words(Tokenizer):  # type: ignore[misc]  # the library has no types
    """Those of `client.words`; English ones of more than three letters stemmed if asked for, as in the library."""

    def __init__(self, stemmed: bool) -> None:
        self.stemmer = PorterStemmer() if stemmed else None

    def tokenize(self, text: str) -> list[str]:
        return [self._stem(word) for word in words(text)]

    def _stem(self, word: str) -> str:
        return self.stemmer.stem(word) if self.stemmer and len(word) > 3 and word.isascii() else word


def rouge1(reference: str, text: str) -> float:
    """ROUGE-1 F1 with stemming."""
    return rouge("rouge1", reference, text, stemmed=True)


def rouge(kind: Literal["rouge1", "rougeL"], reference: str, text: str, *, stemmed: bool) -> float:
    """F1 by words or by the longest common subsequence."""
    return float(_scorer(kind, stemmed).score(reference, text)[kind].fmeasure)


@lru_cache(maxsize=4)
def _scorer(kind: str, stemmed: bool) -> RougeScorer:
    return RougeScorer([kind], tokenizer=Words(stemmed))
