"""All settings that a file may have: which kind of file it is, what each is, and a schema of them for editors.

Types, bounds, choices and what a setting does are those that settings are checked by: pydantic's fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import getdoc
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import Field, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from florilegium.client.agent.config import AgentConfig
from florilegium.privacy.common.base_config import Config
from florilegium.privacy.common.registry import HOW
from florilegium.server.config import ServerConfig
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.heterogeneity.classes import DeviceClasses
from florilegium.simulation.models.config import PretrainConfig
from florilegium.simulation.settings import ConfigError, find_config, read_tree
from florilegium.simulation.studies.config import TREES, StudyConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
EXTENSION = r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$"
TYPES = {
    "string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "array": "list",
    "object": "section",
}  # fmt: skip
BOUNDS = {
    "minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}",
    "minLength": "{} characters or more", "minItems": "{} or more", "maxItems": "{} at most", "pattern": "matches {}",
}  # fmt: skip


def _of_study(name: str, base: type[Config]) -> type[Config]:
    """A study's file: its own section beside the settings of its cells."""
    section = Field(description="how a grid of arms and seeds is run")
    return create_model(name, __base__=base, __doc__=base.__doc__, study=(StudyConfig, section))


KINDS: dict[str, type[Config]] = {
    "run": ExperimentConfig,
    "study": _of_study("StudyFile", ExperimentConfig),
    "rivals": _of_study("BaselinesStudyFile", TREES["rivals"]),
    "methods": _of_study("MethodsStudyFile", TREES["methods"]),
    "lives": _of_study("InteractiveStudyFile", TREES["lives"]),
    "pretrain": PretrainConfig,
    "classes": DeviceClasses,
    "server": ServerConfig,
    "device": AgentConfig,
}


def kind_of(tree: Mapping[str, Any]) -> str:
    """What a file with these settings is for: a study as it says, else the first kind that has all of them."""
    study = tree.get("study")
    if study is not None:
        kind = study.get("kind") if isinstance(study, dict) else None
        return kind if kind in TREES else "study"
    keys = set(tree) - {"name"}
    return next((kind for kind, config in KINDS.items() if keys <= set(config.model_fields)), "run")


def found_config(name: str) -> Path:
    """The file of a config, or that of a run's folder. Raises `ConfigError` where there is none."""
    stored = Path(name) / "config.toml"
    return stored if stored.is_file() else find_config(name)


def kind_of_file(name: str) -> str:
    """The kind of a config; `run` where it cannot be read."""
    try:
        return kind_of(read_tree(found_config(name)))
    except ConfigError:
        return "run"


def settings_of(kind: str) -> list[str]:
    """All settings of a kind, as `key.path`, without sections."""
    return list(_places(KINDS[kind]))


def _places(owner: type[Config], at: str = "") -> Iterator[str]:
    for key, field in owner.model_fields.items():
        inner = _section(owner, key)
        if inner in (type(field.default), field.annotation):
            yield from _places(cast(type[Config], inner), f"{at}{key}.")
        else:
            yield f"{at}{key}"  # tables and lists of sections as a whole: an override names none within


# -- one setting --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What is known of one setting, or of a section."""

    place: str
    kind: str
    type: str
    default: Any  # None: there is none
    about: str
    choices: tuple[Any, ...] = ()  # none: it is open
    bounds: tuple[str, ...] = ()
    extensible: bool = False  # takes package.module:NAME
    settings: tuple[Setting, ...] = ()  # of a section


def find_setting(place: str, kind: str = "") -> Setting:
    """A setting, or a section, of a kind of file, or of the first kind that has it.

    Raises `ConfigError` for a name that there is not, with the hint that a file's refusal gives.
    """
    refused: list[ConfigError] = []
    for tried in [kind] if kind else KINDS:
        try:
            return _found(tried, place)
        except ConfigError as error:
            refused.append(error)
    raise refused[0]  # of the kind that is given, or of runs


