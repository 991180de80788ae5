"""What a run reads beside its settings, as hashes in its folder: people, model, word lists, classes of devices.

They are noted when the run begins, and compared whenever it is opened: when it is resumed, and in every process that
simulates its devices. A file that was changed in between would mix two experiments without a word. Beside the hashes
stands what the people's data was taken for, and what was left out of it. Not covered: newcomers, who are read at the
end alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256

from florilegium.client.lm.places import fingerprint, resolve
from florilegium.client.selection.lexicons import load_lexicons
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.data.formats.reading import FIRST
from florilegium.simulation.data.population import Bootstrapped, User, told_of
from florilegium.simulation.heterogeneity.classes import load_classes
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.folder import RunFolder

NOTED = "inputs.json"
READ_FROM = {
    "people": "what its devices see and are tested on (data.name = {0.data.name!r}, evaluation.newcomers = "
    "{0.evaluation.newcomers})",
    "model": "the model (model.name = {0.model.name!r})",
    "lexicons": "the word lists (selection.lexicons)",
    "classes": "the classes of devices (world.classes = {0.world.classes!r})",
}


def agree(run: RunFolder, population: Sequence[User]) -> None:
    """Notes the inputs of a run that begins; raises `RunError` where one is not what was noted."""
    found, noted = hashes(run.config, population), run.path / NOTED
    if not noted.exists():
        fresh = noted.with_suffix(f".{os.getpid()}")
        told = [line.partition(FIRST)[0] for line in told_of(population)]  # files may be called after people
        read = {"read": told} if told else {}
        fresh.write_text(json.dumps(found | read, indent=1) + "\n", encoding="utf-8")
        fresh.replace(noted)
    if other := differing(json.loads(noted.read_text(encoding="utf-8")), found):
        what = " and ".join(READ_FROM[key].format(run.config) for key in other)
        raise RunError(
            f"{run.path} was begun with other files: what has changed is {what}; old and new would be mixed. Put back "
            f"what was there, or begin anew with --overwrite or name=…"
        )


def differing(noted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Which inputs are not what was noted."""
    return [key for key, value in found.items() if noted.get(key) != value]


def hashes(config: ExperimentConfig, population: Sequence[User]) -> dict[str, str]:
    """One for each thing that a run reads."""
    lexicons = load_lexicons(config.selection.lexicons)
    classes = load_classes(config.world.classes) if config.world.classes else ()
    return {
        "people": people_sha256(population, config.data.users),
        "model": fingerprint(resolve(config.model.name)),
        "lexicons": _sha256({name: sorted(words) for name, words in lexicons.items()}),
        "classes": _sha256(classes),
    }


def people_sha256(population: Sequence[User], devices: int) -> str:
    """Of all dialogues of the people behind so many devices; those that are resampled follow from them.

    >>> one, other = (User("u", (), ()), User("v", (), ()))
    >>> people_sha256([one, other], 1) == people_sha256([one], 1) != people_sha256([other], 1)
    True
    """
    digest = sha256()
    if isinstance(population, Bootstrapped):
        digest.update(f"{population.devices} {population.seed}".encode())
        people = population.people
    else:
        people = population[:devices]
    for user in people:
        digest.update(repr(user).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _sha256(said: object) -> str:
    return sha256(repr(said).encode("utf-8", "surrogatepass")).hexdigest()
