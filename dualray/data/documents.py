"""Documents out of files, streamed: text, jsonl, parquet and Arrow, plain or compressed.

A document arrives as one or more `Piece`s of valid UTF-8, so that a text file of any size passes
through a buffer of about a mebibyte. Reading changes nothing: line ends and spaces stay as they
are; only a byte order mark at the start of a file is dropped, and empty documents are left out.
Whatever cannot be read is refused with the file and the byte, line or row.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.dataset

from dualray.data.sources import SourceFile, reason
from dualray.errors import DataError

BLOCK_BYTES = 1 << 20
TEXT_COLUMN = "text"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a document: UTF-8 bytes, never cut inside a character."""

    data: bytes
    ends_document: bool


def read_pieces(file: SourceFile) -> Iterator[Piece]:
    """The documents of one file, in order. Raises DataError where the file cannot be used."""
    readers = {
        "text": _read_text,
        "jsonl": _read_jsonl,
        "parquet": _read_table,
        "arrow": _read_arrow,
    }
    empty = True
    try:
        # A parquet file of no bytes would otherwise be reported as one without a footer.
        found = file.filesystem.get_file_info(file.path).size != 0
        for piece in readers[file.kind](file) if found else ():
            empty = False
            yield piece
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.name} cannot be read as {file.kind}: {reason(error)}",
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
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file.name} line {number} has a number too long or nesting too deep to be read",
                hint="shorten or remove that line",
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
