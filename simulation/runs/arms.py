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


def arm_of(name: str) -> Arm:
    """The look of an arm; an arm that the table does not know is drawn grey under its own name."""
    return ARMS.get(name, Arm(f"the arm {name}", "", "#7d8288", "hexagon"))
