"""What a shell is offered for a config and for overrides; `florilegium --install-completion` teaches the shell."""

from __future__ import annotations

from pathlib import Path

import typer


def complete_config(incomplete: str) -> list[str]:
    """Configs that come with the package, TOML files, and folders on the way to one."""
    from florilegium.simulation.settings import bundled_configs

    given = Path(incomplete)
    folder = given if incomplete.endswith("/") else given.parent
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [f"{path}/" if path.is_dir() else str(path) for path in inside if path.is_dir() or path.suffix == ".toml"]
    return [name for name in [*bundled_configs(), *files] if name.startswith(incomplete)]


def complete_setting(ctx: typer.Context, incomplete: str) -> list[str]:
    """Overrides of the config that stands before them; of a run where that cannot be read yet."""
    from florilegium.simulation.cli.known_settings import kind_of_file, settings_of

    kind = kind_of_file(ctx.params.get("config") or "")
    return [f"{place}=" for place in settings_of(kind) if place.startswith(incomplete)]


def complete_place(incomplete: str) -> list[str]:
    """Settings of any kind of file."""
    from florilegium.simulation.cli.known_settings import KINDS, settings_of

    every = dict.fromkeys(place for kind in KINDS for place in settings_of(kind))
    return [place for place in every if place.startswith(incomplete)]
