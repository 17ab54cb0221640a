"""The files that sources name: local paths or URIs, folders expanded, kinds told by suffix.

Nothing that a source names is left out silently: an unknown suffix is an error. In folders two
things are skipped, as in Spark and pyarrow: hidden files, and files of an unknown suffix whose path
has a part that begins with an underscore (`_SUCCESS`, `_metadata`, `__pycache__`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs

from dualray.errors import DataError

_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_READABLE = (
    "it reads .txt, .text, .md, .rst, .py and .jsonl (each also .gz or .zst), "
    ".parquet, .arrow, .feather and .ipc"
)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file to read; `name` is what errors and manifests call it."""

    name: str
    path: str
    kind: str
    compression: str | None
    filesystem: pyarrow.fs.FileSystem


def list_files(sources: Iterable[str]) -> list[SourceFile]:
    """Expands folders (recursive, sorted by path); sources keep the order they were given in.

    A source is a path or a URI that `pyarrow.fs` knows (`s3://`, `gs://`, `hdfs://`, `file://`).
    Raises DataError for a missing source, a folder without files, an unknown suffix.
    """
    files: list[SourceFile] = []
    for source in sources:
        files.extend(_expand(source))
    if not files:
        raise DataError("no source was given", hint="name at least one file or folder")
    seen: set[str] = set()
    for file in files:
        # Read twice, held-out text would also be training text.
        if file.path in seen:
            raise DataError(f"{file.name} is named twice by the sources", hint="name it once")
        seen.add(file.path)
    return files


def _expand(source: str) -> list[SourceFile]:
    try:
        if "://" in source:
            filesystem, root = pyarrow.fs.FileSystem.from_uri(source)
        else:
            filesystem, root = pyarrow.fs.LocalFileSystem(), os.path.abspath(source)
        info = filesystem.get_file_info(root)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"source {source} cannot be reached: {reason(error)}", hint="check the address"
        ) from error
    if info.type == pyarrow.fs.FileType.NotFound:
        raise DataError(f"source {source} does not exist", hint="check the path")
    if info.type == pyarrow.fs.FileType.File:
        return [_classify(filesystem, root, source)]
    selector = pyarrow.fs.FileSelector(root, recursive=True)
    inside = sorted(
        entry.path[len(root) :].lstrip("/")
        for entry in filesystem.get_file_info(selector)
        if entry.type == pyarrow.fs.FileType.File
    )
    folder, base = source.rstrip("/"), root.rstrip("/")
    files = [
        _classify(filesystem, f"{base}/{path}", f"{folder}/{path}")
        for path in inside
        if not _skipped(path)
    ]
    if not files:
        raise DataError(
            f"source {source} is a folder without files", hint="name a folder that holds text"
        )
    return files


def _skipped(path: str) -> bool:
    """Hidden files, and markers such as `_SUCCESS`, of a folder."""
    parts = path.split("/")
    if any(part.startswith(".") for part in parts):
        return True
    return any(part.startswith("_") for part in parts) and _kind(path)[0] is None


def _kind(path: str) -> tuple[str | None, str | None]:
    """Kind and compression by suffix; no kind where data build does not know it."""
    name = path.rsplit("/", 1)[-1].lower()
    compression = None
    for suffix, codec in _COMPRESSIONS.items():
        if name.endswith(suffix):
            compression, name = codec, name.removesuffix(suffix)
            break
    kind = _KINDS.get(f".{name.rsplit('.', 1)[1]}" if "." in name else "")
    if compression and kind not in ("text", "jsonl"):
        kind = None
    return kind, compression


def _classify(filesystem: pyarrow.fs.FileSystem, path: str, name: str) -> SourceFile:
    kind, compression = _kind(path)
    if kind is None:
        raise DataError(
            f"{name} has a suffix that data build does not know",
            hint=f"{_READABLE}; rename the file or keep it out of the folder",
        )
    return SourceFile(
        name=name, path=path, kind=kind, compression=compression, filesystem=filesystem
    )


def reason(error: Exception) -> str:
    """The last and most specific clause of what pyarrow or the system says."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(".").rsplit(": ", 1)[-1]