def _found(kind: str, place: str) -> Setting:
    section: type[Config] | None = KINDS[kind]
    owner, at = KINDS[kind], ""
    for part in place.split(".") if place else ():
        if section is None:
            raise ConfigError(f"{at} is a value, not a section")
        if part not in section.model_fields:
            raise ConfigError(f"{at or f'a {kind} file'}: unknown key {part!r}; {section.meant(part)}")
        owner, at = section, f"{at}.{part}" if at else part
        section = _section(owner, part)
    if section is None:
        return _value(owner, at, kind)
    inside = [(key, f"{at}.{key}" if at else key) for key in section.model_fields]
    settings = tuple(_value(section, inner, kind) for _, inner in inside)
    return Setting(at, kind, "section", None, getdoc(section) or "", settings=settings)


def _value(owner: type[Config], place: str, kind: str) -> Setting:
    """A field of a section; of one that is a section itself, its name and what it is."""
    key = place.rpartition(".")[2]
    field, inner = owner.model_fields[key], _section(owner, key)
    if inner is not None:
        return Setting(place, kind, "section", None, (getdoc(inner) or "").partition("\n")[0])
    told = json_schema(owner)["properties"][key]
    default = None if field.is_required() else told.get("default", field.get_default(call_default_factory=True))
    extensible = key in owner.extensible
    ours = [*([default] if owner.extensible.get(key) else []), *owner.extensible.get(key, ())]
    return Setting(
        place, kind, _type(told), default, field.description or "", tuple(dict.fromkeys(told.get("enum", ours))),
        tuple(BOUNDS[name].format(told[name]) for name in BOUNDS if name in told), extensible,
    )  # fmt: skip


def _section(owner: type[Config], key: str) -> type[Config] | None:
    """The class of a section; of a table of sections, as `study.tables`, or of a list, that of each of them."""
    field = owner.model_fields[key]
    inner = [type(field.default), field.annotation, *get_args(field.annotation)]
    return next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, Config)), None)


def _type(told: Mapping[str, Any]) -> str:
    if "type" not in told and "anyOf" in told:
        return " or ".join(dict.fromkeys(_type(one) for one in told["anyOf"]))
    items = told.get("items", {}).get("type")
    of = f" of {TYPES[items]}s" if items in ("string", "integer", "number") else ""
    return TYPES.get(told.get("type", ""), "any value") + of


def described(setting: Setting) -> str:
    """For people, in lines."""
    if setting.type == "section":
        width = max((len(s.place) for s in setting.settings), default=0)
        rows = (f"  {s.place:{width}}  {_shown(s):14}  {s.about}".rstrip() for s in setting.settings)
        return "\n".join([f"{setting.place or 'settings'} ({setting.kind})", setting.about, "", *rows])
    own = HOW if setting.choices else HOW.removeprefix("or ")
    of = [", ".join(map(_quoted, setting.choices)), *([own] if setting.extensible else [])]
    lines = {
        "type": ", ".join([setting.type, *setting.bounds]),
        "default": _shown(setting),
        "one of" if setting.choices else "also": ", ".join(filter(None, of)),
        "is": setting.about,
    }
    told = (f"  {name:8} {value}" for name, value in lines.items() if value)
    return "\n".join([f"{setting.place} ({setting.kind})", *told])


def _shown(setting: Setting) -> str:
    return {"section": "[…]"}.get(setting.type) or ("required" if setting.default is None else _quoted(setting.default))


def _quoted(value: Any) -> str:
    """As in TOML."""
    return json.dumps(value, ensure_ascii=False)


# -- a schema -----------------------------------------------------------------------------------------------------


@cache
def json_schema(config: type[Config]) -> dict[str, Any]:
    """JSON Schema of a file's settings; a name of ours or of a module of one's own where both are taken."""
    return {"$schema": DIALECT, **config.model_json_schema(schema_generator=_Schema)}


class _Schema(GenerateJsonSchema):
    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        told, kind = super().model_schema(schema), schema["cls"]
        for key, names in kind.extensible.items() if issubclass(kind, Config) else ():
            found = told["properties"][key]
            if names:
                choices = list(dict.fromkeys([found["default"], *names]))
                found["anyOf"] = [{"enum": choices}, {"pattern": EXTENSION}]
        return told
