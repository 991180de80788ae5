"""People who talk with their devices, one interaction after the other, and say what they think of the replies.

The simulated user: a reply is accepted where its ROUGE-1 with what the person really said is at least `accepts`; with
probability `slips` the answer is the other one; a rejected reply is corrected, by what the person really said, with
probability `corrects`. Devices are tested before they learn: what is measured of an interaction is what the device
could do before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters, Layout
from florilegium.client.lm.batching import schedule
from florilegium.client.lm.config import AdapterConfig, SamplingConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.personalization.asls import Asls, Device, Interaction
from florilegium.client.personalization.config import AslsConfig, ProfileConfig
from florilegium.client.personalization.profile import Profile, drift
from florilegium.client.rouge import rouge1
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.personalization.config import ReptileConfig, UserConfig

Listener = Callable[[str], None]
SPAN = 6  # interactions over which a profile's movement is measured


@dataclass(frozen=True)
class Lived:
    """What became of the devices; figures by device and interaction, (K, T)."""

    nll: np.ndarray  # of what the person really said, nats a token, before the device learned from it
    rouge1: np.ndarray  # of what the device said
    accepted: np.ndarray
    tokens: np.ndarray  # that the device was trained on after the interaction
    moved: np.ndarray  # whether an adaptation came of the profile's movement, before enough was new
    said: np.ndarray  # tokens of the reply
    devices: Sequence[Device]
    rows: torch.Tensor  # (K, P)
    half_way: torch.Tensor  # (K, P)
    seconds: float  # of a device and an interaction, for all but the reply itself: profile, summary, adaptation
    spent: Mapping[str, float]  # tokens of a device and an interaction beside the reply's: trained, read, written


def feedback(said: str, recorded: str, config: UserConfig, seed: int) -> tuple[bool, str]:
    """Whether the person accepts a reply, and the correction, if one is given."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    slipped, bothers = rng.random(2)
    accepted = (rouge1(recorded, said) >= config.accepts) != (slipped < config.slips)
    return accepted, recorded if not accepted and bothers < config.corrects else ""


def simulate_user(
    lm: LanguageModel,
    config: AslsConfig,
    user: UserConfig,
    adapter: AdapterConfig,
    sampling: SamplingConfig,
    streams: Mapping[str, Sequence[Dialogue]],
    seed: int,
    start: torch.Tensor | None = None,
    beneath: Sequence[Adapters] = (),
    listener: Listener = lambda phase: None,
) -> Lived:
    """As many interactions of each device as the shortest stream has. `start` (P,) is where every adapter begins."""
    asls, layout = Asls(lm, config, seed, beneath), lm.layout(adapter)
    devices = [Device(name) for name in streams]
    first = layout.start(derive_seed(seed, "live", "start")) if start is None else start
    rows = lm.adapters(layout, first.repeat(len(devices), 1))
    steps = min(len(stream) for stream in streams.values())
    nll, rouge, accepted, tokens, moved, said_tokens = (np.zeros((len(devices), steps)) for _ in range(6))
    seconds = 0.0
    half_way = rows.rows
    for t in range(steps):
        listener(f"interaction {t + 1} of {steps}")
        half_way = rows.rows.clone() if t == steps // 2 else half_way
        met = [stream[t] for stream in streams.values()]
        asked = [asls.prompt(d, m.prompt) for d, m in zip(devices, met, strict=True)]
        slots, arm = range(len(devices)), [*beneath, rows]
        told = lm.format.dialogues([replace(m, prompt=p) for m, p in zip(met, asked, strict=True)])
        nll[:, t] = [s.nll / max(1, s.tokens) for s in lm.score(told, slots, arm)]
        seeds = [derive_seed(seed, d.id, "reply", t) >> 1 for d in devices]
        said = lm.generate(asked, slots, arm, sampling, seeds)
        began = time.perf_counter()
        for k, (device, m, text) in enumerate(zip(devices, met, said, strict=True)):
            good, wanted = feedback(text, m.response, user, derive_seed(seed, device.id, "feedback", t))
            rouge[k, t], accepted[k, t] = rouge1(m.response, text), good
            said_tokens[k, t] = lm.format.length(text)
            devices[k] = asls.observe(device, Interaction(m.prompt, text, good, wanted))
        devices = asls.refresh(devices)
        ready = [k for k, device in enumerate(devices) if asls.wants_to_adapt(device)]
        moved[ready, t] = [devices[k].fresh < config.fresh for k in ready]
        if ready:
            after, trained, tokens[ready, t] = asls.adapt([devices[k] for k in ready], rows.pick(ready))
            rows.rows[ready] = trained.rows
            for k, device in zip(ready, after, strict=True):
                devices[k] = device
        seconds += time.perf_counter() - began
    times = len(devices) * steps
    spent = {kind: asls.spent[kind] / times for kind in ("trained", "read", "written")}
    rows_at = {"rows": rows.rows.cpu(), "half_way": half_way.cpu()}
    return Lived(
        nll, rouge, accepted, tokens, moved, said_tokens, devices, **rows_at, seconds=seconds / times, spent=spent
    )


def movements(lm: LanguageModel, config: ProfileConfig, streams: Sequence[Sequence[Dialogue]]) -> np.ndarray:
    """How far each profile is from where it was `SPAN` interactions before, (K, T): 1 − cosine, zero until then.

    Of what people say alone, whatever they think of the replies.
    """
    asls = Asls(lm, AslsConfig(profile=config), 0)
    found = np.zeros((len(streams), min(map(len, streams))))
    for k, stream in enumerate(streams):
        profile, vectors = Profile(), list[torch.Tensor]()
        for t in range(found.shape[1]):
            profile = profile.after(stream[t].prompt, 0.5, asls.embed, config)
            vectors.append(profile.vector(asls.embed, config))
            found[k, t] = drift(vectors[t - SPAN], vectors[t]) if t >= SPAN else 0
    return found


def reptile(
    lm: LanguageModel, layout: Layout, config: ReptileConfig, streams: Sequence[Sequence[Dialogue]], seed: int
) -> torch.Tensor:
    """φ (P,) after φ ← φ + ε · mean_k(θ_k − φ), θ_k what some steps on person k's stream make of φ."""
    phi = layout.start(derive_seed(seed, "live", "start"))
    for number in range(config.rounds):
        rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, "reptile", number)))
        chosen = rng.choice(len(streams), size=min(config.people, len(streams)), replace=False).tolist()
        sets = []
        for k in chosen:
            order = schedule(len(streams[k]), config.batch_size, config.steps, derive_seed(seed, "reptile", number, k))
            sets.append(TrainingSet(lm.format.dialogues(streams[k]), order[: config.steps]))
        rates = [[config.rate] * len(training_set.batches) for training_set in sets]
        trained = lm.engine.finetune(lm.adapters(layout, phi.repeat(len(chosen), 1)), [], sets, rates)
        phi = phi + config.outer * (trained.adapters.rows.cpu() - phi).mean(0)
    return phi


def better_from(one: np.ndarray, other: np.ndarray, window: int = 5) -> int | None:
    """The first interaction, counted from 1, from which the mean over devices of `one` stays below that of `other`.

    Both (K, T), lower is better, smoothed over the last `window` interactions; None where it never does.
    """
    difference = np.convolve((one - other).mean(0), np.ones(window) / window, mode="valid")
    above = np.nonzero(difference >= 0)[0]
    if not len(above):
        return window
    first = int(above[-1]) + 1
    return None if first == len(difference) else first + window
