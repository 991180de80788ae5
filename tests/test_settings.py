"""Every setting has an effect: a table of all of them, each with another value and where that shows.

`Seen` by a small function of the settings, mostly of what is handed on: it must give something else. `In` another test,
where only a run shows it. `Refused`: there is one value, another one is told off. `Without`: it has none here, and why.
A setting that is not in the table fails; so does one that the table has and that is gone.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from florilegium.client import calibration
from florilegium.client.agent.agent import Agent
from florilegium.client.agent.config import AgentConfig
from florilegium.client.agent.device import Device as OpenDevice
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.calibration import release_noise
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm import model
from florilegium.client.lm.features import Feature
from florilegium.client.lm.model import Features, LanguageModel
from florilegium.client.lm.text import ChatFormat
from florilegium.client.lm.training_data import TrainingResult, TrainingSet
from florilegium.client.personalization import rpo
from florilegium.client.personalization.asls import Asls, Device, Interaction
from florilegium.client.personalization.config import AslsConfig
from florilegium.client.phases import annotate, learn_personal, synthesize_pool
from florilegium.client.selection.buffer import Buffer, candidate
from florilegium.client.selection.entry import BufferEntry
from florilegium.client.selection.lexicons import load_lexicons
from florilegium.client.selection.policies import POLICIES
from florilegium.client.shared_training import clipped_change
from florilegium.client.state import DeviceState
from florilegium.client.synthesize import Request, synthesize
from florilegium.privacy.common.base_config import Config
from florilegium.privacy.common.errors import UserError
from florilegium.privacy.noise import ReleaseNoise
from florilegium.privacy.plan import RoundPlan
from florilegium.server.aggregation import RULES
from florilegium.server.strategy import ReleaseStrategy
from florilegium.simulation.baselines import feddpa, layerwise
from florilegium.simulation.baselines.config import BaselinesConfig
from florilegium.simulation.baselines.context import BaselineContext
from florilegium.simulation.baselines.registry import BASELINES
from florilegium.simulation.config import ExperimentConfig, WorldConfig
from florilegium.simulation.data.conversations import Conversation, Turn
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.population import load_population
from florilegium.simulation.devices.preflight import world_of
from florilegium.simulation.engines.ray_actors import RayWorkers
from florilegium.simulation.engines.ray_cluster import Wish
from florilegium.simulation.experiment import ENGINES
from florilegium.simulation.heterogeneity.availability import Work, simulate_round
from florilegium.simulation.heterogeneity.classes import DeviceClass, DevicePopulation
from florilegium.simulation.heterogeneity.clock import Clock
from florilegium.simulation.models import pretrain as pretraining
from florilegium.simulation.models.config import PretrainConfig
from florilegium.simulation.personalization.config import InteractiveConfig, MethodsConfig
from florilegium.simulation.personalization.interactive import feedback, reptile
from florilegium.simulation.personalization.run import play as play_method
from florilegium.simulation.runs.changes import check
from florilegium.simulation.runs.folder import RunFolder, find_run
from florilegium.simulation.settings import ConfigError, dump_config, set_value, validate
from florilegium.simulation.studies import runner as study_runner
from florilegium.simulation.studies.baselines_cell import BaselinesCell
from florilegium.simulation.studies.cell import SharedResources
from florilegium.simulation.studies.config import UNSEEN, Cell, Study, StudyConfig, TableConfig
from florilegium.simulation.studies.federated_cell import FederatedCell
from florilegium.simulation.studies.interactive_cell import InteractiveCell
from florilegium.simulation.studies.methods_cell import MethodsCell
from florilegium.simulation.studies.study_report import Shown
from florilegium.simulation.tasks import config as task_config
from florilegium.simulation.tasks.task import Item, Query, Task, TaskUser

PEOPLE, OTHERS = "people.jsonl", "others.jsonl"
BASE: dict[str, Any] = {"data": {"name": PEOPLE, "users": 3, "split": "all", "min_pairs": 8, "max_pairs": 11}}
PLAN = RoundPlan(2, 1)
Beside = Mapping[str, Any]


@dataclass(frozen=True)
class Tools:
    """What the functions that look at settings work with."""

    lm: LanguageModel
    folder: Path
    home: DeviceFolder  # of a device
    key: str


@dataclass(frozen=True)
class Seen:
    other: Any
    by: Callable[[Any, Tools], Any]
    beside: Beside = field(default_factory=dict)  # settings without which it has none


@dataclass(frozen=True)
class In:
    other: Any
    test: str
    beside: Beside = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    other: Any
    told: str
    beside: Beside = field(default_factory=dict)


@dataclass(frozen=True)
class Without:
    other: Any
    why: str
    beside: Beside = field(default_factory=dict)


Row = Seen | In | Refused | Without


# -- what settings are seen by ------------------------------------------------------------------------------------


def handed_to_the_model(c: ExperimentConfig, tools: Tools) -> Any:
    """What loads it, and what makes its engine."""
    calls: list[Any] = []

    def load(*given: Any, **named: Any) -> tuple[None, Callable[..., dict[str, list[int]]]]:
        calls.append((given, named))
        return None, lambda *given, **named: {"input_ids": []}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load", load)
        patch.setattr(model, "Engine", lambda *given: calls.append(given))
        patch.setattr(model, "ChatFormat", lambda *given: None)
        LanguageModel.load(c.model)
    return calls


def as_ids(c: ExperimentConfig, tools: Tools) -> Any:
    said = [Dialogue("", "a long prompt of ten words or maybe of more than ten " * 9, "as long a reply " * 30)]
    return ChatFormat(tools.lm.tokenizer, c.model).dialogues(said)


def kept(c: ExperimentConfig, tools: Tools) -> Any:
    """What a buffer holds of six texts, with their scores."""
    texts = ("bread and warm cheese", "my doctor gave me a drug for the pain", "the boat went out", "a nurse in pain",
             "we walked home to the kitchen and cooked", "medicine and soup")  # fmt: skip
    names, rng = {p.reading for p in POLICIES.values()} | {"weighted"}, np.random.default_rng(0)
    buffer = Buffer(c.selection)
    for k, text in enumerate(texts):
        drawn = torch.Generator().manual_seed(k)
        vectors = {n: Feature(torch.randn(4, generator=drawn), float(k % 3)) for n in sorted(names)}
        features = Features(vectors, torch.rand(5, generator=drawn), truncated=False)
        dialogue = Dialogue(f"d{k}", text, "")
        buffer, _ = buffer.offer(candidate(dialogue, features, load_lexicons(c.selection.lexicons), c.selection), rng)
    return [(k.id, k.domain, k.eoe, k.dss, k.idd, k.embedding.tolist()) for k in buffer._scored()]


class Scribe(LanguageModel):
    """Writes what it is told to, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def generate(self, prompts: Any, slots: Any, adapters: Any, sampling: Any, seeds: Any) -> list[str]:
        texts = (
            "today soup do you like",  # nearly the same
            "grey ships sail far out tonight",  # nothing of it
            "do you like soup today " + "or perhaps a very large and slow and heavy meal of many parts",  # much longer
            "do you like soup today a.b@example.org",
        )
        self.asked.append((list(prompts), list(seeds), sampling))
        return [texts[k % len(texts)] for k in range(len(prompts))]


PAIR = ("do you like soup today", "yes do you like soup today")


def written(c: ExperimentConfig, tools: Tools) -> Any:
    """What is asked for, and what of it is kept."""
    scribe = Scribe()
    found = synthesize([Request("d", PAIR, 7)], [], scribe, c.synthesis)
    return scribe.asked, [w.kept for w in found]


