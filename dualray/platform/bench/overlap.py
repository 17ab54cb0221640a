"""How much communication overlapped pairs hide, on two hosts joined by a slow link.

Each host runs one process with its share of every layer's experts, so that half of all rows cross
the link four times a layer: dispatch and combine, and the gradients of both. Three walks of the
same step over the same weights are timed in turn: without communication (rows are handed to
oneself: the floor), sequential, and overlapped. What the overlapped walk hides of the time that
the sequential one pays for communication is

    (sequential - overlapped) / (sequential - floor).

The pipeline is DualPipeV on one rank, whose step is made of pairs alone but for its first and last
micro-batches; two ranks a host would share the two cores of a small machine.

A host has a core of its own, as hosts do, and the threads that move rows have real-time priority on
it, as a network card asks nobody for a turn. Without these a thread that is woken waits for the
other host's time slice to end, up to 4 ms, and a step of hundreds of exchanges measures that.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualray.errors import ResourceError
from dualray.model.config import ModelConfig
from dualray.parallel.dispatch import AllToAllDispatch
from dualray.parallel.exchange import Exchange
from dualray.parallel.executor import Executor
from dualray.parallel.groups import Groups, join
from dualray.parallel.held import HeldStages
from dualray.parallel.layout import Layout
from dualray.parallel.micro_batch import MicroBatch, Objective
from dualray.parallel.p2p import PipelineLinks
from dualray.parallel.slots import contiguous_placement
from dualray.parallel.weight_grads import WeightGrads, attach_main_grads
from dualray.platform.bench.hosts import Host, emulated_hosts
from dualray.platform.bench.ranks import Member, run_ranks
from dualray.schedule.actions import Schedule
from dualray.schedule.make import make_schedule

WALKS = ("floor", "sequential", "overlapped")
_CPU = torch.device("cpu")
_OVERHEAD = 1.4
"""How much longer exchanges take than their bytes: headers, counts, and ranks not quite in step."""


@dataclass(frozen=True, kw_only=True)
class OverlapCase:
    """What is walked, and how often."""

    hidden_size: int = 256
    num_attention_heads: int = 16
    """So many that attention and experts take as long as each other, as in DeepSeek-V3."""
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 4
    seq_len: int = 256
    sequences: int = 1
    """Per micro-batch."""
    micro_batches: int = 20
    """As in the figures of the paper; of fewer a larger share is in no pair."""
    repeats: int = 4
    """Timed rounds, in each of which every walk is made once."""

    def model(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=512,
            hidden_size=self.hidden_size,
            intermediate_size=2 * self.hidden_size,
            moe_intermediate_size=self.moe_intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            q_lora_rank=self.hidden_size,
            kv_lora_rank=self.hidden_size // 2,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            n_routed_experts=16,
            n_shared_experts=1,
            num_experts_per_tok=4,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            first_k_dense_replace=0,
            num_nextn_predict_layers=0,
            max_position_embeddings=self.seq_len,
            initializer_range=0.02,
        )


FULL = OverlapCase()
QUICK = OverlapCase(
    hidden_size=64,
    num_attention_heads=4,
    moe_intermediate_size=64,
    seq_len=64,
    sequences=2,
    micro_batches=4,
    repeats=2,
)


class NoJourney(Exchange):
    """Rows arrive where they are: as many as are sent, and their values do not matter."""

    def start_counts(self, counts: Tensor, receive: list[int], send: list[int], group: Any) -> Any:
        return lambda: counts

    def swap(
        self, rows: Tensor, receive: list[int], send: list[int], group: Any, name: str
    ) -> Tensor:
        assert sum(receive) == sum(send)
        return rows.clone()


class _Worker:
    """One rank: the same weights under three executors."""

    def __init__(self, member: Member, case: OverlapCase) -> None:
        self.case, self.model = case, case.model()
        layout = Layout(pipeline=1, experts=member.world_size, schedule="dualpipev")
        self.schedule = make_schedule(layout.schedule, 1, case.micro_batches)
        self.groups = join(
            layout,
            self.schedule,
            member.rank,
            member.rendezvous,
            device=_CPU,
            hosted=member.hosted,
        )
        self.placement = placement = contiguous_placement(self.model, layout.experts)
        self.held = HeldStages(
            self.model,
            self.schedule,
            layout.coordinate(member.rank),
            placement,
            seed=0,
            dtype=torch.float32,
            device=_CPU,
        )
        parameters = (self.held.dense_parameters() | self.held.expert_parameters()).values()
        self.gradients = attach_main_grads(parameters)
        self.executors = {
            "floor": self._executor(NoJourney(), overlapped=False),
            "sequential": self._executor(Exchange(has_couriers=True), overlapped=False),
            "overlapped": self._executor(Exchange(), overlapped=True),
        }
        self.batches = _batches(case, self.schedule, seed=member.rank)
        targets = member.world_size * case.micro_batches * case.sequences * case.seq_len
        self.objective = Objective(main=1 / targets, mtp=(), balance=0.0)

    def _executor(self, exchange: Exchange, *, overlapped: bool) -> Executor:
        groups: Groups = self.groups
        return Executor(
            self.held,
            0,
            PipelineLinks(groups.channels, groups.pipeline_ranks),
            [AllToAllDispatch(self.placement, ways, _CPU, exchange) for ways in groups.dispatch],
            WeightGrads(),
            exchange=exchange,
            overlapped=overlapped,
        )

    def walk(self, name: str) -> float:
        """Seconds from a common start to this rank's end."""
        self.gradients.zero_()
        dist.barrier(self.groups.world)
        started = time.perf_counter()
        self.executors[name].run(self.schedule, self.batches, self.objective)
        return time.perf_counter() - started


