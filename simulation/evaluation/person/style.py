"""Whose texts are these: attribution to one of K people by how each of them has written before.

By function words: rates of the commonest words and marks less everybody's, each by the root of everybody's, compared by
cosine: Burrows' Delta in the form of Smith and Aldridge (2011), but for the scale. A count of a rare word varies as its
root, and of the few words of some chat replies that is most of what varies; z-scores over people, which they take, told
64 people apart less well (areas of .66, .81 and .85 with 1, 4 and 8 replies, not .72, .88 and .92). By character
n-grams of three to five: tf-idf, compared by cosine (Stamatatos 2009). By likelihood: how much likelier a text's
character trigrams are for a person than for everybody, for single replies. None of them looks at what a model says of
a text. Not covered: embeddings that were trained to tell authors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import regex
from scipy import sparse

from florilegium.client.words import words

COMMONEST = 200  # words and marks that are looked at
LONG, SHORT = range(3, 6), range(3, 4)  # lengths of character n-grams: of attribution, of the likelihood
PRIOR = 200.0  # of everybody's n-grams or tokens, that a person's counts are smoothed with
MARK = regex.compile(r"[\p{P}\p{S}]")
Matrix = npt.NDArray[np.float64]


def joined(replies: Iterable[str]) -> str:
    return "\n".join(replies)


@dataclass(frozen=True)
class WordStyle:
    """How often each of K people uses each of the V commonest words and marks of them all."""

    vocabulary: dict[str, int]
    mean: Matrix  # (V,) of the people's rates
    profiles: Matrix  # (K, V), of length 1

    @classmethod
    def of(cls, known: Sequence[str]) -> WordStyle:
        """`known[k]` is all that person k is known to have written."""
        counts = [Counter(_units(text)) for text in known]
        every = sum(counts, Counter[str]())
        ranked = sorted(every, key=lambda unit: (-every[unit], unit))[:COMMONEST]
        vocabulary = {unit: i for i, unit in enumerate(ranked)}
        rates = np.stack([_rates(c, vocabulary) for c in counts])
        mean = rates.mean(0)
        return cls(vocabulary, mean, _unit((rates - mean) / np.sqrt(mean)))

    def scores(self, texts: Sequence[str]) -> Matrix:
        """(T, K) cosines with every person; 0 for a text without a word."""
        rates = np.stack([_rates(Counter(_units(text)), self.vocabulary) for text in texts])
        vectors = _unit((rates - self.mean) / np.sqrt(self.mean))
        vectors[[not text.strip() for text in texts]] = 0
        found: Matrix = vectors @ self.profiles.T
        return found


@dataclass(frozen=True)
class CharacterStyle:
    """The character n-grams of K people, weighted by how few of them use each."""

    vocabulary: dict[str, int]
    weights: Matrix  # (V,): log (K / people) + 1
    profiles: sparse.csr_matrix  # (K, V), of length 1

    @classmethod
    def of(cls, known: Sequence[str]) -> CharacterStyle:
        """`known[k]` is all that person k is known to have written; what one person alone uses counts too."""
        counts = [Counter(_grams(text, LONG)) for text in known]
        people = Counter(gram for c in counts for gram in c)
        vocabulary = {gram: i for i, gram in enumerate(sorted(people))}
        weights = np.log(len(known) / np.array([people[gram] for gram in vocabulary] or [1])) + 1
        return cls(vocabulary, weights, _weighted(counts, vocabulary, weights))

    def scores(self, texts: Sequence[str]) -> Matrix:
        """(T, K) cosines with every person."""
        vectors = _weighted([Counter(_grams(text, LONG)) for text in texts], self.vocabulary, self.weights)
        found: Matrix = (vectors @ self.profiles.T).toarray()
        return found


@dataclass(frozen=True)
class Likelihood:
    """How often each of K people uses each unit of text, beside how often they all do."""

    counts: Sequence[Counter[Hashable]]
    totals: Sequence[int]
    everybody: Counter[Hashable]
    total: int

    @classmethod
    def of(cls, units: Sequence[Iterable[Hashable]]) -> Likelihood:
        counts = [Counter(u) for u in units]
        every = Counter[Hashable]()
        for own in counts:
            every.update(own)
        return cls(counts, [c.total() for c in counts], every, every.total())

    @classmethod
    def of_characters(cls, known: Sequence[str]) -> Likelihood:
        return cls.of([_grams(text, SHORT) for text in known])

    def ratio(self, person: int, unit: Hashable) -> float:
        """log p(unit | person) / p(unit), the person's counts smoothed with `PRIOR` units of everybody's."""
        rate = (self.everybody[unit] + 1) / (self.total + len(self.everybody) + 1)
        return math.log((self.counts[person][unit] + PRIOR * rate) / (self.totals[person] + PRIOR) / rate)

    def score(self, person: int, text: str) -> float:
        """The mean ratio of a text's trigrams, nats; 0 for a text that has none."""
        found = _grams(text, SHORT)
        return sum(self.ratio(person, gram) for gram in found) / max(1, len(found))


