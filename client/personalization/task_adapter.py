"""Stage 1 of OPPU (arXiv 2402.04401): the base is adapted to the task by people who are not evaluated, and merged.

Their questions are asked as the method would ask them, so that a base that will read retrieved items has learned to.
What a person says is learned from one time only: the histories are context, the questions are the examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.config import AdapterConfig
from florilegium.client.personalization.config import TrainingConfig
from florilegium.client.personalization.history import Person
from florilegium.client.personalization.method import Method, MethodContext, worded


def learn_task(
    context: MethodContext, method: Method, others: Sequence[Person], shape: AdapterConfig, training: TrainingConfig
) -> Adapters:
    """One adapter (1, P) trained on the questions of these people, in the method's prompts."""
    method.prepare(others)
    examples = [
        replace(reply, prompt=worded(method, k, asked))
        for k, person in enumerate(others)
        for asked, reply in person.questions
    ]
    return context.train(shape, training, [examples], ["task"])
