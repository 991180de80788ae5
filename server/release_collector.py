"""The releases of one round: each is taken once, or refused with a code. What they become is for the rule to say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, Message

from florilegium.privacy.encoding import ENCODINGS, Encoded
from florilegium.privacy.release import PROTOCOL, Schema
from florilegium.privacy.release import Array as Numbers
from florilegium.privacy.reply_gate import CODES, FAILED, RELEASE
from florilegium.server.aggregation import Places, new_rule
from florilegium.server.config import ServerConfig
from florilegium.server.fixed_point import BadReleaseError
from florilegium.server.lora_products import MeanOfProducts

BOTH = {"lora_A", "lora_B"}
MALFORMED = "malformed"
ONE_IN_TWENTY = 1.645  # standard deviations of a normal distribution, on one side
PRODUCTS_LIMIT = 2**22  # numbers of the adapted weights up to which the error of averaging factors is always computed


@dataclass
class RoundFacts:
    """What the server knows about a round: public values and what it computed from releases."""

    releases: int = 0
    silent: int = 0  # devices that were asked and said nothing
    refused: dict[str, int] = field(default_factory=dict)  # error code → devices
    change_norm_l2: float = 0.0
    signal_to_noise: float = math.nan
    signal_to_noise_floor: float = math.nan  # what is below it cannot be told from 0
    averaging_error: float | None = None  # of A and B averaged apart, by the mean of their products
    held_bytes: int = 0  # what was kept of the releases
    failed_adoptions: int = 0  # devices that did not take what the round became


@dataclass(frozen=True)
class Limits:
    """Norms of releases: above the first one is refused; what is above the second is scaled down to it.

    Where the server adds the noise, the second is what the noise was made for: rounding on the way, or a device that
    does not clip, must not be worth more than one that does.
    """

    largest_norm_l2: float = math.inf
    clip_norm_l2: float = math.inf


class ReleaseCollector:
    """What a round's devices send, summed as it comes."""

    def __init__(
        self,
        config: ServerConfig,
        schema: Schema,
        number: int,
        before: Numbers,
        devices: Mapping[int, str],
        limits: Limits,
        *,
        multiplies: bool = True,
    ) -> None:
        """`before` (P,) is the shared adapter that the round began with; `devices` are by node.

        With `multiplies` the products of A and B are averaged too, where that is wanted or costs next to nothing.
        """
        self.schema, self.number, self.before, self.devices = schema, number, before, devices
        self.limits = limits
        self.rule, self.facts = new_rule(config.rule, schema.width, config), RoundFacts()
        self.ledger_heads: dict[str, str] = {}  # device → head of its ledger with this release
        self.asked = 0
        self.weight_squares = np.zeros(schema.width)  # (P,) summed over the releases that held each number
        wanted = multiplies and _multiplies(schema.of_round(number), config)
        self.products = MeanOfProducts(schema, before) if wanted else None
        self._open: dict[str, tuple[int, float]] = {}  # device → version that it was asked about, weight
        self._layouts: dict[int, tuple[Schema, Places | None]] = {}  # by rank

    def ask(self, devices: Iterable[str], version: int, weight: float = 1.0) -> None:
        """That one reply of each of these is awaited, made on this version of the shared adapter."""
        named = dict.fromkeys(devices, (version, weight))
        self.asked += len(named)
        self._open |= named

    def take(self, reply: Message) -> None:
        """Adds one reply, or counts what was wrong with it."""
        device = self.devices.get(reply.metadata.src_node_id, "")
        version, weight = self._open.pop(device, (None, 0.0))
        problem = "not-asked" if version is None else self._problem(reply, device, version, weight)
        if problem:
            self.facts.refused[problem] = self.facts.refused.get(problem, 0) + 1

    def close(self) -> RoundFacts:
        """What is known when nobody is waited for any more."""
        products = self.products
        self.facts.releases, self.facts.silent = self.rule.count, len(self._open)
        self.facts.held_bytes = self.rule.held_bytes + (products.held_bytes if products else 0)
        if products and products.count:
            self.facts.averaging_error = products.error().overall
        return self.facts

    def _problem(self, reply: Message, device: str, version: int, weight: float) -> str:
        """Adds a release; else the code of what was wrong with it."""
        if reply.has_error():
            return FAILED
        try:
            header = reply.content["header"]
            if "error" in header:
                return str(header["error"]) if header["error"] in CODES else MALFORMED
            if header["protocol"] != PROTOCOL or header["version"] != version:
                return "wrong-version"
            head = header["head"]
            if not RELEASE["head"](head):
                return MALFORMED
            arrays = reply.content["arrays"]
            if not isinstance(arrays, ArrayRecord):
                return MALFORMED
            row, places = self._row(to_numpy(arrays))
            norm = float(np.linalg.norm(row.astype(np.float64)))
        except Exception:  # noqa: BLE001  # numpy, of bytes that are no array: EOFError, BadZipFile, MemoryError, …
            return MALFORMED
        if norm > self.limits.largest_norm_l2:
            return "too-large"
        if norm > self.limits.clip_norm_l2:
            row *= np.float32((1 - 1e-6) * self.limits.clip_norm_l2 / norm)
        try:
            if self.products:  # first: what it takes the rule takes too
                self.products.add(device, row)
            self.rule.add(device, row, places, weight)
        except BadReleaseError:
            return MALFORMED
        self.weight_squares += weight**2 * (1 if places is None else places)
        self.ledger_heads[device] = str(head)
        return ""

    def _row(self, sent: Encoded) -> tuple[Numbers, Places | None]:
        """A release as a row (P,), and which of its numbers were sent, if not all."""
        arrays = ENCODINGS[self.schema.encoding].decode(sent)
        rank = self.schema.rank_of(arrays, self.number)
        if rank not in self._layouts:
            sent_places = self.schema.places(self.number, rank)
            some = None if sent_places.all() else sent_places
            self._layouts[rank] = self.schema.of_round(self.number, rank), some
        layout, places = self._layouts[rank]
        if places is None:
            return layout.join(arrays), None
        row = np.zeros(self.schema.width, dtype=np.float32)
        row[places] = layout.join(arrays)
        return row, places


