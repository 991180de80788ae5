"""The settings of every kind of file can be looked up: in full, one by one, as a schema, on a command line."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from click.shell_completion import ShellComplete

from florilegium.client.selection.policies import POLICIES
from florilegium.simulation.cli.config import Kind
from florilegium.simulation.cli.known_settings import (
    KINDS,
    Setting,
    described,
    find_setting,
    json_schema,
    kind_of,
    settings_of,
)
from florilegium.simulation.cli.main import app
from florilegium.simulation.cli.resolved import LEFT, resolved
from florilegium.simulation.config import load_config
from florilegium.simulation.settings import ConfigError, bundled_configs, find_config, read_tree, set_value
from florilegium.simulation.studies.config import load_study

OF = {  # what bundled configs are for, by folder; where they are no runs
    "selection": "study", "privacy": "study", "pretrain": "pretrain", "world": "classes", "personal": "methods",
}  # fmt: skip
OTHERS = {
    "rivals": "rivals", "rivals-development": "rivals", "rivals-private": "rivals", "scale/servers": "study",
    "personal/asls": "lives", "personal/drift": "lives", "personal/token-weights": "study",
}  # fmt: skip


def test_the_kinds_of_the_command_are_those_there_are() -> None:
    assert get_args(Kind) == tuple(KINDS)


def leaves(setting: Setting) -> list[Setting]:
    inside = [find_setting(s.place, s.kind) if s.type == "section" else s for s in setting.settings]
    return [leaf for s in inside for leaf in (leaves(s) if s.type == "section" else [s])]


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_says_what_it_is(kind: str) -> None:
    found = leaves(find_setting("", kind))
    assert {s.place for s in found} >= set(settings_of(kind)) - {"study.tables", "classes"} and len(found) >= 10
    assert not [s.place for s in found if not s.about or "any value" in s.type]


def test_a_setting_is_described_from_what_it_is_checked_by() -> None:
    policy = find_setting("selection.policy")
    assert policy.choices == tuple(POLICIES) and policy.extensible and policy.default == "quality"
    with pytest.raises(ConfigError, match=f"must be one of {', '.join(POLICIES)}, or package"):
        load_config("quickstart", ["selection.policy=x"])
    assert described(find_setting("privacy.epsilon")).splitlines()[:3] == [
        "privacy.epsilon (run)", "  type     number, > 0, ≤ 100", "  default  8.0",
    ]  # fmt: skip
    assert find_setting("model.dtype").choices == ("auto", "float32", "bfloat16")
    assert find_setting("study.tables.rows").kind == "study" and find_setting("corpora").kind == "pretrain"
    assert "  selection.bins " in described(find_setting("selection")) and find_setting("data.name").choices == ()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("selection.polcy", "selection: unknown key 'polcy'; did you mean 'policy'"),
        ("clients", "it is called data.users here"),
        ("shared.adapter.r", "it is called 'rank' here"),
        ("selection.bins.x", "selection.bins is a value"),
        ("bins", "did you mean selection.bins"),
    ],
)
def test_a_name_that_there_is_not_gets_the_hint_of_a_file(wrong: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        find_setting(wrong)


def test_a_wrong_setting_is_told_with_its_line(tmp_path: Path) -> None:
    (path := tmp_path / "bad.toml").write_text(
        '[personal]\nlearning_rate = "hot"\nadapter = { rank = "x" }\n\n[data]\nusers = 0\n', encoding="utf-8"
    )
    with pytest.raises(ConfigError) as told:
        load_config(path)
    places = ["line 2: personal.learning_rate = 'hot'", "line 3: personal.adapter.rank = 'x'", "line 6: data.users = 0"]
    assert sorted(line.partition("bad.toml, ")[2].partition(": Input")[0] for line in str(told.value).splitlines()) == (
        places
    )


@pytest.mark.parametrize("name", bundled_configs())
def test_a_bundled_config_is_of_its_kind_and_as_its_schema_says(name: str) -> None:
    validator = pytest.importorskip("jsonschema", reason="jsonschema comes with Ray")
    tree = tomllib.loads(find_config(name).read_text(encoding="utf-8"))
    kind = kind_of(tree)
    assert kind == OTHERS.get(name, OF.get(name.partition("/")[0], "run"))
    validator.Draft202012Validator(json_schema(KINDS[kind])).validate(
        {"name": "x", **tree} if kind != "pretrain" else tree
    )


@pytest.mark.parametrize(
    ("key", "value", "taken"),
    [
        ("selection.policy", "my_lab.methods:LONGEST", True), ("selection.policy", "nope", False),
        ("engine", "flower", True), ("engine.name", "flower", True), ("engine.name", "flowr", False),
        ("model.targets", "v_proj", True), ("model.targets", ["v_proj"], True), ("model.targets", [1], False),
        ("privacy.epsilon", 100, True), ("privacy.epsilon", 101, False), ("privacy.epsilon", 0, False),
        ("selection.bin", 4, False), ("rounds", 1.5, False), ("baseline.name", "", True),
    ],
)  # fmt: skip
def test_the_schema_takes_what_settings_take(key: str, value: Any, taken: bool) -> None:
    validator = pytest.importorskip("jsonschema", reason="jsonschema comes with Ray")
    tree: dict[str, Any] = {}
    set_value(tree, key, value)
    assert validator.Draft202012Validator(json_schema(KINDS["run"])).is_valid(tree) == taken


@pytest.mark.parametrize(
    "name", ["quickstart", "rivals", "selection/dolly", "personal/asls", "pretrain/nano", "world/devices"]
)
def test_what_is_shown_loads_again_as_the_same(name: str, tmp_path: Path) -> None:
    shown, file = resolved(name), tmp_path / "again.toml"
    file.write_text(shown, encoding="utf-8")
    assert resolved(str(file)) == shown
    assert set(read_tree(find_config(name))) - {"name"} <= set(tomllib.loads(shown))
    if name == "quickstart":
        assert load_config(file) == load_config(name)
    elif "study" in tomllib.loads(shown):
        assert list(load_study(file).cells) == list(load_study(find_config(name)).cells)


def test_overrides_and_the_folder_of_a_run_are_shown(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(resolved("quickstart", ["selection.bins=7"]), encoding="utf-8")
    assert tomllib.loads(resolved(str(tmp_path), ["rounds=2"]))["selection"]["bins"] == 7
    with pytest.raises(ConfigError, match=r"selection\.bins = 0"):
        resolved("quickstart", ["selection.bins=0"])


def test_a_study_whose_cells_alone_are_whole_is_shown_as_it_was_given(tmp_path: Path) -> None:
    """Without a cell's model this is refused: nano was trained on the texts of the task."""
    file = tmp_path / "s.toml"
    study = '[study]\nkind = "methods"\n[study.tables.t]\nrows = { "model.name" = ["smollm2-135m"] }\n'
    file.write_text(f'task = {{ name = "slots" }}\n{study}', encoding="utf-8")
    shown = resolved(str(file))
    given = tomllib.loads(shown)
    assert shown.startswith(LEFT) and given["study"]["seeds"] == 5 and "model" not in given
    (tmp_path / "again.toml").write_text(shown, encoding="utf-8")
    assert list(load_study(tmp_path / "again.toml").cells) == list(load_study(file).cells)


