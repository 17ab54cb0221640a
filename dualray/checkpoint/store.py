"""A run's checkpoints folder: which are there, which is newest and sound, which may go."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from dualray.checkpoint.manifest import (
    COMMIT,
    MANIFEST,
    DamagedError,
    Manifest,
    check_size,
    hash_file,
    load_manifest,
)
from dualray.errors import CheckpointError

QUARANTINE = "quarantine"


class Latest(NamedTuple):
    """What `latest` found, and one sentence for each damaged checkpoint it set aside."""

    path: Path | None
    messages: tuple[str, ...]


def verify(folder: Path, *, hashes: bool = True) -> Manifest:
    """Reads every file of a checkpoint and compares it with what was written.

    `hashes=False` compares sizes only, which reads nothing but the manifest. Raises
    DamagedError that names the first bad file.
    """
    try:
        manifest = load_manifest(folder)
        for name, entry in manifest.files.items():
            check_size(folder / name, entry.size_bytes)
            if hashes and hash_file(folder / name) != entry.xxh3:
                raise DamagedError(
                    f"{folder / name} does not match its hash, so its bytes have changed"
                )
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read ({error.strerror})") from error
    return manifest


def steps(checkpoints_dir: Path) -> list[tuple[int, Path]]:
    """The `step-N` folders, sound or not, newest first."""
    return _numbered(checkpoints_dir, re.compile(r"step-(\d+)"))


def latest(checkpoints_dir: Path) -> Latest:
    """The newest checkpoint that verifies; damaged ones go to `quarantine/` and are told of.

    Raises CheckpointError when a newer dualray wrote one: it is sound, only not for us.
    """
    messages: list[str] = []
    for _, path in steps(checkpoints_dir):
        try:
            verify(path)
            return Latest(path, tuple(messages))
        except DamagedError as error:
            if path.exists():  # else its run has pruned it while we looked
                messages.append(_quarantine(path, error))
    return Latest(None, tuple(messages))


def find(path: Path) -> Latest:
    """The checkpoint that a person means by a `step-N` folder, a run's folder or its checkpoints.

    It has been verified. Raises CheckpointError when there is none.
    """
    if re.fullmatch(r"step-\d+", path.name) or _looks_like_checkpoint(path):
        verify(path)
        return Latest(path, ())
    found = latest(checkpoints_of(path))
    if found.path is None:
        raise CheckpointError(
            ". ".join([*found.messages, f"There is no checkpoint in {path}"])
            if found.messages
            else f"there is no checkpoint in {path}",
            hint="train without --resume first, or name a folder that has step-N folders",
        )
    return found


def checkpoints_of(path: Path) -> Path:
    """`path` itself, or its `checkpoints` folder when it is a run's."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def prune(checkpoints_dir: Path, *, keep: int) -> list[Path]:
    """Deletes all but the newest `keep` committed checkpoints, and what crashes left behind.

    A checkpoint whose manifest or file sizes are wrong counts as none and is not touched.
    A temporary folder is stale once its step, or a later one, is committed: with one writing
    run at a time nobody can still be filling it. Returns the checkpoints deleted.
    """
    assert keep >= 1, "the last checkpoint is never deleted"
    committed = [(step, path) for step, path in steps(checkpoints_dir) if _is_whole(path)]
    newest = committed[0][0] if committed else -1
    for step, path in _numbered(checkpoints_dir, re.compile(r"\.tmp-step-(\d+)-.*")):
        if step <= newest:
            shutil.rmtree(path)
    deleted = [path for _, path in committed[keep:]]
    for path in deleted:
        # Renamed first: a crash in the middle must not leave half a checkpoint under its name.
        doomed = checkpoints_dir / f".tmp-{path.name}-deleted"
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    return deleted


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _looks_like_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).is_file() or (path / COMMIT).is_file()


def _is_whole(path: Path) -> bool:
    try:
        verify(path, hashes=False)
    except CheckpointError:
        return False
    return True


def _quarantine(path: Path, error: DamagedError) -> str:
    """Moves a damaged checkpoint out of the way, for its step will be written again."""
    folder = path.parent / QUARANTINE
    target = folder / path.name
    copies = 1
    while target.exists():
        copies += 1
        target = folder / f"{path.name}-{copies}"
    try:
        folder.mkdir(exist_ok=True)
        os.rename(path, target)
    except OSError as refused:
        return f"{error.sentence}; skipped, and left in place ({refused.strerror})"
    return f"{error.sentence}; skipped, and moved to {target}"
