"""Settings of any tree: found, read from TOML with overrides, checked, and said in words for people where wrong."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError

import florilegium
from florilegium.privacy.common.base_config import Config
from florilegium.privacy.common.errors import UserError
from florilegium.privacy.common.suggestions import did_you_mean
from florilegium.simulation.data.folder import shown
from florilegium.simulation.data.population import DataConfig

SAID = {  # of what pydantic says in words of Python
    "string_type": 'must be a text; in quotes if it looks like something else, as "3", on a command line \'"3"\'',
    "string_too_short": "must not be empty",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "tuple_type": 'must be a list, as ["one", "two"]',
    "dict_type": "must be a section of settings",
}
KIND = re.compile(r"constrained-|literal\[|(int|float|str|bool|none)$|function-|tagged-union|tuple\[|list\[|dict\[")
Model = TypeVar("Model", bound=Config)


class ConfigError(UserError):
    """A config file or an override is wrong; names file, key, value and what was expected."""


def config_folder() -> Path:
    """The configs that come with the package: beside the sources, or inside an installed distribution."""
    installed = Path(florilegium.__file__).parent / "configs"
    return installed if installed.is_dir() else Path(florilegium.__file__).parent.parent / "configs"


def bundled_configs() -> list[str]:
    """The names of the configs that come with the package."""
    folder = config_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.toml"))


def find_config(name: str) -> Path:
    """A path, or the name of a config that comes with the package (`quickstart`, `selection/dolly`)."""
    path = Path(name)
    if path.is_file():
        return path
    folder, inside = config_folder(), path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    bundled = folder / inside.with_suffix(".toml")
    if bundled.is_file() and bundled.resolve().is_relative_to(folder.resolve()):
        return bundled
    have = bundled_configs()
    near = did_you_mean(inside.with_suffix("").as_posix().lower(), have, 0.7)
    hint = f"; {near}" if near else f" nor one of: {', '.join(have)}"
    raise ConfigError(f"config {name!r} is no file{hint}")


def validate(kind: type[Model], tree: dict[str, Any], where: str, path: Path | None = None) -> Model:
    """The settings of a tree; raises `ConfigError` with a line for each that is wrong.

    It names the line of the file `path` that the setting stands in, where all of the tree is from there.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        text = path.read_text(encoding="utf-8-sig") if path else ""
        told = [f"{where}{_line_in(text, place)}: {what}" for place, what in _told(error.errors())]
        raise ConfigError("\n".join(told)) from None


def _line_in(text: str, place: str) -> str:
    """Where a setting is given a value in a text of TOML: ", line 3"; "" where it is not."""
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[+\s*([\w.\-]+)\s*\]+", line):
            section = f"{header[1]}."
        elif (key := re.match(r"\s*([\w.\-]+)\s*=", line)) and f"{place}.".startswith(f"{section}{key[1]}."):
            return f", line {number}"
    return ""


def parse_override(text: str) -> tuple[str, Any]:
    """`key.path=value` with a TOML value or a bare word."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {shown(text)} must be key=value, for example personal.learning_rate=1e-4")
    try:
        return key, tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError as error:
        if value[:1] not in ("[", '"', "'"):
            return key, value
        raise ConfigError(f"override {shown(text)}: {_toml_error(error, value)}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"override {shown(text)}: {_toml_error(error, value)}") from None


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Puts a value at `key.path` of a tree of settings."""
    *path, last = key.split(".")
    for part in path:
        if part == "engine" and isinstance(tree.get(part), str):
            tree[part] = {"name": tree[part]}
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override of {key!r}: {part} is a value, not a section")
    tree[last] = value


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a file as they stand there, with overrides `key.path=value`; named after the file."""
    tree = _parsed(path)
    tree.setdefault("name", path.stem)
    for override in overrides:
        set_value(tree, *parse_override(override))
    return tree


def _parsed(path: Path) -> dict[str, Any]:
    """A TOML file, with or without the mark that Windows' editors put before it."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: is not UTF-8 ({error.reason}); save the file as UTF-8") from None
    try:
        return tomllib.loads(text.replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {_toml_error(error, text)}") from None


def _toml_error(error: Exception, text: str) -> str:
    """What is wrong with a text in TOML, and for a Windows path how it is written."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    found = re.search(r"line (\d+)", str(error))
    line = text.splitlines()[int(found[1]) - 1 :][:1] if found else []
    if any("\\" in part for part in line):
        return f"{error}; in \"…\" a backslash begins an escape: write a path in '…' or with /"
    if text.startswith("["):
        return f'{error}; texts of a list stand in quotes, on a command line \'["one", "two"]\''
    return str(error).split("; use sys.", maxsplit=1)[0]


def _told(errors: Sequence[Any]) -> list[tuple[str, str]]:
    """Each setting that is wrong, with what each kind of value that it may have says of it, in one line."""
    by_place: dict[str, list[Any]] = {}
    for error in errors:
        by_place.setdefault(_place(error), []).append(error)
    return [
        (place, " or ".join([_explain(first), *(_message(e).removeprefix("Input should ") for e in others)]))
        for place, (first, *others) in by_place.items()
    ]


def _place(error: Any) -> str:
    """The setting, without pydantic's names of the kinds of value that it may have."""
    parts = [str(part) for part in error["loc"]]
    while len(parts) > 1 and KIND.match(parts[-1]):
        parts.pop()
    return ".".join(parts) or "top level"


def _message(error: Any) -> str:
    found: str = SAID.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    return found


def _explain(error: Any) -> str:
    where, message = _place(error), _message(error)
    if isinstance(error.get("input"), dict | Config):
        return f"{where}: {message}"
    return f"{where} = {shown(error.get('input'))}: {message}"


def data_config(name: str, overrides: Sequence[str] = ()) -> DataConfig:
    """The settings of a data set alone; in `overrides` they may stand as in a run's config, with `data.` before."""
    return validate(DataConfig, section_tree("data", name, overrides), f"data set {name}")


def section_tree(section: str, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of a section alone that has a name; overrides may stand with the section before, as in a run's."""
    tree: dict[str, Any] = {"name": name}
    for override in overrides:
        key, value = parse_override(override)
        set_value(tree, key.removeprefix(f"{section}."), value)
    return tree


def dump_config(config: Config) -> str:
    """The complete config as TOML."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
