"""The metrics of LaMP and of other benchmarks, per query, per user and over all queries.

LaMP's are as in its authors' evaluation (github.com/LaMP-Benchmark/LaMP, `eval/evaluation.py`): predictions are
stripped and compared with case; macro-F1 is over the whole list of labels, a label without any prediction and target
counting 0, and a prediction that is no label is wrong and no label's; a rating that cannot be read is taken for
whichever of 1 and 5 is farther from the target, 5 where both are; ROUGE is F1 without stemming (`evaluate`'s default),
unlike the project's other figures, which stem, and over words of any script (`client.words`), which changes nothing in
English. LaMP prints the median of a bootstrap of ROUGE's mean; here it is the mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from florilegium.client.rouge import rouge

Answer = tuple[str, str]  # a prediction and its target
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LOWER_IS_BETTER = {"mae", "rmse"}


@dataclass(frozen=True)
class Measure:
    """One metric of one set of predictions: over all queries, by user, by query.

    `by_query` is empty for RMSE and macro-F1, which one query does not have; `by_user` for macro-F1, which on a few
    queries would be ruled by the labels that a user never meets.
    """

    pooled: float
    by_user: tuple[float, ...] = ()
    by_query: tuple[float, ...] = ()

    @property
    def mean_per_user(self) -> float:
        """Each user counts the same; not a number where `by_user` is empty."""
        return float(np.mean(self.by_user)) if self.by_user else math.nan


def measure(metric: str, answers: Sequence[Sequence[Answer]], labels: Sequence[str] = ()) -> Measure:
    """One metric of the answers of each user; raises `ValueError` for a user without any and an unknown metric."""
    if not answers or not all(answers):
        raise ValueError("every user needs at least one answer to be measured")
    pooled = [answer for of_user in answers for answer in of_user]
    if metric == "f1":
        return Measure(macro_f1(pooled, labels))
    if metric == "rmse":
        return Measure(rmse(pooled), tuple(rmse(of_user) for of_user in answers))
    if metric not in OF_A_QUERY:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join([*OF_A_QUERY, 'f1', 'rmse'])}")
    scores = [[OF_A_QUERY[metric](*answer) for answer in of_user] for of_user in answers]
    by_query = tuple(score for of_user in scores for score in of_user)
    return Measure(float(np.mean(by_query)), tuple(float(np.mean(s)) for s in scores), by_query)


def accuracy(prediction: str, target: str) -> float:
    return float(prediction.strip() == target.strip())


def macro_f1(answers: Sequence[Answer], labels: Sequence[str]) -> float:
    """The mean over all labels of 2 hits / (times predicted + times right), 0 for a label that never came up."""
    given = [(prediction.strip(), target.strip()) for prediction, target in answers]
    scores = []
    for label in labels:
        hits = sum(prediction == target == label for prediction, target in given)
        named = sum((prediction == label) + (target == label) for prediction, target in given)
        scores.append(2 * hits / named if named else 0.0)
    return float(np.mean(scores))


def rating(prediction: str, target: float) -> float:
    """The number that was said, or the end of 1 … 5 that is farther from the target."""
    try:
        number = float(prediction)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return number
    return 1.0 if abs(1 - target) > abs(5 - target) else 5.0


def absolute_error(prediction: str, target: str) -> float:
    return abs(rating(prediction, float(target)) - float(target))


def rmse(answers: Sequence[Answer]) -> float:
    return math.sqrt(float(np.mean([absolute_error(*answer) ** 2 for answer in answers])))


def rouge_1(prediction: str, target: str) -> float:
    return rouge("rouge1", target.strip(), prediction.strip(), stemmed=False)


def rouge_l(prediction: str, target: str) -> float:
    return rouge("rougeL", target.strip(), prediction.strip(), stemmed=False)


def choice_accuracy(prediction: str, target: str) -> float:
    """Whether a reply names the right one of (a) to (d) and no other, behind `<final_answer>` or else in all of it.

    As PersonaMem's authors read it: letters in brackets, or where there are none, letters that stand alone.
    """
    whole = prediction.lower()
    right = {target.strip("() ").lower()}
    return float(any(_letters(said) == right for said in (whole.rpartition("<final_answer>")[2], whole)))


def label_accuracy(prediction: str, target: str) -> float:
    """Whether one of the labels that a reply names, separated by commas, is one of the right ones (PEFT-U)."""
    named, right = ({label.strip() for label in text.split(",")} - {""} for text in (prediction, target))
    return float(bool(named & right))


def _letters(said: str) -> set[str]:
    return set(re.findall(r"\(([a-d])\)", said)) or set(re.findall(r"\b([a-d])\b", said))


def slot_accuracy(prediction: str, target: str) -> float:
    """Whether both are the same value after `normal`."""
    return float(normal(prediction) == normal(target))


def normal(value: str) -> str:
    """A value without case and punctuation, small numbers as digits, a clock's "pm" apart and its ":00" gone.

    >>> normal("Two at 6:00PM.") == normal("2 at 6 p.m.")
    True
    """
    plain = re.sub(r"\b([ap])\.m\b\.?", r"\1m", value.lower())
    plain = re.sub(r"(\d)\s*([ap]m)\b", r"\1 \2", re.sub(r":00\b", "", plain))
    words = re.findall(r"\w+(?:[:']\w+)*", re.sub(r"(?<=\d),(?=\d{3})", "", plain))
    return " ".join(str(NUMBERS.index(word)) if word in NUMBERS else word for word in words)


OF_A_QUERY: dict[str, Callable[[str, str], float]] = {
    "accuracy": accuracy,
    "mae": absolute_error,
    "rouge-1": rouge_1,
    "rouge-L": rouge_l,
    "slot accuracy": slot_accuracy,
    "choice accuracy": choice_accuracy,
    "label accuracy": label_accuracy,
}
