"""The base of every config model: frozen, unknown keys refused with the nearest name, defaults kept beneath.

A section that is given in part keeps the other values that its place in the tree has by default.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Config(BaseModel):
    """A frozen group of settings. Each field documents itself by its name, its type and its bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_over_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key in values:
            if key not in cls.model_fields:
                near = get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key {key!r}; {hint}")
        defaults = {k: cls.model_fields[k].default for k in values}
        return {k: _over(v, d.model_dump()) if isinstance(d := defaults[k], Config) else v for k, v in values.items()}


def _over(given: Any, default: Any) -> Any:
    """`given` where it says something, `default` elsewhere, section by section."""
    if not isinstance(given, dict) or not isinstance(default, dict):
        return given
    return {**default, **{k: _over(v, default.get(k)) for k, v in given.items()}}