def site_of(c: ExperimentConfig, tools: Tools) -> CohortContext:
    return CohortContext.of(tools.lm, c, c.seed, lambda device, identity: f"reply to {identity}")


def state_of(c: ExperimentConfig, context: CohortContext, replies: Mapping[str, str]) -> DeviceState:
    """Five in the buffer, one of them written anew once, and two more in the pool."""
    bins = tuple(BufferEntry(f"b{k}", f"prompt {k}", "", np.ones(2, np.float16)) for k in range(5))
    state = context.new_state("d")
    pool = state.pool
    for k in range(2):
        pool = pool.offer(f"p{k}", f"pooled {k}", state.secret)
    made = {"b0": (("prompt anew", "reply"),)}
    buffer = Buffer(c.selection, bins)
    return replace(state, personal=state.personal + 1, buffer=buffer, pool=pool, replies=dict(replies), synthetic=made)


REPLIES = {name: f"reply to {name}" for name in ("b0", "b1", "b2", "b3", "b4", "p0", "p1")}


def asked_about(c: ExperimentConfig, tools: Tools) -> Any:
    context = site_of(c, tools)
    (state,), _ = annotate([state_of(c, context, {})], context)
    return sorted(state.replies)


def pool_synthetic(c: ExperimentConfig, tools: Tools) -> Any:
    context, scribe = site_of(c, tools), Scribe()
    synthesize_pool([state_of(c, context, REPLIES)], replace(context, lm=scribe))
    return scribe.asked


def trainings(engine: Any, learn: Callable[[], Any]) -> list[Any]:
    """What the engine is given to train."""
    calls: list[Any] = []

    def finetune(trained: Any, frozen: Any, sets: Any, rates: Any, *more: Any, **named: Any) -> TrainingResult:
        given = [(list(x.examples), [list(b) for b in x.batches]) for x in sets]
        calls.append((trained.rows.tolist(), repr(trained.layout), given, rates, more, named))
        return TrainingResult(trained, [[] for _ in sets])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "finetune", finetune)
        learn()
    return calls


def taught_alone(c: ExperimentConfig, tools: Tools) -> Any:
    context = site_of(c, tools)
    return trainings(tools.lm.engine, lambda: learn_personal([state_of(c, context, REPLIES)], None, PLAN, context))


def weighed(c: ExperimentConfig, tools: Tools) -> Any:
    """What each token of a personal lesson weighs."""
    context, found = site_of(c, tools), list[Any]()

    def finetune(trained: Any, frozen: Any, sets: Any, rates: Any, *more: Any) -> TrainingResult:
        found.extend([list(of) for of in x.weights] for x in sets)
        return TrainingResult(trained, [[] for _ in sets])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools.lm.engine, "finetune", finetune)
        learn_personal([state_of(c, context, REPLIES)], None, PLAN, context)
    return found


@contextmanager
def planning() -> Iterator[list[Any]]:
    """Every plan has σ = 1, found at once; yields what is planned for."""
    calls: list[Any] = []

    def calibrate(*given: Any) -> float:
        calls.append(given)
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "calibrate", calibrate)
        yield calls


def taught_for_all(c: ExperimentConfig, tools: Tools) -> Any:
    context = site_of(c, tools)
    received, plan = torch.zeros(context.shared_layout.width), RoundPlan(1, 0)
    with planning():
        return trainings(
            tools.lm.engine, lambda: clipped_change([state_of(c, context, REPLIES)], received, plan, context)
        )


def noise(c: ExperimentConfig, tools: Tools) -> Any:
    """What a release is planned to spend, its noise, and the budget."""
    with planning() as planned:
        return calibration.planned_event(c), release_noise(c, c.server.noise_bands, 0), c.privacy.budget, planned


def summed(c: ExperimentConfig, tools: Tools) -> Any:
    """How many a sum is of, and how their numbers become integers."""
    with planning():
        return c.summed, calibration.sum_code(c, site_of(c, tools).schema, 1, c.seed)


def layouts(c: ExperimentConfig, tools: Tools) -> Any:
    context = site_of(c, tools)
    return [(repr(x), x.width, x.start(0).tolist()) for x in (context.shared_layout, context.personal_layout)]


def new_device(c: ExperimentConfig, tools: Tools) -> Any:
    state = site_of(c, tools).new_state("d")
    return state.secret, state.personal.tolist(), state.pool


def schema(c: ExperimentConfig, tools: Tools) -> Any:
    return site_of(c, tools).schema


class Waiting:
    """A grid on which nobody answers."""

    def get_node_ids(self) -> list[int]:
        return [1]

    def send_and_receive(self, messages: Any, *, timeout: float) -> list[Any]:
        self.timeout = timeout
        return []


def served(c: ExperimentConfig, tools: Tools) -> Any:
    """Whom a server asks, what it makes of eleven releases, and where two steps of its optimizer lead."""
    if not c.server.by_rounds:
        return "no rounds"
    small = site_of(c, tools).schema
    strategy = ReleaseStrategy(c.server, small, c.seed, ReleaseNoise(), over_sampling=c.world.over_sampling)
    strategy.names = [f"d{k}" for k in range(10)]
    rule = RULES[c.server.rule](2, c.server)
    for k, row in enumerate(np.random.default_rng(0).normal(size=(11, 2)).astype(np.float32)):
        rule.add(f"d{k}", row)
    shared, moments, steps = np.zeros(2, np.float32), strategy.optimizer.start(2), []
    for _ in range(2):
        shared, moments = strategy.optimizer.step(shared, np.array([0.01, -0.02], np.float32), moments)
        steps.append(shared.tolist())
    grid = Waiting()
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    with pytest.raises(UserError):
        ReleaseStrategy(c.server, small, c.seed, ReleaseNoise()).greet(grid)  # type: ignore[arg-type]
    asked = [strategy.sampled(number) for number in (1, 2)]
    return asked, rule.change().tolist(), steps, strategy.whole.width, grid.timeout


def people(c: ExperimentConfig, tools: Tools) -> Any:
    data = c.data.model_copy(update={"name": str(tools.folder / c.data.name)})
    try:
        return [(u.id, u.stream, u.held_out) for u in load_population(data, c.seed)]
    except UserError as error:
        return str(error)


def fates(c: ExperimentConfig, tools: Tools) -> Any:
    """Three rounds of a world, of devices that have something to do."""
    world = world_of(c)
    if world is None:
        return "no world"
    clock = Clock(world, lambda name: Work(3e5, 100, 10**6, 10**6), wanted=30, needed_bytes=0)
    return [clock.round(number, [f"d{k}" for k in range(40)]) for number in (1, 2, 3)]


def asked_of_ray(c: ExperimentConfig, tools: Tools) -> Any:
    """What an actor is to have, and whether a node with a GPU has room for it."""
    asked: list[Any] = []

    class Begun:
        begin = SimpleNamespace(remote=lambda *given: given[1:])

    class Ray:
        def remote(self, **wanted: Any) -> Any:
            asked.append(wanted)
            return lambda kind: SimpleNamespace(remote=Begun)

    workers = object.__new__(RayWorkers)
    workers.__dict__.update(ray=Ray(), settings=c.ray, run=RunFolder(Path()), opened=None, starting={})
    workers._start(0)
    return asked, Wish(c.ray.actors, c.ray.cpus_per_actor, c.ray.gpus_per_actor).fits({"CPU": 8.0, "GPU": 1.0})


