"""Control arms: what each is made of, and that none has learned from what it is asked about.

People are written by hand: what is held out of what they say has a word in it that stands nowhere else, and whatever
an engine is given to learn from, or to select by, is listened to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from florilegium.client.lm.config import ModelConfig, ReplyConfig
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.packing import Example
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.personalization.kgt import KnowledgeGraph
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.audit.canaries import Canary
from florilegium.simulation.baselines.registry import BASELINES
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.devices.simulated import load_devices
from florilegium.simulation.engines.scheduler import Scheduler
from florilegium.simulation.engines.workers import LocalWorkers
from florilegium.simulation.evaluation.arms import Arms
from florilegium.simulation.evaluation.evaluator import Evaluator
from florilegium.simulation.experiment import run_experiment
from florilegium.simulation.personalization.config import MethodsConfig
from florilegium.simulation.personalization.run import play
from florilegium.simulation.runs.events import Evaluation
from florilegium.simulation.runs.folder import RunFolder
from florilegium.simulation.studies import federated_cell
from florilegium.simulation.studies.config import load_study
from florilegium.simulation.studies.runner import run_study
from florilegium.simulation.tasks.task import Item, Query, Task, TaskUser

MARK = "quagga"
ROUNDS, REPLIES, PEOPLE = 2, 16, 5  # of each person's replies the last quarter is held out

CLASSES = f"""
name = "one"
[[classes]]
name = "always there"
share = 1.0
train_tokens_per_s = 100
memory_bytes = 8_000_000_000
up_bits_per_s = 1e6
down_bits_per_s = 1e6
joules_per_token = 0.1
joules_per_byte = 1e-6
available = {[1.0] * 24}
source = "assumed"
"""


def write_people(path: Path, met: int = REPLIES * 3 // 4) -> Path:
    """Of each person so many replies that a device meets, and later ones with the word in prompt and reply."""
    said = []
    for person in range(PEOPLE):
        for t in range(REPLIES):
            word = MARK if t >= met else ("soup", "rain", "ships")[t % 3]
            prompt, reply = f"{person} asks for {word}", f"{word} of {person}, {t} times"
            said.append({"user": f"u{person}", "time": t, "prompt": prompt, "response": reply})
    path.write_text("\n".join(map(json.dumps, said)), encoding="utf-8")
    return path


def data(folder: Path, users: int) -> dict[str, Any]:
    path = str(write_people(folder / "people.jsonl"))
    return {"name": path, "users": users, "split": "all", "min_pairs": REPLIES, "max_pairs": REPLIES}


MODEL = {"dtype": "float32", "limits": {"prompt_tokens": 16, "reply_tokens": 16}}
SHORT = {"max_new_tokens": 3}
EVALUATION = {"sampling": SHORT, "rouge_queries_per_user": 1, "every_round": False}
LEARNING = {
    "rounds": ROUNDS,
    "model": MODEL,
    "selection": {"bins": 4},
    "synthesis": {"per_dialogue": 1, "instruction": "Rewrite: ", "sampling": SHORT},
    "shared": {"pool_capacity": 8, "adapter": {"rank": 2, "targets": ["v_proj"]}},
    "personal": {"adapter": {"rank": 2, "targets": ["v_proj"]}},
    "privacy": {"mode": "none"},
    "evaluation": EVALUATION,
}


@dataclass
class Heard:
    """What engines were given."""

    learned: list[tuple[str, list[Example]]] = field(default_factory=list)  # by call: how, and the examples
    finetuned: list[dict[str, Any]] = field(default_factory=list)
    selected: list[Example] = field(default_factory=list)  # read without adapters
    scored: list[Example] = field(default_factory=list)
    written: list[Any] = field(default_factory=list)  # by call: prompts, and how replies were to be decoded

    @property
    def everything(self) -> tuple[list[Any], ...]:
        return self.learned, self.finetuned, self.selected, self.scored, self.written

    @property
    def sets(self) -> list[Example]:
        return [e for _, examples in self.learned for e in examples]


@pytest.fixture(scope="module")
def listening() -> Iterator[Heard]:
    """To every engine of this file's tests; emptied by each of them."""
    heard = Heard()
    finetune, gradients, gradient = Engine.finetune, Engine.dp_gradients, Engine.gradient
    hidden, score, generate = Engine.hidden, Engine.score, LanguageModel.generate

    def finetuning(
        self: Engine, trained: Any, frozen: Any, sets: list[TrainingSet], rates: Any, *more: Any, **named: Any
    ) -> Any:
        heard.learned.append(("finetune", [e for x in sets for e in x.examples]))
        heard.finetuned.append({"start": trained.rows.clone(), "frozen": list(frozen), "sets": sets, "rates": rates})
        return finetune(self, trained, frozen, sets, rates, *more, **named)

    def differentiating(self: Engine, trained: Any, frozen: Any, batches: Any) -> Any:
        heard.learned.append(("dp_gradients", [e for batch in batches for e in batch]))
        return gradients(self, trained, frozen, batches)

    def weighing(self: Engine, trained: Any, frozen: Any, batches: Any, weights: Any) -> Any:
        heard.learned.append(("gradient", [e for batch in batches for e in batch]))
        return gradient(self, trained, frozen, batches, weights)

    def reading(self: Engine, examples: Any, *more: Any, **named: Any) -> Any:
        heard.selected.extend(examples)
        return hidden(self, examples, *more, **named)

    def scoring(self: Engine, examples: Any, slots: Any, adapters: Any) -> Any:
        heard.scored.extend(examples)
        return score(self, examples, slots, adapters)

    def writing(self: LanguageModel, prompts: Any, slots: Any, adapters: Any, sampling: Any, seeds: Any) -> Any:
        heard.written.append((list(prompts), sampling))
        return generate(self, prompts, slots, adapters, sampling, seeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "generate", writing)
        for name, heard_by in (
            ("finetune", finetuning), ("dp_gradients", differentiating), ("gradient", weighing), ("hidden", reading),
            ("score", scoring),
        ):  # fmt: skip
            patch.setattr(Engine, name, heard_by)
        yield heard


