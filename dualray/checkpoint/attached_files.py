"""Small files that travel inside a checkpoint, hashed like its tensors (the tokenizer)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dualray.checkpoint.reader import Reader
from dualray.checkpoint.writer import Piece
from dualray.errors import CheckpointError


def file_pieces(folder: Path, prefix: str) -> Iterator[Piece]:
    """Every file directly in `folder` as a uint8 tensor named `PREFIX/FILE`."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield file_piece(path, prefix)


def file_piece(path: Path, prefix: str) -> Piece:
    """One file as a uint8 tensor named `PREFIX/FILE`."""
    content = bytearray(path.read_bytes())
    # torch refuses an empty buffer.
    values = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0)
    return Piece.whole(f"{prefix}/{path.name}", values.to(torch.uint8))


def restore_files(reader: Reader, prefix: str, folder: Path) -> None:
    """Write the files back. Raises CheckpointError if the checkpoint has none under `prefix`."""
    names = [name for name in reader.names() if name.startswith(f"{prefix}/")]
    if not names:
        raise CheckpointError(
            f"the checkpoint holds no {prefix} files", hint="use one that `dualray train` wrote"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        file = name.removeprefix(f"{prefix}/")
        # A checkpoint may come from anyone; its files go into this folder and nowhere else.
        if file in ("", ".", "..") or Path(file).name != file:
            raise CheckpointError(
                f"checkpoint {reader.folder} holds a file named {file!r}, which is no plain name",
                hint="do not use this checkpoint",
            )
        (folder / file).write_bytes(reader.read(name).numpy().tobytes())
