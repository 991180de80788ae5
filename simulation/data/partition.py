"""Data that names no users, parted among simulated ones by the partitioners of `flwr-datasets`.

Dirichlet: Yurochkin et al., arXiv 1905.12022. Pathological: Li et al., arXiv 2102.02079. Shards: McMahan et al., arXiv
1602.05629. Not covered: which of the users a run draws, and how much of theirs it keeps (`population`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from florilegium.privacy.common.base_config import Config
from florilegium.privacy.common.errors import first_line
from florilegium.simulation.data.errors import DataError

log = logging.getLogger(__name__)
Kind = Literal["", "iid", "linear", "square", "dirichlet", "pathological", "shard", "natural"]
BY_LABEL = ("dirichlet", "pathological", "shard", "natural")
OF_KIND = {"alpha": "dirichlet", "labels_per_user": "pathological", "shards_per_user": "shard"}
INSTALL = "pip install 'florilegium[partition]'"


class PartitionConfig(Config):
    """How data that names no users is parted among simulated ones."""

    kind: Kind = Field(
        "",
        description="iid: equal parts; linear, square: sizes that grow; dirichlet, pathological, shard: by label; "
        "natural: a user for each label; empty: equal parts of whole conversations",
    )
    by: str = Field("", description="column of the labels; empty: what is read as the domain")
    users: int = Field(0, ge=0, description="that the data is parted among; 0: as many as are asked for")
    alpha: float = Field(0.5, gt=0, description="dirichlet: the smaller, the fewer labels a user has")
    labels_per_user: int = Field(2, ge=1, description="pathological: labels of each user")
    shards_per_user: int = Field(2, ge=1, description="shard: runs of the replies sorted by label that each user gets")
    seed: Annotated[int, Field(ge=0)] | Literal["run"] = Field(
        "run", description="of the partition alone, so that several runs can have the same; run: the run's seed"
    )

    @model_validator(mode="after")
    def _settings_are_of_the_kind(self) -> Self:
        changed = [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]
        if changed and not self.kind:
            raise ValueError(f"{', '.join(changed)} without a kind; set data.partition.kind=dirichlet, say")
        for key in changed:
            if OF_KIND.get(key, self.kind) != self.kind:
                raise ValueError(f"{key} = {getattr(self, key)} is of kind = {OF_KIND[key]!r}, not of {self.kind!r}")
        if self.kind == "natural" and self.users:
            raise ValueError(f"users = {self.users}: kind = 'natural' makes a user of each label; leave users out")
        return self

    def told(self) -> str:
        """For people: the kind with its parameter, and what it goes by."""
        own = next((f" ({key} = {getattr(self, key):g})" for key, kind in OF_KIND.items() if kind == self.kind), "")
        return f"{self.kind}{own}" + (f" by {self.by or 'domain'}" if self.kind in BY_LABEL else "")


def rows_by_user(
    labels: Sequence[str], config: PartitionConfig, users: int, least: int, seed: int
) -> list[list[int]]:  # of each of the users, ascending
    """Which rows each of `users` users gets, by the rows' labels; with `least` rows each where draws can be repeated.

    The same rows for the same arguments. Raises `DataError` for rows that cannot be parted so.
    """
    if len(labels) < users:
        raise DataError(f"data.partition: {len(labels)} replies cannot be parted among {users} users; ask for fewer")
    if config.kind in BY_LABEL:
        check_labels(labels, config)
    if config.kind == "shard" and users * config.shards_per_user > len(labels):
        raise DataError(
            f"data.partition.shards_per_user = {config.shards_per_user}: {len(labels)} replies make no "
            f"{users * config.shards_per_user} shards for {users} users; ask for fewer"
        )
    make = _makers(config, users, seed)
    rows = _table(labels)
    try:
        found = _parts(make(least), rows, users)
    except ValueError as error:
        if config.kind != "dirichlet":
            raise DataError(f"data.partition.kind = {config.kind!r}: {first_line(error)}") from None
        found = _parts(make(0), rows, users)  # whoever has too few then is left out by data.min_pairs
    if nobodys := len(labels) - sum(map(len, found)):
        log.warning(
            "data.partition.kind = %r: %s of %s replies are nobody's: shards are of one size, and labels that no user "
            "has are left over", config.kind, f"{nobodys:,}", f"{len(labels):,}",
        )  # fmt: skip
    return found


def check_labels(labels: Sequence[str], config: PartitionConfig) -> None:
    """Raises `DataError` where rows have no label, or are of too few labels."""
    unlabelled, kinds = sum(not label for label in labels), len(set(labels))
    column = repr(config.by) if config.by else "a domain (name a column in data.partition.by)"
    if unlabelled:
        raise DataError(
            f"data.partition.kind = {config.kind!r} needs a label in {column}: {unlabelled:,} of {len(labels):,} "
            f"replies have none (a text or a whole number); give each row one, or use kind = 'iid'"
        )
    if config.kind == "pathological" and config.labels_per_user > kinds:
        raise DataError(
            f"data.partition.labels_per_user = {config.labels_per_user} must be <= {kinds}: there are no more labels"
        )


def _makers(config: PartitionConfig, users: int, seed: int) -> Callable[[int], Any]:
    """What makes the partitioner of a kind anew, given how many rows a user must have at least."""
    try:
        known = import_module("flwr_datasets.partitioner")
    except ImportError:
        raise DataError(f"data.partition.kind = {config.kind!r} needs the package flwr-datasets: {INSTALL}") from None
    drawn = {"num_partitions": users, "partition_by": "label", "shuffle": False, "seed": seed}
    makers: Mapping[str, Callable[[int], Any]] = {
        "iid": lambda _: known.IidPartitioner(users),
        "linear": lambda _: known.LinearPartitioner(users),
        "square": lambda _: known.SquarePartitioner(users),
        "dirichlet": lambda least: known.DirichletPartitioner(alpha=config.alpha, min_partition_size=least, **drawn),
        "pathological": lambda _: known.PathologicalPartitioner(
            num_classes_per_partition=config.labels_per_user, class_assignment_mode="first-deterministic", **drawn
        ),
        "shard": lambda _: known.ShardPartitioner(num_shards_per_partition=config.shards_per_user, **drawn),
    }
    return makers[config.kind]


def _table(labels: Sequence[str]) -> Any:
    return import_module("datasets").Dataset.from_dict({"label": list(labels), "row": list(range(len(labels)))})


def _parts(partitioner: Any, rows: Any, users: int) -> list[list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of draws that are repeated, and of labels that nobody has
        partitioner.dataset = rows
        return [sorted(partitioner.load_partition(user)["row"]) for user in range(users)]
