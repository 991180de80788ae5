"""What a benchmark is asked for, read and checked before anything heavy is loaded.

Without pydantic: `bench engine` runs where there are torch and transformers alone.
"""

from __future__ import annotations

from collections.abc import Collection

from florilegium.privacy.common.errors import UserError

KINDS = ("training", "embedding", "generation", "dp_training")  # of work, in `bench engine`
DTYPES = ("float32", "bfloat16")
TROUBLES = ("none", "hot", "guest", "server")  # of people who learn, in `bench acceptance`
SPLITS = ("development", "test", "all")


def model(name: str) -> str:
    """The name of a model that there is; raises `ModelError`."""
    from florilegium.client.lm.places import check_model  # and with it the hub's client: `--help` needs none

    check_model(name)
    return name


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers from `1,8,64`, in order; raises `UserError`."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise UserError(f"{option} {text!r} must be whole numbers from 1 on, with commas, as in 1,8,64")
    return found


def sizes(text: str, option: str) -> list[float]:
    """Numbers above zero from `0.75,1`; raises `UserError`."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not min(found) > 0:
        raise UserError(f"{option} {text!r} must be numbers above 0, with commas, as in 0.75,1")
    return found


def halves(text: str, option: str) -> list[float]:
    """Numbers above 0, at most a half, from `0.1,0.2`; raises `UserError`."""
    found = sizes(text, option)
    if max(found) > 0.5:
        raise UserError(f"{option} {text!r} must be numbers above 0 and at most 0.5")
    return found


def troubles(text: str) -> list[str]:
    """Of `TROUBLES`, with commas; raises `UserError`."""
    return some_of(text, TROUBLES, "--troubles")


def split(text: str) -> str:
    """One of `SPLITS`; raises `UserError`."""
    (found,) = some_of(text, SPLITS, "--split") if "," not in text else ("",)
    if not found:
        raise UserError(f"--split {text!r} must be one of {', '.join(SPLITS)}")
    return found


def kinds(text: str) -> list[str]:
    """Of `KINDS`, with commas; raises `UserError`."""
    return some_of(text, KINDS, "--kinds")


def dtypes(text: str) -> list[str]:
    """Of `DTYPES`, with commas; none where none is named. Raises `UserError`."""
    return some_of(text, DTYPES, "--dtypes") if text else []


def policies(text: str) -> list[str]:
    """Of `client.selection.policies.POLICIES`, with commas; all where none is named. Raises `UserError`."""
    from florilegium.client.selection.policies import POLICIES  # and with it pydantic

    return some_of(text, POLICIES, "--policies") if text else list(POLICIES)


def some_of(text: str, known: Collection[str], option: str) -> list[str]:
    """Names of `known` ones, with commas; raises `UserError`."""
    asked = text.split(",")
    for name in asked:
        if name not in known:
            raise UserError(f"{option} {name!r} must be of {', '.join(known)}")
    return asked
