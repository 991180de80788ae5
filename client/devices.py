"""What an engine asks of devices, whoever they are: a real one, or cohorts of simulated ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from florilegium.client.secure_sessions import Sessions
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Schema
from florilegium.privacy.secure_aggregation.part import Sendable


class Devices(Protocol):
    """One device or a cohort, by their names."""

    @property
    def schema(self) -> Schema:
        """The arrays of a shared adapter."""

    @property
    def sessions(self) -> Sessions | None:
        """Those of secure aggregation, where they are these devices' own to keep, and not their engine's."""

    def contribute(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> list[Sendable | None]:
        """Learns on what was received (P,); the release of each device, None for one that sends nothing."""

    def adopt(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> None:
        """Takes what the releases have become (P,), and ends the round."""
