"""`florilegium bench`: this machine measured with what it is asked to do; all benchmarks are rows of one table."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Annotated, Any

import typer

from florilegium.client.terminal import telling, wide
from florilegium.simulation.benchmarks import arguments
from florilegium.simulation.cli.app import console, interruptible

app = typer.Typer(no_args_is_help=True, help="Measure this machine with what it is asked to do.")
Model = Annotated[str, typer.Option(help="nano, smollm2-135m, a hub id, a folder or a .gguf file")]
InTurns = Annotated[int, typer.Option(min=1, help="In each of them every arm has its turn.")]
Asked = Sequence[Any]


@dataclass(frozen=True)
class Benchmark:
    """A command: its options, read and checked; the module that measures; and what is printed."""

    options: Callable[..., Asked]  # to the arguments of the module's `measure`
    module: str  # of `simulation.benchmarks`, with `measure`, `as_json` and `as_table`
    columns: int  # that its table takes
    prints: str = "object"  # for programs

    def command(self) -> Callable[..., None]:
        """For typer: the options and `--json`."""

        @wraps(self.options)
        def command(as_json: bool, **options: Any) -> None:
            asked = self.options(**options)
            benchmark = import_module(f"florilegium.simulation.benchmarks.{self.module}")  # and with it torch
            with interruptible(), telling("measuring") as tell:
                found = benchmark.measure(*asked, tell)
            if as_json:
                print(json.dumps(benchmark.as_json(found), indent=1))
            else:
                wide(console, self.columns).print(benchmark.as_table(found))

        as_json = Annotated[bool, typer.Option("--json", help=f"One {self.prints} instead of the table.")]
        last = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=as_json)
        signature = inspect.signature(self.options, eval_str=True)
        command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), last])  # type: ignore[attr-defined]
        command.__annotations__ = {**command.__annotations__, "as_json": as_json}
        return command


def engine(
    model: Model = "nano",
    devices: Annotated[str, typer.Option(help="How many devices in one pass, with commas.")] = "1,8,64,256",
    kinds: Annotated[str, typer.Option(help="What to measure.")] = "training,embedding,generation,dp_training",
    examples: Annotated[str, typer.Option(help="How many texts a device has in a step, with commas.")] = "1,4,16",
    steps: Annotated[int, typer.Option(min=1, help="Local steps of training.")] = 4,
    repeats: InTurns = 3,
    dtypes: Annotated[
        str, typer.Option(help="float32, bfloat16; empty: both, but for one that this machine only emulates.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="64 devices training with one text, in two turns.")] = False,
) -> Asked:
    """Train, embed and generate for many devices, beside what you would use instead: PEFT, Flower, pfl, Opacus.

    Some of the arms that train are processes of one thread: one (-one-core), or as many as there are cores (-cores).

    Arms that are not installed are named as absent; pip install 'florilegium[bench]' adds pfl-research.

    florilegium bench engine --devices 64 --kinds training --repeats 3
    """
    if quick:
        devices, kinds, examples, repeats = "64", "training", "1", 2
    numbers = arguments.numbers(devices, "--devices"), arguments.kinds(kinds), arguments.numbers(examples, "--examples")
    return arguments.model(model), *numbers, steps, repeats, arguments.dtypes(dtypes)


def selection(
    model: Model = "nano",
    bins: Annotated[int, typer.Option(min=2, help="Of the buffer, and dialogues that arrive.")] = 128,
    policies: Annotated[str, typer.Option(help="Which, with commas; empty: all.")] = "",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> Asked:
    """What each selection policy costs a device in a round: reading, scoring, deciding, beside learning.

    florilegium bench selection --policies quality,oasis --repeats 1
    """
    return arguments.model(model), bins, arguments.policies(policies), repeats


def privacy(
    model: Model = "nano",
    devices: Annotated[int, typer.Option(min=1, help="In one pass.")] = 64,
    repeats: InTurns = 3,
) -> Asked:
    """What protection costs in time: noisy steps beside plain ones, and the ledger's share of a round.

    florilegium bench privacy --devices 16 --repeats 1
    """
    return arguments.model(model), devices, repeats


def secure(
    devices: Annotated[str, typer.Option(help="In one round, with commas; 4 at least.")] = "10,100,1000",
    width: Annotated[int, typer.Option(min=1, help="Numbers of a device's row.")] = 3072,
) -> Asked:
    """What secure aggregation costs a device and its server, beside Flower's SecAgg+: bytes, milliseconds, by devices.

    florilegium bench secure --devices 10,64
    """
    counts = arguments.numbers(devices, "--devices")
    if min(counts) < 4:
        raise typer.BadParameter("--devices takes at least 4: of fewer a sum hides nobody")
    return counts, width


def scale(
    devices: Annotated[str, typer.Option(help="Population sizes, with commas; a tenth is sampled.")] = "100,1000,10000",
    stock_until: Annotated[int, typer.Option(help="Flower's stock simulation up to so many devices.")] = 1000,
    actors: Annotated[int, typer.Option(min=0, help="Ray actors of ours; 0: in the driver's process.")] = 0,
) -> Asked:
    """What a federation costs beside its training, beside Flower's stock simulation: time, memory, start.

    florilegium bench scale --devices 100,1000,10000,100000 --stock-until 10000 --actors 1
    """
    return arguments.numbers(devices, "--devices"), stock_until, actors


def poison(
    devices: Annotated[int, typer.Option(min=10, help="Of which none, one and three are false.")] = 10,
    least_epsilon: Annotated[float, typer.Option(help="As for server init: it bounds a release.")] = 4.0,
    seeds: Annotated[int, typer.Option(min=1, help="Federations of each kind.")] = 3,
) -> Asked:
    """What devices that send what they like do to the shared adapter, under each of the server's rules."""
    return devices, least_epsilon, seeds


