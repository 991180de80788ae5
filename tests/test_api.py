"""What is promised to programs that import Florilegium: names, signatures, and that they do what they say."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import florilegium
from florilegium import Experiment, FlorilegiumError, RunError, load_config, load_run
from florilegium.client.lm import Adapters, Engine, Example, TrainingSet, lora_layout, read_peft, write_peft
from florilegium.simulation.settings import ConfigError

PACKAGES = (
    "florilegium",
    "florilegium.client",
    "florilegium.client.lm",
    "florilegium.client.personalization",
    "florilegium.client.selection",
    "florilegium.privacy",
    "florilegium.server",
    "florilegium.simulation",
)
PROMISED = Path(__file__).parent / "api.txt"
NOTEBOOKS = Path(__file__).parent.parent / "docs" / "notebooks"
TINY = [
    "data.users=2", "data.max_pairs=8", "data.min_pairs=8", "rounds=1", "synthesis.per_dialogue=0", "selection.bins=2",
    "personal.epochs=1", "evaluation.users=2", "evaluation.sampling.max_new_tokens=2", "shared.pool_capacity=6",
]  # fmt: skip


def signatures() -> list[str]:
    """Each public name with its signature, and those of the public methods of a class."""
    told = []
    for name in PACKAGES:
        package = importlib.import_module(name)
        for public in sorted(package.__all__):
            told += described(f"{name}.{public}", getattr(package, public))
    return [re.sub(r"<function (\w+) at 0x\w+>", r"\1", line) for line in told]


def described(name: str, what: object) -> list[str]:
    if not inspect.isclass(what):
        return [f"{name}{inspect.signature(what)}" if callable(what) else f"{name}: {type(what).__name__}"]
    if issubclass(what, BaseException):
        return [f"{name}({', '.join(base.__name__ for base in what.__bases__)})"]
    own = inspect.signature(what) if "model_fields" not in dir(what) else ""
    found = [f"{name}{own}"]
    for method, value in sorted(vars(what).items()):
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | cached_property)):
            found.append(f"{name}.{method}{inspect.signature(value) if inspect.isfunction(value) else ''}")
    return found


def test_the_public_names_and_signatures_are_those_that_were_promised() -> None:
    """After a change that is meant: `python tests/test_api.py` writes the list anew; the change log says what moved."""
    assert signatures() == PROMISED.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", PACKAGES)
def test_what_is_exported_is_documented(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__doc__
    for public in package.__all__:
        what = getattr(package, public)
        assert not callable(what) or inspect.getdoc(what), f"{name}.{public}"
        for member, value in vars(what).items() if inspect.isclass(what) else ():
            if inspect.isfunction(value) or isinstance(value, property | cached_property):
                assert member.startswith("_") or inspect.getdoc(value), f"{name}.{public}.{member}"
    with pytest.raises(AttributeError):
        package.nothing_of_this_name  # noqa: B018


def test_importing_it_loads_no_library_of_models() -> None:
    probe = "import sys, florilegium, florilegium.client.lm, florilegium.server, florilegium.simulation\n"
    probe += "print(sorted({'torch', 'flwr', 'transformers', 'numpy', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_it_works_in_a_folder_with_modules_of_these_names(tmp_path: Path) -> None:
    """Flower's own projects have a `client.py` and a `server.py` beside the script."""
    for name in ("client.py", "server.py", "privacy.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong one')")
    (tmp_path / "simulation").mkdir()
    (tmp_path / "simulation" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    code = (
        "from florilegium.client.selection import Buffer; from florilegium import load_config; print(Buffer.__name__)"
    )
    for command in ([sys.executable, "-c", code], [sys.executable, "-m", "florilegium", "--help"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_one_model_trains_the_adapters_of_many_devices(tmp_path: Path) -> None:
    """The engine alone, with one's own model: each device's loss falls, and PEFT's files give its adapter back."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    engine = Engine(LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)), targets=["q_proj", "v_proj"])
    layout = lora_layout(engine, rank=4, alpha=8.0)
    of_devices = [[Example((k + 1, 2, 3), (4 + k, 5, 6 + k))] for k in range(3)]
    sets = [TrainingSet(examples, [[0]] * 20) for examples in of_devices]
    rows = torch.stack([layout.start(seed=k) for k in range(3)])  # (K, P)
    trained = engine.finetune(Adapters(layout, rows), frozen=[], sets=sets, rates=[[1e-2] * 20] * 3)
    assert all(losses[-1] < losses[0] - 0.1 for losses in trained.losses)
    examples, devices = [e for own in of_devices for e in own], [0, 1, 2]
    before, after = (engine.score(examples, devices, [a]) for a in (Adapters(layout, rows), trained.adapters))
    assert all(b > a for b, a in zip(before, after, strict=True))
    for k, row in enumerate(trained.adapters.rows):
        write_peft(tmp_path / str(k), layout, row, "my/model")
        assert torch.equal(read_peft(tmp_path / str(k), layout), row)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebook") / "run"


@pytest.fixture(scope="module")
def result(folder: Path) -> florilegium.Result:
    return Experiment(load_config("quickstart", TINY), folder).run(quiet=True)


@pytest.mark.slow
def test_a_notebook_and_the_command_get_the_same_bits(result: florilegium.Result, tmp_path: Path) -> None:
    """Events but for their times, and the bytes of every adapter."""
    command = [sys.executable, "-m", "florilegium", "run", "quickstart", *TINY, "--runs", str(tmp_path), "name=run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    other = load_run(tmp_path / "run")
    for kind in ("evaluation", "result", "comparison"):
        ours, theirs = ([replace(e, time=0.0) for e in r.events(kind)] for r in (result, other))
        assert ours and ours == theirs
    kept = sorted(p.relative_to(result.folder) for p in (result.folder / "adapters").rglob("adapter_model.safetensors"))
    assert len(kept) >= 3
    for path in kept:
        assert (result.folder / path).read_bytes() == (other.folder / path).read_bytes(), path


def test_a_result_is_frames_summary_report_and_adapters(result: florilegium.Result) -> None:
    of_devices = result.frame("result")
    assert set(of_devices.device) == {"device-00000", "device-00001"}
    assert {"arm", "nll", "rouge1", "queries"} <= set(of_devices.columns)
    curves = result.frame("evaluation")
    final = curves[(curves.arm == "base") & curves.final & (curves.metric == "nll")].iloc[0]
    mean = of_devices[of_devices.arm == "base"].nll.mean()
    assert final.mean_per_user == pytest.approx(mean) and final.ci95_low <= mean <= final.ci95_high
    assert "seconds_annotate" in result.frame("round").columns
    assert result.summary.nll["base"].mean_per_user == final.mean_per_user and 0 < result.summary.epsilon <= 8
    assert result.config.rounds == 1
    assert "<h1" in result._repr_html_() or "&lt;h1" in result._repr_html_()
    told = json.loads((result.adapter("personal", "device-00000") / "adapter_config.json").read_text(encoding="utf-8"))
    assert told["peft_type"] == "LORA" and result.adapter("shared").is_dir()
    with pytest.raises(RunError, match=r"device-9 holds no adapter; there are personal/device-00000"):
        result.adapter("personal", "device-9")
    with pytest.raises(RunError, match=r"has no events 'evaluations'; it has .*evaluation"):
        result.frame("evaluations")


def test_a_folder_that_is_there_is_not_run_over(result: florilegium.Result) -> None:
    again = Experiment(load_config("quickstart", TINY), result.folder)
    with pytest.raises(RunError, match="exists"):
        again.run(quiet=True)
    assert again.run(resume=True, quiet=True) == load_run(result.folder) == result


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.toml"):
        load_run(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(RunError, match=r"was not finished: go on with florilegium run --resume"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_config("quickstrat")
    assert issubclass(RunError, FlorilegiumError)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not [out for cell in book.cells for out in cell.get("outputs", ()) if out.output_type == "error"]


if __name__ == "__main__":
    PROMISED.write_text("\n".join(signatures()) + "\n", encoding="utf-8")