def _batches(case: OverlapCase, schedule: Schedule, seed: int) -> dict[tuple[int, int], MicroBatch]:
    generator = torch.Generator().manual_seed(seed)
    tokens = case.sequences * case.seq_len
    positions = torch.arange(case.seq_len).repeat(case.sequences)
    drawn = [
        torch.randint(512, (2, tokens), generator=generator) for _ in range(case.micro_batches)
    ]
    return {
        (direction, index): MicroBatch(
            positions_T=positions,
            seq_lens=(case.seq_len,) * case.sequences,
            ids_T=drawn[index][0],
            labels_DT=drawn[index][1:],
        )
        for direction in range(schedule.num_directions)
        for index in range(case.micro_batches)
    }


def _settle(rank: int) -> None:
    """Keep this process, and the threads that it has by now, on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    for thread in _threads():
        os.sched_setaffinity(thread, {cores[rank % len(cores)]})


def _check_priorities() -> None:
    """Raises ResourceError where no thread may have real-time priority: before minutes of work."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError as error:
        raise ResourceError(
            f"threads must be given real-time priority, which this system refuses ({error})",
            hint="run as root with the capability CAP_SYS_NICE",
        ) from None


def _prefer_communication() -> None:
    """Give every thread that computes nothing real-time priority; all have started by now."""
    computing = {
        thread.native_id
        for thread in threading.enumerate()
        if thread is threading.main_thread() or thread.name.startswith("strand")
    }
    for thread in set(_threads()) - computing:
        os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))


def _threads() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def measure_rank(member: Member, case: OverlapCase) -> dict[str, list[float]]:
    """Seconds of every timed walk."""
    _settle(member.rank)
    _check_priorities()
    worker = _Worker(member, case)
    seconds: dict[str, list[float]] = {name: [] for name in WALKS}
    for number in range(case.repeats + 1):
        for name in WALKS:
            took = worker.walk(name)
            if number:  # the first round warms up
                seconds[name].append(took)
        if not number:
            _prefer_communication()
    for executor in worker.executors.values():
        executor.close()
    return seconds


def compare_overlap(
    case: OverlapCase,
    *,
    timeout_s: float = 900.0,
    on_part: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Rows `free` (nothing to hide) and `shaped` (communication as long as computation).

    The shaped link's rate is chosen from the free one's floor and bytes, so that carrying a
    step's rows takes as long as computing it. Raises ResourceError where hosts cannot be emulated.
    """
    with emulated_hosts(2) as network:
        hosts: tuple[Host, ...] = network.hosts
        before = network.sent_bytes(hosts[0])
        on_part("free link")
        free = _row("free", run_ranks(measure_rank, case, hosts, timeout_s=timeout_s), None)
        walks = 2 * (case.repeats + 1)  # the floor sends nothing
        step_bytes = (network.sent_bytes(hosts[0]) - before) / walks
        rate = _OVERHEAD * 8 * step_bytes / free["floor_s"]
        network.set_rate(rate)
        on_part(f"link of {rate / 1e6:.0f} Mbit/s")
        shaped = _row("shaped", run_ranks(measure_rank, case, hosts, timeout_s=timeout_s), rate)
    for row in (free, shaped):
        row["step_bytes"] = round(step_bytes)
    return [free, shaped]


def _row(link: str, ranks: list[dict[str, list[float]]], rate: float | None) -> dict[str, Any]:
    # A step ends when its slowest rank does.
    rounds = {name: [max(times) for times in zip(*(r[name] for r in ranks))] for name in WALKS}
    median = {name: statistics.median(times) for name, times in rounds.items()}
    triples = list(zip(*(rounds[name] for name in WALKS)))
    row: dict[str, Any] = {
        "link": link,
        "rate_bits_per_s": rate,
        **{f"{name}_s": median[name] for name in WALKS},
        "overlapped_per_sequential": statistics.median(o / s for _, s, o in triples),
        "communication_per_computation": statistics.median((s - f) / f for f, s, _ in triples),
    }
    if rate is not None:
        hidden = [(s - o) / (s - f) for f, s, o in triples]
        row |= {
            "hidden": statistics.median(hidden),
            "hidden_min": min(hidden),
            "hidden_max": max(hidden),
        }
    return row


def config_dict(case: OverlapCase) -> dict[str, Any]:
    """What was measured, for the record."""
    return asdict(case) | {
        "schedule": "dualpipev",
        "hosts": 2,
        "experts": 2,
        "cores_per_host": 1,
        "communication_threads": "real-time priority",
    }
