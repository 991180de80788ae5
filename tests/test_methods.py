"""Studies of methods on tasks, and of lives, from their settings to their pages."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.model import LanguageModel
from florilegium.client.personalization.history import Asked
from florilegium.simulation.heterogeneity.classes import load_classes
from florilegium.simulation.personalization.config import HistoryConfig, InteractiveConfig, MethodsConfig
from florilegium.simulation.personalization.histories import halved, person
from florilegium.simulation.personalization.run import play
from florilegium.simulation.settings import ConfigError
from florilegium.simulation.studies.cell import SharedResources
from florilegium.simulation.studies.config import Cell, Study, StudyConfig, TableConfig, load_study
from florilegium.simulation.studies.interactive_cell import HELD_OUT, InteractiveCell
from florilegium.simulation.studies.personalization_report import STRANGER, tables
from florilegium.simulation.studies.runner import run_study
from florilegium.simulation.studies.study_report import read_report
from florilegium.simulation.tasks.config import load_task
from florilegium.simulation.tasks.task import Item, Query, Task, TaskUser

MODEL = {"name": "nano", "dtype": "float32", "limits": {"prompt_tokens": 48, "reply_tokens": 12}}
METHODS: dict[str, Any] = {
    "model": MODEL,
    "task": {"name": "chat-reply", "users": 3, "pool_users": 3, "max_history": 10, "queries_per_user": 2},
    "task_stage": {"training": {"epochs": 1}},
    "method": {"training": {"learning_rate": 5e-3, "batch_size": 4}},
    "sampling": {"max_new_tokens": 6},
    "study": {
        "kind": "methods",
        "seeds": 2,
        "tables": {"t": {"rows": {"method.name & method.retrieve": [["base", 0], ["base", 1], ["oppu", 0]]}}},
    },
}
METHODS_OF_TWO: dict[str, Any] = {"model": MODEL, "sampling": {"max_new_tokens": 6}}
LIVES: dict[str, Any] = {
    "model": MODEL,
    "data": {"users": 2, "min_pairs": 40, "max_pairs": 40},
    "interactions": 6,
    "others": 2,
    "reptile": {"rounds": 1, "people": 2, "steps": 2},
    "sampling": {"max_new_tokens": 6},
    "asls": {"fresh": 2},
    "user": {"corrects": 1},
    "study": {
        "kind": "lives",
        "seeds": 1,
        "tables": {
            "starts": {"rows": {"start": ["new", "shared", "reptile"]}},
            "shift": {"rows": {"asls.arm": ["full", "none"]}, "fixed": {"shift": "person"}},
        },
    },
}


def study_of(tree: dict[str, Any], folder: Path) -> Study:
    path = folder / "study.toml"
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")
    return load_study(path)


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    folder = tmp_path_factory.mktemp("methods")
    study = study_of(METHODS, folder)
    run_study(study, folder, lambda phase: None)
    return study, folder


def test_methods_are_compared_on_the_same_people(methods: tuple[Study, Path]) -> None:
    study, folder = methods
    (shown,) = tables(study, folder)
    names = [o.name for o in shown.outcomes]
    assert names == ["base", "base + bm25 1", "oppu"] and list(shown.metrics) == ["nll", "rouge-1", "rouge-L"]
    assert len({tuple(o.result["devices"]) for o in shown.outcomes}) == 1 and len(shown.outcomes[0].seeds) == 6
    base, retrieved, own = shown.outcomes
    assert own.costs["bytes kept"] and own.costs["tokens trained"] and not base.costs["tokens trained"]
    assert retrieved.costs["tokens of a question"] > base.costs["tokens of a question"]  # type: ignore[operator]
    phone = own.costs["seconds of a mid-phone"]
    assert phone and phone == pytest.approx(own.costs["tokens trained"] * 2_557_632 / 135e6 / TOKENS_PER_S, rel=0.02)
    assert base.measured() == base.measured(arm="shuffled") and own.measured() != own.measured(arm="shuffled")
    assert shown.against(own) and shown.against(own, than=STRANGER) and not shown.against(base, than=STRANGER)
    page = read_report(study, folder).write(folder).read_text("utf-8")
    assert "oppu" in page and "</html>" in page
    told = json.loads((folder / "summary.json").read_text())["tables"]["t"]
    assert len(told["cells"]) == 3 and {c["than"] for c in told["contrasts"]} == {"base", STRANGER}


def test_a_study_of_methods_goes_on_where_it_was_killed(methods: tuple[Study, Path], tmp_path: Path) -> None:
    study, folder = methods
    key = list(study.cells)[-1]
    kept = json.loads((folder / "cells" / key / "seed0.json").read_text())
    (tmp_path / "cells" / key).mkdir(parents=True)
    (tmp_path / "cells" / key / "seed0.json").write_text(json.dumps({**kept, "marked": True}))
    run_study(study, tmp_path, lambda phase: None)
    first, second = json.loads((tmp_path / "cells" / key / "result.json").read_text())["seeds"]
    assert first["marked"] and first["arms"] == kept["arms"]
    whole = json.loads((folder / "cells" / key / "result.json").read_text())["seeds"][1]
    np.testing.assert_allclose(
        second["arms"]["own"]["nll"]["by_user"], whole["arms"]["own"]["nll"]["by_user"], rtol=1e-4
    )


@pytest.mark.slow
def test_lives_are_studied(tmp_path: Path) -> None:
    study = study_of(LIVES, tmp_path)
    run_study(study, tmp_path, lambda phase: None)
    starts, shift = tables(study, tmp_path)
    new, shared, reptile = starts.outcomes
    assert {o.measured().mean_per_user for o in (new, shared, reptile)}.__len__() == 3  # type: ignore[union-attr]
    assert new.costs["adaptations"] and new.costs["milliseconds an interaction"] and new.costs["bytes of the profile"]
    full, none = shift.outcomes
    assert full.costs["forgotten, nats"] != 0 == none.costs["forgotten, nats"]
    assert read_report(study, tmp_path).write(tmp_path).exists()


def test_a_dialogue_of_the_second_half_is_measured_before_it_is_learned_from(lm: LanguageModel, tmp_path: Path) -> None:
    """With everything but the learning left out, the figures are those of the base."""
    tree = {**LIVES, "asls": {"arm": "none"}}
    tree["study"] = {**LIVES["study"], "tables": {"t": {"rows": {"asls.arm": ["none"]}}}}
    study = study_of(tree, tmp_path)
    run_study(study, tmp_path, lambda phase: None)
    (shown,) = tables(study, tmp_path)
    assert shown.outcomes[0].costs["tokens trained"] == 0


def test_forgotten_is_what_the_first_half_has_become_worse_by_and_won_what_the_second_has_become_better(
    lm: LanguageModel, tmp_path: Path
) -> None:
    """The loss of held-out replies from before the shift, at the end less half way; from after it, the other way."""
    config = InteractiveConfig.model_validate(
        {"interactions": 2, "shift": "person", "adapter": {"rank": 2, "alpha": 4}}
    )
    cell = InteractiveCell(
        Cell(config, StudyConfig(tables={"t": TableConfig(rows={})})), tmp_path, SharedResources(frozenset()), print
    )
    layout = lm.layout(config.adapter)
    streams = {
        name: [
            Dialogue(f"{n}", f"{name}, what is number {n}", f"it is {n} {'times ' * (n % 3)}{name}") for n in range(18)
        ]
        for name in ("ann", "bob")
    }
    noise = torch.randn(2, 2, layout.width, generator=torch.Generator().manual_seed(0))
    half_way, end = layout.start(0) + torch.tensor([0.02, 0.1])[:, None, None] * noise
    lived = SimpleNamespace(half_way=half_way, rows=end)
    found = cell._shifted(lived, lm, streams, [])  # type: ignore[arg-type]

    def loss(rows: torch.Tensor, first: int) -> float:
        """The mean over people of each one's mean over all tokens, nats."""
        means = []
        for row, stream in zip(rows, streams.values(), strict=True):
            told = lm.format.dialogues(stream[first : first + HELD_OUT])
            scores = lm.score(told, [0] * HELD_OUT, [lm.adapters(layout, row)])
            means.append(sum(s.nll for s in scores) / sum(s.tokens for s in scores))
        return float(np.mean(means))

    assert found["forgotten, nats"] == pytest.approx(loss(end, 2) - loss(half_way, 2), abs=1e-3)
    assert found["won, nats"] == pytest.approx(loss(half_way, 10) - loss(end, 10), abs=1e-3)
    assert min(abs(found["forgotten, nats"] or 0), abs(found["won, nats"] or 0)) > 0.02


