"""The arms of a run, ways of answering that are measured beside each other, and which of them are compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arm:
    """How one way of answering is named and drawn, in every table and figure alike."""

    subject: str
    meaning: str
    colour: str
    symbol: str
    dash: str = "solid"


# Colours are at least 3:1 against a white and a dark page, and told apart in all three kinds of colour blindness;
# the symbol repeats what the colour says.
ARMS = {
    "base": Arm("the base model", "the model as it came, no adapter", "#7d8288", "circle-open", "dot"),
    "shared": Arm("the shared adapter", "aggregated from what the devices released", "#1987ba", "square"),
    "local": Arm("the local adapter", "learned on the device alone, nothing shared", "#7d5f16", "triangle-up", "dash"),
    "personal": Arm("the personal adapter", "the shared adapter and the user's own, added", "#d25440", "circle"),
    "shuffled": Arm("a stranger's adapter", "control: another user's personal adapter", "#e347bd", "x", "dashdot"),
    "pooled": Arm("the pooled adapter", "reference: all data in one place, no privacy", "#0b994b", "diamond", "dash"),
}

# (metric, arm, arm that it is compared with) → its place in the verdict; None: it is in the table alone. They are
# recorded in this order.
COMPARISONS: dict[tuple[str, str, str], int | None] = {
    ("nll", "personal", "base"): 2,
    ("nll", "personal", "shuffled"): 5,
    ("nll", "personal", "local"): 4,
    ("nll", "personal", "shared"): 3,
    ("nll", "shared", "base"): 1,
    ("nll", "pooled", "base"): None,
    ("rouge1", "personal", "base"): 7,
    ("rouge1", "personal", "shuffled"): None,
    ("rouge1", "shared", "base"): 6,
}


# Measures of whether a model has become its person's: what they are called, and what they say.
PERSON = {
    "style-words": ("style, words", "area under the curve of attributing replies to their person by function words"),
    "style-words-right": ("style, words, right", "share of people to whom their replies are attributed"),
    "style-characters": ("style, characters", "as style, by character n-grams"),
    "style-characters-right": ("style, characters, right", "share of people to whom their replies are attributed"),
    "choice-4": ("which of 4 is mine", "share of one's own replies that are likelier a token than 3 of others"),
    "choice-10": ("which of 10 is mine", "share of one's own replies that are likelier a token than 9 of others"),
    "rank": ("rank of one's adapter", "share of others' adapters under which one's replies are less likely"),
    "rank-first": ("one's adapter is first", "share of people whose replies are likeliest under their own adapter"),
    "own-tokens": ("gain on one's own tokens", "nats over the base where a token is more the person's than others'"),
    "other-tokens": ("gain on the other tokens", "nats over the base on the rest of the same replies"),
    "others-nll": ("others' replies, NLL", "nats a token of other people's replies; lower is better"),
    "neutral-nll": ("neutral text, NLL", "nats a token of plain answers to plain questions; lower is better"),
    "repetition": ("repetition", "share of pairs of words that stood in the same reply before; lower is better"),
    "distinct-2": ("distinct pairs", "different pairs of words by all pairs of a person's replies"),
}


def arm_of(name: str) -> Arm:
    """The look of an arm; an arm that the table does not know is drawn grey under its own name."""
    return ARMS.get(name, Arm(f"the arm {name}", "", "#7d8288", "hexagon"))
