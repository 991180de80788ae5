"""What a run has left, for whoever reads it in a program or a notebook: figures, events, data frames, adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from csv import DictWriter
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florilegium.client.lm.places import ADAPTERS
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.reports.tables import own_folder
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import Event
from florilegium.simulation.runs.folder import RunFolder
from florilegium.simulation.runs.summary import RunSummary, read_summary

if TYPE_CHECKING:
    from pandas import DataFrame

INSTALL = "pip install 'florilegium[notebook]'"
HEIGHT_PX = 640  # of a report within a notebook


@dataclass(frozen=True)
class Result:
    """A finished run in its folder. Two of them are equal where their folders are."""

    folder: Path

    @property
    def config(self) -> ExperimentConfig:
        """The settings of the run, defaults included."""
        return RunFolder(self.folder).config

    @cached_property
    def summary(self) -> RunSummary:
        """The figures of `summary.json`."""
        return read_summary(self.folder)

    def events(self, kind: str = "") -> Iterator[Event]:
        """What the run wrote down, in its order; with a kind, such as `evaluation` or `device_round`, that alone.

        `florilegium.simulation.runs.events` has a dataclass for each kind. Raises `RunError` for a damaged log.
        """
        return (event for event in RunFolder(self.folder).events() if not kind or event.kind == kind)

    def frame(self, kind: str) -> DataFrame:
        """The events of a kind as a data frame, a row each.

        A column is a field; an interval `ci95` is the columns `ci95_low` and `ci95_high`, a field with named parts is
        one column for each, as in `seconds_annotate`. Some kinds: `evaluation` (round, arm, metric, mean_per_user,
        mean_per_query, ci95_low, ci95_high: nats a token for `nll`), `result` (device, arm, nll, rouge1, queries:
        after the last round), `device_round` (what a device did in a round). Raises `ImportError` without pandas, and
        `RunError` for a kind that the run has none of.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise ImportError(f"data frames need pandas: {INSTALL}") from None
        rows = [flat(event) for event in self.events(kind)]
        if not rows:
            have = ", ".join(sorted({event.kind for event in self.events()}))
            raise RunError(f"{self.folder} has no events {kind!r}; it has {have}")
        return DataFrame(rows)

    def adapter(self, arm: str, device: str = "") -> Path:
        """The folder of an adapter in PEFT's format: `shared`, or `personal` with the device's name.

        Raises `RunError` where the run has kept none.
        """
        adapters = self.folder / ADAPTERS
        folder = adapters / arm / device
        if not (folder / "adapter_config.json").is_file():
            kept = sorted(p.parent.relative_to(adapters) for p in adapters.rglob("adapter_config.json"))
            have = ", ".join(map(str, kept[:4])) + (", …" if len(kept) > 4 else "")
            raise RunError(f"{folder} holds no adapter; there are {have or 'none'}")
        return folder

    @property
    def report(self) -> Path:
        """The run's report, one HTML file that loads nothing from elsewhere."""
        return self.folder / "report.html"

    def _repr_html_(self) -> str:
        """The report within a notebook, in a frame of its own."""
        page = escape(self.report.read_text(encoding="utf-8"))
        style = f"width: 100%; height: {HEIGHT_PX}px; border: 0"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{page}"></iframe>'


def load_run(folder: str | Path) -> Result:
    """The result of a run that was finished; raises `RunError` for anything else."""
    path = Path(folder)
    if not (path / "config.toml").is_file():
        raise RunError(f"{path} is not the folder of a run: it has no config.toml")
    if not (path / "summary.json").is_file():
        raise RunError(f"{path} was not finished: go on with florilegium run --resume {path}")
    return Result(path)


def export_run(run: Path, out: Path, *, parquet: bool) -> dict[Path, int]:
    """Writes the events of a run as tables, one for each kind, and returns their numbers of rows.

    The columns are those of `Result.frame`; what is a list or has deeper parts is JSON. Raises `RunError` for what is
    no run, for an `out` that holds files of others, and where a package is missing.
    """
    if parquet and find_spec("pyarrow") is None:
        raise RunError("--parquet needs a package: pip install 'florilegium[parquet]'")
    if not (run / "metrics.jsonl").is_file():
        raise RunError(f"{run} is not the folder of a run that has begun: it has no metrics.jsonl")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for event in RunFolder(run).events():
        kinds.setdefault(event.kind, []).append({key: _cell(value) for key, value in flat(event).items()})
    own_folder(out)
    written = {out / f"{kind}.{'parquet' if parquet else 'csv'}": rows for kind, rows in kinds.items()}
    for path, rows in written.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if parquet:
            _write_parquet(path, columns, rows)
        else:
            with path.open("w", encoding="utf-8", errors="replace", newline="") as stream:
                writer = DictWriter(stream, columns)
                writer.writeheader()
                writer.writerows(rows)
    return {path: len(rows) for path, rows in written.items()}


def _write_parquet(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    from pyarrow import table
    from pyarrow.parquet import write_table

    write_table(table({name: [row.get(name) for row in rows] for name in columns}), path)


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # people's texts may hold half a surrogate pair
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else value


def flat(event: Event) -> dict[str, Any]:
    """One event as the cells of a row."""
    row: dict[str, Any] = {}
    for key, value in asdict(event).items():
        if key == "ci95":
            row["ci95_low"], row["ci95_high"] = value or (None, None)
        elif isinstance(value, Mapping):
            row |= {f"{key}_{part}": x for part, x in value.items()}
        else:
            row[key] = value
    return row
