"""The methods by name. To add one: its class in a file of its own, its name in `config.NAMES`, a line here."""

from __future__ import annotations

from collections.abc import Mapping

from florilegium.client.personalization.aloe import Aloe
from florilegium.client.personalization.core import Core
from florilegium.client.personalization.dpcml import Dpcml
from florilegium.client.personalization.dpl import Dpl
from florilegium.client.personalization.hydra import Hydra
from florilegium.client.personalization.hypernet import Hypernet, HypernetStart
from florilegium.client.personalization.kgt import KnowledgeGraph
from florilegium.client.personalization.method import Method, MethodContext
from florilegium.client.personalization.oppu import Oppu, Pooled
from florilegium.client.personalization.per_pcs import Assembled
from florilegium.client.personalization.pplug import Pplug
from florilegium.client.personalization.prompting import Prompting
from florilegium.client.personalization.rpo import Rpo
from florilegium.client.personalization.steerable import Steerable
from florilegium.client.personalization.tap_per import TapPer
from florilegium.client.personalization.userip import UserIp
from florilegium.privacy.common.registry import calling, resolve

METHODS: Mapping[str, type[Method]] = {
    "base": Prompting,
    "oppu": Oppu,
    "pooled": Pooled,
    "pplug": Pplug,
    "kgt": KnowledgeGraph,
    "per-pcs": Assembled,
    "rpo": Rpo,
    "hydra": Hydra,
    "dpcml": Dpcml,
    "steerable": Steerable,
    "core": Core,
    "hypernet": Hypernet,
    "hypernet-start": HypernetStart,
    "tap-per": TapPer,
    "userip": UserIp,
    "dpl": Dpl,
    "aloe": Aloe,
}


def method(context: MethodContext) -> Method:
    """The one that the settings name. Raises `ExtensionError`."""
    name = context.config.name
    with calling(name, "be made of a MethodContext alone"):
        return method_class(name)(context)


def method_class(name: str) -> type[Method]:
    """The method of this name, or one of the user's own. Raises `ExtensionError`."""
    return resolve(name, METHODS, type[Method])
