"""The settings of an experiment of a study of baselines: they are compared at one size."""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from florilegium.simulation.config import BaselineConfig, ExperimentConfig, check_baseline


class BaselinesConfig(ExperimentConfig):
    """An experiment with a baseline. What a run of [shared], [personal] and [synthesis] does besides is not done."""

    baseline: BaselineConfig = BaselineConfig(name="ours")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_a_baseline(cls, values: Any) -> Any:
        """Those of every experiment: a study says all that it compares."""
        return values

    @model_validator(mode="after")
    def _baseline_fits(self) -> Self:
        if not self.baseline.name:
            raise ValueError("baseline.name must not be empty here; our own method is 'ours'")
        if self.shared.adapter != self.personal.adapter:
            raise ValueError("shared.adapter and personal.adapter must be equal: baselines are compared at one size")
        check_baseline(self, self.baseline.name)
        return self
