"""What its owner said elsewhere that a reply is shown: the dialogues that share most rare words with a prompt.

BM25 by `client.personalization.retrieve`, over the owner's own words: prompts, and what they would have said; never the
model's. Causal, as the vault has nothing that is not over; made anew for each prompt, so that nothing of what is erased
is left in an index. Words of more than a tenth of the dialogues do not count. Not covered: other words for the same.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection

import bm25s

from florilegium.client.agent.device import Device
from florilegium.client.agent.vault import Turn
from florilegium.client.dialogue import Echo
from florilegium.client.personalization.retrieve import best_first
from florilegium.client.words import words

NEWEST = 2000  # dialogues that are looked through
COMMON = 0.1  # of the dialogues: what is in more of them tells nothing
LEAST_COMMON = 2  # dialogues that a word may always be in
TOKENS = 32  # of what is shown of each


def recalled(device: Device, prompt: str, without: Collection[str]) -> list[Turn]:
    """At most `recall` dialogues, the best last, nearest to the prompt; none where no rare word is shared."""
    most, newest = device.config.recall, device.vault.count() - NEWEST
    if not most:
        return []
    turns = [t for t in device.vault.turns()[max(0, newest) :] if t.id not in without and t.prompt != prompt]
    documents = [words(own_words(turn)) for turn in turns]
    found_in = Counter(word for document in documents for word in set(document))
    bound = max(LEAST_COMMON, COMMON * len(documents))
    asked = [word for word in words(prompt) if 0 < found_in[word] <= bound]
    if not asked:
        return []
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    scores = index.get_scores(asked)
    return [turns[k] for k in best_first(scores)[:most] if scores[k] > 0][::-1]


def own_words(turn: Turn) -> str:
    """What the owner said in a dialogue."""
    return turn.prompt if isinstance(turn.reply, Echo) else f"{turn.prompt} {turn.reply}"


def line_of(device: Device, turn: Turn) -> str:
    """A dialogue as a reply is shown it: its day, and the beginning of what its owner said."""
    day = time.localtime(turn.time)
    text = device.format.beginning(" ".join(own_words(turn).split()), TOKENS)
    return f"({day.tm_mday} {time.strftime('%B', day)}) {text}"