def named(c: ExperimentConfig, tools: Tools) -> Any:
    (tools.folder / "mine.toml").write_text(dump_config(c), encoding="utf-8")
    return find_run(str(tools.folder / "mine.toml"), [], Path("runs"), resuming=False)[1]


# -- the table ----------------------------------------------------------------------------------------------------

WHOLE = {"privacy.mode": "user-local"}  # a device's change is clipped as a whole
TOGETHER: dict[str, Any] = {"privacy.mode": "user-distributed"}
A_WORLD = {"world.classes": "world/devices"}
ARMS, FEDERATIONS, PERSON = "test_arms.py::", "test_federations.py::", "test_person.py::"
OF_LORA_ALONE = "prompts alone have virtual tokens, and what is shared is LoRA"
POOLED = ARMS + "test_pooled_is_one_adapter_on_all_that_the_evaluated_met"
CALLED = "test_extensions.py::test_a_run_with_extensions_ends_with_what_is_wrong_and_goes_on"
COUNTED = "test_faults.py::test_too_many_faults_end_the_run"
HUB = "test_data.py::test_hub_rows_are_read_by_the_columns_named"
HUBS_OWN = "test_data.py::test_a_hub_row_has_its_domain_and_comes_of_the_part_asked_for"
PARTED = "test_data_partition.py::test_each_reply_goes_to_one_user_and_the_seed_alone_decides"
NATURAL = "test_data_partition.py::test_natural_makes_a_user_of_each_label_and_halves_them"
IID = {"data.partition.kind": "iid"}
OTHER_NAMES = "test_formats.py::test_every_field_may_be_called_otherwise"