def _multiplies(schema: Schema, config: ServerConfig) -> bool:
    """Whether the mean of products of factors is wanted, or costs next to nothing."""
    if config.buffer or config.rule != "mean" or {name.rpartition(".")[2] for name, _ in schema.shapes} != BOTH:
        return False
    return config.products != "average" or schema.with_weights().width - schema.width <= PRODUCTS_LIMIT


def signal_to_noise(change_norm_l2: float, noise_std: float, width: int) -> float:
    """‖signal‖ / ‖noise‖ of a mean release whose numbers carry noise of `noise_std`, from public values.

    The noise has norm √P · noise_std in expectation; the signal is what the measured norm exceeds it by, in squares,
    and never below zero. NaN when no noise was added.
    """
    noise = noise_std * math.sqrt(width)
    return math.sqrt(max(0.0, change_norm_l2**2 - noise**2)) / noise if noise else math.nan


def signal_to_noise_floor(width: int) -> float:
    """The ratio that noise alone seems to have one time in twenty, in a mean release of P numbers.

    ‖noise‖² / (P σ²) is χ² of P degrees of freedom over P, near 1 ± √(2 / P); the ratio is the root of what is above 1.
    """
    return math.sqrt(ONE_IN_TWENTY * math.sqrt(2 / width)) if width else math.nan


def to_numpy(arrays: ArrayRecord) -> dict[str, Numbers]:
    return {name: array.numpy() for name, array in arrays.items()}


def to_arrays(numbers: Mapping[str, Numbers]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(a)) for name, a in numbers.items()})
