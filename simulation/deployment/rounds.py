"""The rounds of a federation of real devices: asked with the operator's signature, aggregated, stored, told."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from florilegium.client.agent.config import new_config
from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.folder import write_private
from florilegium.client.agent.signature import hash_of, new_key, public_half, sealed
from florilegium.client.agent.terms import Membership, Terms, read_terms, write_terms
from florilegium.client.calibration import release_limits
from florilegium.client.context import release_schema
from florilegium.client.lm.adapter import AdapterLayout
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.privacy.common.errors import UserError
from florilegium.privacy.modes import Mode
from florilegium.privacy.release import Schema
from florilegium.privacy.secure_aggregation.wire import Told
from florilegium.privacy.seeds import derive_seed
from florilegium.server.config import ServerConfig
from florilegium.server.release_collector import Limits, to_numpy
from florilegium.server.secure_round import SumTerms
from florilegium.server.strategy import Commit, NoReleaseError, ReleaseStrategy
from florilegium.simulation.deployment.activity import Activity
from florilegium.simulation.deployment.certificates import (
    CERTIFICATE,
    KEY,
    OPERATOR_KEY,
    TERMS,
    check_folder,
    make_certificates,
)
from florilegium.simulation.deployment.https_server import Allowed, device_server
from florilegium.simulation.deployment.link import Link, LinkGrid
from florilegium.simulation.deployment.register import NODES, admitted, welcome
from florilegium.simulation.deployment.settings import check_rule, read_settings, write_settings
from florilegium.simulation.deployment.status import Status, came_to
from florilegium.simulation.deployment.status_page import showing_status
from florilegium.simulation.deployment.sums import check_for_devices, noise_of, sum_terms, with_sums
from florilegium.simulation.engines.strategy import commit, go_on
from florilegium.simulation.rounds import Recorder, federate
from florilegium.simulation.runs.events import RoundEnd
from florilegium.simulation.runs.folder import RunFolder

log = logging.getLogger(__name__)
LOG = "server.log"
LOOK_S = 1.0  # between two looks at who is there, and who may be
TRIES = 3  # at a round that too few releases came for
Tell = Callable[[str], None]


# -- a server's folder ------------------------------------------------------------------------------------------------


def make_folder(
    folder: Path,
    terms: Terms,
    settings: ServerConfig,
    least_epsilon: float,
    hosts: Sequence[str] = (),
    mode: Mode = "example-local",
    sums: Mapping[str, object] | None = None,
) -> Terms:
    """The terms with the operator's key and the bound of a release in them, and all that a server at `hosts` needs.

    `mode` and `least_epsilon` are those of the devices whose releases are longest; `sums` says what devices fix that
    add noise together, as `deployment.sums.with_sums` takes it.

    Raises `DeviceError`, for terms that no device would accept too; then nothing was written.
    """
    layout, private = layout_of(terms), new_key()
    told = terms.model_copy(update={"operator": public_half(private)})
    if sums is not None:
        told = with_sums(told, layout, sums)
    check_for_devices(layout, told)
    if sums is None:
        told = told.model_copy(update={"largest_norm_l2": largest_norm(told, layout, least_epsilon, mode)})
    if hosts:
        make_certificates(folder, hosts)
    write_private(folder / OPERATOR_KEY, private)
    write_terms(folder / TERMS, told)
    write_settings(folder, settings)
    (folder / NODES).mkdir(mode=0o700)
    return told


def largest_norm(terms: Terms, layout: AdapterLayout, epsilon: float, mode: Mode = "example-local") -> float:
    """No honest release of a device in this mode with this ε or more, and else a new one's settings, is longer."""
    device = new_config(ModelConfig(name=terms.model)).device
    privacy = device.privacy.model_copy(update={"epsilon": epsilon, "mode": mode})
    settings = Membership.of(terms).settings(device.model_copy(update={"privacy": privacy}))
    return release_limits(settings, release_schema(layout, terms.shared.upload))[0]


def all_done(folder: Path) -> bool:
    """Whether the last round of the terms is stored."""
    last = RunFolder(folder).last_shared()
    return last is not None and last.round >= read_terms(folder / TERMS).rounds


def layout_of(terms: Terms) -> AdapterLayout:
    """Of the shared adapter; loads the model, whose layers it is for."""
    lm = LanguageModel.load(ModelConfig(name=terms.model, dtype="float32"))
    return lm.lora_layout(terms.shared.adapter, public_seed=terms.seed)


