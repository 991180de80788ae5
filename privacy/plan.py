"""What a server says about a round: public values, the same for every device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """`version` counts the server's aggregations: the shared adapter that a device gets is of this version."""

    round: int
    version: int
