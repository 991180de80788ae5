"""What a user's own module adds, named as `package.module:NAME`: it is used, and told by its name where it is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from pydantic import ValidationError

from florilegium import Experiment, load_config, load_run
from florilegium.client.agent.http_json import told_of
from florilegium.client.agent.invitation import Invitation
from florilegium.client.agent.terms import Terms
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.model import LanguageModel
from florilegium.client.personalization.config import MethodConfig
from florilegium.client.personalization.method import MethodContext
from florilegium.client.personalization.registry import method
from florilegium.client.phases import observe
from florilegium.client.selection.buffer import Buffer, BufferEntry
from florilegium.client.selection.config import SelectionConfig
from florilegium.client.selection.policies import POLICIES, READINGS, Policy
from florilegium.privacy.common.base_config import Config
from florilegium.privacy.common.registry import ExtensionError, import_folders, is_extension, resolve
from florilegium.privacy.plan import RoundPlan
from florilegium.server.aggregation import Mean, new_rule
from florilegium.server.config import ServerConfig
from florilegium.server.optimizers import FedAvg, new_optimizer
from florilegium.simulation.baselines.devices import run_devices_of_worker, under
from florilegium.simulation.baselines.registry import BASELINES, baseline
from florilegium.simulation.config import BaselineConfig, ExperimentConfig
from florilegium.simulation.data.describe import describe
from florilegium.simulation.data.population import DataConfig, load_population
from florilegium.simulation.devices.simulated import SimulatedDevices, load_devices
from florilegium.simulation.personalization.config import MethodsConfig
from florilegium.simulation.personalization.run import play
from florilegium.simulation.runs import provenance
from florilegium.simulation.runs.callbacks import Callback, Callbacks, RunFacts
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.folder import RunFolder, check_resumable, create
from florilegium.simulation.runs.provenance import check_sources, sources_sha256
from florilegium.simulation.settings import ConfigError, dump_config
from florilegium.simulation.studies.cell import SharedResources
from florilegium.simulation.studies.config import load_study
from florilegium.simulation.studies.methods_cell import MethodsCell
from florilegium.simulation.studies.preflight import ready
from florilegium.simulation.studies.runner import run_study
from florilegium.simulation.tasks.config import TaskConfig, load_task

SOURCE = '''
"""Methods of a laboratory's own."""

from dataclasses import replace

import numpy as np

from florilegium.client.personalization import Method
from florilegium.client.selection import Policy
from florilegium.server import KeptRows
from florilegium.server.optimizers import FedAvg, Moments
from florilegium.simulation.baselines.registry import BASELINES
from florilegium.simulation.data.conversations import Conversation, Turn
from florilegium.simulation.runs.callbacks import Callback
from florilegium.simulation.tasks.stand_ins import STAND_INS


def longest(bins, newcomer, memory, rng):
    shortest = min(range(len(bins)), key=lambda i: len(bins[i].prompt))
    return shortest if len(bins[shortest].prompt) < len(newcomer.prompt) else None


def deciding(what):
    return Policy(lambda bins, newcomer, memory, rng: what)


