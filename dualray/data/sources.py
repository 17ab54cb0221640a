"""Documents out of files: text, jsonl, parquet and Arrow, plain or compressed, local or by URI.

Everything is streamed. A document arrives as one or more `Piece`s of valid UTF-8, so that a text
file of any size passes through a buffer of about a mebibyte. Reading changes nothing: line ends
and spaces stay as they are; only a byte order mark at the start of a text file is dropped.
Whatever cannot be read is refused with the file and the byte, line or row; nothing is skipped,
except empty documents and, in folders, hidden files and those of an unknown suffix whose path has
a part that begins with an underscore (`_SUCCESS`, `_metadata`, `__pycache__`).
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs

from dualray.errors import DataError

BLOCK_BYTES = 1 << 20
TEXT_COLUMN = "text"

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
class Piece:
    """A part of a document: UTF-8 bytes, never cut inside a character."""

    data: bytes
    ends_document: bool


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
        files.extend(_expand(str(source)))
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
            f"source {source} cannot be reached: {_first_line(error)}", hint="check the address"
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


def read_pieces(file: SourceFile) -> Iterator[Piece]:
    """The documents of one file, in order. Raises DataError where the file cannot be used."""
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_table}
    empty = True
    try:
        for piece in readers.get(file.kind, _read_arrow)(file):
            empty = False
            yield piece
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.name} cannot be read as {file.kind}: {_first_line(error)}",
            hint="the file is damaged or not what its suffix says",
        ) from error
    if empty:
        raise DataError(
            f"{file.name} is empty: it holds no document", hint="remove it from the sources"
        )


def _blocks(file: SourceFile) -> Iterator[bytes]:
    with file.filesystem.open_input_stream(file.path, compression=file.compression) as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


def _read_text(file: SourceFile) -> Iterator[Piece]:
    """One document per file."""
    offset = 0
    held = b""  # the piece before the last, kept back so that the last can be marked
    carry = b""
    for block in _blocks(file):
        data = carry + block
        _refuse_nul(file, data, offset)
        valid = _valid_utf8(file, data, offset, more=True)
        text, carry = data[:valid], data[valid:]
        if offset == 0:
            text = text.removeprefix(codecs.BOM_UTF8)
        offset += valid
        if held and text:
            yield Piece(data=held, ends_document=False)
        held = text or held
    _valid_utf8(file, carry, offset, more=False)
    if held:
        yield Piece(data=held, ends_document=True)


def _refuse_nul(file: SourceFile, data: bytes, offset: int) -> None:
    if (nul := data.find(0)) >= 0:
        raise DataError(
            f"{file.name} is a binary file: byte {offset + nul} is NUL",
            hint="only UTF-8 text can be read; convert it or remove it from the sources",
        )


def _valid_utf8(file: SourceFile, data: bytes, offset: int, *, more: bool, where: str = "") -> int:
    """Number of leading bytes that are whole characters; an unfinished last one may wait."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if more and error.end == len(data) and error.reason == "unexpected end of data":
            return error.start
        at = offset + error.start
        raise DataError(
            f"{file.name} is not UTF-8 at byte {at}{where} (0x{data[error.start]:02x})",
            hint="convert it, for instance with `iconv -f LATIN1 -t UTF-8`",
        ) from error
    return len(data)


def _lines(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    """Lines and the byte at which each begins."""
    offset, carry = 0, b""
    for block in _blocks(file):
        lines = (carry + block).split(b"\n")
        carry = lines.pop()
        for line in lines:
            yield offset, line
            offset += len(line) + 1
    if carry:
        yield offset, carry


def _read_jsonl(file: SourceFile) -> Iterator[Piece]:
    """One document per line: an object whose `text` is a string."""
    for number, (offset, line) in enumerate(_lines(file), start=1):
        _refuse_nul(file, line, offset)
        _valid_utf8(file, line, offset, more=False, where=f" in line {number}")
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file.name} line {number} is not JSON: {error.msg} at column {error.colno}",
                hint="each line must be one JSON object",
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get(TEXT_COLUMN), str):
            found = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{file.name} line {number} has no string field `{TEXT_COLUMN}` (found: {found})",
                hint=f'each line must look like {{"{TEXT_COLUMN}": "..."}}',
            )
        try:
            data = row[TEXT_COLUMN].encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{file.name} line {number} has half a surrogate pair in `{TEXT_COLUMN}`",
                hint="repair the \\u escapes of that line",
            ) from error
        if data:
            yield Piece(data=data, ends_document=True)


def _read_table(file: SourceFile, file_format: str = "parquet") -> Iterator[Piece]:
    """One document per row of the `text` column."""
    table = pyarrow.dataset.dataset(file.path, format=file_format, filesystem=file.filesystem)
    _require_text(file, table.schema)
    # One thread and no read-ahead: the order must be the file's, and memory one row group.
    batches = table.to_batches(
        columns=[TEXT_COLUMN],
        batch_size=1024,
        batch_readahead=0,
        fragment_readahead=0,
        use_threads=False,
    )
    yield from _rows(file, batches)


def _read_arrow(file: SourceFile) -> Iterator[Piece]:
    """Arrow files come in two layouts; the streaming one (without a footer) has no magic."""
    with file.filesystem.open_input_stream(file.path, compression=None) as stream:
        magic = stream.read(6)
    if not magic:
        return
    if magic == b"ARROW1":
        yield from _read_table(file, "ipc")
        return
    with (
        file.filesystem.open_input_stream(file.path, compression=None) as stream,
        pa.ipc.open_stream(stream) as batches,
    ):
        _require_text(file, batches.schema)
        yield from _rows(file, batches)


def _require_text(file: SourceFile, schema: pa.Schema) -> None:
    if TEXT_COLUMN not in schema.names:
        raise DataError(
            f"{file.name} has no column `{TEXT_COLUMN}`, its columns are {', '.join(schema.names)}",
            hint=f"rename the column that holds the text to `{TEXT_COLUMN}`",
        )
    kind = schema.field(TEXT_COLUMN).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value)):
        raise DataError(
            f"{file.name} has a column `{TEXT_COLUMN}` of type {kind}",
            hint="it must hold strings",
        )


def _rows(file: SourceFile, batches: Iterable[pa.RecordBatch]) -> Iterator[Piece]:
    row = 0
    for batch in batches:
        for text in batch.column(TEXT_COLUMN).to_pylist():
            if text is None:
                raise DataError(
                    f"{file.name} row {row} has null in `{TEXT_COLUMN}`", hint="drop such rows"
                )
            row += 1
            if text:
                yield Piece(data=text.encode(), ends_document=True)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
