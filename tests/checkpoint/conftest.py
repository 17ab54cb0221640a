"""Small checkpoints to read, damage and prune."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dualray.checkpoint.writer import Piece, begin, commit, step_dir, write_rank

torch.set_num_threads(1)

Save = Callable[..., Path]


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "model.norm.weight": torch.randn(5, generator=generator),
        "model.layers.0.mlp.experts.1.gate_proj.weight": torch.randn(
            7, 3, generator=generator
        ).bfloat16(),
        "optimizer.exp_avg/model.norm.weight": torch.randn(5, generator=generator).double(),
    }


@pytest.fixture
def save(tensors: dict[str, Tensor]) -> Save:
    """save(checkpoints_dir, step) -> committed folder, written by one rank in two files."""

    def write(checkpoints: Path, step: int, values: dict[str, Tensor] = tensors) -> Path:
        temporary = begin(checkpoints, step)
        pieces: Sequence[Piece] = [Piece.whole(name, value) for name, value in values.items()]
        files = write_rank(temporary, 0, pieces, limit_bytes=64)
        commit(temporary, step_dir(checkpoints, step), [files], {"step": step, "model": {}})
        return step_dir(checkpoints, step)

    return write
