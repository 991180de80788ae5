"""Names of what can be extended: a key of a table, or `package.module:NAME` of a module of the user's own.

A module is imported because whoever runs the program has named it in their own settings. What a server, or any other
peer, says is never resolved here: an import that somebody else names is code of theirs. Settings that come from others
(terms, plans, invitations) have closed lists.

What an extension does wrong ends a run with one `ExtensionError` that names it, the device if there is one, and what
was expected. An extension is to be a function of its arguments, or what is computed in company, again or by another
process is something else: of a policy it is noticed that it keeps something from one call to the next, of others not.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import TypeVar, cast, get_args, get_origin

from florilegium.privacy.common.errors import FlorilegiumError, UserError
from florilegium.privacy.common.suggestions import did_you_mean

Found = TypeVar("Found")
_NAME = r"[^\W\d]\w*"
_EXTENSION = re.compile(rf"{_NAME}(\.{_NAME})*:{_NAME}")
HOW = "or package.module:NAME of a module of your own"
_LOOKING: ContextVar[bool] = ContextVar("looking", default=False)


class ExtensionError(UserError):
    """An extension is not there, is something else, or does not do what it is asked for."""


class UnexpectedError(ValueError):
    """What was returned is not what was asked for; the message begins with a verb, as in 'returned 99'."""


def is_extension(name: str) -> bool:
    """Whether a name has the form `package.module:NAME`."""
    return _EXTENSION.fullmatch(name) is not None


@contextmanager
def looking() -> Iterator[None]:
    """Settings that are read in here are looked at, those of somebody else's run say: no extension is imported."""
    token = _LOOKING.set(True)
    try:
        yield
    finally:
        _LOOKING.reset(token)


def looked_at(name: str) -> bool:
    """Whether this is the name of an extension in settings that are only looked at."""
    return _LOOKING.get() and is_extension(name)


def resolve(name: str, table: Mapping[str, Found], kind: object) -> Found:
    """What a name stands for: an entry of the table, or what a module of the user's own has under it.

    `kind` is a class, `type[Base]` for a subclass of it, or `Callable`. Raises `ExtensionError` for a name that is
    neither, for a module that is not there or cannot be imported, for a name that it does not have, and for what is no
    `kind`.
    """
    if name in table:
        return table[name]
    if not is_extension(name):
        raise ExtensionError(_unknown(name, table))
    found = _imported(name)
    if not _is_a(found, kind):
        raise ExtensionError(f"{name} is {_article(type(found).__name__)}; it must be {_told(kind)}")
    return cast(Found, found)


def check(name: str, names: Collection[str], kind: object = object) -> str:
    """The name, for a field's validator: one of these, or an extension of a kind. Raises `ValueError`."""
    try:
        if name not in names and not looked_at(name):
            resolve(name, dict.fromkeys(names), kind)
    except ExtensionError as error:
        raise ValueError(str(error)) from None
    return name


def _unknown(name: str, names: Collection[str]) -> str:
    near = did_you_mean(name.lower(), names)
    hint = f"{near} " if near else ""
    return f"{hint}must be one of {', '.join(names)}, {HOW}" if names else f"must be {HOW.removeprefix('or ')}"


def _imported(name: str) -> object:
    place, _, attribute = name.partition(":")
    if place == "__main__":
        raise ExtensionError(f"{name}: other processes look for it too; write it into a module, a file with a name")
    try:
        module = import_module(place)
    except ModuleNotFoundError as error:
        if not error.name or not f"{place}.".startswith(f"{error.name}."):
            raise ExtensionError(f"{name}: {place} cannot be imported: {error}") from error
        raise ExtensionError(
            f"{name}: there is no module {error.name!r}; install it, or put the folder that holds it on PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:
        raise ExtensionError(f"{name}: {place} cannot be imported: {_said(error)}") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        near = did_you_mean(attribute, dir(module))
        hint = f"; {near}" if near else ""
        raise ExtensionError(f"{name}: module {place} has no {attribute!r}{hint}") from None


def _is_a(found: object, kind: object) -> bool:
    if kind is Callable:
        return callable(found)
    if get_origin(kind) is type:
        return isinstance(found, type) and issubclass(found, get_args(kind)[0])
    return isinstance(found, cast("type[object]", kind))


def _told(kind: object) -> str:
    if kind is Callable:
        return "something to call"
    if get_origin(kind) is type:
        return f"a class derived from {get_args(kind)[0].__name__}"
    return _article(cast("type[object]", kind).__name__)


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


# -- what an extension does -------------------------------------------------------------------------------------------


@contextmanager
def calling(name: str, expected: str, of: str = "") -> Iterator[None]:
    """What an extension of this name raises in here becomes an `ExtensionError`; errors of ours stay what they are.

    `expected` says what it must do, `of` for which device. An entry of a table is no extension: what it raises is a
    fault of ours.
    """
    try:
        yield
    except (FlorilegiumError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        if not is_extension(name):
            raise
        said = str(error) if isinstance(error, UnexpectedError) else f"raised {_said(error)}"
        raise ExtensionError(f"{f'{of}: ' if of else ''}{name} {said}; it must {expected}") from error


@contextmanager
def naming(device: str) -> Iterator[None]:
    """An `ExtensionError` in here is that of a device."""
    try:
        yield
    except ExtensionError as error:
        raise ExtensionError(f"{device}: {error}") from error.__cause__


def _said(error: BaseException) -> str:
    """Its kind, its first line, and the file and line that raised it."""
    lines = str(error).splitlines() or [""]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {lines[0]}{where}"


# -- where extensions lie ---------------------------------------------------------------------------------------------


def source_files(names: Iterable[str]) -> dict[str, Path]:
    """The file of each module that one of these names is in, by the module's name. Raises `ExtensionError`."""
    found: dict[str, Path] = {}
    for name in sorted(set(names)):
        _imported(name)
        place = name.partition(":")[0]
        file = getattr(sys.modules[place], "__file__", None)
        if not file:
            raise ExtensionError(f"{name}: module {place} has no file; other processes look for it too")
        found[place] = Path(file)
    return found


def import_folders(names: Iterable[str]) -> list[str]:
    """The folders from which the modules of these names are imported, absolute."""
    files = source_files(names).items()
    depth = {place: place.count(".") + (file.name == "__init__.py") for place, file in files}
    return sorted({str(file.absolute().parents[depth[place]]) for place, file in files})
