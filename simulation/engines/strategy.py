"""The server of a federation: built, and set to where it left off. Every engine takes it from here.

What a round came to is stored before any device gets it, and read again by whoever goes on; a server of real devices
(`simulation.deployment.rounds`) does that by the same functions. Not covered: the rounds themselves
(`simulation.rounds`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from flwr.app import ArrayRecord

from florilegium.client.calibration import release_limits, release_noise
from florilegium.client.config import DeviceConfig
from florilegium.client.context import CohortContext
from florilegium.client.secure_sessions import SimulatedSessions
from florilegium.privacy.noise import ReleaseNoise
from florilegium.privacy.release import Array
from florilegium.privacy.seeds import derive_key, derive_seed, fresh_secret
from florilegium.server.config import ServerConfig
from florilegium.server.fedbuff import BufferedStrategy
from florilegium.server.optimizers import Moments
from florilegium.server.release_collector import Limits, RoundFacts, to_arrays, to_numpy
from florilegium.server.secure_round import SumTerms
from florilegium.server.strategy import Aggregate, ReleaseStrategy, ServerState
from florilegium.simulation.heterogeneity.clock import BufferedClock, Clock
from florilegium.simulation.runs.checkpoint import Checkpoint
from florilegium.simulation.runs.folder import RunFolder

Opened = tuple[ReleaseStrategy, ArrayRecord]  # a strategy, and what it sends devices next


def open_strategy(
    run: RunFolder, context: CohortContext, clock: Clock | None = None, check: Callable[[], None] = lambda: None
) -> Opened:
    """The server of a run, after the last round that was finished; `check` raises where a round is not to be kept."""

    def checked(made: Aggregate) -> None:
        check()
        commit(run, made)

    config, schema, seed = run.config, context.schema, context.seed
    secret = run.server_secret() if config.privacy.secret == "os" else derive_key(seed, "server")
    noise, limits = _noise(config, config.server, secret), Limits(*release_limits(config, schema))
    if config.baseline.name and config.privacy.mode == "none":
        limits = Limits()  # a baseline without protection clips nothing
    strategy: ReleaseStrategy
    if isinstance(clock, BufferedClock):
        strategy = BufferedStrategy(
            config.server, schema, seed, noise, limits=limits, commit=checked,
            makers=clock.makers, version=lambda number: to_arrays(run.shared(number).shared),
        )  # fmt: skip
    else:
        strategy = ReleaseStrategy(
            config.server, schema, seed, noise, limits=limits, commit=checked,
            over_sampling=config.world.over_sampling, sums=sum_terms(context),
        )  # fmt: skip
    return strategy, go_on(strategy, run, _start(context))


def new_strategy(context: CohortContext, server: ServerConfig, limits: Limits | None = None) -> Opened:
    """A server before its first round, of which nothing is stored; within the devices' own limits, or these."""
    config, schema = context.config, context.schema
    secret = fresh_secret() if config.privacy.secret == "os" else derive_key(context.seed, "server")
    limits = limits or Limits(*release_limits(config, schema))
    noise, sums = _noise(config, server, secret), sum_terms(context)
    strategy = ReleaseStrategy(server, schema, context.seed, noise, limits=limits, sums=sums)
    return strategy, strategy.begin(_start(context))


def sum_terms(context: CohortContext) -> SumTerms | None:
    """What a server knows of its devices' sums, where they give it nothing else."""
    config = context.config
    if not config.privacy.distributed:
        return None

    context.sum_code(1)  # raises what is wrong with it before anything is asked
    registrar = SimulatedSessions(context).registrar
    return SumTerms(context.experiment, config.summed.limits, registrar, context.sum_code)


def go_on(strategy: ReleaseStrategy, run: RunFolder, start: Array) -> ArrayRecord:
    """Sets a strategy to what is stored in a folder, or to before round 1, with the shared adapter's start (P,).

    A round that was aggregated is not asked for again. Returns what devices are sent next.
    """
    last = run.last_shared()
    state = _state(last) if last else ServerState(0, strategy.begin(start), {}, strategy.moments)
    return strategy.at(state, committed(run, state.round + 1))


def commit(run: RunFolder, made: Aggregate) -> None:
    """Stores what a round came to."""
    run.save_shared(made.round, to_numpy(made.shared), made.ledger_heads, made.moments.arrays(), asdict(made.facts))


def committed(run: RunFolder, round_number: int) -> Aggregate | None:
    """What a round came to, if it came so far."""
    stored = run.aggregate(round_number)
    return Aggregate(**vars(_state(stored)), facts=RoundFacts(**(stored.facts or {}))) if stored else None


def _state(stored: Checkpoint) -> ServerState:
    return ServerState(stored.round, to_arrays(stored.shared), stored.heads, Moments.of(stored.moments))


def _noise(config: DeviceConfig, server: ServerConfig, secret: int) -> ReleaseNoise:
    return release_noise(config, server.noise_bands, secret)


def _start(context: CohortContext) -> Array:
    start: Array = context.shared_layout.start(derive_seed(context.seed, "shared")).numpy()
    return start