def votes(
    config: Annotated[str, typer.Argument(help="A TOML file, or the name of a bundled one.")] = "scale/votes",
    candidates: Annotated[int, typer.Option(min=2, help="Dialogues that the server sends.")] = 256,
    epsilon: Annotated[str, typer.Option(help="Budgets, with commas; without noise too.")] = "1,8",
) -> Asked:
    """Votes for the server's candidates beside noised gradients, at the same ε for the same people."""
    return config, candidates, arguments.sizes(epsilon, "--epsilon")


def door(
    devices: Annotated[int, typer.Option(min=1, help="Registered ones, all of this machine.")] = 1000,
    seconds: Annotated[float, typer.Option(min=1, help="After all have connected.")] = 60.0,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 19092,
) -> Asked:
    """The server's door under many devices that ask, every three seconds, whether there is something to do."""
    return devices, seconds, port


def agent(
    clients: Annotated[str, typer.Option(help="How many at once, with commas; 100 at most.")] = "1,8,100",
    seconds: Annotated[float, typer.Option(min=1, help="With each number of them.")] = 10.0,
) -> Asked:
    """A device's page under clients that rate and read without a pause, as fast as it answers.

    florilegium bench agent --clients 8 --seconds 5
    """
    numbers = arguments.numbers(clients, "--clients")
    if max(numbers) > 100:
        raise typer.BadParameter("--clients takes at most 100: a page has 128 connections")
    return numbers, seconds


def board(
    models: Annotated[str, typer.Option(help="With commas.")] = "nano,smollm2-135m",
    threads: Annotated[str, typer.Option(help="With commas.")] = "1,2",
    limits: Annotated[str, typer.Option(help="GiB of memory, with commas.")] = "1,2,4",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, with commas.")] = "float32,bfloat16",
    weights: Annotated[str, typer.Option(help="Of the frozen base: float, int8, int4, with commas.")] = "float",
    forms: Annotated[str, typer.Option(help="usual, thrifty (as --memory-limit sets), with commas.")] = "usual,thrifty",
    generations: Annotated[str, typer.Option(help="What talks: torch, llamacpp (.gguf), with commas.")] = "torch",
    turns: InTurns = 1,
    learn: Annotated[bool, typer.Option("--learn/--talk-only", help="Whether a device learns as well.")] = True,
) -> Asked:
    """What talking and learning take of a small board: seconds and memory under limits that the kernel enforces.

    florilegium bench board --models nano --threads 1 --limits 0.75,1
    """
    names = [arguments.model(name) for name in models.split(",")]
    counts, gib = arguments.numbers(threads, "--threads"), arguments.sizes(limits, "--limits")
    chosen = [
        arguments.some_of(given, known, option)
        for given, known, option in (
            (dtypes, ("float32", "bfloat16"), "--dtypes"),
            (weights, ("float", "int8", "int4"), "--weights"),
            (forms, ("usual", "thrifty"), "--forms"),
            (generations, ("torch", "llamacpp"), "--generations"),
        )
    ]
    return names, counts, gib, *chosen, turns, learn


def acceptance(
    data: Annotated[str, typer.Option(help="A known data set's name, a file or a folder.")] = "chitchat",
    split: Annotated[str, typer.Option(help="development, test or all.")] = "test",
    people: Annotated[int, typer.Option(min=2)] = 48,
    shares: Annotated[str, typer.Option(help="Of replies that are held back, with commas.")] = "0.2",
    risks: Annotated[str, typer.Option(help="Of the test, with commas; 0.5 takes back whatever is worse.")] = "0.2",
    troubles: Annotated[str, typer.Option(help="none, hot, guest, server, with commas.")] = "none,hot,guest,server",
    seed: Annotated[int, typer.Option()] = 0,
) -> Asked:
    """What testing each update of a personal adapter on held-back replies saves and costs real people.

    florilegium bench acceptance --people 24 --troubles none,guest
    """
    parts = arguments.halves(shares, "--shares"), arguments.halves(risks, "--risks")
    return data, arguments.split(split), people, *parts, arguments.troubles(troubles), seed


BENCHMARKS = {
    "engine": Benchmark(engine, "engine", 200),
    "selection": Benchmark(selection, "selection", 120),
    "privacy": Benchmark(privacy, "privacy", 120),
    "secure": Benchmark(secure, "secure_aggregation", 170),
    "scale": Benchmark(scale, "scale", 100, prints="list"),
    "poison": Benchmark(poison, "poisoning", 100),
    "votes": Benchmark(votes, "votes", 110),
    "door": Benchmark(door, "https_server", 80),
    "agent": Benchmark(agent, "agent", 110),
    "board": Benchmark(board, "edge_device", 100, prints="list"),
    "acceptance": Benchmark(acceptance, "acceptance", 130),
}
for name, benchmark in BENCHMARKS.items():
    app.command(name)(benchmark.command())
