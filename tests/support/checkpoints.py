"""A checkpoint of a model that nothing trained."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path

from dualray.checkpoint.attached_files import file_pieces
from dualray.checkpoint.writer import Piece, begin, commit, step_dir, write_rank
from dualray.model.init import logical_tensors
from dualray.model.stage import Stage


def save_stage(
    stage: Stage, checkpoints: Path, *, step: int = 1, tokenizer: Path | None = None, **meta: str
) -> Path:
    """The committed folder; `tokenizer` is a folder whose files travel along."""
    temporary = begin(checkpoints, step)
    pieces = (Piece.whole(name, value) for name, value in logical_tensors(stage).items())
    if tokenizer is not None:
        pieces = itertools.chain(pieces, file_pieces(tokenizer, "tokenizer"))
    files = write_rank(temporary, 0, pieces)
    commit(
        temporary,
        step_dir(checkpoints, step),
        [files],
        {"step": step, "model": asdict(stage.config)} | meta,
    )
    return step_dir(checkpoints, step)
