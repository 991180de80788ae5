"""Runs a cell of a study of lives: people who talk with their devices, other people for each seed.

Figures are of the second half of the interactions, each measured before its device learned from it. Where the stream
shifts half way, two more tell what was lost and won: by held-out replies of what came before and of what came after,
with the adapter as it was half way and as it is at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cached_property

import numpy as np
import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.model import LanguageModel
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.data.population import DataConfig, User, load_population
from florilegium.simulation.evaluation.metrics import score_arms
from florilegium.simulation.personalization.config import InteractiveConfig
from florilegium.simulation.personalization.interactive import (
    SPAN,
    Lived,
    better_from,
    movements,
    reptile,
    simulate_user,
)
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.studies.cell import Result, SeededCell

HELD_OUT = 8  # of each half, where the stream shifts
ALARM = 0.9  # quantile of other people's unshifted movements from which a movement is taken for a shift


class InteractiveCell(SeededCell):
    """One cell while it is being run."""

    @property
    def config(self) -> InteractiveConfig:
        assert isinstance(self.cell.config, InteractiveConfig)
        return self.cell.config

    @cached_property
    def users(self) -> dict[str, User]:
        return self.bench.people(self.config.data, self.cell.seeds, self.config.seed)

    def repetition(self, number: int) -> Result:
        """The people of one seed."""
        config, lm, self._number = self.config, self.bench.model(self.config.model), number
        names = [name for name in self.users if name.startswith(f"seed{number}-")]
        people = [(self.users[n], self.users[names[(k + 1) % len(names)]]) for k, n in enumerate(names)]
        streams = {n: self._stream(one, other) for n, (one, other) in zip(names, people, strict=True)}
        seed = derive_seed(config.seed, "lives", number)
        made = self._made_by_others(lm, seed)
        start = made.rows[0].cpu() if made and config.start == "reptile" else None
        beneath = [made] if made and config.start == "shared" else []
        lived = simulate_user(
            lm, config.asls, config.user, config.adapter, config.sampling,
            {n: s[: config.interactions] for n, s in streams.items()}, seed, start, beneath, self.listener,
        )  # fmt: skip
        return {
            "arms": {"own": _measured(lived)},
            "history": [config.interactions] * len(names),
            "costs": {
                "adaptations": float((lived.tokens > 0).sum(1).mean()),
                "of these for drift": float(lived.moved.sum(1).mean()),
                "milliseconds an interaction": 1e3 * lived.seconds,
                **{f"tokens {kind}": count for kind, count in lived.spent.items()},
                "bytes of the profile": float(np.mean([len(d.profile.to_json().encode()) for d in lived.devices])),
                f"better than the others' from ({config.interactions + 1}: never)": self._better_from(
                    lived, lm, streams, made
                ),
                **self._shifted(lived, lm, streams, beneath),
            },
            "curve": lived.nll.mean(0).tolist(),
        }

    def _stream(self, one: User, other: User) -> list[Dialogue]:
        """So many interactions, and behind them the held-out ones of both halves; raises `RunError` for too few."""
        config, need = self.config, self.config.interactions // 2 + HELD_OUT
        if config.shift == "none":
            found = list(one.stream[: config.interactions])
            if len(found) < config.interactions:
                raise RunError(f"{one.id} has {len(found)} dialogues, not the {config.interactions} of interactions=")
            return found
        if config.shift == "person":
            halves = list(one.stream), list(other.stream)
        else:
            count = Counter(d.domain for d in one.stream)
            domains = sorted(count, key=lambda x: (-count[x], x))[:2]
            halves = tuple([d for d in one.stream if d.domain == x] for x in domains)  # type: ignore[assignment]
        if len(halves) < 2 or min(map(len, halves)) < need:
            raise RunError(f"{one.id} has not {need} dialogues before and after a shift of the kind {config.shift!r}")
        first, second = (h[:need] for h in halves)
        half = config.interactions // 2
        return [*first[:half], *second[:half], *first[half:], *second[half:]]

    def _made_by_others(self, lm: LanguageModel, seed: int) -> Adapters | None:
        """What people of the other half have made together: FedAvg of a few steps of each, which is Reptile's start."""
        config = self.config
        if config.start == "new":
            return None
        if config.data.split != "test":
            raise RunError("what others have made is made by people of the development half: set data.split = 'test'")
        others = config.data.model_copy(update={"users": config.others, "split": "development"})
        layout = lm.layout(config.adapter)

        def learn() -> torch.Tensor:
            streams = [u.stream for u in load_population(others, config.seed)]
            return reptile(lm, layout, config.reptile, streams, seed)

        return lm.adapters(layout, self.bench.remembered(self._of_others(others, seed), learn))

    def _of_others(self, others: DataConfig, seed: int) -> Hashable:
        """All that what others have made depends on; `seed` follows from the cell's and the repetition."""
        return ("made", self.config.model, self.config.adapter, self.config.reptile, others, seed)

    def _better_from(
        self, lived: Lived, lm: LanguageModel, streams: dict[str, list[Dialogue]], made: Adapters | None
    ) -> float | None:
        """The interaction from which devices are better off than with what others have made, alone."""
        if made is None:
            return None
        queries = [s[: self.config.interactions] for s in streams.values()]
        nll = np.array(score_arms(lm, queries, {"made": [made]})["made"].by_query).reshape(lived.nll.shape)
        return float(better_from(lived.nll, nll) or self.config.interactions + 1)

    def _shifted(
        self, lived: Lived, lm: LanguageModel, streams: dict[str, list[Dialogue]], beneath: Sequence[Adapters]
    ) -> dict[str, float | None]:
        """What was forgotten and won by the end, and whether the shift was noticed."""
        if self.config.shift == "none":
            return {}
        many, layout = self.config.interactions, lm.layout(self.config.adapter)
        old = [s[many : many + HELD_OUT] for s in streams.values()]
        new = [s[many + HELD_OUT :] for s in streams.values()]
        arms = {name: [*beneath, lm.adapters(layout, rows)] for name, rows in
                (("half way", lived.half_way), ("end", lived.rows))}  # fmt: skip
        of_old, of_new = (score_arms(lm, queries, arms) for queries in (old, new))
        return {
            "forgotten, nats": of_old["end"].mean_per_user - of_old["half way"].mean_per_user,
            "won, nats": of_new["half way"].mean_per_user - of_new["end"].mean_per_user,
            **self._alarms(lm, [s[:many] for s in streams.values()]),
        }

    def _alarms(self, lm: LanguageModel, shifted: Sequence[Sequence[Dialogue]]) -> dict[str, float | None]:
        """In the `SPAN` interactions after the shift, and at the same place of streams that go on as they began.

        The usual movement is that of all others' unshifted streams.
        """
        half, after = self.config.interactions // 2, slice(self.config.interactions // 2, None)
        if half <= SPAN:
            return {}
        whole = [self._unshifted(u)[: half + SPAN] for u in self.users.values()]
        profile = self.config.asls.profile
        usual = self.bench.remembered(self._of_everybody(), lambda: movements(lm, profile, whole))[:, after]
        names = list(self.users)
        moved = movements(lm, profile, [s[: half + SPAN] for s in shifted])[:, after]
        return alarms(usual, moved, [k for k, n in enumerate(names) if n.startswith(f"seed{self._number}-")])

    def _of_everybody(self) -> Hashable:
        """All that everybody's unshifted movements depend on."""
        config = self.config
        people = (config.data, self.cell.seeds, config.seed)
        return ("movements", config.model, people, config.interactions, config.shift, config.asls.profile)

    def _unshifted(self, user: User) -> list[Dialogue]:
        """The stream as it would have gone on."""
        if self.config.shift == "person":
            return list(user.stream)
        count = Counter(d.domain for d in user.stream)
        first = min(count, key=lambda x: (-count[x], x))
        return [d for d in user.stream if d.domain == first]


def alarms(usual: np.ndarray, moved: np.ndarray, mine: Sequence[int]) -> dict[str, float | None]:
    """Shares of the movements of some people that are taken for a shift: where there was one, and where there was none.

    `usual` (K, T) is everybody's without a shift, `moved` (len(mine), T) that of the people `mine` with one.
    """
    limits = [np.quantile(np.delete(usual, k, 0), ALARM) for k in mine]
    return {
        "alarms after the shift": float(np.mean([m > limit for m, limit in zip(moved, limits, strict=True)])),
        "alarms without one": float(np.mean([usual[k] > limit for k, limit in zip(mine, limits, strict=True)])),
    }


def _measured(lived: Lived) -> Result:
    """Of the second half, by person and by interaction."""
    half = lived.nll.shape[1] // 2
    found = {}
    for name, values in (("nll", lived.nll), ("rouge1", lived.rouge1), ("accepted", lived.accepted)):
        later = values[:, half:]
        found[name] = {
            "by_user": later.mean(1).tolist(), "by_query": later.ravel().tolist(), "pooled": float(later.mean()),
        }  # fmt: skip
    return {**found, "mean_length_tokens": float(lived.said[:, half:].mean())}
