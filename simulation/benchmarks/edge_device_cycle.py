"""One measurement of `florilegium bench board`, in a process of its own: a device that talks and learns.

    python -m florilegium.simulation.benchmarks.edge_device_cycle MODEL LIMIT THREADS FOLDER GENERATION WORK [CGROUP]

prints seconds, tokens and memory. MODEL is JSON; WORK is "talk", or "learn" for learning as well. FOLDER holds
`dialogues.json`: pairs of a prompt and its reply, which are learned. The process joins the control group before it
loads anything.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import psutil

from florilegium.simulation.runs.stopping import end_with_parent

if TYPE_CHECKING:
    from florilegium.client.agent.agent import Agent

PROMPTS = ("What did you do at the weekend?", "Tell me of your favourite book.", "How do I cook rice?", "Will it rain?")


def main(model: str, limit: str, threads: str, folder: str, generation: str, work: str, group: str = "") -> None:
    end_with_parent()
    if group:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    os.environ["OMP_NUM_THREADS"] = threads
    from florilegium.client.agent.agent import Agent
    from florilegium.client.agent.config import AgentConfig, new_config
    from florilegium.client.agent.device import Device, loaded
    from florilegium.client.agent.folder import DeviceFolder
    from florilegium.client.agent.memory_limits import limit_memory
    from florilegium.client.lm.config import ModelConfig
    from florilegium.privacy.common.machine import peak_rss_bytes

    limit_memory(int(limit))
    home, usual = DeviceFolder(Path(folder) / "device"), new_config(ModelConfig.model_validate_json(model))
    config = AgentConfig.model_validate({**usual.model_dump(), "generation": {"backend": generation}})
    began = time.monotonic()
    agent = Agent(Device(home, config, loaded(config.device.model), home.make(config)))
    loading_s = time.monotonic() - began
    agent.consent("learn", True)
    for prompt, said in json.loads((Path(folder) / "dialogues.json").read_text(encoding="utf-8")):
        agent.rate(agent.device.vault.add(prompt, "?", "").id, None, said)
    agent.settle()
    agent.chat(PROMPTS[0], temporary=True)  # what is made at the first
    talked = [_talked(agent, prompt) for prompt in PROMPTS[1:]]
    talking = psutil.Process().memory_info().rss
    began = time.monotonic()
    at_once, page = None, dict[str, object]()
    if work == "learn":
        budget = agent.device.lm.engine.token_budget  # of the model that learns, which may be put away afterwards
        page, at_once = agent.learn(), budget.tokens
    cycle_s, peak = time.monotonic() - began, peak_rss_bytes()
    told = {
        "loading_s": loading_s,
        "first_token_s": median(first for first, _, _ in talked),
        "tokens_per_s": sum(more for _, more, _ in talked) / sum(seconds for _, _, seconds in talked),
        "talking_bytes": talking,
        "idle_bytes": psutil.Process().memory_info().rss,
        "cycle_s": cycle_s,
        "examples": page.get("personal_examples", 0),
        "peak_bytes": peak,
        "tokens_at_once": at_once,
    }
    print(json.dumps(told))
    sys.stdout.flush()
    agent.close()


def _talked(agent: Agent, prompt: str) -> tuple[float, int, float]:
    """Seconds to the first token of a reply, how many came after it, and in how many seconds."""
    began, heard = time.monotonic(), list[float]()
    said = agent.chat(prompt, told=lambda _: heard.append(time.monotonic()), temporary=True).said
    return heard[0] - began, agent.device.format.length(said) - 1, heard[-1] - heard[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