RUNS: dict[str, Row] = {
    "model.name": Seen("smollm2-135m", handed_to_the_model),
    "model.dtype": Seen("bfloat16", handed_to_the_model, {"model.dtype": "float32"}),
    "model.weights": Seen("int8", handed_to_the_model),
    "model.device": Seen("cuda:1", handed_to_the_model),
    "model.chat_template": Seen("plain", handed_to_the_model),
    "model.date": In(
        "2026-02-01", "test_text.py::test_a_template_that_asks_for_today_is_told_the_date_of_the_settings"
    ),
    "model.targets": Seen(["v_proj"], handed_to_the_model),
    "model.limits.prompt_tokens": Seen(9, as_ids),
    "model.limits.reply_tokens": Seen(9, as_ids),
    "model.max_batch_tokens": Seen(99, handed_to_the_model),
    "model.checkpointing": Seen(True, handed_to_the_model),
    "selection.policy": Seen("fifo", kept, {"selection.bins": 2}),
    "selection.bins": Seen(2, kept),
    "selection.bin_bytes": Seen(30, kept),
    "selection.annotations_per_round": Seen(1, asked_about),
    "selection.entropy": Seen("dimensions", kept),
    "selection.pooling": Seen("weighted", kept),
    "selection.dissimilarity": Seen("recomputed", kept),
    "selection.lexicons": Seen(["medical"], kept),
    "synthesis.per_dialogue": Seen(1, written),
    "synthesis.attempts": Seen(2, written),
    "synthesis.prompt": Seen("keep", written, {"synthesis.response": "rewrite"}),
    "synthesis.response": Seen("rewrite", written),
    "synthesis.accept": In("likely", "test_client.py::test_a_reply_that_would_become_less_likely_is_thrown_away"),
    "synthesis.instruction": Seen("Rewrite: ", written),
    "synthesis.rouge1_min": Seen(0.0, written, {"synthesis.per_dialogue": 4}),
    "synthesis.rouge1_max": Seen(1.0, written, {"synthesis.per_dialogue": 4}),
    "synthesis.length_ratio_max": Seen(9.0, written, {"synthesis.per_dialogue": 4}),
    "synthesis.pii_free": Seen(True, written, {"synthesis.per_dialogue": 4}),
    "synthesis.sampling.max_new_tokens": Seen(5, written),
    "synthesis.sampling.temperature": Seen(0.9, written),
    "shared.adapter.kind": Refused("ia3", "what is shared is LoRA's factors"),
    "shared.adapter.rank": Seen(2, layouts),
    "shared.adapter.alpha": Seen(3.0, layouts),
    "shared.adapter.targets": Seen(["v_proj"], layouts),
    "shared.adapter.factors": Seen("both", layouts),
    "shared.adapter.virtual_tokens": Without(3, OF_LORA_ALONE),
    "shared.source": Seen("buffer", taught_for_all, WHOLE),
    "shared.pool_capacity": Seen(7, new_device),
    "shared.sampling_rate": Seen(0.25, noise),
    "shared.sampling": Refused("shuffled", "must be 'poisson'"),
    "shared.steps_per_round": Seen(2, noise),
    "shared.synthetic": Seen(2, pool_synthetic),
    "shared.learning_rate": Seen(0.5, noise),
    "shared.adamw_learning_rate": Seen(1e-4, taught_for_all, WHOLE),
    "shared.batch_size": Seen(1, taught_for_all, WHOLE),
    "shared.upload": Seen("int8", schema),
    "shared.proximal": Seen(0.5, taught_for_all, WHOLE),
    "personal.adapter.kind": Seen("ia3", layouts),
    "personal.adapter.rank": Seen(2, layouts),
    "personal.adapter.alpha": Seen(3.0, layouts),
    "personal.adapter.targets": Seen(["v_proj"], layouts),
    "personal.adapter.factors": Seen("b", layouts),
    "personal.adapter.virtual_tokens": Seen(3, layouts, {"personal.adapter.kind": "prompt"}),
    "personal.learning_rate": Seen(1e-5, taught_alone),
    "personal.epochs": Seen(2, taught_alone),
    "personal.steps": Seen(3, taught_alone),
    "personal.batch_size": Seen(2, taught_alone),
    "personal.weight_decay": Seen(0.5, taught_alone),
    "personal.token_contrast": Seen(1.0, weighed),
    "personal.half_life": Seen(2.0, weighed),
    "personal.on_new_shared": Seen("retrain", taught_alone),
    "privacy.mode": Seen("user-central", noise),
    "privacy.epsilon": Seen(4.0, noise),
    "privacy.delta": Seen(1e-6, noise),
    "privacy.accountant": Refused("rdp", "'pld' .* decides"),
    "privacy.clip_norm_l2": Seen(0.5, noise),
    "privacy.releases": Seen(1, noise),
    "privacy.clips": Seen("change", noise, {"privacy.mode": "none"}),
    "privacy.secret": Seen("os", new_device),
    "secure_aggregation.devices": Seen(4, summed, TOGETHER | {"secure_aggregation.survivors": 3}),
    "secure_aggregation.survivors": Seen(4, summed, TOGETHER | {"data.users": 6}),
    "secure_aggregation.colluding": Seen(1, summed, TOGETHER | {"data.users": 6}),
    "secure_aggregation.bits": Seen(24, summed, TOGETHER),
    "rounds": Seen(5, noise),
    "name": Seen("another", named),
    "seed": Seen(1, new_device),
    "engine.name": Seen("flower", lambda c, tools: ENGINES[c.engine.name]),
    "engine.on_device_error": In("count", COUNTED),
    "engine.failed_share": In(0.5, "test_faults.py::test_counted_faults_are_in_table_summary_and_report"),
    "cohort_size": In(1, "test_scale.py::test_cohorts_of_one_select_write_and_draw_the_same"),
    "workers": In(2, "test_scale.py::test_two_processes_give_the_same_bits_and_one_goes_on_from_there"),
    "callbacks": In(["florilegium.simulation.runs.callbacks:Callback"], CALLED),
    "data.name": Seen(OTHERS, people),
    "data.users": Seen(2, people),
    "data.split": Seen("development", people),
    "data.bootstrap": Seen(True, people, {"data.users": 9}),
    "data.min_pairs": Seen(10, people, {"data.users": 6}),
    "data.max_pairs": Seen(9, people),
    "data.held_out_share": Seen(0.5, people),
    "data.queries_per_user": Seen(1, people),
    "data.context_turns": In(2, "test_data.py::test_a_prompt_holds_as_many_turns_as_are_asked_for", WHOLE),
    "data.order": Seen("blocked", people),
    "data.stickiness": Seen(0.1, people, {"data.order": "sticky"}),
    "data.troubles.kind": Seen("greetings", people, {"data.troubles": {"kind": "junk", "share": 0.5}}),
    "data.troubles.share": Seen(0.25, people, {"data.troubles": {"kind": "junk", "share": 0.5}}),
    "data.hub_fields.user": In("who", HUB),
    "data.hub_fields.time": In("at", HUB),
    "data.hub_fields.prompt": In("asked", HUB),
    "data.hub_fields.response": In("said", HUB),
    "data.hub_fields.domain": In("topic", HUBS_OWN),
    "data.hub_fields.subset": In("small", HUBS_OWN),
    "data.hub_fields.part": In("test", HUBS_OWN),
    "data.hub_fields.revision": In("v2", HUBS_OWN),
    "data.fields.user": In("k1", OTHER_NAMES),
    "data.fields.time": In("k2", OTHER_NAMES),
    "data.fields.prompt": In("k3", OTHER_NAMES),
    "data.fields.response": In("k4", OTHER_NAMES),
    "data.fields.domain": In("k5", OTHER_NAMES),
    "data.fields.text": In("k6", OTHER_NAMES),
    "data.fields.conversation": In("k7", OTHER_NAMES),
    "data.fields.id": In("k8", OTHER_NAMES),
    "data.fields.reply_to": In("k9", OTHER_NAMES),
    "data.replies": In("user", "test_formats.py::test_whose_replies_are_learned_is_told_and_can_be_chosen"),
    "data.reply_within_s": In(
        9.0, "test_formats.py::test_a_log_is_paired_by_what_a_message_names_else_by_the_last_of_somebody_else"
    ),
    "data.dates": In("day-first", "test_formats.py::test_the_whole_file_decides_whether_day_or_month_comes_first"),
    "data.partition.kind": In("iid", PARTED),
    "data.partition.by": In("domain", NATURAL, IID),
    "data.partition.users": In(9, "test_data_partition.py::test_more_users_than_are_drawn_can_be_made", IID),
    "data.partition.alpha": In(
        0.1, "test_data_partition.py::test_a_small_alpha_leaves_a_user_with_few_labels_and_a_large_one_with_all",
        {"data.partition.kind": "dirichlet"},
    ),
    "data.partition.labels_per_user": In(
        1, "test_data_partition.py::test_a_pathological_user_has_as_many_labels_as_asked",
        {"data.partition.kind": "pathological"},
    ),
    "data.partition.shards_per_user": In(
        1, "test_data_partition.py::test_a_user_of_shards_has_as_many_labels_as_shards",
        {"data.partition.kind": "shard"},
    ),
    "data.partition.seed": In(5, PARTED, IID),
    "server.sampled_share": Seen(0.3, served),
    "server.rule": Seen("trimmed-mean", served, {"data.users": 11}),
    "server.trimmed_share": Seen(0.4, served, {"server.rule": "trimmed-mean", "data.users": 11}),
    "server.byzantine": Seen(4, served, {"server.rule": "krum", "server.krum_keep": 3, "data.users": 11}),
    "server.krum_keep": Seen(2, served, {"server.rule": "krum", "data.users": 11}),
    "server.optimizer": Seen("fedadam", served),
    "server.learning_rate": Seen(0.5, served),
    "server.momentum": Seen(0.1, served, {"server.optimizer": "fedavgm"}),
    "server.beta_2": Seen(0.5, served, {"server.optimizer": "fedadam"}),
    "server.tau": Seen(0.5, served, {"server.optimizer": "fedyogi"}),
    "server.products": Seen("residual", served, {"shared.adapter.factors": "both"}),
    "server.buffer": Seen(2, served, {**A_WORLD, "server.concurrency": 2}),
    "server.concurrency": In(
        3, "test_world.py::test_concurrency_makes_answers_stale_and_no_device_works_twice",
        {**A_WORLD, "server.buffer": 2, "server.concurrency": 2},
    ),
    "server.noise_bands": Seen(3, noise, {"privacy.mode": "user-central", "privacy.releases": 1}),
    "server.reply_timeout_s": Seen(7.0, served),
    "evaluation.every_round": In(False, ARMS + "test_a_curve_is_of_every_round_or_of_the_last"),
    "evaluation.users": In(2, FEDERATIONS + "test_newcomers_are_evaluated_and_never_asked"),
    "evaluation.newcomers": In(2, FEDERATIONS + "test_newcomers_are_evaluated_and_never_asked"),
    "evaluation.sampling.max_new_tokens": In(5, ARMS + "test_replies_are_asked_for_as_the_settings_say"),
    "evaluation.sampling.temperature": In(0.5, ARMS + "test_replies_are_asked_for_as_the_settings_say"),
    "evaluation.sampling.contrast": In(1.0, PERSON + "test_contrast_is_of_the_replies_that_are_measured"),
    "evaluation.sampling.plausible": In(
        0.9, PERSON + "test_contrast_is_of_the_replies_that_are_measured", {"evaluation.sampling.contrast": 1.0}
    ),
    "evaluation.person.people": In(8, PERSON + "test_a_run_tells_whose_its_adapters_are"),
    "evaluation.person.replies": In(2, PERSON + "test_a_run_tells_whose_its_adapters_are"),
    "evaluation.rouge_queries_per_user": In(1, ARMS + "test_replies_are_asked_for_as_the_settings_say"),
    "evaluation.pooled_epochs": In(2, POOLED),
    "evaluation.pooled_batch_size": In(12, POOLED),
    "evaluation.pooled_learning_rate": In(1e-3, POOLED),
    "evaluation.replies_shown": In(1, ARMS + "test_replies_are_asked_for_as_the_settings_say"),
    "ray.actors": In(2, "test_scale.py::test_two_actors_select_write_and_draw_the_same_beside_a_foreign_module"),
    "ray.cpus_per_actor": Seen(2.0, lambda c, tools: c.ray.cpus_needed, {"ray.actors": 3}),
    "ray.gpus_per_actor": Seen(1.0, asked_of_ray, {"ray.actors": 2}),
    "ray.address": In("x:1", "test_scale.py::test_a_node_that_is_gone_with_its_disk_changes_nothing"),
    "ray.shards": In(3, "test_scale.py::test_cohorts_of_one_select_write_and_draw_the_same"),
    "world.classes": Seen("world/devices", fates),
    "world.deadline_s": Seen(60.0, fates, A_WORLD),
    "world.over_sampling": Seen(1.5, served, {**A_WORLD, "server.sampled_share": 0.3}),
    "world.drop_out": Seen(0.5, fates, A_WORLD),
    "world.start_hour": Seen(12.0, fates, A_WORLD),
    "world.idle_s": Seen(6000.0, fates, A_WORLD),
}  # fmt: skip

# -- rivals -------------------------------------------------------------------------------------------------------

