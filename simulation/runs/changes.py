"""Which settings of a run may be others when it goes on: none that something that is done would depend on.

The processes are free. What is measured after the last round alone is measured anew. More rounds are had where the
rounds that are done stay what they would have been and the noise was planned for no more releases than there will be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.settings import ConfigError

Changes = dict[str, tuple[Any, Any]]
# Without effect on what is computed, but for rounding.
SPEED = ("ray.", "cohort_size", "workers", "engine.on_device_error", "engine.failed_share", "callbacks")


def changes(before: ExperimentConfig, after: ExperimentConfig) -> Changes:
    """The settings that differ, by dotted key: the value before, and after."""
    old, new = (flat(config.model_dump(mode="json")) for config in (before, after))
    return {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}


def told(found: Changes) -> str:
    """`key: before → after` of each."""
    return ", ".join(f"{key}: {before!r} → {after!r}" for key, (before, after) in found.items())


def check(before: ExperimentConfig, after: ExperimentConfig, done: int, where: str) -> None:
    """Raises `ConfigError` unless a run of which so many rounds are done may go on with other settings."""
    found = changes(before, after)
    fixed = {key: values for key, values in found.items() if not key.startswith((*SPEED, "evaluation.", "rounds"))}
    planned = fixed.pop("privacy.releases", None) if "rounds" in found else None
    if fixed:
        raise ConfigError(
            f"{where} differs from the config given ({told(fixed)}); resume with the same settings: only rounds, "
            f"[evaluation], [ray], workers, cohort_size and callbacks may be others"
        )
    if "evaluation.users" in found and done:
        raise ConfigError(
            f"{where}: {told({'evaluation.users': found['evaluation.users']})} cannot be changed after a round: the "
            f"curves are those of the same devices, and so are the controls, which have learned since round 1"
        )
    if "rounds" in found and (why := _against_rounds(before, after, done)):
        both = {"rounds": found["rounds"]} | ({"privacy.releases": planned} if planned else {})
        raise ConfigError(f"{where}: {told(both)}: {why}")


def _against_rounds(before: ExperimentConfig, after: ExperimentConfig, done: int) -> str:
    """Why a run cannot go on with this number of rounds; empty: it can."""
    if done < before.rounds:
        return (
            f"{done} of {before.rounds} rounds are done, and every stream was divided by {before.rounds}; let the run "
            f"end first and then give it more, or begin anew"
        )
    if after.rounds < before.rounds:
        return f"{before.rounds} rounds are done"
    if before.world.classes:
        return "how long the devices of a [world] work in a round follows from the number of rounds"
    if before.evaluation.users:
        return "which devices are evaluated (evaluation.users) follows from all rounds"
    if before.server.absent or before.privacy.mode == "none":
        return ""
    return _against_noise(before, after)


def _against_noise(before: ExperimentConfig, after: ExperimentConfig) -> str:
    from florilegium.client.calibration import planned_event

    if planned_event(before) == planned_event(after):
        return ""
    releases = min(before.rounds, before.privacy.releases or before.rounds)
    return (
        f"the noise of the rounds that are done was planned for {releases} releases, and more would need more noise "
        f"from the first on; add privacy.releases={releases}: devices then go on learning, and send nothing once "
        f"their budget is spent"
    )


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values of a tree of settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found
