"""Flower's SecAgg+ doing what `bench secure` has ours do: the same devices, neighbours, numbers and losses.

`SecAggPlusWorkflow` and `secaggplus_mod` of the installed Flower, every message handed over in this process. It
promises less: no noise, masks from seeds of 32 bits, and nobody signs the devices' keys.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation import secaggplus_workflow
from flwr.supercore.task_identity import TaskIdentity  # private: a message cannot be made outside a run without it

Row = np.ndarray[Any, np.dtype[np.float32]]
compat: Any = secaggplus_workflow.compat  # type: ignore[attr-defined]  # where it lies differs between versions
NOTHING = Parameters([], "numpy.ndarray")


@dataclass(frozen=True)
class FlowerRound:
    """What a round of SecAgg+ took."""

    up_bytes: int  # of one device, median over those that came through
    down_bytes: int
    device_ms: float
    server_ms: float


@dataclass
class _Devices:
    """A Flower grid and all devices behind it; those of `lost` send their shares and nothing after."""

    rows: Mapping[int, Row]
    lost: set[int]
    spent_s: dict[int, float] = field(default_factory=dict)
    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)
    mean: Row | None = None

    def __post_init__(self) -> None:
        self.contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in self.rows}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [reply for m in messages if (reply := self._answered(m))]

    def _answered(self, asked: Message) -> Message | None:
        node, told = asked.metadata.dst_node_id, asked.content.config_records[RECORD_KEY_CONFIGS]
        if node in self.lost and told[Key.STAGE] in (Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK):
            return None
        self.down[node] = self.down.get(node, 0) + _size(told)
        content = RecordDict({**asked.content, RECORD_KEY_CONFIGS: ConfigRecord(dict(told))})  # the mod empties its own
        alone = Message(content, dst_node_id=node, message_type=asked.metadata.message_type)
        began = time.perf_counter()
        reply = secaggplus_mod(alone, self.contexts[node], lambda message, context: self._trained(message, node))
        self.spent_s[node] = self.spent_s.get(node, 0.0) + time.perf_counter() - began
        self.up[node] = self.up.get(node, 0) + _size(reply.content.config_records[RECORD_KEY_CONFIGS])
        reply.metadata.__dict__["_src_node_id"] = node
        return reply

    def _trained(self, message: Message, node: int) -> Message:
        sent = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([self.rows[node]]), 1, {})
        return Message(compat.fitres_to_recorddict(sent, False), reply_to=message)

    # -- what the workflow asks of a strategy and of a manager of clients

    def configure_fit(self, number: int, parameters: Parameters, manager: object) -> list[tuple[Any, FitIns]]:
        return [(SimpleNamespace(node_id=n), FitIns(NOTHING, {})) for n in self.rows]

    def aggregate_fit(self, number: int, results: Any, failures: object) -> tuple[None, dict[str, Any]]:
        (self.mean,) = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}

    def num_available(self) -> int:
        return len(self.rows)


def flower_round(rows: Mapping[int, Row], lost: set[int], holders: int, threshold: int) -> FlowerRound:
    """One round over rows (P,) by node, each with so many holders of its shares, itself among them.

    Raises `AssertionError` where it does not come to the mean of the rows that were not lost.
    """
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    devices = _Devices(rows, lost)
    largest = float(np.abs(np.stack(list(rows.values()))).max())
    workflow = SecAggPlusWorkflow(holders, threshold, max_weight=1.0, clipping_range=max(1e-3, 1.01 * largest))
    context = LegacyContext(Context(1, 1, {}, RecordDict(), {}), strategy=devices, client_manager=devices)  # type: ignore[arg-type]
    context.state[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    context.state[MAIN_PARAMS_RECORD] = ArrayRecord()
    logger = logging.getLogger("flwr")
    before, logger.disabled = logger.disabled, True
    began = time.perf_counter()
    try:
        workflow(devices, context)  # type: ignore[arg-type]
    finally:
        logger.disabled = before
    whole = time.perf_counter() - began
    wanted = np.mean([row for node, row in rows.items() if node not in lost], axis=0)
    if devices.mean is None or not np.allclose(devices.mean, wanted, atol=1e-5 * max(1e-3, largest)):
        raise AssertionError("SecAgg+ does not come to the mean")
    came = [node for node in rows if node not in lost]
    return FlowerRound(
        int(median(devices.up[n] for n in came)), int(median(devices.down[n] for n in came)),
        1000 * median(devices.spent_s[n] for n in came), 1000 * (whole - sum(devices.spent_s.values())),
    )  # fmt: skip


def _size(told: Mapping[str, Any]) -> int:
    """Bytes of what a record holds; of a number eight, names and framing left out."""
    return sum(_bytes(value) for value in told.values())


def _bytes(value: Any) -> int:
    if isinstance(value, bytes | str):
        return len(value)
    return sum(map(_bytes, value)) if isinstance(value, list) else 8