SHAPE = {"adapter": {"rank": 2, "alpha": 4, "factors": "both", "targets": ["v_proj"]}}
RIVAL = {**BASE, "shared": SHAPE, "personal": SHAPE, "privacy": {"mode": "none", "clips": "change"}}
TALKS = [Dialogue(str(k), f"prompt {k}", f"reply {k}") for k in range(6)]


def scheduled(c: BaselinesConfig, tools: Tools) -> Any:
    return BaselineContext.of(tools.lm, c, c.seed).training_set(state_of(c, site_of(c, tools), REPLIES), 1).batches


def turned(c: BaselinesConfig, tools: Tools) -> Any:
    """What a round of the rival hands to the engine."""
    context, rival = BaselineContext.of(tools.lm, c, c.seed), BASELINES[c.baseline.name]
    sets = [TrainingSet(tools.lm.format.dialogues(TALKS), [[0, 1], [2, 3]])] * 2
    return trainings(tools.lm.engine, lambda: rival.turn(rival.start(context, 2), sets, context, 1))


def asked_by_feddpa(c: BaselinesConfig, tools: Tools) -> Any:
    context = BaselineContext.of(tools.lm, c, c.seed)
    sets = [TrainingSet(tools.lm.format.dialogues(TALKS), [[0]])]
    return feddpa.mixed(feddpa.start(context, 1), context, [[Dialogue("q", "prompt 7", "x")]], sets).tolist()


RIVALRY: dict[str, Row] = {
    "baseline.name": Seen("ditto", lambda c, tools: BASELINES[c.baseline.name]),
    "baseline.learning_rate": Seen(1e-5, turned),
    "baseline.steps": Seen(4, scheduled),
    "baseline.batch_size": Seen(2, scheduled),
    "baseline.ditto_lambda": Seen(9.0, turned, {"baseline.name": "ditto"}),
    "baseline.personal_share": Seen(
        0.75, lambda c, tools: layerwise.parts(BaselineContext.of(tools.lm, c, 0))[1].width
    ),
    "baseline.mix": Seen(0.1, asked_by_feddpa),
    "baseline.compared": Seen(1, asked_by_feddpa),
}


# -- methods ------------------------------------------------------------------------------------------------------

METHOD = {"model": {"name": "smollm2-135m"}, "sampling": {"max_new_tokens": 4}, "task": {"users": 2, "pool_users": 2}}


def a_task_user(name: str) -> TaskUser:
    texts = ("green tea", "red ship", "blue rain", "a red boat")
    items = tuple(Item(f"{name}{i}", text, f"it is {text}", float(i)) for i, text in enumerate(texts))
    return TaskUser(name, items, (Query(f"{name}q", "say red ship", f"it is {name}", "red ship"),))


def methods(c: MethodsConfig, tools: Tools) -> Any:
    """What a method is trained on, and what it then asks the model."""
    found: list[Any] = []

    def preferring(engine: Any, start: Any, beneath: Any, told: Any, **named: Any) -> Any:
        found.append(([p.pairs.tolist() for of in told for p in of], named))
        return start, []

    def playing() -> None:
        task, pool = Task("echo", ("accuracy",), asked="say {text}"), [a_task_user("p0"), a_task_user("p1")]
        played = play_method(tools.lm, c, task, pool, [a_task_user("u0"), a_task_user("u1")], c.seed)
        found.append(played.question_tokens)

    def generate(prompts: Any, slots: Any, adapters: Any, sampling: Any, seeds: Any) -> list[str]:
        found.append((list(prompts), sampling))
        return ["it is so"] * len(prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpo, "prefer", preferring)
        patch.setattr(tools.lm, "generate", generate)
        return trainings(tools.lm.engine, playing), found


