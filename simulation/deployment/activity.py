"""What a server's door has seen since its start, for its operator: counts and times, nothing of what was said."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Activity:
    """Times in seconds since 1970."""

    began: float = field(default_factory=time.time)
    turned_away: Counter[str] = field(default_factory=Counter)  # the word that was answered → requests
    heard: dict[str, float] = field(default_factory=dict)  # device → its last request
