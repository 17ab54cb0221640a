"""A run's folder as a training would have left it, made in a moment and without torch."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from dualray.parallel.layout import Layout
from dualray.parallel.spans import SpanTuple
from dualray.platform.loads import LoadsLog, Place
from dualray.platform.metrics import CheckpointSaved, ExpertsMoved, StepMetrics, Switch, Yardsticks
from dualray.platform.metrics_log import MetricsLog
from dualray.platform.timeline import step_trace
from dualray.platform.trace import Category, Span, Trace, write_trace
from dualray.schedule.actions import Kind, Overlap
from dualray.schedule.make import make_schedule
from dualray.schedule.simulate import Costs, simulate

RUN_YAML = """\
name: demo
seed: 0
model: tiny
data: {path: data/shakespeare}
layout: {pipeline: 2, experts: 2, replicas: 1, schedule: dualpipe}
train: {steps: 600, seq_len: 256, micro_batch_size: 4, micro_batches: 8, lr: 3.0e-3}
"""
YARDSTICKS = Yardsticks(gzip=3.0887, bzip2=2.4412, unigram=2.9134, bigram=2.2577)
TOKENS_PER_STEP = 16_384
TOKENS_PER_BYTE = 0.3


Loads = dict[int, list[int]]
LAYERS, NUM_EXPERTS = (1, 2, 3), 16


MOVED_AT = 220
MOVED = ExpertsMoved(
    step=MOVED_AT,
    layers=LAYERS,
    imbalance_before=1.93,
    imbalance_after=1.07,
    num_bytes=41_300_000,
    seconds=0.62,
    reason=f"{len(LAYERS)} of {len(LAYERS)} layers move for 0.6 s and save 9.1 s in 110 steps",
)


def make_loads(
    num_steps: int, *, layers: tuple[int, ...] = LAYERS, num_experts: int = NUM_EXPERTS
) -> list[Loads]:
    """Tokens of every expert by layer, step by step: balance that improves, with noise."""
    noise = random.Random(8)
    taste = {layer: [noise.gauss(0, 0.9) for _ in range(num_experts)] for layer in layers}
    steps = []
    for step in range(1, num_steps + 1):
        skew = 0.15 + math.exp(-step / 90)
        loads = {}
        for layer in layers:
            weights = [math.exp(skew * t + noise.gauss(0, 0.06)) for t in taste[layer]]
            scale = 4 * TOKENS_PER_STEP / sum(weights)
            loads[layer] = [round(weight * scale) for weight in weights]
        steps.append(loads)
    return steps


def write_loads(folder: Path, steps: list[Loads], *, nodes: tuple[str, ...]) -> None:
    """The tables of a run whose expert ranks, one a node, hold equal runs of the experts."""
    with LoadsLog.resume(folder, 0) as log:
        for step, loads in enumerate(steps, start=1):
            tokens = {}
            for layer, load in loads.items():
                for expert, count in enumerate(load):
                    rank = expert * len(nodes) // len(load)
                    tokens[Place(layer, expert, rank, nodes[rank])] = count
            log.add(step, tokens)


def make_steps(
    num_steps: int,
    *,
    layers: tuple[int, ...] = LAYERS,
    num_experts: int = NUM_EXPERTS,
    eval_every=50,
) -> list[StepMetrics]:
    """Curves that fall and balance that improves, with noise; the same ones every time."""
    noise = random.Random(7)
    steps = []
    summed = {layer: [0] * num_experts for layer in layers}
    for step, loads in enumerate(make_loads(num_steps, layers=layers, num_experts=num_experts), 1):
        loss = 4.6 + 3.7 * math.exp(-step / 70) - 0.35 * step / 600 + noise.gauss(0, 0.04)
        summed = {k: [a + b for a, b in zip(v, loads[k])] for k, v in summed.items()}
        vio, vio_run = (
            {k: max(v) * num_experts / sum(v) - 1 for k, v in every.items()}
            for every in (loads, summed)
        )
        evaluated = step % eval_every == 0 or step == num_steps
        heldout = loss + 0.05
        steps.append(
            StepMetrics(
                step=step,
                tokens=step * TOKENS_PER_STEP,
                loss=loss,
                mtp_loss=(loss + 0.35 + noise.gauss(0, 0.04),),
                balance_loss=1e-4,
                grad_norm=(0.4 + 2 * math.exp(-step / 40)) * math.exp(noise.gauss(0, 0.2)),
                lr=3e-3 * min(step / 40, 0.55 + 0.45 * math.cos(math.pi * step / num_steps)),
                tokens_per_s=31_000 + noise.gauss(0, 900),
                step_time_s=0.53 + noise.gauss(0, 0.02),
                bubble=0.16 + abs(noise.gauss(0, 0.02)),
                exposed_communication=0.125,
                max_vio=max(vio.values(), default=None),
                max_vio_per_layer=vio,
                max_vio_run=max(vio_run.values(), default=None),
                max_vio_run_per_layer=vio_run,
                rank_imbalance=(1.9 if step <= MOVED_AT else 1.06) + noise.gauss(0, 0.02)
                if layers
                else None,
                expert_s=(0.19 if step <= MOVED_AT else 0.11) + noise.gauss(0, 0.003),
                expert_s_mean=0.1,
                heldout_loss=heldout if evaluated else None,
                heldout_bits_per_byte=heldout * TOKENS_PER_BYTE / math.log(2)
                if evaluated
                else None,
            )
        )
    return steps


def make_spans(*, pipeline: int = 2, experts: int = 2, micro_batches: int = 8) -> list[Span]:
    """One step of DualPipe as the simulator sees it, with jitter, exchanges and an optimizer."""
    noise = random.Random(3)
    timeline = simulate(make_schedule("dualpipe", pipeline, micro_batches), Costs())
    spans = []
    end = timeline.makespan
    for rank in range(pipeline * experts):
        for step, start, stop in timeline.rows[rank // experts]:
            start, stop = start + noise.uniform(0, 0.04), stop - noise.uniform(0, 0.04)
            forward = not isinstance(step, Overlap) and step.kind is Kind.FORWARD
            spans.append(_span(rank, str(step), Category.COMPUTE, start, stop))
            if isinstance(step, Overlap) or forward:
                spans.append(
                    _span(rank, "dispatch", Category.COMMUNICATION, start + 0.3, start + 0.5)
                )
        spans.append(_span(rank, "gradients", Category.COMMUNICATION, end + 0.05, end + 0.8))
        spans.append(_span(rank, "optimizer", Category.OPTIMIZER, end + 0.8, end + 1.6))
    return spans


def make_trace(*, step: int) -> Trace:
    """Those spans and the simulation that they lead to, and a checkpoint long after the step."""
    layout = Layout(pipeline=2, experts=2, schedule="dualpipe")
    spans: list[list[SpanTuple]] = [[] for _ in range(layout.world_size)]
    for span in make_spans():
        spans[span.rank].append((span.name, str(span.category), span.start_s, span.end_s))
        if span.category is Category.OPTIMIZER:
            spans[span.rank].append(("write checkpoint", "checkpoint", 60.0, 61.0))
    schedule = make_schedule(layout.schedule, layout.pipeline, 8)
    return step_trace(spans, step=step, layout=layout, schedule=schedule)


def make_run(folder: Path, *, num_steps: int = 600) -> Path:
    """A whole run: run file, state, metrics, trace, checkpoints and the switch to serving."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(RUN_YAML)
    state = {
        "run_id": "a1",
        "name": "demo",
        "state": "stopped",
        "corpus": "data/shakespeare (5.5 MB)",
        "num_parameters": 3_412_992,
        "num_active_parameters": 1_318_144,
    }
    (folder / "run.json").write_text(json.dumps(state))
    with MetricsLog.create(folder / "metrics.jsonl") as log:
        log.append(YARDSTICKS)
        for metrics in make_steps(num_steps):
            log.append(metrics)
            if metrics.step == MOVED_AT:
                log.append(MOVED)
            if metrics.step % 200 == 0:
                log.append(CheckpointSaved(step=metrics.step, seconds=0.75 + metrics.step / 1000))
        pids = (4101, 4102, 4103, 4104)
        log.append(Switch(seconds_to_first_token=0.83, workers_before=pids, workers_after=pids))
    write_loads(folder / "loads", make_loads(num_steps), nodes=("10.0.0.1", "10.0.0.2"))
    write_trace(folder / "trace.json", make_trace(step=300))
    for step in (400, 600):
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step}" / "COMMIT").touch()
    return folder


def _span(rank: int, name: str, category: Category, start: float, end: float) -> Span:
    # The unit of the simulation becomes 12 ms.
    return Span(rank=rank, name=name, category=category, start_s=start * 0.012, end_s=end * 0.012)