def task_of(c: MethodsConfig, tools: Tools) -> Any:
    """What a stand-in is asked for."""
    calls: list[Any] = []

    def load(*given: Any) -> Any:
        calls.append(given)
        raise DataError("not here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_config, "load_stand_in", load)
        with pytest.raises(DataError):
            task_config.load_task(c.task, c.seed)
    return repr(calls)


LAMP = "test_tasks.py::test_a_config_of_lamp_keeps_development_test_and_pool_apart"
OPPU, RPO = {"method.name": "oppu"}, {"method.name": "rpo"}
OF_METHODS: dict[str, Row] = {
    "task.name": Seen("talk-topic", task_of),
    "task.folder": In("official", LAMP, {"task.name": "lamp:1", "task.folder": "other"}),
    "task.file": In("train", "test_tasks.py::test_all_seven_tasks_are_read_from_their_own_fields"),
    "task.users": Seen(3, task_of),
    "task.pool_users": Seen(3, task_of),
    "task.split": Seen("development", task_of),
    "task.min_history": Seen(20, task_of),
    "task.max_history": Seen(60, task_of),
    "task.queries_per_user": Seen(2, task_of),
    "task_stage.enabled": Seen(False, methods),
    "task_stage.adapter.kind": Seen("ia3", methods),
    "task_stage.adapter.rank": Seen(2, methods),
    "task_stage.adapter.alpha": Seen(2.0, methods),
    "task_stage.adapter.targets": Seen(["v_proj"], methods),
    "task_stage.adapter.factors": Seen("b", methods),
    "task_stage.adapter.virtual_tokens": Seen(3, methods, {"task_stage.adapter.kind": "prompt"}),
    "task_stage.training.epochs": Seen(1, methods),
    "task_stage.training.batch_size": Seen(1, methods),
    "task_stage.training.learning_rate": Seen(1e-5, methods),
    "history.part": Seen("far", methods, OPPU),
    "history.most": Seen(1, methods, OPPU),
    "history.labels": Seen(False, methods, OPPU),
    "method.name": Seen("pooled", methods),
    "method.retrieve": Seen(2, methods),
    "method.retriever": Seen("recent", methods, {"method.retrieve": 1}),
    "method.profile": Seen(True, methods),
    "method.adapter.kind": Seen("ia3", methods, OPPU),
    "method.adapter.rank": Seen(2, methods, OPPU),
    "method.adapter.alpha": Seen(2.0, methods, OPPU),
    "method.adapter.targets": Seen(["o_proj"], methods, OPPU),
    "method.adapter.factors": Seen("b", methods, OPPU),
    "method.adapter.virtual_tokens": Seen(3, methods, {**OPPU, "method.adapter.kind": "prompt"}),
    "method.training.epochs": Seen(1, methods, OPPU),
    "method.training.batch_size": Seen(1, methods, OPPU),
    "method.training.learning_rate": Seen(1e-5, methods, OPPU),
    "method.preference.beta": Seen(0.9, methods, RPO),
    "method.preference.temperature": Seen(0.1, methods, RPO),
    "method.preference.nll_weight": Seen(0.1, methods, RPO),
    "sampling.max_new_tokens": Seen(2, methods),
    "sampling.temperature": Seen(5.0, methods),
}


# -- lives --------------------------------------------------------------------------------------------------------


def adapting(c: InteractiveConfig, tools: Tools) -> Any:
    """What devices make of six interactions, and what they hand to the engine."""
    asls, calls = Asls(tools.lm, c.asls, c.seed), list[Any]()
    devices, wants = [Device("d")], []
    for k, prompt in enumerate(("i like ships", "i like ships too", "what of soup", "is it late", "any ships", "rain")):
        said = Interaction(prompt, f"said {k}", k % 2 == 0, "" if k % 2 == 0 else f"wanted {k}")
        devices = [asls.observe(devices[0], said)]
        wants.append(asls.wants_to_adapt(devices[0]))
    layout = tools.lm.layout(c.adapter)
    rows = tools.lm.adapters(layout, layout.start(0))

    def gradient(trained: Any, frozen: Any, batches: Any, weights: Any) -> Any:
        calls.append((repr(trained.layout), batches, weights))
        return torch.ones_like(trained.rows), torch.zeros(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools.lm.engine, "gradient", gradient)
        devices, after, _ = asls.adapt(devices, rows)
    again = asls.observe(devices[0], Interaction("and now something else, of trains", "x", False, "y"))
    profile = devices[0].profile
    interests = [(i.text, i.count, i.feedback) for i in profile.interests]
    vector = profile.vector(asls.embed, c.asls.profile).tolist()
    moved = (after.rows - rows.rows).tolist()
    later = asls.wants_to_adapt(again), asls.rate(again), asls.prompt(again, "x"), len(again.window)
    return wants, later, interests, vector, calls, moved


def thought(c: InteractiveConfig, tools: Tools) -> Any:
    return [feedback("lentil soup", "lentil soup and bread or rice or fish", c.user, seed) for seed in range(60)]


def led(c: InteractiveConfig, tools: Tools) -> Any:
    layout = tools.lm.layout(c.adapter)
    made: list[Any] = []
    calls = trainings(tools.lm.engine, lambda: made.append(reptile(tools.lm, layout, c.reptile, [TALKS] * 3, c.seed)))
    return calls


STARTS = "test_methods.py::test_lives_are_studied"
TWO = {"asls.profile.same": 0.95}
OF_LIVES: dict[str, Row] = {
    "adapter.kind": Seen("ia3", adapting),
    "adapter.rank": Seen(2, adapting),
    "adapter.alpha": Seen(2.0, adapting),
    "adapter.targets": Seen(["v_proj"], adapting),
    "adapter.factors": Seen("b", adapting),
    "adapter.virtual_tokens": Seen(3, adapting, {"adapter.kind": "prompt"}),
    "asls.arm": Seen("with-words", adapting),
    "asls.profile.interests": Seen(1, adapting, TWO),
    "asls.profile.same": Seen(1.0, adapting),
    "asls.profile.half_life": Seen(1, adapting, TWO),
    "asls.profile.feedback_rate": Seen(0.9, adapting),
    "asls.drift": Seen(0.0, adapting, {"asls.fresh": 5}),
    "asls.fresh": Seen(1, adapting, {"asls.drift": 2.0}),
    "asls.window": Seen(2, adapting),
    "asls.examples": Seen(1, adapting),
    "asls.steps": Seen(1, adapting),
    "asls.rate": Seen(1e-5, adapting),
    "asls.boost": Seen(0.1, adapting),
    "asls.decay": Seen(0.9, adapting),
    "asls.beta": Seen(0.9, adapting),
    "asls.preference": Seen(0.1, adapting),
    "user.accepts": Seen(0.9, thought, {"user.slips": 0.0}),
    "user.slips": Seen(0.4, thought),
    "user.corrects": Seen(1.0, thought, {"user.accepts": 0.9}),
    "interactions": In(6, STARTS),
    "start": In("shared", STARTS),
    "others": In(2, STARTS),
    "reptile.rounds": Seen(2, led),
    "reptile.people": Seen(1, led),
    "reptile.steps": Seen(1, led),
    "reptile.batch_size": Seen(1, led),
    "reptile.rate": Seen(1e-5, led),
    "reptile.outer": In(1.0, "test_live.py::test_reptile_moves_the_start_by_epsilon_of_the_change"),
    "shift": In("person", STARTS),
}


# -- a device of one's own ----------------------------------------------------------------------------------------


def chatting(c: AgentConfig, tools: Tools) -> Any:
    """What a device hands to its model, and when it would learn by itself."""
    asked, agent = list[Any](), Agent(OpenDevice(tools.home, c, tools.lm, tools.key))
    agent.consent("learn", True)

    conversation = f"c{agent.device.vault.count()}"  # a new one

    def reply(prompt: str, adapters: Any, sampling: Any, *_: Any) -> str:
        asked.append((prompt, sampling))
        return "so it is"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools.lm, "reply", reply)
        for prompt in ("first", "second", "third", "x" * 50):
            try:
                agent.chat(prompt, conversation)
            except UserError as error:
                asked.append(str(error))
    hours = [time.struct_time((2026, 1, 1, hour, *[0] * 5)) for hour in range(24)]
    return asked, [agent.due(hour, plugged) for hour in hours for plugged in (True, False)]


TRIALS = "test_trial.py::"
OF_DEVICES: dict[str, Row] = {
    "name": In("another", "test_deployment.py::test_three_devices_a_server_and_what_goes_wrong"),
    "key": In("keyring", "test_agent.py::test_a_key_may_lie_in_the_keyring"),
    "chat.max_new_tokens": Seen(5, chatting),
    "chat.temperature": Seen(0.5, chatting),
    "chat.contrast": Seen(0.5, chatting),
    "chat.plausible": Seen(0.5, chatting, {"chat.contrast": 1.0}),
    "generation.backend": In("llamacpp", "test_llamacpp.py::test_a_device_talks_with_what_it_has_learned"),
    "context_turns": Seen(1, chatting),
    "recall": In(1, "test_recall.py::test_a_reply_is_shown_what_its_owner_said_elsewhere"),
    "acceptance.share": In(0.5, TRIALS + "test_a_reply_that_is_held_back_is_learned_from_by_nobody_until_its_turn"),
    "acceptance.learnings": In(2, TRIALS + "test_a_reply_that_is_held_back_is_learned_from_by_nobody_until_its_turn"),
    "acceptance.risk": In(0.5, TRIALS + "test_an_update_is_taken_back_beyond_what_chance_alone_brings"),
    "longest": Seen(40, chatting),
    "memory_limit": In(2**30, "test_agent.py::test_a_limit_of_memory_is_kept_to_and_told"),
    "keep": In(8, "test_agent.py::test_dialogues_beyond_what_is_kept_go_unless_they_are_learned_from"),
    "learn": Seen("charging", chatting),
    "night": Seen([3, 4], chatting, {"learn": "night"}),
    "port": In(0, "test_agent.py::test_the_page_is_for_its_owner_alone"),
}


# -- a class of devices -------------------------------------------------------------------------------------------

KIND = {
    "name": "slow", "share": 1.0, "train_tokens_per_s": 100.0, "memory_bytes": 1000, "up_bits_per_s": 8000.0,
    "down_bits_per_s": 8000.0, "joules_per_token": 0.5, "joules_per_byte": 0.25, "available": [0.6] * 24, "source": "x",
}  # fmt: skip


def fared(c: DeviceClass, tools: Tools) -> Any:
    """Of twenty devices in a round; of this class and of another one that is always there."""
    other = DeviceClass.model_validate({**KIND, "name": "other", "available": [1.0] * 24})
    world = DevicePopulation(WorldConfig(classes="made-up"), (c, other), 0)
    return simulate_round(world, 1, 0, {f"d{k}": Work(1000, 200, 1000, 1000) for k in range(20)}, 20, needed_bytes=1000)


OF_CLASSES: dict[str, Row] = {
    "name": Seen("slower", fared),
    "share": Seen(0.5, fared),
    "train_tokens_per_s": Seen(10.0, fared),
    "memory_bytes": Seen(999, fared),
    "up_bits_per_s": Seen(80.0, fared),
    "down_bits_per_s": Seen(80.0, fared),
    "joules_per_token": Seen(5.0, fared),
    "joules_per_byte": Seen(5.0, fared),
    "available": Seen([0.1] * 24, fared),
    "rank": In(1, FEDERATIONS + "test_a_device_with_room_for_a_part_of_the_rank_sends_that_part"),
    "source": Without("y", "it says where the figures come from"),
}


