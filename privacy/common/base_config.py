"""The base of every config model: frozen, unknown keys refused with the nearest name, defaults kept beneath.

A section that is given in part keeps the other values that its place in the tree has by default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from florilegium.privacy.common.registry import is_extension

LARGEST = 2**64  # whole numbers are below: a seed has 64 bits


COMMON = {  # what other trainers and simulators call what has one name here, wherever it stands
    "lr": "learning_rate",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "num_rounds": "rounds",
    "temp": "temperature",
    "torch_dtype": "dtype",
    "device_map": "device",
    "model_name_or_path": "name",
}


class Config(BaseModel):
    """A frozen group of settings. Each field documents itself by its name, its type and its bounds.

    `elsewhere` has what other tools have in this place: the field that is meant, or why there is none. `extensible`
    has the fields that take `package.module:NAME` too (`privacy.common.registry`), each with the names of ours; with
    none where those cannot be listed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    elsewhere: ClassVar[Mapping[str, str]] = {}
    extensible: ClassVar[Mapping[str, Collection[str]]] = {}

    def extensions(self) -> list[str]:
        """The names of all modules' objects that these settings ask for, those of their sections too."""
        found: list[str] = []
        for key in type(self).model_fields:
            value = getattr(self, key)
            if isinstance(value, Config):
                found += value.extensions()
            elif key in self.extensible:
                found += filter(is_extension, [value] if isinstance(value, str) else value)
        return found

    @model_validator(mode="before")
    @classmethod
    def _known_keys_over_defaults(cls, values: object) -> object:
        if isinstance(values, cls):
            return values
        if not isinstance(values, dict):
            raise ValueError(  # noqa: TRY004  # pydantic tells where a ValueError belongs
                f"is a section, not a value; it has the settings {', '.join(cls.model_fields)}"
            )
        for key, value in values.items():
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key!r}; {cls.meant(str(key))}")
            if isinstance(value, int) and abs(value) >= LARGEST:
                raise ValueError(f"{key} is a whole number of more than 64 bits")
        defaults = {k: cls.model_fields[k].default for k in values}
        return {k: over(v, d.model_dump()) if isinstance(d := defaults[k], Config) else v for k, v in values.items()}

    @classmethod
    def meant(cls, key: str) -> str:
        """What somebody may have meant by a key that there is not."""
        told = cls.elsewhere.get(key) or COMMON.get(key, "")
        if told in cls.model_fields or key in cls.elsewhere:
            return f"it is called {told!r} here" if told in cls.model_fields else told
        near = [repr(name) for name in get_close_matches(key, cls.model_fields, n=1, cutoff=0.7)]
        deeper = [place for place in _places(cls) if place.endswith(f".{told or key}")]
        hint = f"did you mean {' or '.join([*near, *deeper])}?"
        return hint if near or deeper else f"known keys: {', '.join(cls.model_fields)}"


def over(given: object, default: object) -> object:
    """`given` where it says something, `default` elsewhere, section by section."""
    if not isinstance(given, dict) or not isinstance(default, dict):
        return given
    return {**default, **{k: over(v, default.get(k)) for k, v in given.items()}}


def _places(kind: type[Config], at: str = "") -> Iterator[str]:
    """All settings of a tree, as `key.path`."""
    for key, field in kind.model_fields.items():
        if isinstance(field.default, Config):
            yield from _places(type(field.default), f"{at}{key}.")
        else:
            yield f"{at}{key}"


def _listed(value: object) -> object:
    """A bare text as the list that it stands for: names with commas between them."""
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def _short_and_plain(value: str) -> str:
    if not 1 <= len(value) <= 64 or not value.isascii() or not all(c.isalnum() or c in "-_." for c in value):
        raise ValueError("must be 1 to 64 of the letters a to z and A to Z, digits, '-', '_' and '.'")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed, json_schema_input_type=str | tuple[str, ...])]
PlainName = Annotated[str, AfterValidator(_short_and_plain)]
