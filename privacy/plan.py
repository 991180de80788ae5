"""What a server says about a round: public values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """`version` counts the server's aggregations: the shared adapter that a device gets is of this version.

    `heads` are those of the devices' ledgers with their last releases, as far as the server remembers them.
    """

    round: int
    version: int
    heads: Mapping[str, str] = field(default_factory=dict)
