"""One measurement of `florilegium bench board`, in a process of its own: a device that talks and learns.

    python -m florilegium.simulation.benchmarks.edge_device_cycle '{"name": "nano"}' LIMIT THREADS FOLDER [CGROUP]

prints seconds, tokens and peak memory. The process joins the control group before it loads anything.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from florilegium.simulation.runs.stopping import end_with_parent

DIALOGUES = 8
PROMPT = "What did you do at the weekend?"


def main(model: str, limit: str, threads: str, folder: str, group: str = "") -> None:
    end_with_parent()
    if group:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    os.environ["OMP_NUM_THREADS"] = threads
    from florilegium.client.agent.agent import Agent
    from florilegium.client.agent.config import new_config
    from florilegium.client.agent.device import Device, loaded
    from florilegium.client.agent.folder import DeviceFolder
    from florilegium.client.agent.memory_limits import limit_memory
    from florilegium.client.lm.config import ModelConfig
    from florilegium.privacy.common.machine import peak_rss_bytes
    from florilegium.simulation.data.population import DataConfig, load_population

    limit_memory(int(limit))
    home, config = DeviceFolder(Path(folder) / "device"), new_config(ModelConfig.model_validate_json(model))
    began = time.monotonic()
    agent = Agent(Device(home, config, loaded(config.device.model), home.make(config)))
    loading_s = time.monotonic() - began
    agent.consent("learn", True)
    (person,) = load_population(DataConfig(users=1, split="development", max_pairs=40), seed=0)
    for had in person.stream[:DIALOGUES]:
        agent.rate(agent.device.vault.add(had.prompt, "?", "").id, None, had.response)
    began = time.monotonic()
    reply = agent.chat(PROMPT).said
    reply_s, tokens = time.monotonic() - began, agent.device.lm.format.length(reply)
    began = time.monotonic()
    page = agent.learn()
    told = {
        "loading_s": loading_s,
        "tokens_per_s": tokens / reply_s,
        "cycle_s": time.monotonic() - began,
        "examples": page["personal_examples"],
        "peak_bytes": peak_rss_bytes(),
        "tokens_at_once": agent.device.lm.engine.token_budget.tokens,
        "dtype": str(agent.device.lm.engine.dtype).removeprefix("torch."),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
