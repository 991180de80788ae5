"""Questions that have nothing to do with anybody, with plain answers: what a personal adapter should not forget."""

from __future__ import annotations

from florilegium.client.dialogue import Dialogue

_ANSWERED = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What do plants need to grow?", "Plants need water, light and air to grow."),
    ("Which planet is closest to the sun?", "Mercury is the planet that is closest to the sun."),
    ("What is ice made of?", "Ice is frozen water."),
    ("How do birds fly?", "Birds fly by moving their wings through the air."),
    ("What is a library for?", "A library lends books to people who want to read them."),
    ("Why does it rain?", "Water in the clouds gathers into drops and falls to the ground."),
)
NEUTRAL = tuple(Dialogue(f"neutral-{i}", asked, answer) for i, (asked, answer) in enumerate(_ANSWERED))
