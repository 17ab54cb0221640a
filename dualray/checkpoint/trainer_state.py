"""A trainer's state as pieces of logical tensors, and back, at any layout.

Weights and router biases are written by the first of the ranks that hold a copy; optimizer
state by the rank that owns the range. No random numbers are drawn after initialisation and
batches are a pure function of (data, seed, step), so tensors and the step are everything.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dualray.checkpoint.reader import Reader
from dualray.checkpoint.writer import Piece
from dualray.model.init import LogicalSlice, logical_tensors
from dualray.parallel.held import EMBEDDING
from dualray.parallel.reshard import assemble, cut
from dualray.parallel.trainer import Trainer

EMBEDDING_LOGICAL = f"model.{EMBEDDING}"


def weight_pieces(trainer: Trainer) -> Iterator[Piece]:
    """Weights and biases that this rank is the first to hold."""
    held, groups = trainer.held, trainer.groups
    experts = held.expert_parameters()
    slices = held.slices()
    for name, tensor in held.tensors().items():
        ranks = groups.expert_ranks if name in experts else groups.dense_ranks
        if trainer.rank != ranks[0]:
            continue
        flat = tensor.detach().view(-1)
        for part in slices[name]:
            if part.is_copy:
                continue
            values = flat[part.start : part.start + part.numel]
            yield Piece(name=part.name, shape=part.shape, start=0, tensor=values)


def pieces(trainer: Trainer) -> Iterator[Piece]:
    """What this rank writes; over the world every element of the state comes once."""
    yield from weight_pieces(trainer)
    slices = _state_slices(trainer)
    for name, kind, start, values in trainer.optimizer.state_pieces():
        for part, part_start, chunk in cut(slices[name], start, values):
            yield Piece(
                name=state_name(kind, part.name), shape=part.shape, start=part_start, tensor=chunk
            )


@torch.no_grad()
def restore_weights(trainer: Trainer, reader: Reader) -> None:
    """Read the weights and biases of this worker's stages and experts, nothing else.

    Raises CheckpointError if a tensor is missing or has another shape.
    """
    for stage in trainer.held.stages.values():
        for name, view in logical_tensors(stage).items():
            reader.expect_shape(name, tuple(view.shape))
            reader.read_into(name, view)
    copy = trainer.held.embedding_copy
    if copy is not None:
        reader.read_into(EMBEDDING_LOGICAL, copy.weight)
    trainer.weights_were_written()


def restore(trainer: Trainer, reader: Reader, *, step: int) -> None:
    """Weights and optimizer state after `step` optimizer steps."""
    restore_weights(trainer, reader)
    slices = _state_slices(trainer)

    def read(name: str, kind: str, start: int, count: int) -> Tensor:
        def fetch(part: LogicalSlice, low: int, length: int) -> Tensor:
            return reader.read(state_name(kind, part.name), low, length)

        return assemble(slices[name], start, count, fetch)

    trainer.optimizer.load_state(read, step_count=step)


def state_name(kind: str, logical: str) -> str:
    """Name in a checkpoint of one kind of optimizer state of a logical tensor."""
    return f"optimizer.{kind}/{logical}"


def _state_slices(trainer: Trainer) -> dict[str, list[LogicalSlice]]:
    """The logical tensors in each parameter that has state, the last stage's embedding included."""
    shape = (trainer.model.vocab_size, trainer.model.hidden_size)
    embedding = LogicalSlice(name=EMBEDDING_LOGICAL, shape=shape, start=0)
    return trainer.held.slices() | {EMBEDDING: [embedding]}
