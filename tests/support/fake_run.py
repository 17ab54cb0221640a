"""A run without Ray: a controller whose workers and engine are fakes in its own process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.runs import write_run_file

from dualray.actors.cluster import Connection
from dualray.actors.grpc_security import OwnAccess
from dualray.actors.stage_worker import WorkerInfo
from dualray.checkpoint.writer import Piece, write_rank
from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.nodes import NodeMap
from dualray.parallel.slots import ExpertPlacement
from dualray.parallel.state_place import StateBytes
from dualray.parallel.step_result import HeldOut, StepResult
from dualray.platform import controller as module
from dualray.platform import life, serving
from dualray.platform.assignment import Assignment
from dualray.platform.controller import Controller
from dualray.platform.events import Event, StateChange
from dualray.platform.folder import RunFolder
from dualray.platform.run_file import load_run_file
from dualray.platform.states import RunState

CONNECTION = Connection(address="127.0.0.1:1", embedded=False, auth_token="secret")


FIELDS = {"keep": "kept", "park": "parked", "drop": "dropped"}


class FakeGang:
    """Two workers whose losses are the step's number. `before[method](*args)` runs first."""

    def __init__(self) -> None:
        self.infos = [
            WorkerInfo(rank=rank, pid=6 + rank, node="node", memory_bytes=1e9, has_device=False)
            for rank in range(2)
        ]
        self.workers = [None, None]
        self.before: dict[str, Callable[..., None]] = {}
        self.calls: list[str] = []

    def create(self, *args: Any) -> FakeGang:
        return self

    def start(self, nodes: NodeMap | None) -> None:
        assert nodes is None

    def dead_ranks(self) -> list[int]:
        self.call("info")
        return []

    def without(self, ranks: Any) -> FakeGang:
        assert not ranks
        return self

    def call(self, method: str, *args: Any) -> list[Any]:
        self.calls.append(method)
        self.before.get(method, lambda *_: None)(*args)
        answers: dict[str, Callable[[], list[Any]]] = {
            "step": lambda: [result(args[0] + 1)] * 2,
            "evaluate": lambda: [HeldOut(loss_sum=10.0, targets=5)] * 2,
            "write_checkpoint": lambda: [
                write_rank(Path(args[0]), 0, [Piece.whole("model.norm.weight", torch.ones(3))])
            ],
            "digest": lambda: [10, 2**128 + 6],
            "put_state_away": lambda: [
                StateBytes(**{FIELDS[args[0]]: size}) for size in (9_000, 8_000)
            ],
            "cache_bytes": lambda: [5_000, 4_000],
        }
        return answers.get(method, lambda: [None, None])()

    def pids(self) -> list[int]:
        return [info.pid for info in self.infos]

    def stop(self) -> None:
        self.calls.append("stop")


def result(step: int) -> StepResult:
    return StepResult(
        loss=float(step), mtp_loss=[], balance_loss=0.0, grad_norm=1.0, lr=0.1, bubble=0.0,
        exposed_communication=0.0, step_time_s=0.1, loads={}, max_vio={},
        work=ExpertWork(slot_rows={}, seconds={}), cross_node_bytes=0, spans=[],
    )  # fmt: skip


class FakeRay:
    """`ray.get` of what an actor's method returned."""

    def __init__(self) -> None:
        self.refused: Exception | None = None
        self.util = SimpleNamespace(remove_placement_group=lambda group: self.removed.append(group))
        self.removed: list[Any] = []
        self.killed = 0
        self.drained: list[str] = []
        """What the engine did after each drain."""
        self.num_cut = 0
        self.is_held = False
        """Whether the engine's generation is paused."""
        self.placement: ExpertPlacement | None = None
        """Where the engine says that experts are."""

    def drain(self, then: str, within_s: float) -> int:
        assert within_s == 30.0
        self.drained.append(then)
        return self.num_cut

    def end_pause(self) -> bool:
        was, self.is_held = self.is_held, False
        return was

    def remote(self, actor: type) -> Any:
        def start() -> str:
            if self.refused is not None:
                raise self.refused
            return "127.0.0.1:5"

        methods = {"start": start, "serve": lambda *_: None, "stop": lambda: None}
        methods |= {"migrations": lambda: [], "placement": lambda: self.placement}
        methods |= {"drain": self.drain, "admin_target": lambda: None}
        methods |= {"end_pause": self.end_pause}
        methods |= {"own_access": lambda: OwnAccess(target="127.0.0.1:5", token=None)}
        handle = SimpleNamespace(
            **{name: SimpleNamespace(remote=method) for name, method in methods.items()}
        )
        return SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda **_: handle),
        )

    def get(self, value: Any, timeout: float | None = None) -> Any:
        return value

    def kill(self, actor: Any) -> None:
        self.killed += 1


def install(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeGang, FakeRay]:
    """Let every controller have these workers and this Ray."""
    gang, ray = FakeGang(), FakeRay()
    monkeypatch.setattr(module, "Gang", gang)
    monkeypatch.setattr(module, "ray", ray)
    monkeypatch.setattr(serving, "ray", ray)
    monkeypatch.setattr(serving, "first_token_at", lambda target, run_name, token: 1e12)
    monkeypatch.setattr(life, "LOOK_AFTER_WORKERS_S", 0.0)
    return gang, ray


def controller_of(
    corpus: Path, train: dict[str, Any], serve: dict[str, Any], **assignment: Any
) -> Controller:
    """One of runs/tiny in the working directory."""
    path = write_run_file(Path("tiny.yaml"), corpus, serve=serve, train=train)
    values = {"run": load_run_file(path), "folder": RunFolder.named("tiny"), "trains": True}
    return Controller(Assignment(**(values | assignment)), "group", CONNECTION)


def states_of(events: list[Event]) -> list[RunState]:
    return [event.state for event in events if isinstance(event, StateChange)]
