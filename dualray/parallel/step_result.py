"""What one worker measured of a step, and of held-out text, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.spans import SpanTuple


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step's measurements. Losses are global means in nats per target.

    `loads` and `max_vio` cover the MoE layers this worker holds, over the whole batch.
    `bubble` and `exposed_communication` are shares of the walk, from its start to the end of the
    last worker's, averaged over the workers: what each waited for other pipeline ranks or was
    done already, and what it waited for expert ranks with nothing to compute.
    `work` is what this worker's routed experts did, `cross_node_bytes` what it sent to expert ranks
    on other nodes in its forwards and backwards, counts included.
    `spans` are what this worker did when.
    """

    loss: float
    mtp_loss: list[float]
    balance_loss: float
    grad_norm: float
    lr: float
    bubble: float
    exposed_communication: float
    step_time_s: float
    loads: dict[int, list[int]]
    max_vio: dict[int, float]
    work: ExpertWork
    cross_node_bytes: int
    spans: list[SpanTuple]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out cross-entropy: the global sum in nats, and how many targets it covers."""

    loss_sum: float
    targets: int