def offered(*words: str) -> list[str]:
    """For the last word, after the others."""
    program = ShellComplete(typer.main.get_command(app), {}, "florilegium", "_COMPLETE")
    return [item.value for item in program.get_completions(list(words[:-1]), words[-1])]


def test_a_shell_is_offered_configs_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered("run", "quick") == ["quickstart"]
    assert offered("run", "quickstart", "rounds=2", "selection.b") == ["selection.bins=", "selection.bin_bytes="]
    assert offered("study", "rivals", "study.s") == ["study.seeds="]
    assert offered("config", "show", "pretrain/nano", "model.h") == ["model.hidden_size=", "model.heads="]
    assert offered("config", "describe", "study.h") == ["study.hidden_share"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").touch()
    (tmp_path / "inner").mkdir()
    assert offered("run", "m") == ["mine.toml"] and offered("run", "in") == ["inner/"]


def test_a_shell_asks_the_command_itself() -> None:
    """As the script does that `--install-completion` writes."""
    asking = {"COMP_WORDS": "florilegium run quick", "COMP_CWORD": "2", "_FLORILEGIUM_COMPLETE": "complete_bash"}
    program = "import sys; sys.argv = ['florilegium']; from florilegium.simulation.cli import main; main.main()"
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **asking}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("quickstart\n", "")
