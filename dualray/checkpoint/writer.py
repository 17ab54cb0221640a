"""Writing a checkpoint: every rank writes its pieces, then one process commits.

    temporary = begin(checkpoints_dir, step)                     # one process
    files = write_rank(temporary, rank, pieces)                  # every rank, same folder
    commit(temporary, step_dir(checkpoints_dir, step), [files, ...], meta)   # one process

A crash at any instant leaves either a `.tmp-step-N-...` folder, which no reader looks at, or the
whole checkpoint: the rename is the only moment at which it comes to be.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dualray.checkpoint.manifest import (
    COMMIT,
    DTYPE_NAMES,
    MANIFEST,
    FileEntry,
    Manifest,
    PieceEntry,
    TensorEntry,
    commit_text,
)
from dualray.checkpoint.shard import write_file, write_shard
from dualray.errors import CheckpointError

FILE_LIMIT_BYTES = 1 << 30
"""Upper bound of the tensor bytes in one file."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements [start, start + len(tensor)) of the flattened logical tensor `name`."""

    name: str
    """Logical name: `model.norm.weight`, `optimizer.exp_avg/model.norm.weight`, ..."""
    shape: tuple[int, ...]
    """Global shape of the logical tensor."""
    start: int
    """First element."""
    tensor: Tensor
    """1-D, any device; must not change until `write_rank` has returned."""

    def __post_init__(self) -> None:
        assert self.tensor.dim() == 1, f"{self.name}: a piece is flat, not {self.tensor.shape}"
        assert 0 <= self.start <= self.stop <= math.prod(self.shape), f"{self.name}: out of range"

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Piece:
        """The logical tensor in one piece."""
        return cls(name=name, shape=tuple(tensor.shape), start=0, tensor=tensor.reshape(-1))

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()

    @property
    def key(self) -> str:
        """Key in the file: the plain name when it is the whole tensor, so other tools find it."""
        return self.name if self.is_whole else f"{self.name}[{self.start}:{self.stop}]"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape if self.is_whole else (self.tensor.numel(),)

    @property
    def is_whole(self) -> bool:
        return self.tensor.numel() == math.prod(self.shape)

    def entry(self, file: str) -> TensorEntry:
        """The manifest's line for this piece alone, once it lies in `file`."""
        piece = PieceEntry(file=file, key=self.key, start=self.start, count=self.tensor.numel())
        return TensorEntry(shape=self.shape, dtype=DTYPE_NAMES[self.tensor.dtype], pieces=(piece,))


@dataclass(frozen=True, kw_only=True)
class RankFiles:
    """What one rank wrote; plain data (`dataclasses.asdict` of it is JSON)."""

    rank: int
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    """This rank's share of each logical tensor."""
    written_s: tuple[float, float] | None = None
    """When writing began and ended, seconds of the epoch; None where nobody looked."""


