"""Flower's stock simulation with PEFT inside its ClientApp: a message per device, Ray actors, 256 nodes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from florilegium.simulation.benchmarks.engine_peft import OneByOne
from florilegium.simulation.benchmarks.engine_workload import NODES, Workload, adapter_rows
from florilegium.simulation.engines.flower_ray import stock_grid

app = ClientApp()


@lru_cache(maxsize=1)
def _resident(model: str, dtype: str, device: str) -> OneByOne:
    """An actor keeps its model from message to message."""
    return OneByOne(model, getattr(torch, dtype), device)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Local training of one device on the adapter that came with the message."""
    task = message.content.config_records["task"]
    arm = _resident(str(task["model"]), str(task["dtype"]), str(task["device"]))
    work = Workload("training", NODES, int(str(task["examples_per_step"])), int(str(task["steps"])))
    row = torch.from_numpy(message.content.array_records["adapter"]["row"].numpy().copy())
    batches = [arm.padded(step) for step in work.batches(int(str(task["number"])))]
    row = row.to(arm.device)
    loss = arm.training(row, batches)
    content = {
        "adapter": ArrayRecord({"row": Array(row.cpu().numpy())}),
        "result": MetricRecord({"number": int(str(task["number"])), "loss": loss}),
    }
    return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]


class Federation:
    """The server's side: one round is one measurement."""

    def __init__(self, grid: Grid, arm: OneByOne, task: dict[str, str]) -> None:
        self.grid, self.task = grid, task
        self.size, self.rows = arm.size, adapter_rows(arm.layout, NODES)

    def prepare(self, work: Workload) -> Callable[[], list[Any]]:
        return lambda: self._round(work)

    def _round(self, work: Workload) -> list[Any]:
        nodes = sorted(self.grid.get_node_ids())[: work.devices]
        messages = []
        for number, node in enumerate(nodes):
            task = {**self.task, "number": number, "examples_per_step": work.examples_per_step, "steps": work.steps}
            content = {
                "adapter": ArrayRecord({"row": Array(self.rows[number].numpy())}),
                "task": ConfigRecord(task),  # type: ignore[arg-type]
            }
            messages.append(Message(RecordDict(content), dst_node_id=node, message_type="train"))  # type: ignore[arg-type]
        losses: dict[int, float] = {}
        for reply in self.grid.send_and_receive(messages):
            result = reply.content.metric_records["result"]
            losses[int(str(result["number"]))] = float(str(result["loss"]))
        return [losses[number] for number in range(work.devices)]


def federate(model: str, dtype: str, device: str, serve: Callable[[Federation], None]) -> None:
    """Starts the simulation and serves measurements with its grid until `serve` returns."""
    own, folder = OneByOne(model, getattr(torch, dtype), device), Path(tempfile.mkdtemp())
    with stock_grid(app, NODES, folder, gpus_per_client=0.0 if device == "cpu" else 0.5) as grid:
        serve(Federation(grid, own, {"model": model, "dtype": dtype, "device": device}))