def ranks(scores: Matrix, own: Sequence[int]) -> list[float]:
    """Of each text (T, K) the share of the other people who are less like it than `own[t]`; who is equal counts half.

    Its mean is the area under the curve of telling one's own from others' texts.

    >>> ranks(np.array([[0.9, 0.1, 0.9]]), [0]), ranks(np.array([[0.9, 0.1, 0.5]]), [1])
    ([0.75], [0.0])
    """
    rows = zip(scores, own, strict=True)
    return [float((np.sum(row < row[k]) + (np.sum(row == row[k]) - 1) / 2) / (len(row) - 1)) for row, k in rows]


def rights(scores: Matrix, own: Sequence[int]) -> list[float]:
    """Of each text (T, K) whether `own[t]` is the most like it; of n that are equal each is right 1 / n times.

    >>> rights(np.array([[0.9, 0.1, 0.9]]), [0]), rights(np.array([[0.9, 0.1, 0.5]]), [1])
    ([0.5], [0.0])
    """
    rows = zip(scores, own, strict=True)
    return [float(row[k] == row.max()) / int(np.sum(row == row.max())) for row, k in rows]


def of_others(scores: Matrix, measured: Callable[[Matrix, Sequence[int]], list[float]]) -> list[float]:
    """What `ranks` or `rights` is for each person where other people's texts (K, K) are taken for theirs: the floor."""
    count = len(scores)
    moved = [measured(np.roll(scores, shift, axis=0), range(count)) for shift in range(1, count)]
    return [float(x) for x in np.mean(moved, axis=0)]


def _units(text: str) -> list[str]:
    return [*words(text), *MARK.findall(text)]


def _grams(text: str, lengths: Iterable[int]) -> list[str]:
    shown = " ".join(text.split())
    return [shown[i : i + n] for n in lengths for i in range(len(shown) - n + 1)]


def _rates(counts: Counter[str], vocabulary: dict[str, int]) -> Matrix:
    found = np.zeros(len(vocabulary))
    for unit, count in counts.items():
        if unit in vocabulary:
            found[vocabulary[unit]] = count
    return found / max(1, counts.total())


def _weighted(counts: Sequence[Counter[str]], vocabulary: dict[str, int], weights: Matrix) -> sparse.csr_matrix:
    """(T, V): (1 + log count) · weight, of length 1."""
    known = [[(vocabulary[gram], n) for gram, n in c.items() if gram in vocabulary] for c in counts]
    columns = np.array([i for some in known for i, _ in some], dtype=np.int64)
    values = (1 + np.log([n for some in known for _, n in some])) * weights[columns]
    starts = np.cumsum([0, *map(len, known)])
    made = sparse.csr_matrix((values, columns, starts), shape=(len(counts), len(weights)))
    lengths = np.sqrt(np.asarray(made.multiply(made).sum(1)).ravel())
    return sparse.diags(1 / np.where(lengths > 0, lengths, 1)).tocsr() @ made


def _unit(rows: Matrix) -> Matrix:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Matrix = rows / np.where(lengths > 0, lengths, 1)
    return found
