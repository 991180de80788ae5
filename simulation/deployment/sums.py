"""What a server of real devices knows of their sums: the terms made whole, and checked as every device checks them."""

from __future__ import annotations

from collections.abc import Mapping

from florilegium.client.agent.acceptance import (
    check_for_everyone,
    check_promise,
    check_settings,
    check_sums,
    check_work,
)
from florilegium.client.agent.config import new_config
from florilegium.client.agent.distributed_terms import DistributedTerms
from florilegium.client.agent.terms import Membership, Terms
from florilegium.client.calibration import planned_event, release_noise, sum_code
from florilegium.client.config import DeviceConfig
from florilegium.client.context import release_schema
from florilegium.client.lm.adapter import AdapterLayout
from florilegium.client.lm.config import ModelConfig
from florilegium.privacy.noise import ReleaseNoise
from florilegium.privacy.secure_aggregation.rounded_noise import SumCode
from florilegium.server.secure_round import SumTerms
from florilegium.simulation.settings import validate

WIDEST = 32  # bits, until it is known how many it takes


def with_sums(terms: Terms, layout: AdapterLayout, asked: Mapping[str, object]) -> Terms:
    """The terms with what `asked` wants of sums, the noise that ε needs, and the fewest bits where it says 0.

    Raises `UserError` for what protects nobody, or cannot be.
    """
    told = validate(DistributedTerms, {**asked, "noise_multiplier": 1.0, "bits": WIDEST}, "server init")
    config = settings_of(terms.model_copy(update={"distributed": told}))
    told = told.model_copy(update={"noise_multiplier": planned_event(config).noise_multiplier})
    summed = config.secure_aggregation.model_copy(update={"bits": asked.get("bits", 0)})
    schema = release_schema(layout, terms.shared.upload)
    rounds = range(1, 1 + len(schema.turns))
    fitting = config.model_copy(update={"secure_aggregation": summed})
    bits = max(sum_code(fitting, schema, number, terms.seed).bits for number in rounds)
    told = told.model_copy(update={"bits": bits})
    whole = {**terms.model_dump(exclude_none=True), "distributed": told.model_dump()}
    return validate(Terms, whole, "server init")


def settings_of(terms: Terms) -> DeviceConfig:
    """A new device's under these terms; of sums nothing is its own."""
    return Membership.of(terms).settings(new_config(ModelConfig(name=terms.model)).device)


def check_for_devices(layout: AdapterLayout, terms: Terms) -> None:
    """Raises `UserError` for terms that every device would refuse."""
    if terms.distributed is None:
        check_for_everyone(layout, terms.shared, terms.rounds)
        return
    check_settings(terms.shared, terms.rounds)
    config = settings_of(terms)
    check_work(layout, config)
    check_promise(config, terms.min_devices)
    check_sums(config, release_schema(layout, terms.shared.upload), terms.distributed, terms.seed)


def sum_terms(terms: Terms, layout: AdapterLayout) -> SumTerms | None:
    """What the server tells sums by; None where devices send releases."""
    if terms.distributed is None:
        return None
    config, schema = settings_of(terms), release_schema(layout, terms.shared.upload)

    def code(number: int) -> SumCode:
        return sum_code(config, schema, number, terms.seed)

    return SumTerms(terms.federation, terms.distributed.limits, bytes.fromhex(terms.distributed.registrar), code)


def noise_of(terms: Terms) -> ReleaseNoise:
    """What a device adds, where the terms say it."""
    return release_noise(settings_of(terms), 1, 0) if terms.distributed else ReleaseNoise()
