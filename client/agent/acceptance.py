"""Whether a device may do what a federation's terms ask: what it would cost, and what of its promise would be left.

All is reckoned before anything is joined, paid for or sent, within seconds and some tens of megabytes whatever the
terms say. Not covered: what a server makes of the releases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from florilegium.client.agent.distributed_terms import DistributedTerms
from florilegium.client.agent.errors import RefusedTermsError
from florilegium.client.calibration import planned_event, planned_steps, sum_code
from florilegium.client.config import DeviceConfig, SharedConfig
from florilegium.privacy.accounting import Event, epsilon
from florilegium.privacy.common.errors import UserError
from florilegium.privacy.modes import Mode, PrivacyConfig
from florilegium.privacy.release import Schema

if TYPE_CHECKING:
    from florilegium.client.lm.adapter import AdapterLayout

LARGEST_RANK = 256  # of a shared adapter
BOUNDS: dict[str, tuple[float, float]] = {  # of `shared` and `shared.adapter`: the least and the most
    "adapter.rank": (1, LARGEST_RANK),
    "adapter.alpha": (1e-3, 4096),
    "pool_capacity": (0, 4096),
    "sampling_rate": (1e-3, 1),
    "steps_per_round": (1, 1000),
    "batch_size": (1, 1024),
    "learning_rate": (1e-6, 1000),
    "adamw_learning_rate": (1e-9, 1),
}
MOST_STEPS = 100_000  # in all rounds
MOST_TEXTS = 20_000  # learned from in a round
MOST_BYTES = 2**30  # of the gradients of a pool that is drawn as a whole
MOST_TARGETS, LONGEST_TARGET = 64, 128  # names of layers, and characters of each
ANSWERING: tuple[Mode, ...] = ("example-local", "user-local")  # modes whose noise is a device's own
SAME = 1e-9  # of a noise multiplier: how far two devices' may be apart
LEAST_NOISE = 0.3  # in clipping norms: below, coins that nobody may guess are all that is left


def unprotected(privacy: PrivacyConfig) -> str:
    """Why a device with these settings answers no server, in a sentence; empty where it may."""
    if privacy.mode == "none":
        return "privacy.mode = 'none' is for simulations: nothing would be protected"
    if privacy.mode == "user-central":
        return (
            "privacy.mode = 'user-central' leaves the noise to the server, and no server of real devices adds any: "
            "your change would arrive as it is; set 'example-local' or 'user-local', which add it on this device"
        )
    if privacy.secret != "os":
        return (
            "privacy.secret = 'seed' is for simulations: whoever knows the seed can take the noise off again; "
            "set privacy.secret = 'os'"
        )
    return ""


def disagreement(config: DeviceConfig, told: DistributedTerms | None) -> str:
    """What of a federation's sums is beyond this device's own settings, in a sentence; empty where nothing is."""
    privacy, own = config.privacy, config.secure_aggregation
    if told is None:
        if not privacy.distributed:
            return ""
        return (
            f"privacy.mode = {privacy.mode!r} needs a federation whose terms say how the noise is added together, and "
            f"these do not; set 'example-local' or 'user-local', which add all noise on this device"
        )
    if privacy.mode != told.mode:
        return (
            f"the federation is for privacy.mode = {told.mode!r}, in which the noise is that of many devices; this one "
            f"is set to {privacy.mode!r}: set it to the federation's if you want that, or stay away"
        )
    beyond = {
        f"epsilon = {told.epsilon:g}, above this device's privacy.epsilon = {privacy.epsilon:g}":
            told.epsilon > privacy.epsilon,
        f"delta = {told.delta:g}, above this device's privacy.delta = {privacy.delta:g}": told.delta > privacy.delta,
        f"sums of {told.survivors} survivors, below this device's secure_aggregation.survivors = {own.survivors}":
            told.survivors < own.survivors,
        f"sums of up to {told.devices} devices, above this device's secure_aggregation.devices = {own.devices}":
            bool(own.devices) and told.devices > own.devices,
        f"releases = {told.releases or 'all'}, above this device's privacy.releases = {privacy.releases}":
            bool(privacy.releases) and not 0 < told.releases <= privacy.releases,
        f"colluding = {told.colluding}, below this device's secure_aggregation.colluding = {own.colluding}":
            told.colluding < own.colluding,
        f"bits = {told.bits}, other than this device's secure_aggregation.bits = {own.bits}":
            own.bits not in (0, told.bits),
    }  # fmt: skip
    found = [text for text, is_so in beyond.items() if is_so]
    return f"the federation wants {found[0]}" if found else ""


def check_sums(config: DeviceConfig, schema: Schema, told: DistributedTerms, seed: int) -> None:
    """Raises `RefusedTermsError` for noise that is not what ε needs, TooFewBitsError for a sum that could wrap.

    `config` is that under these terms. All is reckoned here from ε, δ, rounds and rates: nothing is believed.
    """
    needed = planned_event(config).noise_multiplier
    if abs(told.noise_multiplier - needed) > SAME * needed:
        raise RefusedTermsError(
            f"the terms say noise_multiplier = {told.noise_multiplier:.9g}; epsilon = {told.epsilon:g} at delta = "
            f"{told.delta:g} over their rounds needs {needed:.9g} by this device's own accounting, and others would "
            f"add their shares of another one"
        )
    for number in range(1, 1 + len(schema.turns)):
        sum_code(config, schema, number, seed)


def check_settings(shared: SharedConfig, rounds: int) -> None:
    """Raises `RefusedTermsError` for numbers beyond what a device is made for."""
    for name, (least, most) in BOUNDS.items():
        section, _, last = name.rpartition(".")
        value = getattr(getattr(shared, section) if section else shared, last)
        if not least <= value <= most:
            side = f"above {most:g}" if value > most else f"below {least:g}"
            raise RefusedTermsError(f"the terms want shared.{name} = {value:g}, {side}: no device takes that")
    targets = shared.adapter.targets
    if len(targets) > MOST_TARGETS or any(len(t) > LONGEST_TARGET for t in targets):
        raise RefusedTermsError(
            f"the terms name {len(targets):,} layers; {MOST_TARGETS} names of {LONGEST_TARGET} characters are the most"
        )
    steps = rounds * shared.steps_per_round
    if steps > MOST_STEPS:
        raise RefusedTermsError(
            f"the terms want {rounds:,} rounds of {shared.steps_per_round:,} steps, more than {MOST_STEPS:,} in all"
        )


def check_work(layout: AdapterLayout, config: DeviceConfig) -> None:
    """Raises `RefusedTermsError` for more memory or more texts in a round than a device gives."""
    shared = config.shared
    needed = 4 * layout.width * shared.pool_capacity
    if config.privacy.by_dialogue and needed > MOST_BYTES:
        raise RefusedTermsError(
            f"the terms want gradients of {layout.width:,} numbers for each of {shared.pool_capacity:,} dialogues, "
            f"{needed / 2**30:.1f} GiB; {MOST_BYTES / 2**30:g} is the most"
        )
    drawn = shared.sampling_rate * shared.pool_capacity if config.privacy.by_dialogue else shared.batch_size
    texts = drawn * shared.steps_per_round * (1 + shared.synthetic)
    if texts > MOST_TEXTS:
        raise RefusedTermsError(
            f"the terms want {texts:,.0f} texts learned from in a round; {MOST_TEXTS:,} is the most"
        )


def check_for_everyone(layout: AdapterLayout, shared: SharedConfig, rounds: int) -> None:
    """Raises `RefusedTermsError` for work that no device takes on, whatever its mode.

    Not covered: what depends on an owner's ε and δ, as `check_promise` does.
    """
    check_settings(shared, rounds)
    refused = list[UserError]()
    for mode in ANSWERING:
        try:
            config = DeviceConfig(shared=shared, rounds=rounds, privacy=PrivacyConfig(mode=mode))
            check_work(layout, config)
            if shared.source == "pool" and not shared.pool_capacity:
                raise RefusedTermsError("the terms want shared.pool_capacity = 0, which leaves nothing to train on")
        except (UserError, ValidationError) as error:
            refused.append(error if isinstance(error, UserError) else RefusedTermsError(str(error)))
    if len(refused) == len(ANSWERING):
        raise RefusedTermsError(str(refused[0]))


def check_promise(config: DeviceConfig, devices: int) -> None:
    """Raises `RefusedTermsError` where δ is too large for what it is a chance of, or hardly any noise would be added.

    `devices` that there are at least. Raises `BudgetError` where no noise keeps the budget, or chance alone does.
    """
    privacy = config.privacy
    units, what = (config.shared.pool_capacity, "dialogues") if privacy.by_dialogue else (devices, "devices")
    if privacy.by_dialogue and privacy.distributed:
        units *= config.summed.devices  # all that a sum is of
    if units and privacy.delta * units >= 1:
        raise RefusedTermsError(
            f"privacy.delta = {privacy.delta:g} must be below 1/{units:,}, as there are {units:,} {what}: "
            f"else one of them could be told whole within the promise; lower it in this device's settings"
        )
    rate, steps, releases = planned_steps(config)
    if rate * steps * releases > privacy.delta:  # else the next line says what is wrong
        least = epsilon([Event(LEAST_NOISE, rate, steps * releases)], privacy.delta, privacy.promise.adjacency)
        if least <= privacy.epsilon:
            raise RefusedTermsError(
                f"with epsilon = {privacy.epsilon:g} these terms leave noise of less than {LEAST_NOISE:g} of what one "
                f"of the {what} may move: only not knowing what is drawn would protect it; lower privacy.epsilon in "
                f"this device's settings"
            )
    planned_event(config)
