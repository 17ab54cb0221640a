"""Optimizer state that is kept, parked or dropped while its workers do something else."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.models import tiny_config
from support.processes import free_port, run_ranks
from support.training import make_trainer, tokens_for

from dualray.checkpoint import trainer_state
from dualray.checkpoint.reader import Reader
from dualray.checkpoint.writer import begin, commit, step_dir, write_rank
from dualray.parallel.layout import Layout
from dualray.parallel.slots import ExpertPlacement
from dualray.parallel.state_place import Shelf, StateBytes, StatePlace
from dualray.parallel.train_config import TrainConfig
from dualray.parallel.trainer import Trainer

MODEL = tiny_config(n_routed_experts=8)
LAYOUT = Layout(pipeline=2, experts=2, schedule="dualpipe")
FLOAT32 = TrainConfig(
    steps=8, seq_len=12, micro_batches=4, lr=3e-3, warmup_steps=0, clip_norm=0.5, gamma=0.01,
)  # fmt: skip
BFLOAT16 = replace(FLOAT32, dtype="bfloat16")
TRAINS = [FLOAT32, BFLOAT16, replace(BFLOAT16, optimizer="adamw")]
MOVED = ExpertPlacement(
    held=dict.fromkeys(MODEL.moe_layers, ((6, 1, 2, 0, 5), (7, 4, 5, 3, 2, 6))),
    num_homes=dict.fromkeys(MODEL.moe_layers, (4, 4)),
)
AWAY, STEPS = 2, 4
PARK = StatePlace.PARK


def test_memory_comes_back_with_what_was_parked() -> None:
    moments, zeros = torch.arange(10.0), torch.zeros(6)
    moments.numpy()  # as a checkpoint does; the memory cannot be resized any more
    part = zeros[1:]
    shelf = Shelf(PARK, [moments], [zeros, part], leave_host=False)
    # Two views of one memory are one thing to put away.
    assert shelf.size == StateBytes(parked=40, gradients_freed=24)
    assert moments.untyped_storage().nbytes() == zeros.untyped_storage().nbytes() == 0
    shelf.bring_back()
    assert torch.equal(moments, torch.arange(10.0))
    part += 1
    assert torch.equal(zeros, torch.tensor([0.0, 1, 1, 1, 1, 1]))


def test_what_is_dropped_comes_back_as_zeros() -> None:
    moments = torch.arange(10.0)
    shelf = Shelf(StatePlace.DROP, [moments], [])
    assert shelf.size == StateBytes(dropped=40)
    assert moments.untyped_storage().nbytes() == 0
    shelf.bring_back()
    assert torch.equal(moments, torch.zeros(10))


@pytest.mark.parametrize("place", [StatePlace.KEEP, PARK])
def test_state_in_host_memory_stays_where_it_is(place: StatePlace) -> None:
    moments, zeros = torch.arange(10.0), torch.zeros(6)
    before = moments.data_ptr()
    shelf = Shelf(place, [moments], [zeros])
    kept = place is StatePlace.KEEP
    assert shelf.size == (
        StateBytes(kept=40) if kept else StateBytes(parked=40, gradients_freed=24)
    )
    assert zeros.untyped_storage().nbytes() == (24 if kept else 0)
    shelf.bring_back()
    assert moments.data_ptr() == before
    assert torch.equal(moments, torch.arange(10.0))
    assert zeros.untyped_storage().nbytes() == 24


def _hashes(trainer: Trainer) -> dict[str, str]:
    tensors = dict(trainer.held.tensors())
    for name, kind, start, values in trainer.optimizer.state_pieces():
        tensors[f"{kind} {name} {start}"] = values
    return {
        name: hashlib.sha256(
            tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors.items()
    }


def _save(trainer: Trainer, temporary: Path, final: Path) -> None:
    files = [None] * LAYOUT.world_size
    own = write_rank(temporary, trainer.rank, trainer_state.pieces(trainer))
    dist.all_gather_object(files, own, group=trainer.groups.world)
    if trainer.rank == 0:
        commit(temporary, final, files, {"step": AWAY})
    dist.barrier(group=trainer.groups.world)


def run_one(
    rank: int,
    train: TrainConfig,
    place: StatePlace | None,
    temporary: Path | None,
    final: Path,
    port: int,
) -> tuple:
    """Losses, hashes of all state at the end, and what was put away in the middle."""
    trainer = make_trainer(rank, MODEL, LAYOUT, train, port)
    source = tokens_for(MODEL, train)
    losses, size, in_memory = [], StateBytes(), 0
    for step in range(STEPS):
        if step == AWAY:
            if temporary is not None:
                _save(trainer, temporary, final)
            if place is not None:
                size = trainer.put_state_away(place, leave_host=False)
            trainer.move_experts(MOVED)
            in_memory = sum(t.untyped_storage().nbytes() for t in trainer.optimizer.state_tensors())
            trainer.bring_state_back()
            if temporary is not None:
                trainer_state.restore(trainer, Reader(final), step=AWAY)
        result = trainer.step(step, source)
        losses.append((result.loss, *result.mtp_loss, result.grad_norm))
    hashes = _hashes(trainer)
    trainer.close()
    return losses, hashes, size, in_memory


def run(rank: int, cases: list[tuple]) -> list[tuple]:
    return [run_one(rank, *case) for case in cases]


@pytest.mark.multiproc
def test_training_goes_on_bit_exactly_wherever_state_was(tmp_path: Path) -> None:
    """Experts move meanwhile, as they do while a run serves."""
    cases = []
    for number, train in enumerate(TRAINS):
        for place in (None, *StatePlace):
            folder = tmp_path / f"{number}-{place}"
            folder.mkdir()
            temporary = begin(folder, AWAY) if place is StatePlace.DROP else None
            cases.append((train, place, temporary, step_dir(folder, AWAY), free_port()))
    for found in run_ranks(run, LAYOUT.world_size, cases):
        for number in range(len(TRAINS)):
            plain, kept, parked, dropped = found[4 * number : 4 * number + 4]
            for case in (kept, parked, dropped):
                assert case[0] == plain[0]
                assert case[1] == plain[1]
            assert kept[2].kept == parked[2].parked == dropped[2].dropped > 0
            assert kept[2] == StateBytes(kept=kept[2].kept)
            assert parked[2].gradients_freed == dropped[2].gradients_freed > 0
            # Where experts have moved to their state is away, too.
            assert (parked[3], dropped[3]) == (0, 0)
            assert kept[3] > 0