LONGEST = Policy(longest)
RAISES = Policy(lambda bins, newcomer, memory, rng: 1 // 0)
FORGETS = Policy(longest, meet=lambda newcomer, memory: memory)
REMEMBERS_TEXT = Policy(longest, meet=lambda newcomer, memory: (newcomer, {"last": newcomer.prompt}))
COUNTS = Policy(longest, meet=lambda newcomer, memory: (newcomer, {"n": np.int64(memory.get("n", 0) + 1)}))


class Median(KeptRows):
    """The coordinate-wise median of a round's releases."""

    def chosen(self):
        return np.median(np.stack(self.by_name()), axis=0).astype(np.float32)


class Five(Median):
    least_releases = 5


def median(width, settings):
    return Median(width)


def ruling(what):
    def rule(width, settings):
        made = Median(width)
        made.chosen = lambda: what(width)
        return made

    return rule


class Picky(Median):
    def add(self, device, row, places=None, weight=1.0):
        raise KeyError(device)


class Slower(FedAvg):
    def step(self, shared, change, state):
        return super().step(shared, change / 2, state)


def slow(settings):
    return Slower(settings.learning_rate)


class Longer(FedAvg):
    def step(self, shared, change, state):
        return np.zeros(len(shared) + 1, np.float32), state


class Watch(Callback):
    """Keeps what it is told."""

    def __init__(self):
        self.told, self.broken = [], False

    def on_run_begin(self, facts):
        self.told.append(("begin", facts.round, [e.kind for e in facts.events]))

    def on_round_end(self, facts):
        self.told.append(("round", facts.round, [e.kind for e in facts.events]))
        if self.broken:
            raise RuntimeError("no room for a chart")

    def on_run_end(self, facts):
        self.told.append(("end", facts.round, facts.interrupted))


WATCH = Watch()


def read():
    """Six people who talk of the sea."""
    for user in range(6):
        for n in range(12):
            turns = Turn("", f"what of wave {n}?"), Turn(f"u{user}", f"{user} saw {n}", n + 1)
            yield Conversation(f"{user}-{n}", turns)


def read_numbers():
    yield 7


class Shouting(Method):
    def prompt(self, device, asked, before=None):
        return asked.prompt.upper()


class Needy(Method):
    def __init__(self, context, more):
        pass


class Mumbling(Method):
    def prompt(self, device, asked, before=None):
        return asked.prompt if device == 0 else {}[asked.prompt]


class Counting(Method):
    def prompt(self, device, asked, before=None):
        return len(asked.prompt)


class Short(Method):
    def serving(self, asked):
        return self.served(asked[1:])


QUIZ = replace(STAND_INS["chat-reply"], source="my_lab.methods:read")
DITTO = BASELINES["ditto"]


def engine(run, progress, callbacks, people):
    from florilegium.simulation.experiment import ENGINES

    ENGINES["cohort"](run, progress, callbacks, people)
'''
TINY = [
    "data.users=2", "data.max_pairs=8", "data.min_pairs=8", "synthesis.per_dialogue=0", "selection.bins=2",
    "personal.epochs=1", "evaluation.users=2", "evaluation.sampling.max_new_tokens=2", "shared.pool_capacity=6",
    "evaluation.every_round=false",
]  # fmt: skip
ALL = [
    "selection.policy=my_lab.methods:LONGEST", "server.rule=my_lab.methods:median",
    "server.optimizer=my_lab.methods:slow", "engine=my_lab.methods:engine", "data.name=my_lab.methods:read",
    'callbacks=["my_lab.methods:WATCH"]',
]  # fmt: skip
DITTO = ["rounds=1", "data.name=my_lab.methods:read", "baseline.name=my_lab.methods:DITTO"]
ME = "my_lab.methods:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What holds the package `my_lab`, on the path of modules."""
    root = tmp_path_factory.mktemp("lab")
    (root / "my_lab").mkdir()
    (root / "my_lab" / "__init__.py").touch()
    (root / "my_lab" / "methods.py").write_text(SOURCE, encoding="utf-8")
    (root / "broken_lab.py").write_text("import a_package_that_is_not_there", encoding="utf-8")
    (root / "failing_lab.py").write_text("raise KeyError('at once')", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        yield root
    for name in [n for n in sys.modules if n.partition(".")[0] == "my_lab"]:
        del sys.modules[name]


@pytest.fixture
def lab(folder: Path) -> ModuleType:
    """The module `my_lab.methods`."""
    __import__("my_lab.methods")
    return sys.modules["my_lab.methods"]


# -- names --------------------------------------------------------------------------------------------------------


def test_a_name_is_that_of_the_table_or_of_a_module(lab: Any) -> None:
    assert resolve("fifo", POLICIES, Policy) is POLICIES["fifo"]
    assert resolve(ME + "LONGEST", POLICIES, Policy) is lab.LONGEST
    assert SelectionConfig(policy=ME + "LONGEST").chosen is lab.LONGEST


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fifp", r"did you mean 'fifo'\? must be one of quality, .*, or package\.module:NAME"),
        ("no_lab.methods:X", r"no_lab\.methods:X: there is no module 'no_lab'; install it, or put .* on PYTHONPATH"),
        ("my_lab.methodes:X", r"there is no module 'my_lab\.methodes'"),
        (ME + "LONGST", r"module my_lab\.methods has no 'LONGST'; did you mean 'LONGEST'\?"),
        (ME + "longest", r"my_lab\.methods:longest is a function; it must be a Policy"),
        ("broken_lab:X", r"broken_lab cannot be imported: No module named 'a_package_that_is_not_there'"),
        ("failing_lab:X", r"failing_lab cannot be imported: KeyError: 'at once' \(failing_lab\.py, line 1\)"),
        ("__main__:X", r"write it into a module"),
        ("my_lab.methods:", r"must be one of"),
        ("../my_lab:X", r"must be one of"),
    ],
)
def test_what_is_not_there_is_told_in_a_line(name: str, told: str, folder: Path) -> None:
    with pytest.raises(ExtensionError, match=told) as raised:
        resolve(name, POLICIES, Policy)
    assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match=rf"selection\.policy = '{name}': .*{told}"):
        load_config("quickstart", [f"selection.policy={name}"])


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("server.rule=my_lab.methods:WATCH", "my_lab.methods:WATCH is a Watch; it must be something to call"),
        ("server.rule=my_lab.methods:read", "my_lab.methods:read raised TypeError: .*it must give a Rule"),
        ("server.rule=my_lab.methods:deciding", "deciding"),
        ("server.optimizer=my_lab.methods:deciding", "gave Policy, which is none; it must give a ServerOptimizer"),
        ("engine=my_lab.methods:LONGEST", "it must be something to call"),
        ("data.name=my_lab.methods:LONGEST", "it must be something to call"),
        ('callbacks=["fifo"]', "must be one of tensorboard, mlflow, wandb, or package.module:NAME"),
    ],
)
def test_what_is_of_another_kind_is_refused_with_the_settings(setting: str, told: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config("quickstart", [setting])


def test_a_policy_reads_what_there_is() -> None:
    from florilegium.client.lm.features import FEATURES

    assert set(READINGS) == set(FEATURES)
    with pytest.raises(ValueError, match="reading = 'colour' must be one of mean"):
        Policy(lambda *_: None, reading="colour")


# -- a policy -----------------------------------------------------------------------------------------------------


def entry(text: str) -> BufferEntry:
    return BufferEntry(text, text, "", np.ones(2, np.float16))


def offered(policy: str, *texts: str) -> Buffer:
    buffer = Buffer(SelectionConfig(policy=policy, bins=2))
    for text in texts:
        buffer, _ = buffer.offer(entry(text), np.random.default_rng(0))
    return buffer


def test_a_policy_of_ones_own_decides(lab: Any) -> None:
    assert [k.id for k in offered(ME + "LONGEST", "bb", "a", "ccc", "dd", "e").bins] == ["bb", "ccc"]
    assert offered(ME + "COUNTS", "a", "b", "c").memory == {"n": 3}


@pytest.mark.parametrize(
    ("decision", "told"),
    [
        (99, "returned 99, of 2 bins; it must return the index of one of the bins, or None"),
        (-1, "returned -1, of 2 bins"),
        (1.5, "returned 1.5;"),
        (True, "returned bool;"),
        ("a word", "returned str;"),
        (np.float64(1.0), "returned 1.0;"),
    ],
)
def test_a_decision_that_is_none_is_told(decision: object, told: str, lab: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(lab, "DECIDES", lab.deciding(decision), raising=False)
    with pytest.raises(ExtensionError, match=rf"my_lab\.methods:DECIDES {told}"):
        offered(ME + "DECIDES", "a", "b", "c")


def test_a_policy_that_keeps_something_of_its_own_is_told(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked twice, with the same dice: what it draws is no state."""
    asked: list[str] = []

    def alternating(bins: Any, newcomer: Any, memory: Any, rng: np.random.Generator) -> int:
        asked.append(newcomer.id)
        return len(asked) % 2

    monkeypatch.setattr(lab, "KEEPS", Policy(alternating), raising=False)
    with pytest.raises(ExtensionError, match=rf"{ME}KEEPS decided otherwise when it was asked the same again"):
        offered(ME + "KEEPS", "a", "b", "c")
    monkeypatch.setattr(lab, "DRAWS", Policy(lambda bins, newcomer, memory, rng: int(rng.integers(2))), raising=False)
    assert len(offered(ME + "DRAWS", *"abcdefgh").bins) == 2


def test_a_devices_owner_is_told_which_extension_went_wrong() -> None:
    told = f"device: {ME}RAISES raised ZeroDivisionError; it must return the index"
    assert told_of(ExtensionError(told)) == (500, told) and "RAISES" not in told_of(RuntimeError(told))[1]


def test_an_integer_of_numpys_is_a_decision(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "DECIDES", lab.deciding(np.int64(1)), raising=False)
    assert [k.id for k in offered(ME + "DECIDES", "a", "b", "c").bins] == ["a", "c"]


@pytest.mark.parametrize("name", ["FORGETS", "REMEMBERS_TEXT"])
def test_a_memory_that_cannot_be_kept_is_told(name: str, folder: Path) -> None:
    with pytest.raises(ExtensionError, match=rf"{name} returned something else, of type \w+; it must return the newc"):
        offered(ME + name, "a")


def test_a_policy_that_raises_is_told_with_the_device(lm: LanguageModel, folder: Path) -> None:
    config = load_config("quickstart", ["selection.policy=my_lab.methods:RAISES", "selection.bins=1"])
    context = CohortContext.of(lm, config, 0, lambda device, dialogue: "a reply")
    states = [context.new_state(name) for name in ("d0", "d1")]
    arrived = [[Dialogue("a", "bread", "")], [Dialogue("b", "rain", ""), Dialogue("c", "sun", "")]]
    told = (
        r"^d1: my_lab\.methods:RAISES raised ZeroDivisionError: .* \(methods\.py, line \d+\); it must return the index"
    )
    with pytest.raises(ExtensionError, match=told):
        observe(states, arrived, RoundPlan(1, 0), context)


# -- what a server makes of releases ------------------------------------------------------------------------------


def given(name: str, *rows: list[float]) -> Any:
    rule = new_rule(name, len(rows[0]), ServerConfig())
    for k, row in enumerate(rows):
        rule.add(f"d{k}", np.array(row, np.float32))
    return rule


def test_a_rule_of_ones_own_makes_the_change(folder: Path) -> None:
    assert given(ME + "median", [1, 5], [2, 9], [90, 7]).change().tolist() == [2, 7]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda width: np.zeros(width + 1, np.float32), r"returned float32 \(3,\)"),
        (lambda width: np.zeros(width), r"returned float64 \(2,\)"),
        (lambda width: np.full(width, np.nan, np.float32), r"returned a number that is not finite"),
        (lambda width: [0.0] * width, r"returned list"),
        (lambda width: {}[width], r"raised KeyError: 2 \(.*, line \d+\)"),
    ],
)
def test_a_change_that_is_none_is_told(made: Callable[[int], object], told: str, lab: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(lab, "BAD", lab.ruling(made), raising=False)
    with pytest.raises(ExtensionError, match=rf"my_lab\.methods:BAD {told}; it must return float32 \(2,\), all finite"):
        given(ME + "BAD", [1, 2]).change()


def test_a_rule_that_breaks_on_a_release_is_told_with_the_device(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "PICKY", lambda width, settings: lab.Picky(width), raising=False)
    with pytest.raises(
        ExtensionError, match=r"^d0: my_lab\.methods:PICKY raised KeyError: 'd0' .*; it must take float32"
    ):
        given(ME + "PICKY", [1, 2])


def test_a_rule_says_what_it_is_a_sum_of_and_how_many_it_needs(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "FIVE", lambda width, settings: lab.Five(width), raising=False)
    monkeypatch.setattr(lab, "SUM", lambda width, settings: Mean(width), raising=False)
    assert [ServerConfig(rule=r).sums for r in ("mean", "krum", "none", ME + "median", ME + "SUM")] == [
        True, False, False, False, True,
    ]  # fmt: skip
    assert (ServerConfig(rule=ME + "FIVE").least_releases, ServerConfig(rule="krum", byzantine=2).least_releases) == (
        5,
        7,
    )
    with pytest.raises(ConfigError, match=r"needs 5 releases in a round of 4 devices"):
        load_config("quickstart", ["server.rule=my_lab.methods:FIVE", "data.users=4"])
    with pytest.raises(
        ConfigError, match=r"adds noise to a round's sum; server\.rule = 'my_lab\.methods:median' makes no"
    ):
        load_config("quickstart", ["server.rule=my_lab.methods:median", "privacy.mode=user-central"])
    assert load_config("quickstart", ["server.rule=my_lab.methods:SUM", "privacy.mode=user-central"]).server.sums


def test_an_optimizer_of_ones_own_steps_and_is_looked_after(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "SLOW", lambda settings: lab.Slower(settings.learning_rate), raising=False)
    monkeypatch.setattr(lab, "LONGER", lambda settings: lab.Longer(), raising=False)
    shared, change = np.zeros(2, np.float32), np.array([2, 4], np.float32)
    slow, longer = (new_optimizer(ME + name, ServerConfig()) for name in ("SLOW", "LONGER"))
    assert slow.step(shared, change, slow.start(2))[0].tolist() == [1, 2]
    with pytest.raises(
        ExtensionError, match=r"LONGER returned float32 \(3,\); it must return float32 \(2,\) and Moments"
    ):
        longer.step(shared, change, FedAvg().start(2))


# -- the rest -----------------------------------------------------------------------------------------------------


def test_a_reader_of_ones_own_is_read(folder: Path) -> None:
    config = DataConfig(name=ME + "read", users=2, min_pairs=8, max_pairs=8, split="all")
    users = load_population(config, 0)
    assert len(users) == 2 and users[0].stream[0].prompt == "what of wave 0?"
    assert describe(config, 0).about == "Six people who talk of the sea."
    with pytest.raises(ExtensionError, match="read_numbers yielded int; it must take nothing and yield Conversations"):
        load_population(config.model_copy(update={"name": ME + "read_numbers"}), 0)


def test_a_task_of_ones_own_is_asked(folder: Path) -> None:
    assert TaskConfig(name=ME + "QUIZ").extensions() == [ME + "QUIZ"]
    with pytest.raises(ValidationError, match="it must be a StandIn"):
        TaskConfig(name=ME + "LONGEST")
    with pytest.raises(ValidationError, match="did you mean 'chat-reply'"):
        TaskConfig(name="chat-replay")


def test_a_method_of_ones_own_is_made(lm: LanguageModel, lab: Any) -> None:
    made = method(MethodContext(lm, MethodConfig(name=ME + "Shouting")))
    assert type(made) is lab.Shouting
    with pytest.raises(ExtensionError, match=r"Needy raised TypeError: .* it must be made of a MethodContext alone"):
        method(MethodContext(lm, MethodConfig(name=ME + "Needy")))
    with pytest.raises(ExtensionError, match=r"Median is an ABCMeta; it must be a class derived from Method"):
        method(MethodContext(lm, MethodConfig(name=ME + "Median")))


def test_a_baseline_of_ones_own_is_found(folder: Path) -> None:
    assert baseline(BaselineConfig(name=ME + "DITTO").name) is BASELINES["ditto"]
    with pytest.raises(ExtensionError, match="is a function; it must be a Baseline"):
        baseline(ME + "read")


TASK = {"name": ME + "QUIZ", "users": 2, "pool_users": 2, "split": "all", "min_history": 4, "max_history": 6,
        "queries_per_user": 1}  # fmt: skip
LITTLE = {"name": "nano", "dtype": "float32", "limits": {"prompt_tokens": 24, "reply_tokens": 6}}


def test_a_study_of_a_task_and_a_method_of_ones_own_runs_to_its_end(folder: Path, tmp_path: Path) -> None:
    """`base` too, in whose prompts the task's adapter is another one than in those of the method."""
    tree = {
        "model": LITTLE, "task": TASK, "task_stage": {"training": {"epochs": 1}}, "sampling": {"max_new_tokens": 2},
        "study": {"kind": "methods", "seeds": 1, "tables": {"t": {"rows": {"method.name": ["base", ME + "Shouting"]}}}},
    }  # fmt: skip
    (tmp_path / "study.toml").write_text(tomli_w.dumps(tree), encoding="utf-8")
    study = load_study(tmp_path / "study.toml")
    ready(study, tmp_path / "study")
    run_study(study, tmp_path / "study", lambda phase: None)
    results = [json.loads(p.read_text()) for p in (tmp_path / "study" / "cells").glob("*/result.json")]
    cells = [MethodsCell(cell, SharedResources.of([cell]), tmp_path, str) for cell in study.cells.values()]
    assert len({repr(r["seeds"][0]["arms"]["own"]["nll"]["by_user"]) for r in results}) == 2
    assert len({cell._of_task(0) for cell in cells}) == 2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "Mumbling",
            r"^device-0001: my_lab\.methods:Mumbling raised KeyError: .*; it must return the prompt as a text",
        ),
        ("Counting", r"^device-0000: my_lab\.methods:Counting returned int; it must return the prompt as a text"),
        ("Short", r"^my_lab\.methods:Short returned Served of 1 slots; .* Served with a slot for each of 2 questions"),
    ],
)
def test_what_a_method_does_wrong_is_told(name: str, told: str, lm: LanguageModel, folder: Path) -> None:
    config = MethodsConfig.model_validate({
        "model": LITTLE, "task": TASK, "method": {"name": ME + name}, "task_stage": {"enabled": False},
    })  # fmt: skip
    task, pool, users = load_task(config.task, 0)
    with pytest.raises(ExtensionError, match=told):
        play(lm, config, task, pool, users, 0)


def test_a_run_of_a_baseline_of_ones_own_comes_to_its_end(folder: Path, tmp_path: Path) -> None:
    config = load_config("quickstart", [*TINY, *DITTO, "baseline.steps=2"])
    result = Experiment(config, tmp_path / "run").run(quiet=True)
    assert result.summary.rounds == 1 and result.summary.baseline == ME + "DITTO"
    assert result.summary.nll["personal"] != result.summary.nll["base"]
    assert ME + "DITTO" in result.report.read_text(encoding="utf-8")
    assert not [p for p in (tmp_path / "run").rglob("*") if p.stat().st_mode & 0o077]  # as those of the command


def test_who_has_begun_is_told_the_end_where_another_raises_at_the_beginning(lab: Any, tmp_path: Path) -> None:
    class Broken(Callback):
        def on_run_begin(self, facts: RunFacts) -> None:
            raise OSError("no room")

    run, told, late = create(tmp_path / "run", ExperimentConfig()), lab.Watch(), lab.Watch()
    run.metrics.write_bytes(b"")
    with pytest.raises(ExtensionError, match=r"Broken raised OSError: no room"):
        Callbacks(run, [told, Broken(), late]).begin(0)
    assert told.told == [("begin", 0, []), ("end", 0, True)] and not late.told


@pytest.fixture(scope="module")
def run_of_a_baseline(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimulatedDevices:
    return load_devices(create(tmp_path_factory.mktemp("runs") / "run", load_config("quickstart", [*TINY, *DITTO])))


def sideways(held: Any, sets: Any, context: Any) -> Any:
    return held.own, held.own[:, :-1]


def unbounded(held: Any, sets: Any, context: Any) -> Any:
    return held.own, torch.stack([torch.zeros(held.own.shape[1]), torch.full((held.own.shape[1],), float("nan"))])


@pytest.mark.parametrize(
    ("contribute", "told"),
    [
        (lambda *given: 1 // 0, r"raised ZeroDivisionError: .* \(test_extensions\.py, line \d+\)"),
        (lambda *given: (7, 7), r"returned int"),
        (sideways, r"returned float32 \(2, \d+\)"),
        (lambda held, *_: (held.own, held.own.double()), r"returned float64 \(2, \d+\)"),
        (unbounded, r"returned numbers for device-00001 that are not finite"),
    ],
)
def test_what_a_baseline_does_wrong_is_told_with_the_devices(
    contribute: Callable[..., Any], told: str, run_of_a_baseline: SimulatedDevices
) -> None:
    devices = under(run_of_a_baseline, replace(BASELINES["ditto"], contribute=contribute))
    who, must = (
        r"^device-00000 … device-00001: my_lab\.methods:DITTO",
        r"; it must return float32 \(2, \d+\) that stays",
    )
    with pytest.raises(ExtensionError, match=f"{who} {told}{must}"):
        devices.contribute(list(devices.users), devices.context.shared_layout.start(0), RoundPlan(1, 0))
    bad = under(run_of_a_baseline, replace(BASELINES["ours"], adopt=contribute))
    rounds = bad.duties.adopt
    with pytest.raises(ExtensionError, match=who):
        rounds(bad.states(list(bad.users)), bad.context.shared_layout.start(0), RoundPlan(1, 1), bad.context)


# -- where it is never taken --------------------------------------------------------------------------------------


def kinds(kind: type[Config]) -> Iterator[type[Config]]:
    yield kind
    for field in kind.model_fields.values():
        inner = field.default if isinstance(field.default, Config) else field.annotation
        inner = inner if isinstance(inner, type) else type(inner)
        if issubclass(inner, Config):
            yield from kinds(inner)


def test_what_a_server_says_names_no_module(folder: Path, tmp_path: Path) -> None:
    """No setting of terms is resolved, whatever is written there: the module that it names is not imported."""
    assert not any(kind.extensible for start in (Terms, Invitation) for kind in kinds(start))
    assert {k.__name__ for k in kinds(Invitation)} >= {"Terms", "SharedConfig", "AdapterConfig"}
    trap = "trap_lab:NAME"
    (folder / "trap_lab.py").write_text("NAME = print", encoding="utf-8")
    shared = (
        {"adapter": {"kind": trap}},
        {"adapter": {"factors": trap}},
        {"source": trap},
        {"upload": trap},
        {"policy": trap},
    )
    for wanted in ({"shared": s} for s in (*shared, {"sampling": trap})):
        with pytest.raises(ValidationError):
            Terms.model_validate({"name": "f", **wanted})
    for more in ("rule", "optimizer", "selection", "callbacks"):
        with pytest.raises(ValidationError, match="unknown key"):
            Terms.model_validate({"name": "f", more: trap})
    Terms(name="f", model=trap, shared={"adapter": {"targets": [trap]}})  # type: ignore[arg-type]
    assert is_extension(trap) and "trap_lab" not in sys.modules
    assert set(RoundPlan.__slots__) == {"round", "version", "heads"}


# -- runs ---------------------------------------------------------------------------------------------------------


def own(*more: str) -> ExperimentConfig:
    return load_config("quickstart", [*TINY, *ALL, *more])


def test_a_run_with_extensions_ends_with_what_is_wrong_and_goes_on(lab: Any, tmp_path: Path) -> None:
    """Policy, rule, optimizer, reader, engine and callbacks of one's own; a callback raises after round 1 of 2."""
    run = tmp_path / "run"
    lab.WATCH.broken = True
    with pytest.raises(
        ExtensionError, match=r"WATCH raised RuntimeError: no room.*; what was finished is kept in .*resume"
    ):
        Experiment(own("rounds=2"), run).run(quiet=True)
    assert RunFolder(run).done == 1
    begun, one, end = lab.WATCH.told
    assert begun == ("begin", 0, ["run"]) and one[:2] == ("round", 1) and "round" in one[2] and end == ("end", 1, True)
    lab.WATCH.broken = False
    lab.WATCH.told.clear()
    result = Experiment(own("rounds=2"), run).run(resume=True, quiet=True)
    assert [told[:2] for told in lab.WATCH.told] == [("begin", 1), ("round", 2), ("end", 2)]
    assert "round" in lab.WATCH.told[0][2] and lab.WATCH.told[-1] == ("end", 2, False)
    assert (result.config.server.rule, result.config.engine.name) == (ME + "median", ME + "engine")
    assert load_run(run).summary.rounds == 2
    assert ME + "LONGEST" in result.report.read_text(encoding="utf-8")


def test_the_source_of_an_extension_is_in_the_hash_of_a_run(folder: Path, tmp_path: Path) -> None:
    module = folder / "hashed_lab.py"
    module.write_text("from florilegium.server.aggregation import RULES\nMINE = RULES['krum']\n", encoding="utf-8")
    config = load_config("quickstart", ["server.rule=hashed_lab:MINE"])
    run = create(tmp_path / "run", config)
    check_sources(run.path, config.extensions())
    assert sources_sha256(config.extensions()) != sources_sha256()
    (run.path / "sources.sha256").write_text(sources_sha256() + "\n")
    with pytest.raises(RunError, match="or of hashed_lab:MINE is not the code that started"):
        check_sources(run.path, config.extensions())
    assert import_folders(own().extensions()) == [str(folder)]


def test_a_module_that_a_process_lacks_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is in a process of another machine."""
    (folder / "here_lab.py").write_text("from florilegium.client.selection import POLICIES\nMINE = POLICIES['fifo']\n")
    run = create(tmp_path / "run", load_config("quickstart", ["selection.policy=here_lab:MINE"]))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(folder)])
    monkeypatch.delitem(sys.modules, "here_lab")
    provenance._sources_sha256.cache_clear()  # another process has none
    with pytest.raises(ExtensionError, match=r"here_lab:MINE: there is no module 'here_lab'"):
        run_devices_of_worker(run.path)


def test_a_worker_has_the_sources_of_what_the_run_names(folder: Path, tmp_path: Path) -> None:
    (folder / "there_lab.py").write_text("from florilegium.client.selection import POLICIES\nMINE = POLICIES['fifo']\n")
    small = ["data.users=2", "rounds=1", "evaluation.users=2"]
    run = create(tmp_path / "run", load_config("quickstart", [*small, "selection.policy=there_lab:MINE"]))
    assert len(run_devices_of_worker(run.path).users) == 2


def test_a_run_that_is_looked_at_imports_nothing(folder: Path, tmp_path: Path) -> None:
    """It may be somebody else's, and what it names lie beside it."""
    (folder / "payload.py").write_text("from florilegium.server import RULES\nMINE = RULES['mean']\n")
    names = ["selection.policy=payload:MINE", "server.rule=payload:MINE", "server.optimizer=payload:MINE"]
    path = tmp_path / "config.toml"
    path.write_text(dump_config(load_config("quickstart", ["callbacks=[]"])))
    found = path.read_text()
    for name in names:
        key, value = name.split("=")
        found = found.replace(f'{key.split(".")[1]} = "', f'{key.split(".")[1]} = "{value}" # ', 1)
    path.write_text(found)
    sys.modules.pop("payload", None)
    config = RunFolder(tmp_path).config
    assert (config.selection.policy, config.server.rule) == ("payload:MINE", "payload:MINE")
    assert "payload" not in sys.modules
    with pytest.raises(ConfigError, match="payload:MINE is a function; it must be a Policy"):
        load_config(path)  # whoever runs it has it checked
    assert "payload" in sys.modules


def test_a_run_may_lose_a_callback_that_is_there_no_more(folder: Path, tmp_path: Path) -> None:
    run = create(tmp_path / "run", load_config("quickstart"))
    text = (run.path / "config.toml").read_text()
    assert "callbacks = []" in text
    (run.path / "config.toml").write_text(text.replace("callbacks = []", 'callbacks = ["gone_lab:WATCH"]'))
    check_resumable(run.path, load_config("quickstart"))
    assert "callbacks" not in load_config("quickstart").extensible


def test_cells_of_a_study_may_differ_in_extensions(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'data = { users = 2 }\n[study.tables.one]\nrows = { "selection.policy" = ["fifo", "my_lab.methods:LONGEST"] }\n'
    )
    study = load_study(tmp_path / "s.toml")
    assert [c.config.extensions() for c in study.cells.values()] == [[], [ME + "LONGEST"]]
    assert SharedResources.of(study.cells.values()).extensions == {ME + "LONGEST"}
    (tmp_path / "m.toml").write_text(
        'method = { name = "my_lab.methods:Median" }\n[study]\nkind = "methods"\ntables = { one = {} }\n'
    )
    with pytest.raises(ExtensionError, match=r"Median is an ABCMeta; it must be a class derived from Method"):
        ready(load_study(tmp_path / "m.toml"), tmp_path / "study")


@pytest.mark.slow
def test_rays_processes_find_what_the_driver_found(lab: Any, tmp_path: Path) -> None:
    lab.WATCH.told.clear()
    result = Experiment(own("rounds=1", "engine=cohort", "ray.actors=1"), tmp_path / "run").run(quiet=True)
    assert result.summary.rounds == 1 and lab.WATCH.told[-1] == ("end", 1, False)
