"""The settings of a file with all defaults, as TOML that loads again as the same settings."""

from __future__ import annotations

from collections.abc import Sequence

import tomli_w

from florilegium.simulation.cli.known_settings import KINDS, found_config, kind_of
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.settings import ConfigError, dump_config, read_tree, validate
from florilegium.simulation.studies.config import TREES, Study, load_study, study_of

LEFT = "# The settings of the cells stand as they were given: some of their defaults depend on the cell.\n"


def resolved(name: str, overrides: Sequence[str] = (), kind: str = "") -> str:
    """Raises `ConfigError` for a file that is wrong."""
    path = found_config(name)
    tree = read_tree(path, overrides)
    kind = kind or kind_of(tree)
    if "study" in KINDS[kind].model_fields:
        return _study(load_study(path, overrides))
    if "name" not in KINDS[kind].model_fields:
        tree.pop("name")
    return dump_config(validate(KINDS[kind], tree, str(path)))


def _study(study: Study) -> str:
    """With the defaults of its cells where these give the same cells."""
    section = {"study": study.config.model_dump(mode="json", exclude_none=True)}
    kind = TREES.get(study.config.kind, ExperimentConfig)
    try:
        whole = validate(kind, dict(study.tree), study.where).model_dump(mode="json", exclude_none=True)
        if list(study_of({**whole, **section}, study.where).cells) == list(study.cells):
            return tomli_w.dumps({**whole, **section})
    except ConfigError:
        pass  # what stands there is no experiment without what a cell adds
    return LEFT + tomli_w.dumps({**study.tree, **section})