# -- rounds -----------------------------------------------------------------------------------------------------------


class OperatorStrategy(ReleaseStrategy):
    """Asks devices that were admitted, under the names that the operator gave them, with the operator's signature."""

    def __init__(
        self,
        config: ServerConfig,
        schema: Schema,
        terms: Terms,
        operator_key: bytes,
        link: Link,
        tell: Tell,
        *,
        least_releases: int,
        commit: Commit | None = None,
        sums: SumTerms | None = None,
    ) -> None:
        """How much noise devices add is theirs to know, unless they add it together.

        How long a release may be stands in the terms.
        """
        limits = Limits(largest_norm_l2=terms.largest_norm_l2 or math.inf)
        super().__init__(
            config, schema, terms.seed, noise_of(terms), limits=limits, least_releases=least_releases, commit=commit,
            sums=sums,
        )  # fmt: skip
        self.numbers_asked = set[int]()  # rounds of sums whose devices give no numbers again
        self.terms, self.operator_key, self.link, self.tell = terms, operator_key, link, tell
        self.asked: Sequence[str] = ()  # in the round that is under way

    @property
    def fewest(self) -> int:
        """Releases that a round is aggregated of at least: as the terms say, and as the rule needs."""
        return self.terms.fewest if self.sums else self.least_releases

    def greet(self, grid: Grid) -> None:
        """Nobody is asked for a name: names are bound to keys by the operator."""

    def messages(
        self,
        names: Iterable[str],
        number: int,
        version: int,
        arrays: ArrayRecord,
        kind: str,
        secure: Mapping[str, Told] | None = None,
    ) -> list[Message]:
        known = hash_of(arrays)
        if secure is not None and kind == MessageType.TRAIN:
            self.numbers_asked.add(number)
        return [
            Message(
                sealed(m.content, kind, self.terms.name, self.operator_key, known),
                dst_node_id=m.metadata.dst_node_id,
                message_type=kind,
            )
            for m in super().messages(names, number, version, arrays, kind, secure)
        ]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.look()
        self.asked = super().sampled(server_round)
        return super().configure_evaluate(server_round, arrays, config, grid)

    def sampled(self, server_round: int) -> list[str]:
        """Drawn of those who are there as a round begins, and the same in all of its tries."""
        return list(self.asked) or self._drawn(server_round)

    def _drawn(self, number: int) -> list[str]:
        """As others draw them; of sums not more than one may be of."""
        drawn = super().sampled(number)
        if self.sums is None or len(drawn) <= self.sums.limits.devices:
            return drawn
        order = sorted(drawn, key=lambda name: derive_seed(self.seed, name, number))
        return sorted(order[: self.sums.limits.devices])

    def look(self) -> None:
        """Who is connected now."""
        self.nodes = self.link.online()
        self.names, self.devices = sorted(self.nodes), {node: name for name, node in self.nodes.items()}

    def _again(self, number: int) -> list[str]:
        """Whom the round has asked before, but for those who have gone; of others so many as it cannot do without."""
        there = [name for name in self.asked if name in self.nodes]
        others = sorted(set(self.names) - set(there), key=lambda name: derive_seed(self.seed, name, number))
        return sorted([*there, *others[: max(0, self.least_releases - len(there))]])

    def collected(self, number: int, arrays: ArrayRecord, grid: Grid, timeout: float) -> ArrayRecord | None:
        """As the others do, with as many devices as the terms ask for; a round that too few releases came for is asked
        again.

        The same devices are: one that has paid for the round sends its release once more, and no other pays instead.
        A round of sums is over once numbers were asked for: a device gives them once.
        """
        self.asked = ()
        for attempt in range(TRIES):
            if attempt:
                self.tell(f"round {number}: {self.facts[number].releases} of {self.fewest} releases; once more")
            while len(self.link.online()) < self.least_releases:
                time.sleep(LOOK_S)
            self.look()
            self.asked = self._again(number) if attempt else self._drawn(number)
            try:
                found = super().collected(number, arrays, grid, timeout)
            except NoReleaseError as error:
                log.warning("%s", error)
            else:
                if found is not None:
                    return found
            if number in self.numbers_asked:
                return None
        return None


