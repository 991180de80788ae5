"""How a server for real devices aggregates: the file that `server init` writes, and what does not go together in it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import tomli_w

from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.terms import Terms
from florilegium.server.config import ServerConfig
from florilegium.simulation.deployment.certificates import SETTINGS

OF_RULE = {"rule", "trimmed_share", "byzantine", "krum_keep"}


def write_settings(folder: Path, settings: ServerConfig) -> None:
    (folder / SETTINGS).write_text(tomli_w.dumps(settings.model_dump(include=OF_RULE)), encoding="utf-8")


def read_settings(folder: Path) -> ServerConfig:
    """Raises `DeviceError` for a file that does not say how."""
    try:
        return ServerConfig.model_validate(tomllib.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DeviceError(f"{folder / SETTINGS}: {error}") from None


def check_rule(settings: ServerConfig, terms: Terms) -> None:
    """Raises `DeviceError` where a round that has the releases it is to have could have too few for its rule.

    Or where it has none, as of sums alone, and the rule looks at each.
    """
    if terms.distributed and settings.rule != "mean":
        raise DeviceError(
            f"--rule {settings.rule} looks at each device's release, and in {terms.distributed.mode!r} nobody sees "
            f"any: what a server has is their sum; take mean"
        )
    if (needed := settings.least_releases) > terms.min_devices:
        why = {
            "krum": f"with byzantine = {settings.byzantine} and krum_keep = {settings.krum_keep}",
            "trimmed-mean": f"to leave out one at each end with trimmed_share = {settings.trimmed_share:g}",
        }.get(settings.rule, "by what it says of itself")
        raise DeviceError(
            f"min_devices = {terms.min_devices} is below the {needed} releases that {settings.rule} needs {why}: "
            f"florilegium server init --min-devices {needed}, or another rule"
        )