def step_dir(checkpoints_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies once committed."""
    return checkpoints_dir / f"step-{step}"


def begin(checkpoints_dir: Path, step: int) -> Path:
    """Makes the temporary folder for all ranks; refuses a step that is already there."""
    return begin_at(step_dir(checkpoints_dir, step))


def begin_at(final: Path) -> Path:
    """Makes the temporary folder of what will be `final`, beside it; refuses if that is there."""
    refuse_existing(final)
    path = final.parent / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"
    with writing(path):
        path.mkdir(parents=True)
        fsync_dir(final.parent.parent)  # the first checkpoint's folder is new itself
    return path


def write_rank(
    folder: Path, rank: int, pieces: Iterable[Piece], *, limit_bytes: int = FILE_LIMIT_BYTES
) -> RankFiles:
    """Writes one rank's pieces as safetensors files of at most `limit_bytes` of tensors each.

    `pieces` is consumed one file's worth at a time, so a generator may gather them lazily.
    Raises CheckpointError when the disk refuses.
    """
    started_s = time.time()
    files: dict[str, FileEntry] = {}
    shares: dict[str, TensorEntry] = {}
    for index, batch in enumerate(_file_batches(pieces, limit_bytes)):
        file = f"rank-{rank:05d}-{index:05d}.safetensors"
        with writing(folder / file):
            files[file] = write_shard(
                folder / file, [(piece.key, piece.stored_shape, piece.tensor) for piece in batch]
            )
        for piece in batch:
            _add_share(shares, piece.name, piece.entry(file))
    with writing(folder):
        fsync_dir(folder)
    return RankFiles(rank=rank, files=files, tensors=shares, written_s=(started_s, time.time()))


def commit(
    temporary: Path, final: Path, rank_files: Sequence[RankFiles], meta: dict[str, Any]
) -> None:
    """Turns the ranks' files into a checkpoint, atomically. `meta` is JSON and has `step`.

    Raises CheckpointError, with the temporary folder left as it was, when the pieces do not cover
    every logical tensor exactly once, a rank's file is not here, or `final` exists.
    """
    assert isinstance(meta["step"], int), "meta.step is the number of finished optimizer steps"
    refuse_existing(final)
    files = {name: entry for rank in rank_files for name, entry in rank.files.items()}
    for name, entry in files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != entry.size_bytes:
            raise CheckpointError(
                f"{path} was written by a worker but is not complete where it is committed",
                hint="put the run's folder on storage that every node shares",
            )
    manifest = Manifest(meta=meta, files=files, tensors=_assemble(rank_files)).to_json()
    with writing(final):
        write_file(temporary / MANIFEST, [manifest])
        fsync_dir(temporary)
        write_file(temporary / COMMIT, [commit_text(manifest)])
        fsync_dir(temporary)
        # rename(2) replaces no folder that has files in it, so a race cannot overwrite either.
        os.rename(temporary, final)
        fsync_dir(final.parent)


def _assemble(rank_files: Sequence[RankFiles]) -> dict[str, TensorEntry]:
    """Joins the ranks' shares of each logical tensor and checks that it is covered once."""
    tensors: dict[str, TensorEntry] = {}
    for rank in rank_files:
        for name, share in rank.tensors.items():
            _add_share(tensors, name, share)
    for name, tensor in tensors.items():
        ordered = sorted(tensor.pieces, key=lambda piece: (piece.start, piece.count))
        tensors[name] = replace(tensor, pieces=tuple(ordered))
        _check_cover(name, tensors[name])
    return tensors


def _add_share(tensors: dict[str, TensorEntry], name: str, share: TensorEntry) -> None:
    known = tensors.setdefault(name, replace(share, pieces=()))
    if (known.shape, known.dtype) != (share.shape, share.dtype):
        raise CheckpointError(
            f"tensor {name} is {share.dtype} {list(share.shape)} in {share.pieces[0].file} but "
            f"{known.dtype} {list(known.shape)} in {known.pieces[0].file}",
            hint="every rank must hold the same model",
        )
    tensors[name] = replace(known, pieces=known.pieces + share.pieces)


def _check_cover(name: str, tensor: TensorEntry) -> None:
    covered = 0
    for piece in tensor.pieces:
        if piece.start < covered:
            raise CheckpointError(
                f"tensor {name} has elements [{piece.start}:{covered}] in two pieces, "
                f"the second in {piece.file}",
                hint="exactly one rank may write each element",
            )
        if piece.start > covered:
            raise _gap(name, covered, piece.start)
        covered += piece.count
    if covered < tensor.numel:
        raise _gap(name, covered, tensor.numel)


def _gap(name: str, start: int, stop: int) -> CheckpointError:
    return CheckpointError(
        f"tensor {name} has elements [{start}:{stop}] in no piece",
        hint="the files of every rank must be committed together",
    )


def _file_batches(pieces: Iterable[Piece], limit_bytes: int) -> Iterator[list[Piece]]:
    """Groups pieces into files; only a piece that no file could hold is cut."""
    batch: list[Piece] = []
    room = limit_bytes
    for piece in pieces:
        # An empty share of a tensor says nothing; a tensor without elements is still a tensor.
        if piece.tensor.numel() == 0 and not piece.is_whole:
            continue
        for part in _cut(piece, limit_bytes):
            if batch and part.tensor.nbytes > room:
                yield batch
                batch, room = [], limit_bytes
            batch.append(part)
            room -= part.tensor.nbytes
    if batch:
        yield batch


def _cut(piece: Piece, limit_bytes: int) -> Iterator[Piece]:
    longest = max(limit_bytes // piece.tensor.element_size(), 1)
    for offset in range(0, max(piece.tensor.numel(), 1), longest):
        yield Piece(
            name=piece.name,
            shape=piece.shape,
            start=piece.start + offset,
            tensor=piece.tensor[offset : offset + longest],
        )


def fsync_dir(path: Path) -> None:
    """Makes the names in a folder durable; a file's fsync does not do that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_existing(final: Path) -> None:
    if final.exists():
        raise CheckpointError(
            f"{final} exists and a checkpoint is never overwritten",
            hint="resume from it, or move it away",
        )


@contextmanager
def writing(path: Path) -> Generator[None, None, None]:
    """Says in one sentence what the operating system refused."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path} ({error.strerror})",
            hint="check the free space and the permissions there",
        ) from error
