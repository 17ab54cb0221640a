"""A trainer's state through a checkpoint: resumed bit for bit, at any other layout nearly so.

Two worlds of four new processes each: the first trains every case to its end and writes a
checkpoint half-way, the second starts from those checkpoints.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import tiny_config
from support.processes import free_port, run_ranks
from support.training import make_trainer, tokens_for

from dualray.checkpoint import trainer_state
from dualray.checkpoint.reader import Reader
from dualray.checkpoint.writer import begin, commit, step_dir, write_rank
from dualray.parallel.layout import Layout
from dualray.parallel.train_config import TrainConfig
from dualray.parallel.trainer import Trainer

HALF, STEPS = 2, 4
MODEL = tiny_config()
TIED = tiny_config(tie_word_embeddings=True)
TRAIN = TrainConfig(
    steps=STEPS, seq_len=10, micro_batch_size=1, micro_batches=4, lr=3e-3, warmup_steps=2,
    gamma=0.01, alpha=1e-3,
)  # fmt: skip
BF16 = replace(TRAIN, dtype="bfloat16")
EIGHT = replace(TRAIN, micro_batches=8)
FOUR_RANKS = Layout(pipeline=2, experts=2, schedule="dualpipe")

WRITTEN = {
    "zero1": (MODEL, FOUR_RANKS, TRAIN),
    "bf16": (MODEL, FOUR_RANKS, BF16),
    "1f1b, copied embedding": (MODEL, Layout(pipeline=2, experts=2, schedule="1f1b"), BF16),
    "1f1b, tied": (TIED, Layout(pipeline=2, replicas=2, schedule="1f1b"), TRAIN),
    "adamw": (MODEL, Layout(pipeline=2, schedule="dualpipe"), replace(BF16, optimizer="adamw")),
    "4x1": (MODEL, Layout(pipeline=4, schedule="dualpipe"), EIGHT),
}
# name of what wrote it, model, layout, train: the same eight sequences in every step
ELSEWHERE = [
    ("4x1", MODEL, FOUR_RANKS, TRAIN),
    ("4x1", MODEL, Layout(pipeline=2, experts=2, schedule="1f1b"), TRAIN),
    ("4x1", MODEL, Layout(schedule="1f1b"), replace(EIGHT, optimizer="adamw")),
    ("1f1b, tied", TIED, Layout(schedule="1f1b"), EIGHT),
]


def state_of(trainer: Trainer) -> dict[str, str]:
    """Hashes of every tensor that this rank holds, copies included, and of its optimizer state."""
    tensors = dict(trainer.held.tensors())
    if trainer.held.embedding_copy is not None:
        tensors["embedding copy"] = trainer.held.embedding_copy.weight
    for name, kind, start, values in trainer.optimizer.state_pieces():
        tensors[f"{kind} {name} {start}"] = values
    return {
        name: hashlib.sha256(
            tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors.items()
    }


def steps_of(trainer: Trainer, model, train, first: int) -> list[tuple]:
    source = tokens_for(model, train)
    results = [trainer.step(step, source) for step in range(first, STEPS)]
    return [(r.loss, *r.mtp_loss, r.balance_loss, r.grad_norm) for r in results]


def train_and_save(rank: int, folders: dict[str, Path], ports: dict[str, int]) -> dict:
    results = {}
    for name, (model, layout, train) in WRITTEN.items():
        if rank >= layout.world_size:
            continue
        trainer = make_trainer(rank, model, layout, train, ports[name])
        source = tokens_for(model, train)
        for step in range(HALF):
            trainer.step(step, source)
        files = write_rank(folders[name], rank, trainer_state.pieces(trainer))
        results[name] = files, steps_of(trainer, model, train, HALF), state_of(trainer)
        trainer.close()
    return results


def restore_and_train(rank: int, checkpoints: dict[str, Path], ports: list[int]) -> tuple:
    same, elsewhere = {}, []
    for (name, (model, layout, train)), port in zip(WRITTEN.items(), ports):
        if rank < layout.world_size:
            trainer = make_trainer(rank, model, layout, train, port)
            trainer_state.restore(trainer, Reader(checkpoints[name]), step=HALF)
            same[name] = steps_of(trainer, model, train, HALF), state_of(trainer)
            trainer.close()
    for (name, model, layout, train), port in zip(ELSEWHERE, ports[len(WRITTEN) :]):
        losses = None
        if rank < layout.world_size:
            trainer = make_trainer(rank, model, layout, train, port)
            trainer_state.restore(trainer, Reader(checkpoints[name]), step=HALF)
            losses = steps_of(trainer, model, train, HALF)
            trainer.close()
        elsewhere.append(losses)
    return same, elsewhere, warm_start(rank, checkpoints["bf16"], ports[-1])


def warm_start(rank: int, checkpoint: Path, port: int) -> list[str]:
    """`train.init_from` takes the weights only; says what is wrong."""
    layout = Layout(pipeline=2, experts=2, schedule="1f1b")
    trainer = make_trainer(rank, MODEL, layout, BF16, port)
    reader = Reader(checkpoint)
    trainer_state.restore_weights(trainer, reader)
    wrong = [] if trainer.optimizer.step_count == 0 else ["step count"]
    for piece in trainer_state.pieces(trainer):
        if "/" not in piece.name:
            expected = reader.read(piece.name)
        elif piece.name.startswith("optimizer.master/"):
            logical = piece.name.removeprefix("optimizer.master/")
            expected = reader.read(logical, piece.start, piece.tensor.numel()).float()
        else:
            expected = torch.zeros_like(piece.tensor)
        if not torch.equal(piece.tensor, expected):
            wrong.append(piece.name)
    copy = trainer.held.embedding_copy
    if copy is not None and not torch.equal(
        copy.weight.flatten(), reader.read(trainer_state.EMBEDDING_LOGICAL)
    ):
        wrong.append("embedding copy")
    trainer.step(0, tokens_for(MODEL, BF16))
    trainer.close()
    return wrong


@pytest.mark.multiproc
@pytest.mark.timeout(600)
def test_resumed_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    folders = {
        name: begin(tmp_path / str(n) / "checkpoints", HALF) for n, name in enumerate(WRITTEN)
    }
    ports = {name: free_port() for name in WRITTEN}
    written = run_ranks(train_and_save, 4, folders, ports, timeout_s=500)
    checkpoints = {}
    for name, folder in folders.items():
        files = [results[name][0] for results in written if name in results]
        checkpoints[name] = step_dir(folder.parent, HALF)
        commit(folder, checkpoints[name], files, {"step": HALF})

    more = [free_port() for _ in range(len(WRITTEN) + len(ELSEWHERE) + 1)]
    restored = run_ranks(restore_and_train, 4, checkpoints, more, timeout_s=500)

    for rank, (same, _, wrong) in enumerate(restored):
        assert same.keys() == written[rank].keys()
        for name, (steps, state) in same.items():
            _, expected_steps, expected_state = written[rank][name]
            assert steps == expected_steps, (rank, name)
            assert state == expected_state, (rank, name)
        assert wrong == [], rank

    for index, (name, _, layout, _) in enumerate(ELSEWHERE):
        expected = written[0][name][1]
        for rank in range(layout.world_size):
            losses = restored[rank][1][index]
            for found, wanted in zip(losses, expected):
                assert found[0] == pytest.approx(wanted[0], rel=1e-6), (name, layout)
                assert found[1:-1] == pytest.approx(wanted[1:-1], rel=1e-5), (name, layout)