# -- studies ------------------------------------------------------------------------------------------------------

GRID = {"rows": {"selection.policy": ["fifo"]}}


def celled(c: StudyConfig, tools: Tools) -> Any:
    """How a study's cells are run, and which they are."""
    return study_runner.KINDS[c.kind], list(Study("s", BASE, c, "study").cells)


def gridded(c: TableConfig, tools: Tools) -> Any:
    """The cells of a study of one table, those that others are compared with too."""
    study = Study("s", BASE, StudyConfig(tables={"t": c}), "study")
    return list(study.cells), [[study.cell(c, label).key for label in row] for row in c.labels()]


OF_STUDIES: dict[str, Row] = {
    "kind": Seen("federated", celled),
    "seeds": Seen(2, celled),
    "workers": In(2, "test_study.py::test_two_processes_find_what_one_finds_to_the_bit"),
    "hidden_share": Seen(0.5, celled, {"kind": "federated"}),
    "tables": Seen({"t": GRID, "u": {"rows": {"selection.bins": [4]}}}, celled),
}
OF_TABLES: dict[str, Row] = {
    "title": Seen("A title", lambda c, tools: Shown("t", c, [], []).title),
    "rows": Seen({"selection.policy": ["random"]}, gridded),
    "columns": Seen({"selection.bins": [4, 8]}, gridded),
    "fixed": Seen({"selection.bins": 5}, gridded),
    "against": Seen(["selection.policy=random"], gridded),
    "published": In("policy", "test_study.py::test_the_papers_figures_stand_where_they_belong"),
}


# -- training a model ---------------------------------------------------------------------------------------------

TINY = {"vocab_size": 300, "hidden_size": 16, "layers": 1, "heads": 1, "intermediate_size": 16, "context": 64}
PRETRAIN = {
    "out": "pretrained", "corpora": ["one"], "model": TINY, "tokens": 10_000, "window": 32, "batch_tokens": 4096,
    "held_out": 5, "device": "cpu",
}  # fmt: skip


def talks(word: str) -> list[Conversation]:
    rng, words = np.random.default_rng(len(word)), [word, "soup", "rain", "ships", "tea", "night", "walk"]
    said = [" ".join(rng.choice(words, 8)) for _ in range(400)]
    return [Conversation(word, tuple(Turn("ab"[k % 2], text, k) for k, text in enumerate(said[i : i + 4])))
            for i in range(0, 400, 4)]  # fmt: skip