TOKENS_PER_S = next(c.train_tokens_per_s for c in load_classes("world/devices") if c.name == "mid-phone")
TASK = Task("echo", ("accuracy",), asked="say {text}", shown_as='"{text}" is "{target}"')


def user(name: str, *texts: str) -> TaskUser:
    items = tuple(Item(f"{name}{i}", text, f"t{i}", float(i)) for i, text in enumerate(texts))
    return TaskUser(name, items, (Query("q", "say red ship", "x", "red ship"),))


def test_a_history_is_cut_halved_or_stripped_of_its_labels(lm: LanguageModel) -> None:
    told = user("a", "green tea", "red ship", "blue rain", "a red boat")
    whole = person(told, TASK, HistoryConfig(), "d")
    assert whole.history[1].example.prompt == "say red ship" and whole.history[1].example.response == "t1"
    assert whole.questions[0][0] == Asked("say red ship", "red ship")
    assert [p.document for p in person(told, TASK, HistoryConfig(most=2), "d").history] == ["blue rain", "a red boat"]
    near, far = (halved([whole], HistoryConfig.model_validate({"part": part}), lm)[0] for part in ("near", "far"))
    assert [p.document for p in near.history] == ["red ship", "a red boat"]
    assert [p.document for p in far.history] == ["green tea", "blue rain"]
    plain = person(told, TASK, HistoryConfig(labels=False), "d").history[1]
    assert (plain.example.prompt, plain.example.response, plain.shown) == ("", "red ship", '"red ship"')


