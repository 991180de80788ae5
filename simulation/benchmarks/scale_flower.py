"""The same measurement of Flower's stock simulation, with its own FedAvg and a client that returns what it got.

    python -m florilegium.simulation.benchmarks.scale_flower 1000

No torch is loaded here: the memory is Flower's and Ray's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from florilegium.privacy.common.machine import peak_rss_bytes
from florilegium.simulation.runs.stopping import end_with_parent

ROUNDS = 4
SAMPLED = 0.1
NUMBERS = 768  # of an upload


def stock(devices: int) -> list[float]:
    """When each round was over, in seconds since the epoch."""
    from florilegium.simulation.benchmarks.scale_idle_client import app
    from florilegium.simulation.engines.flower_ray import stock_grid

    ended: list[float] = []
    with stock_grid(app, devices, Path.cwd()) as grid:
        strategy = FedAvg(fraction_train=SAMPLED, fraction_evaluate=0.0, min_available_nodes=devices)
        start = ArrayRecord([np.zeros(NUMBERS, np.float32)])
        strategy.start(grid, start, ROUNDS, evaluate_fn=lambda number, arrays: ended.append(time.time()))
    return ended[1:]  # the first call is before round 1


def main() -> None:
    end_with_parent()
    began = time.time()
    ended = stock(int(sys.argv[1]))
    print("\n" + json.dumps({"began": began, "ended": ended, "peak_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
