"""The methods by name. To add one: its class in a file of its own, its name in `config.Name`, a line here."""

from __future__ import annotations

from collections.abc import Mapping

from client.personal.config import Name
from client.personal.kgt import KnowledgeGraph
from client.personal.method import Desk, Method
from client.personal.oppu import Oppu, Pooled
from client.personal.per_pcs import Assembled
from client.personal.pplug import Pplug
from client.personal.prompting import Prompting
from client.personal.rpo import Rpo

METHODS: Mapping[Name, type[Method]] = {
    "base": Prompting,
    "oppu": Oppu,
    "pooled": Pooled,
    "pplug": Pplug,
    "kgt": KnowledgeGraph,
    "per-pcs": Assembled,
    "rpo": Rpo,
}


def method(desk: Desk) -> Method:
    """The one that the desk's settings name."""
    return METHODS[desk.config.name](desk)