@dataclass
class ServerRecorder(Recorder):
    """What a server's folder has of each round, and its operator is told."""

    run: RunFolder
    strategy: OperatorStrategy

    def after_round(self, number: int, arrays: ArrayRecord) -> None:
        strategy = self.strategy
        self.run.save_shared(number, to_numpy(arrays), strategy.ledger_heads, strategy.moments.arrays())
        if number:
            facts = strategy.facts[number]
            self.run.record(RoundEnd(round=number, **asdict(facts)))
            strategy.tell(f"round {number}: {came_to(facts, strategy.fewest)}")


def strategy_of(folder: Path, link: Link, layout: AdapterLayout, tell: Tell) -> tuple[OperatorStrategy, ArrayRecord]:
    """Where the last process left off, and what devices are sent next."""
    terms, run, settings = read_terms(folder / TERMS), RunFolder(folder), read_settings(folder)
    check_rule(settings, terms)
    strategy = OperatorStrategy(
        settings.model_copy(update={"sampled_share": terms.fraction, "reply_timeout_s": terms.patience_s}),
        release_schema(layout, terms.shared.upload),
        terms,
        (folder / OPERATOR_KEY).read_bytes(),
        link,
        tell,
        least_releases=terms.min_devices,
        commit=partial(commit, run),
        sums=sum_terms(terms, layout),
    )
    return strategy, go_on(strategy, run, layout.start(derive_seed(terms.seed, "shared")).numpy())


def run_rounds(folder: Path, link: Link, layout: AdapterLayout, tell: Tell) -> None:
    """All rounds of the terms that are left; what a round came to is stored before any device gets it."""
    strategy, start = strategy_of(folder, link, layout, tell)
    recorder = ServerRecorder(RunFolder(folder), strategy)
    federate(LinkGrid(link), strategy, recorder, start, strategy.terms.rounds)


# -- the process ------------------------------------------------------------------------------------------------------


@contextmanager
def serving(
    folder: Path, host: str, port: int, layout: AdapterLayout, tell: Tell, status_port: int | None = None
) -> Iterator[Link]:
    """The door of this folder's server is open while this lasts, for whoever is admitted. Raises `DeviceError`.

    With a `status_port` (0: any that is free) the operator's page is there too.
    """
    check_folder(folder)
    terms = read_terms(folder / TERMS)
    _check_terms(folder, terms, layout, tell)
    allowed = Allowed.of(release_schema(layout, terms.shared.upload).size_bytes)
    with _alone(folder), _logged(folder), ExitStack() as open_too:
        link, activity = Link(), Activity()
        link.set_admitted(admitted(folder))
        welcomed = partial(welcome, folder)
        with (
            _watched(folder, link),
            device_server(
                link, host, port, folder / CERTIFICATE, folder / KEY, allowed, welcome=welcomed, activity=activity
            ) as door,
        ):
            if status_port is not None:
                open_too.enter_context(showing_status(Status(folder, terms, link, activity, door), status_port))
            yield link


def _check_terms(folder: Path, terms: Terms, layout: AdapterLayout, tell: Tell) -> None:
    """Terms that no device takes: edited since they were made, or made by a version that took them.

    Raises `RefusedTermsError` before the first round; who takes part in one that has begun is served to its end.
    """
    try:
        check_for_devices(layout, terms)
    except UserError as error:
        if not RunFolder(folder).done and RunFolder(folder).aggregate(1) is None:
            raise
        tell(f"no device would join for these terms now: {error}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / "server.lock", timeout=0):
            yield
    except Timeout:
        raise DeviceError(f"a server is running on {folder} already") from None


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """What Flower's parts say goes into the folder, not onto the terminal."""
    flower, file = logging.getLogger("flwr"), logging.FileHandler(folder / LOG)
    file.setLevel(logging.INFO)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before, flower.handlers, flower.propagate = flower.handlers, [file], False
    try:
        yield
    finally:
        flower.handlers, flower.propagate = before, True
        file.close()


@contextmanager
def _watched(folder: Path, link: Link) -> Iterator[None]:
    """Who is admitted or expelled while this lasts is so at once."""
    over = threading.Event()

    def watch() -> None:
        seen = _stamps(folder)
        while not over.wait(LOOK_S):
            if (now := _stamps(folder)) != seen:
                seen = now
                link.set_admitted(admitted(folder))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _stamps(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for path in (folder / NODES).glob("*.pub"):
        try:
            found.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:
            continue
    return found
