"""When an answer leaves a device: at a time that does not tell what the work for it was.

The seconds of a private phase follow the coins, the texts, and how much had arrived: whoever measures them learns of
what was drawn, and a dialogue that is known to be drawn is hidden by less noise. So an answer leaves a fixed time
after its question, the pace: as long as a round takes in which every text is as long as it may be. An answer that was
not ready by then, as the machine was busy, its owner was talking or much had arrived, leaves after twice the pace, or
four times. Where the work alone took longer, that is the pace from then on. What is told in all is in which rounds it
took so many times as long.
"""

from __future__ import annotations

import math
import time

from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue

LEAST_S = 0.25
REHEARSED = 8  # texts


def doubled(pace: float, spent: float) -> float:
    """The pace, or the least of its doubles that holds the seconds spent."""
    return pace * 2.0 ** max(0, math.ceil(math.log2(max(spent, pace) / pace)))


def rehearsed(context: CohortContext) -> float:
    """The pace of this device for these settings: seconds, a power of two.

    Private passes of texts of the greatest length are timed, and reckoned up to those that a round draws on average.
    """
    shared, limits = context.config.shared, context.lm.format.limits
    drawn = shared.batch_size
    if context.config.privacy.by_dialogue:
        drawn = math.ceil(shared.sampling_rate * shared.pool_capacity * (1 + shared.synthetic))
    longest = Dialogue("", "word " * limits.prompt_tokens, "word " * (limits.reply_tokens + 1))
    batch = context.lm.format.dialogues([longest] * min(max(1, drawn), REHEARSED))
    adapter, seconds = context.lm.adapters(context.shared_layout, context.shared_layout.start(0)), []
    for _ in range(2):  # the first one learns what the machine can do
        began = time.monotonic()
        context.lm.engine.dp_gradients(adapter, [], [batch])
        seconds.append(time.monotonic() - began)
    return doubled(LEAST_S, min(seconds) / len(batch) * drawn * shared.steps_per_round)