def test_the_task_is_learned_from_the_pool_alone(lm: LanguageModel) -> None:
    """With another target for everything that the reported users have, the task's adapter is the same."""
    config = MethodsConfig.model_validate({k: v for k, v in METHODS.items() if k != "study"})
    task, pool, users = load_task(config.task, 0)
    made = []

    def remember(learn: Any) -> Any:
        made.append(learn())
        return made[-1]

    changed = [
        TaskUser(
            u.id,
            tuple(Item(i.id, i.text, "x") for i in u.history),
            tuple(Query(q.id, f"{q.input}?", "x", q.search) for q in u.queries),
        )
        for u in users
    ]
    for some in (users, changed):
        play(lm, config, task, pool, some, 0, remember)
    assert (made[0].rows == made[1].rows).all()


def test_what_the_bundled_model_was_trained_on_is_refused() -> None:
    with pytest.raises(ValueError, match="nano was trained"):
        MethodsConfig.model_validate({"model": MODEL, "task": {"name": "help-reply"}})


def test_unknown_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="retreive"):
        study_of({**METHODS, "method": {"retreive": 2}}, tmp_path)
    with pytest.raises(ConfigError, match="chat-reply"):
        study_of({**METHODS, "task": {"name": "chat-replay"}}, tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"name": "tap-per", "retrieve": 1}, "retrieve = 0"),
        ({"name": "userip", "adapter": {"kind": "ia3"}}, "method.adapter.kind = 'lora', not 'ia3'"),
        ({"name": "dpl", "profile": True}, "profile = false"),
        ({"name": "aloe", "retrieve": 2}, "retriever = 'recent'"),
        ({"name": "aloe", "retriever": "recent"}, "retrieve >= 1"),
    ],
)
def test_settings_that_a_method_makes_nothing_of_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MethodsConfig.model_validate({"method": settings})


def test_a_method_that_chooses_costs_its_candidates_but_where_there_are_options(lm: LanguageModel) -> None:
    """Four replies a question; the label of an option, which is not written, is what is said."""
    config = MethodsConfig.model_validate(
        METHODS_OF_TWO | {"method": {"name": "steerable", "training": {"epochs": 1}}, "task_stage": {"enabled": False}}
    )
    task = Task("which", ("accuracy",), asked="{text}", labels=("[1]", "[2]"))
    people = [TaskUser(n, tuple(Item(f"{n}{i}", f"say {i}", f"it is {i}") for i in range(3)), ()) for n in "abcd"]
    query = Query("q", "which is it", "[2]", "it", ("it is 1", "it was"))
    users = {
        options: [TaskUser(p.id, p.history, (Query(query.id, query.input, "[2]", "it", options),)) for p in people[:2]]
        for options in ((), query.options)
    }
    free, choice = (play(lm, config, task, people[2:], users[o], seed=0) for o in ((), query.options))
    assert free.question_tokens == 4 * choice.question_tokens
    assert {reply for of in choice.own.replies for reply in of} <= {"[1]", "[2]"}
