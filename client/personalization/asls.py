"""When a device adapts to its person, how fast, and on what (after ASLS, arXiv 2409.16973).

The paper describes two layers and no equations. Here the profile (`profile`) is the first; the second adapts, θ' = θ +
Δθ(profile), by these rules. *When*: the profile has moved by `drift` since the last time, or `fresh` replies with
feedback have come. *How fast*: the rate is `rate · (1 + boost · share of fresh feedback) / (1 + decay · times)`. *On
what*: of the newest `window` interactions, those nearest to the profile; the loss is the NLL of accepted or corrected
replies (a correction weighs 1, a reply that was accepted ½), plus a preference term (DPO) on pairs of a corrected and
a rejected reply.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.config import SamplingConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.optimizer import Moments, adamw_
from florilegium.client.personalization.config import AslsConfig
from florilegium.client.personalization.preference import value_and_weights
from florilegium.client.personalization.profile import Profile, drift
from florilegium.privacy.seeds import derive_seed

SUMMARY_TOKENS, SUMMARY_ITEMS, SUMMARY_ITEM_TOKENS = 24, 8, 12
ASK_FOR_SUMMARY = "{interests}\nDescribe the user who wrote this in one sentence."


@dataclass(frozen=True, slots=True)
class Interaction:
    """A prompt, what the model said, and what the person made of it."""

    prompt: str
    said: str
    accepted: bool
    wanted: str = ""  # the person's correction, if one was given

    @property
    def good(self) -> str:
        """The reply to learn; empty where none is known."""
        return self.said if self.accepted else self.wanted

    @property
    def feedback(self) -> float:
        return float(self.accepted)


@dataclass(frozen=True)
class Device:
    """What one device holds."""

    id: str
    profile: Profile = field(default_factory=Profile)
    window: tuple[Interaction, ...] = ()
    fresh: int = 0
    times: int = 0
    adapted_at: torch.Tensor | None = None  # the profile's vector then
    summary: str = ""  # what the model says of the person
    told_at: torch.Tensor | None = None  # the profile's vector when it said so


class Asls:
    """The devices of a cohort."""

    def __init__(self, lm: LanguageModel, config: AslsConfig, seed: int, beneath: Sequence[Adapters] = ()) -> None:
        """`frozen_adapters` are adapters of one row that are always on, such as a shared one."""
        self.lm, self.config, self.seed, self.beneath = lm, config, seed, beneath
        self.spent = Counter[str]()  # tokens of all devices: "trained", "read" and "written"

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """(n, H) by the base model."""
        self.spent["read"] += sum(e.length for e in self.lm.format.prompts(texts))
        return torch.stack([f.readings["mean"].vector for f in self.lm.embed(texts)])

    def prompt(self, device: Device, prompt: str) -> str:
        """With the profile's words in front, where it is all that there is of the person."""
        if self.config.arm == "summary":
            return f"(The user: {device.summary}) {prompt}" if device.summary else prompt
        told = self.config.arm in ("profiling-only", "with-words")
        words = device.profile.words(self.config.profile) if told else ""
        return f"({words}) {prompt}" if words else prompt

    def observe(self, device: Device, met: Interaction) -> Device:
        """After an interaction."""
        config, feedback = self.config, met.feedback if self.config.arm != "no-feedback" else 0.5
        profile = device.profile
        if config.profiles:
            profile = profile.after(met.prompt, feedback, self.embed, config.profile)
        window = (*device.window, met)[-config.window :]
        return replace(device, profile=profile, window=window, fresh=device.fresh + 1)

    def refresh(self, devices: Sequence[Device]) -> list[Device]:
        """Has the model describe anew those people whose profiles have moved since it last did."""
        after = list(devices)
        if self.config.arm != "summary":
            return after
        vectors = {k: d.profile.vector(self.embed, self.config.profile) for k, d in enumerate(devices)}
        due = [
            k for k, d in enumerate(devices) if d.told_at is None or drift(d.told_at, vectors[k]) > self.config.drift
        ]
        prompts = [self._summary_of(devices[k].profile) for k in due]
        seeds = [derive_seed(self.seed, devices[k].id, "summary") >> 1 for k in due]
        said = self.lm.generate(prompts, due, self.beneath, SamplingConfig(max_new_tokens=SUMMARY_TOKENS), seeds)
        self.spent["read"] += sum(e.length for e in self.lm.format.prompts(prompts))
        self.spent["written"] += SUMMARY_TOKENS * len(due)
        for k, text in zip(due, said, strict=True):
            after[k] = replace(devices[k], summary=text, told_at=vectors[k])
        return after

    def _summary_of(self, profile: Profile) -> str:
        """The question after what weighs most in a profile, cut so that a model sees all of it."""
        weights = profile.weights(self.config.profile).tolist()
        order = sorted(range(len(weights)), key=lambda i: (-round(weights[i], 6), i))[:SUMMARY_ITEMS]
        texts = [self.lm.format.beginning(profile.interests[i].text, SUMMARY_ITEM_TOKENS) for i in order]
        return ASK_FOR_SUMMARY.format(interests="\n".join(texts))

    def wants_to_adapt(self, device: Device) -> bool:
        """Whether now is the time: enough that is new, or the profile has moved since the last time."""
        config = self.config
        if not config.adapts or not any(self._lesson(i) for i in device.window):
            return False
        if config.arm == "no-retuning" and device.times:
            return False
        return device.fresh >= config.fresh or self.has_moved(device)

    def has_moved(self, device: Device) -> bool:
        """Whether the profile is elsewhere than when the device last adapted."""
        config, before = self.config, device.adapted_at
        if before is None or not config.profiles or not device.fresh:
            return False
        return drift(before, device.profile.vector(self.embed, config.profile)) > config.drift

    def rate(self, device: Device) -> float:
        """η of the next adaptation."""
        config = self.config
        told = 0 if config.arm == "no-feedback" else device.fresh
        share = min(1.0, told / max(1, len(device.window)))
        return config.rate * (1 + config.boost * share) / (1 + config.decay * device.times)

    def chosen(self, device: Device) -> list[Interaction]:
        """What is adapted on: the nearest to the profile; or the newest, or any."""
        config, there = self.config, [i for i in device.window if self._lesson(i)]
        if config.arm == "random-sampling":
            seed = derive_seed(self.seed, device.id, "sampling", device.times)
            order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(there)).tolist()
        elif config.profiles and device.profile.interests:
            vectors = torch.nn.functional.normalize(self.embed([i.prompt for i in there]), dim=1)
            near = vectors @ device.profile.vector(self.embed, config.profile)
            order = sorted(range(len(there)), key=lambda i: (-round(float(near[i]), 4), -i))
        else:
            order = list(range(len(there)))[::-1]
        return [there[i] for i in order[: config.examples]]

    def adapt(self, devices: Sequence[Device], rows: Adapters) -> tuple[list[Device], Adapters, list[int]]:
        """Those devices, each with its row, after an adaptation; and the tokens that each was trained on."""
        sets = [self.chosen(d) for d in devices]
        trained, tokens = self._trained(sets, rows, [self.rate(d) for d in devices])
        after = [
            replace(d, fresh=0, times=d.times + 1, adapted_at=d.profile.vector(self.embed, self.config.profile))
            for d in devices
        ]
        return after, trained, tokens

    def _trained(
        self, sets: Sequence[Sequence[Interaction]], rows: Adapters, rates: Sequence[float]
    ) -> tuple[Adapters, list[int]]:
        """`config.steps` steps of AdamW on all of each device's lesson."""
        config, engine, encode = self.config, self.lm.engine, self.lm.format.dialogues
        good = [encode([Dialogue("", i.prompt, self._lesson(i)) for i in training_set]) for training_set in sets]
        pairs = [[i for i in training_set if self._pair(i)] for training_set in sets]
        wanted = [encode([Dialogue("", i.prompt, i.wanted) for i in some]) for some in pairs]
        rejected = [encode([Dialogue("", i.prompt, i.said) for i in some]) for some in pairs]
        batches = [[*g, *w, *r] for g, w, r in zip(good, wanted, rejected, strict=True)]
        sizes = [len(w) + len(r) for w, r in zip(wanted, rejected, strict=True)]
        both = [e for w, r in zip(wanted, rejected, strict=True) for e in (*w, *r)]
        slots = [k for k, size in enumerate(sizes) for _ in range(size)]
        reference = torch.tensor(engine.score(both, slots, self.beneath)).split(sizes)
        found, moments = rows.rows.clone(), Moments.zeros(rows.rows)
        self.spent["read"] += (1 + config.steps) * sum(e.length for e in both)
        self.spent["trained"] += config.steps * sum(e.length for batch in batches for e in batch)
        for _ in range(config.steps):
            now = torch.tensor(engine.score(both, slots, [*self.beneath, Adapters(rows.layout, found)])).split(sizes)
            weights = [
                [*self._weights(training_set, own), *self._preferences(before - nll)]
                for training_set, own, before, nll in zip(sets, good, reference, now, strict=True)
            ]
            gradient, _ = engine.gradient(Adapters(rows.layout, found), self.beneath, batches, weights)
            adamw_(found, gradient, moments, range(len(found)), rates, 0.0)
        return Adapters(rows.layout, found), [config.steps * sum(e.length for e in batch) for batch in batches]

    def _weights(self, training_set: Sequence[Interaction], examples: Sequence[object]) -> list[float]:
        """Of the NLL of each reply: a correction is worth a whole one, an accepted reply half of it."""
        told = [0.5 if self.config.arm == "no-feedback" or i.accepted else 1.0 for i in training_set]
        tokens = max(1, sum(e.targets for e in examples))  # type: ignore[attr-defined]
        return [w / tokens for w in told]

    def _preferences(self, rewards: torch.Tensor) -> list[float]:
        """Of the NLL of each corrected and of each rejected reply."""
        count = len(rewards) // 2
        if not count:
            return []
        _, up, down = value_and_weights(rewards[:count], rewards[count:], torch.eye(count), self.config.beta)
        return [self.config.preference * w for w in (*up.tolist(), *down.tolist())]

    def _lesson(self, met: Interaction) -> str:
        """The reply to learn. Who does not look at feedback learns what was said."""
        return met.said if self.config.arm == "no-feedback" else met.good

    def _pair(self, met: Interaction) -> bool:
        return self.config.arm != "no-feedback" and bool(met.wanted and met.said and not met.accepted)