@pytest.fixture
def heard(listening: Heard) -> Heard:
    for of_kind in listening.everything:
        of_kind.clear()
    return listening


def in_words(lm: LanguageModel, examples: list[Example]) -> list[str]:
    return [lm.tokenizer.decode([*e.prompt, *e.reply]) for e in examples]


def assert_unseen(lm: LanguageModel, heard: Heard) -> None:
    """What is held out was asked about, and neither learned from nor looked at by what selects."""
    asked, learned, selected = (in_words(lm, e) for e in (heard.scored, heard.sets, heard.selected))
    assert learned and any(MARK in text for text in asked)
    assert not [text for text in (*learned, *selected) if MARK in text]


# -- runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run that has ended, and what its engine was given."""

    folder: RunFolder
    heard: Heard
    shared: torch.Tensor
    arms: Arms

    def events(self, kind: str) -> list[Any]:
        return [e for e in self.folder.events() if e.kind == kind]

    def row(self, arm: str, part: int) -> torch.Tensor:
        return self.arms.arms[arm][part].rows


@pytest.fixture(scope="module")
def run(listening: Heard, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three devices in a world, two newcomers, all arms."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "classes.toml").write_text(CLASSES, encoding="utf-8")
    pooled = {"pooled_epochs": 2, "pooled_batch_size": 12, "pooled_learning_rate": 1e-3}
    sampling = {"max_new_tokens": 5, "temperature": 0.25}
    evaluation = {**EVALUATION, **pooled, "newcomers": 2, "sampling": sampling, "replies_shown": 1}
    config = ExperimentConfig.model_validate({
        **LEARNING, "data": data(folder, 3), "evaluation": evaluation,
        "world": {"classes": str(folder / "classes.toml")},
    })  # fmt: skip
    for of_kind in listening.everything:
        of_kind.clear()
    run_experiment(config, folder / "run")
    kept = Heard(*map(list, listening.everything))
    made = RunFolder(folder / "run")
    devices = load_devices(made)
    scheduler = Scheduler(LocalWorkers(devices), devices)
    last = made.last_shared()
    assert last
    shared = torch.from_numpy(devices.schema.join(last.shared))
    arms = Evaluator(made, devices, scheduler, list(devices.users)[:3])._arms(ROUNDS, shared)
    return Run(made, kept, shared, arms)


def test_no_arm_of_a_run_has_seen_what_is_held_out(lm: LanguageModel, run: Run) -> None:
    """Shared, personal, local, pooled, and those of newcomers."""
    assert {how for how, _ in run.heard.learned} == {"dp_gradients", "finetune"}
    assert_unseen(lm, run.heard)
    assert {e.arm for e in run.events("newcomers")} == {"base", "shared", "personal"}


def test_the_arms_of_a_run_are_made_of_what_they_are_named_after(run: Run) -> None:
    """`shuffled` differs from `personal` in one thing: whose the personal adapter is."""
    devices, names = load_devices(run.folder), list(run.arms.names)
    parts = {arm: [part.kind for part in of] for arm, of in run.arms.arms.items()}
    assert parts == {
        "base": [], "shared": ["shared"], "local": ["personal"], "personal": ["shared", "personal"],
        "shuffled": ["shared", "personal"],
    }  # fmt: skip
    for arm in ("shared", "personal", "shuffled"):
        assert torch.equal(run.row(arm, 0), run.shared[None])
    own, strangers, local = run.row("personal", 1), run.row("shuffled", 1), run.row("local", 0)
    for k, name in enumerate(names):
        assert torch.equal(own[k], devices.state(name).personal)
        assert not torch.equal(strangers[k], own[k]) and not torch.equal(local[k], own[k])
    assert sorted(r.sum().item() for r in strangers) == sorted(r.sum().item() for r in own)  # each once


def test_replies_are_asked_for_as_the_settings_say(run: Run) -> None:
    """One of each device under each of six arms, in the same words for all of them; one pair is shown."""
    sampling = ReplyConfig(max_new_tokens=5, temperature=0.25)
    asked = [prompts for prompts, how in run.heard.written if how == sampling]
    assert run.folder.config.evaluation.rouge_queries_per_user == 1
    assert len(asked) == 6 and len(asked[0]) == 3 and all(prompts == asked[0] for prompts in asked)
    assert len(run.events("replies")) == run.folder.config.evaluation.replies_shown == 1


@pytest.fixture(scope="module")
def alone(listening: Heard, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run without a server, evaluated after each round."""
    folder = tmp_path_factory.mktemp("alone")
    config = ExperimentConfig.model_validate({
        **LEARNING, "data": data(folder, 3), "server": {"rule": "none"}, "synthesis": {"per_dialogue": 0},
        "evaluation": EVALUATION | {"pooled_epochs": 0, "rouge_queries_per_user": 0, "every_round": True},
    })  # fmt: skip
    run_experiment(config, folder / "run")
    return RunFolder(folder / "run")


def test_a_curve_is_of_every_round_or_of_the_last(run: Run, alone: RunFolder) -> None:
    def rounds(folder: RunFolder) -> list[int]:
        found = list(folder.events_of(Evaluation))
        return [e.round for e in found if (e.arm, e.metric) == ("personal", "nll")]

    assert rounds(run.folder) == [ROUNDS] and rounds(alone) == [1, 2]


def test_without_a_server_nothing_shared_is_beneath(alone: RunFolder) -> None:
    """The arms are those of devices alone."""
    devices = load_devices(alone)
    examiner = Evaluator(alone, devices, Scheduler(LocalWorkers(devices), devices), list(devices.users))
    arms = examiner._arms(1, torch.ones(devices.context.shared_layout.width))
    assert {arm: [part.kind for part in of] for arm, of in arms.arms.items()} == {
        "base": [], "personal": ["personal"], "shuffled": ["personal"],
    }  # fmt: skip


def same_lessons(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return [(x.examples, x.batches) for x in one["sets"]] == [(x.examples, x.batches) for x in other["sets"]]


def test_local_differs_from_personal_in_nothing_but_what_is_beneath(run: Run) -> None:
    """In each round the same examples in the same batches at the same rates; in the first from the same start."""
    rounds = [call for call in run.heard.finetuned if len(call["sets"]) == 3]
    assert len(rounds) == 2 * ROUNDS
    for personal, local in zip(rounds[::2], rounds[1::2], strict=True):
        assert len(personal["frozen"]) == 1 and local["frozen"] == []
        assert same_lessons(personal, local) and personal["rates"] == local["rates"]
        assert any(x.examples for x in personal["sets"])
    assert torch.equal(rounds[0]["start"], rounds[1]["start"])
    assert torch.equal(rounds[2]["frozen"][0].rows, run.shared[None])


def test_pooled_is_one_adapter_on_all_that_the_evaluated_met(lm: LanguageModel, run: Run) -> None:
    """36 replies in batches of 12, twice, at a rate that falls to zero; from a start of its own, on the bare model."""
    (call,) = [c for c in run.heard.finetuned if len(c["sets"]) == 1 and len(c["sets"][0].examples) == 36]
    (training_set,), (rates,) = call["sets"], call["rates"]
    assert call["frozen"] == [] and [len(b) for b in training_set.batches] == [12] * 6
    assert sorted(i for b in training_set.batches[:3] for i in b) == list(range(36))
    assert rates == pytest.approx([1e-3 * (1 - s / 6) for s in range(6)])
    first = derive_seed(0, "pooled", "start")
    assert torch.equal(call["start"], lm.layout(run.folder.config.personal.adapter).start(first)[None])


def test_newcomers_learn_from_their_own_streams_on_the_shared_adapter(lm: LanguageModel, run: Run) -> None:
    last = run.heard.finetuned[-1]
    assert len(last["sets"]) == 2 and torch.equal(last["frozen"][0].rows, run.shared[None])
    users = load_devices(run.folder).users
    for training_set, name in zip(last["sets"], ("device-00003", "device-00004"), strict=True):
        person = users[name].id.removeprefix("u")
        originals = [t for t in in_words(lm, list(training_set.examples)) if f"of {person}," in t]
        assert originals and all(f"|>{person} as" in t for t in originals)


def test_a_gain_is_what_the_base_lost_more_than_the_personal_adapter(run: Run) -> None:
    """By class of device, in the report's own units: the mean over devices of NLL with neither minus with both."""
    nll = {(e.device, e.arm): e.nll for e in run.events("result")}
    gains = [nll[d, "base"] - nll[d, "personal"] for d in run.arms.names]
    (told,) = run.events("fairness")
    assert told.classes["always there"].utility.mean == pytest.approx(float(np.mean(gains)))
    assert told.fairness.worst_decile_utility == pytest.approx(min(gains)) and np.mean(gains) != 0


# -- studies ------------------------------------------------------------------------------------------------------


def study_of(folder: Path, kind: str, rows: dict[str, Any], **settings: Any) -> None:
    tree = {**LEARNING, "data": data(folder, 2), **settings}
    tree["study"] = {"kind": kind, "seeds": 2 if kind == "alone" else 1, "tables": {"one": {"rows": rows}}}
    if kind == "federated":
        tree["study"]["hidden_share"] = 0.5
    tree["study"]["workers"] = 1  # what others do is not heard here
    path = folder / f"{kind}.toml"
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")
    run_study(load_study(path), folder / "study", lambda phase: None)


def test_no_cell_of_a_study_without_a_server_learns_what_is_held_out(
    lm: LanguageModel, heard: Heard, tmp_path: Path
) -> None:
    study_of(tmp_path, "alone", {"selection.policy": ["fifo"]}, rounds=1)
    assert_unseen(lm, heard)


def test_no_arm_of_a_federated_study_has_seen_what_is_held_out(lm: LanguageModel, heard: Heard, tmp_path: Path) -> None:
    study_of(tmp_path, "federated", {"selection.policy": ["fifo"]}, rounds=1)
    assert_unseen(lm, heard)
    personal, local = [c for c in heard.finetuned if len(c["sets"]) == 2]
    assert len(personal["frozen"]) == 1 and local["frozen"] == [] and same_lessons(personal, local)
    assert torch.equal(personal["start"], local["start"])


def test_no_arm_of_a_federated_study_has_met_what_a_coin_hid(
    lm: LanguageModel, heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the attack, which asks about what was met and what was hidden alike."""
    coins: list[Canary] = []
    ours: list[Example] = []
    membership = federated_cell.membership

    def attacking(seen: Any, hidden: Any) -> Any:
        coins.extend(hidden)
        ours.extend([*heard.sets, *heard.selected])
        asked = len(heard.learned)
        found = membership(seen, hidden)
        del heard.learned[asked:]
        return found

    monkeypatch.setattr(federated_cell, "membership", attacking)
    study_of(tmp_path, "federated", {"selection.policy": ["fifo"]}, rounds=1)
    learned = {e.reply for e in [*ours, *heard.sets]}
    replies = [(lm.format.dialogues([c.dialogue])[0].reply, c.member) for c in coins]
    assert len(replies) == 12 and [r for r, member in replies if member and r in learned]
    assert not [r for r, member in replies if not member and r in learned]


@pytest.mark.parametrize("looking", [False, True])
def test_no_rival_has_seen_what_is_held_out(lm: LanguageModel, heard: Heard, tmp_path: Path, looking: bool) -> None:
    """FedDPA compares a question with its device's own examples, and so alone reads what is asked; it learns nothing
    of it either.
    """
    shape = {"adapter": {"rank": 2, "alpha": 4, "targets": ["v_proj"], "factors": "both"}}
    names = [name for name in BASELINES if (name == "feddpa") == looking]
    study_of(tmp_path, "rivals", {"baseline.name": names}, rounds=1, baseline={"steps": 2, "batch_size": 2},
             shared={**shape, "pool_capacity": 0, "source": "buffer"}, personal=shape,
             privacy={"mode": "none", "clips": "change"},
             evaluation=EVALUATION | {"rouge_queries_per_user": 0})  # fmt: skip
    if looking:
        assert any(MARK in text for text in in_words(lm, heard.selected))
        heard.selected.clear()
    assert_unseen(lm, heard)


def test_no_life_has_learned_what_it_is_asked_about_at_its_end(lm: LanguageModel, heard: Heard, tmp_path: Path) -> None:
    """Two interactions as one person and two as another; of each eight later ones are held out."""
    people = data(tmp_path, 2)
    write_people(Path(people["name"]), met=2)
    lives = {"model": MODEL, "data": people, "interactions": 4, "shift": "person", "sampling": SHORT,
             "asls": {"fresh": 1}, "study": {"kind": "lives", "seeds": 1, "tables": {"one": {"rows": {"seed": [0]}}}},
             "user": {"accepts": 1.0, "slips": 0.0, "corrects": 1.0}}  # fmt: skip
    (tmp_path / "lives.toml").write_text(tomli_w.dumps(lives), encoding="utf-8")
    run_study(load_study(tmp_path / "lives.toml"), tmp_path / "study", lambda phase: None)
    assert_unseen(lm, heard)


# -- methods ------------------------------------------------------------------------------------------------------


def task_user(name: str, word: str) -> TaskUser:
    items = tuple(Item(f"{name}{i}", f"{word} {i} for {name}", f"{word} it is, {i}", float(i)) for i in range(3))
    query = Query(f"{name}q", f"what of {word}", f"{MARK if name[0] == 'u' else word} it is", word, time=9.0)
    return TaskUser(name, items, (query,))


@pytest.mark.parametrize("name", ["oppu", "pooled", "pplug", "per-pcs", "rpo", "hypernet-start", "userip"])
def test_no_method_has_seen_the_answers(lm: LanguageModel, heard: Heard, name: str) -> None:
    """Of those who are reported on; the pool's answers are what the task is learned from."""
    config = MethodsConfig.model_validate({
        "model": MODEL | {"name": "smollm2-135m"},
        "task": {"users": 2, "pool_users": 2},
        "task_stage": {"training": {"epochs": 1}},
        "method": {"name": name, "training": {"epochs": 1}},
        "sampling": SHORT,
    })  # fmt: skip
    task = Task("replies", ("rouge1",), asked="{text}")
    pool = [task_user("p0", "soup"), task_user("p1", "rain")]
    play(lm, config, task, pool, [task_user("u0", "ships"), task_user("u1", "tea")], seed=0)
    learned = in_words(lm, heard.sets)
    assert any(MARK in text for text in in_words(lm, heard.scored))
    assert learned and not [text for text in learned if MARK in text]
    assert [t for t in learned if "soup it is" in t]  # of the pool


def test_a_graph_of_triples_is_neither_made_of_nor_tuned_on_the_answers(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KGT trains nothing: what it reads to propose a triple, and what it weighs triples by, are their own items."""
    lm = LanguageModel.load(ModelConfig.model_validate(MODEL | {"limits": {"prompt_tokens": 48, "reply_tokens": 16}}))
    weighed: list[Example] = []
    losses = KnowledgeGraph.losses

    def weighing(self: KnowledgeGraph, graphs: Any) -> Any:
        before = len(heard.scored)
        found = losses(self, graphs)
        weighed.extend(heard.scored[before:])
        return found

    monkeypatch.setattr(KnowledgeGraph, "losses", weighing)
    config = MethodsConfig.model_validate({
        "model": MODEL | {"name": "smollm2-135m"},
        "task": {"users": 2, "pool_users": 2},
        "task_stage": {"training": {"epochs": 1}},
        "method": {"name": "kgt"},
        "sampling": SHORT,
    })  # fmt: skip
    task = Task("replies", ("rouge1",), asked="{text}")
    pool = [task_user("p0", "soup"), task_user("p1", "rain")]
    play(lm, config, task, pool, [task_user("u0", "ships"), task_user("u1", "tea")], seed=0)
    asked = [prompt for prompts, _ in heard.written for prompt in prompts if "What the user" in prompt]
    assert [p for p in asked if "ships" in p] and not [p for p in asked if MARK in p]
    read = in_words(lm, weighed)
    assert [t for t in read if "ships it is" in t] and not [t for t in read if MARK in t]
    assert [t for t in in_words(lm, heard.scored) if MARK in t]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load(ModelConfig.model_validate(MODEL))