def trained(c: PretrainConfig, tools: Tools) -> Any:
    """What two steps leave, and what is told of them."""
    told: list[Any] = []

    def compiled(loss: Any) -> Any:
        told.append("compiled")
        return loss

    home = Path(tempfile.mkdtemp(dir=tools.folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "READERS", {"one": lambda: talks("one"), "two": lambda: talks("cheese")})
        patch.setattr(torch, "compile", compiled)
        try:
            facts = pretraining.pretrain(c.model_copy(update={"out": home / c.out}), told.append)
        except (RuntimeError, AssertionError) as error:
            return type(error)  # without a GPU
    files = [p for p in sorted(home.rglob("*.*")) if p.suffix in (".safetensors", ".json")]
    left = {str(p.relative_to(home)): p.read_bytes() for p in files}
    return told[0], "compiled" in told, facts, left


OF_PRETRAINING: dict[str, Row] = {
    "out": Seen("elsewhere", trained),
    "corpora": Seen(["two"], trained),
    "model.vocab_size": Seen(310, trained),
    "model.hidden_size": Seen(32, trained),
    "model.layers": Seen(2, trained),
    "model.heads": Seen(2, trained),
    "model.intermediate_size": Seen(32, trained),
    "model.context": Seen(128, trained),
    "tokens": Seen(20_000, trained),
    "window": Seen(64, trained),
    "batch_tokens": Seen(2048, trained),
    "learning_rate": Seen(1e-3, trained),
    "warmup_share": Seen(0.9, trained),
    "decay_share": Seen(1.0, trained),
    "weight_decay": Seen(0.9, trained),
    "rewrite_share": Seen(0.5, trained),
    "rewrite_instruction": Seen("Again: ", trained, {"rewrite_share": 0.5}),
    "held_out": Seen(9, trained),
    "checkpoint_every_s": Seen(1e-9, trained),
    "compile": Seen(True, trained),
    "device": Seen("cuda", trained),
    "seed": Seen(1, trained),
}

TREES: dict[str, tuple[type[Config], Mapping[str, Any], Mapping[str, Row]]] = {
    "runs": (ExperimentConfig, BASE, RUNS),
    "rivals": (BaselinesConfig, RIVAL, RIVALRY),
    "methods": (MethodsConfig, METHOD, OF_METHODS),
    "lives": (InteractiveConfig, {}, OF_LIVES),
    "devices": (AgentConfig, {"name": "d", "device": {"model": {"dtype": "float32"}}}, OF_DEVICES),
    "classes": (DeviceClass, KIND, OF_CLASSES),
    "studies": (StudyConfig, {"tables": {"t": GRID}}, OF_STUDIES),
    "tables": (TableConfig, GRID, OF_TABLES),
    "pretraining": (PretrainConfig, PRETRAIN, OF_PRETRAINING),
}
ELSEWHERE = {  # of a tree, what another one has the same of
    "runs": ("baseline",),
    "rivals": tuple(k for k in ExperimentConfig.model_fields if k != "baseline"),
    "methods": ("name", "seed", "model"),
    "lives": ("name", "seed", "model", "data", "sampling"),
    "devices": ("device",),
    "classes": (),
    "studies": (),
    "tables": (),
    "pretraining": (),
}
ALL = [(tree, key, row) for tree, (_, _, rows) in TREES.items() for key, row in rows.items()]


# -- the tests ----------------------------------------------------------------------------------------------------


def leaves(kind: type[Config], at: str = "") -> Iterator[str]:
    for key, found in kind.model_fields.items():
        if isinstance(found.default, Config):
            yield from leaves(type(found.default), f"{at}{key}.")
        else:
            yield f"{at}{key}"


def configured(tree: str, changed: Mapping[str, Any]) -> Any:
    """The settings of a tree's base with some others."""
    kind, base, _ = TREES[tree]
    settings = deepcopy(dict(base))
    for key, value in changed.items():
        set_value(settings, key, deepcopy(value))  # which a setting within it changes
    return validate(kind, settings, "settings")


@pytest.mark.parametrize("tree", TREES)
def test_the_table_has_every_setting(tree: str) -> None:
    kind, _, rows = TREES[tree]
    everything = {key for key in leaves(kind) if key.partition(".")[0] not in ELSEWHERE[tree]}
    assert everything == set(rows)


@pytest.fixture(scope="module")
def tools(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Tools:
    folder = tmp_path_factory.mktemp("settings")
    for file, word in ((PEOPLE, "soup"), (OTHERS, "rain")):
        said = [
            {
                "user": f"u{u}",
                "time": t,
                "prompt": f"{word} {t}?",
                "response": f"{u} says {t}",
                "domain": f"d{t * 7 % 3}",
            }
            for u in range(6)
            for t in range(9 if u == 5 else 12)
        ]
        (folder / file).write_text("\n".join(map(json.dumps, said)), encoding="utf-8")
    home, owner = DeviceFolder(folder / "device"), configured("devices", {})
    return Tools(lm, folder, home, home.make(owner))


BEFORE: dict[Any, Any] = {}


@pytest.mark.parametrize(("tree", "key", "row"), [pytest.param(*r, id=f"{r[0]}-{r[1]}") for r in ALL])
def test_every_setting_has_an_effect(tree: str, key: str, row: Row, tools: Tools) -> None:
    if isinstance(row, Refused):
        with pytest.raises(ConfigError, match=row.told):
            configured(tree, {**row.beside, key: row.other})
        return
    if not isinstance(row, Seen):
        return
    same = tree, row.by, tuple(sorted((k, str(v)) for k, v in row.beside.items()))
    if same not in BEFORE:
        BEFORE[same] = row.by(configured(tree, row.beside), tools)
    assert row.by(configured(tree, {**row.beside, key: row.other}), tools) != BEFORE[same]


def test_a_training_of_the_same_settings_is_the_same(tools: Tools) -> None:
    """Or else every setting of it would seem to have an effect."""
    assert trained(configured("pretraining", {}), tools) == trained(configured("pretraining", {}), tools)


def test_what_is_seen_elsewhere_is_seen_there() -> None:
    for _, key, row in ALL:
        if isinstance(row, In):
            file, _, name = row.test.partition("::")
            text = (Path(__file__).parent / file).read_text(encoding="utf-8")
            assert f"def {name}(" in text and key.rpartition(".")[2] in text, (key, row.test)


# -- what is remembered -------------------------------------------------------------------------------------------

# Settings of a tree that do not reach what a study remembers, and why.
OF_A_CELL = dict.fromkeys(UNSEEN, "changes nothing in a study")
NAME = {"name": "it is a study's"}
OUR_OWN = {"baseline": "no other scheme is studied there"}
NO_BENCH: tuple[Any, ...] = (Path(), SharedResources(frozenset()), print)
NOT_REACHING: dict[str, tuple[str, Callable[[Cell], Any], Mapping[str, str]]] = {
    "the folder of a federated cell": ("runs", lambda cell: cell.key, {**OF_A_CELL, **OUR_OWN}),
    "the folder of a cell of rivals": ("rivals", lambda cell: cell.key, OF_A_CELL),
    "the folder of a cell of methods": ("methods", lambda cell: cell.key, NAME),
    "the folder of a cell of lives": ("lives", lambda cell: cell.key, NAME),
    "the arms without a server": (
        "runs",
        lambda cell: FederatedCell(cell, *NO_BENCH)._learned_alone([], 0),
        {**OF_A_CELL, **OUR_OWN, **dict.fromkeys(("shared", "server", "privacy"), "by the buffers, that the key has")},
    ),
    "the base of rivals": (
        "rivals",
        lambda cell: BaselinesCell(cell, *NO_BENCH)._of_base(0),
        {k: "the base is without adapters" for k in BaselinesConfig.model_fields if k not in ("model", "data", "seed")},
    ),
    "the task's adapter": (
        "methods",
        lambda cell: MethodsCell(cell, *NO_BENCH)._of_task(0),
        {
            **NAME, "method.name": "but for kgt and dpl, prompts are the same", "method.adapter": "trained later",
            "method.training": "trained later", "method.preference": "trained later", "sampling": "nothing is said yet",
        },
    ),
    "what others have made": (
        "lives",
        lambda cell: InteractiveCell(cell, *NO_BENCH)._of_others(cell.config.data, cell.config.seed),  # type: ignore[union-attr]
        {
            **NAME, "asls": "theirs is no device", "user": "nobody is asked", "interactions": "all of their streams",
            "start": "what is made of it", "others": "in the data of those people", "shift": "none of theirs shifts",
            "sampling": "nothing is said",
        },
    ),
    "everybody's movements": (
        "lives",
        lambda cell: InteractiveCell(cell, *NO_BENCH)._of_everybody(),
        {
            **NAME, **{f"asls.{k}": "of adapting" for k in AslsConfig.model_fields if k != "profile"},
            **dict.fromkeys(("adapter", "start", "others", "reptile"), "profiles have no adapter"),
            "user": "whatever is thought of replies", "sampling": "nothing is said",
        },
    ),
}  # fmt: skip


KIND_OF = {"runs": "federated", "rivals": "rivals", "methods": "methods", "lives": "lives"}


@pytest.mark.parametrize("what", NOT_REACHING)
def test_a_remembered_result_is_used_only_if_every_setting_that_reaches_it_is_equal(what: str) -> None:
    tree, key_of, not_reaching = NOT_REACHING[what]
    study = StudyConfig.model_validate({"kind": KIND_OF[tree], "tables": {"t": {}}})
    tried = set[str]()
    for key, row in _rows_of(tree).items():
        if (tree, key) == ("runs", "baseline.name"):
            continue  # refused there, and others of its settings follow from it
        try:
            both = [configured(tree, changed) for changed in (row.beside, {**row.beside, key: row.other})]
        except ConfigError:
            continue  # cannot be otherwise here
        if both[0] == both[1]:
            continue  # is so already here
        one, other = (key_of(Cell(config, study)) for config in both)
        spared = any(key == k or key.startswith(f"{k}.") for k in not_reaching)
        assert (one == other) == spared, key
        tried.add(key.partition(".")[0])
    never = {"secure_aggregation"} if tree == "rivals" else set[str]()  # baselines have no *-distributed mode
    assert tried >= {"seed", "model"} and tried == set(TREES[tree][0].model_fields) - never


def _rows_of(tree: str) -> dict[str, Row]:
    """Of all settings of a tree, those too that another one has the same of."""
    kind, _, own = TREES[tree]
    return {key: own.get(key) or RUNS.get(key) or RIVALRY.get(key) or OF_METHODS[key] for key in leaves(kind)}


def test_a_control_without_a_server_is_that_of_the_same_buffers(tools: Tools) -> None:
    """Who was asked when, and about what, follows from the pool and the server too: it is in the key by its outcome."""
    config = configured("runs", {"selection.annotations_per_round": 1})
    study = StudyConfig.model_validate({"kind": "federated", "tables": {"t": {}}})
    cell, context = (
        FederatedCell(Cell(config, study), Path(), SharedResources(frozenset()), print),
        site_of(config, tools),
    )
    whole = state_of(config, context, REPLIES)
    fewer = replace(whole, replies={k: v for k, v in REPLIES.items() if k != "b3"})
    otherwise, plain = replace(whole, replies={**REPLIES, "b3": "else"}), replace(whole, synthetic={})
    keys = [cell._learned_alone([state], 0) for state in (whole, fewer, otherwise, plain)]
    assert len(set(keys)) == 4
    learned = replace(whole, personal=whole.personal + 1, pool=context.new_state("d").pool)  # what it is not made of
    assert cell._learned_alone([learned], 0) == keys[0] != cell._learned_alone([whole], 1)


GOES_ON = (
    "ray.",
    "cohort_size",
    "workers",
    "engine.on_device_error",
    "engine.failed_share",
    "callbacks",
    "evaluation.",
    "rounds",
)


def test_a_run_goes_on_only_with_settings_that_nothing_done_depends_on() -> None:
    """After one of three rounds."""
    for key, row in RUNS.items():
        if isinstance(row, Refused):
            continue
        before, after = configured("runs", row.beside), configured("runs", {**row.beside, key: row.other})
        if key.startswith(GOES_ON) and key not in ("rounds", "evaluation.users"):
            check(before, after, 1, "run")
            continue
        with pytest.raises(ConfigError, match=r"run.* differs from the config given|cannot be changed|was divided by"):
            check(before, after, 1, "run")
