"""The split into training and held-out text, decided before any token exists.

A rule by document fails on a corpus of a few large documents (forty plays: 5 % is two plays), and
a free coin per document gives anything between 0 and 10 % of them. So the text is cut into
*segments* of nearly equal size: runs of up to `segment_bytes` that end at a document's end, else
at a line end, else at a space. Of every `round(1 / fraction)` consecutive segments exactly one,
chosen by a keyed hash, is held out. Its neighbours are closed with end-of-document on both sides,
so no training window reads over the gap. The rule depends on the text alone. Segments are large
(128 KiB, about a play) because gzip and bzip2 are judged on this text: on shreds of 32 KiB from
here and there bzip2 needs 2.58 bits per byte, on 124 KiB pieces 2.47 (Shakespeare), and a model
should have to beat the better figure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dualray.data.documents import Piece
from dualray.errors import DataError

MAX_SEGMENT_BYTES = 1 << 17
MIN_SEGMENT_BYTES = 256
MIN_HELDOUT_SEGMENTS = 2


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive text: the end of one document, whole ones, the beginning of another."""

    index: int
    pieces: tuple[Piece, ...]
    heldout: bool

    @property
    def num_bytes(self) -> int:
        return sum(len(piece.data) for piece in self.pieces)


def segment_size(total_bytes: int, fraction: float) -> int:
    """Bytes per segment: 128 KiB, less where that would hold out fewer than 2 segments.

    Raises DataError for a fraction that is none, and for less text than 2 segments of 256 bytes
    need.
    """
    if not 0 < fraction <= 0.5:
        raise DataError(
            f"heldout is {fraction} and must be above 0 and at most 0.5",
            hint="0.05 is a good value",
        )
    fair = total_bytes // (MIN_HELDOUT_SEGMENTS * round(1 / fraction))
    if fair < MIN_SEGMENT_BYTES:
        least = MIN_SEGMENT_BYTES * MIN_HELDOUT_SEGMENTS * round(1 / fraction)
        raise DataError(
            f"the sources hold {total_bytes} bytes of text and holding out {fraction:g} of them "
            f"needs {least}",
            hint="give more text",
        )
    return min(MAX_SEGMENT_BYTES, fair)


def cut(pieces: Iterable[Piece], segment_bytes: int, fraction: float) -> Iterator[Segment]:
    """Segments of a stream of pieces; how the reader happened to cut its pieces does not matter."""
    every = round(1 / fraction)
    index = 0
    done: list[Piece] = []  # finished pieces of the current segment
    done_bytes = 0
    open_text = b""  # the current document's text in the current segment

    def close() -> Segment:
        nonlocal done, done_bytes, index
        segment = Segment(
            index=index, pieces=tuple(done), heldout=index % every == _chosen(index // every, every)
        )
        done, done_bytes, index = [], 0, index + 1
        return segment

    for piece in pieces:
        open_text += piece.data
        while done_bytes + len(open_text) > segment_bytes:
            at = _cut_point(open_text, segment_bytes - done_bytes)
            done.append(Piece(data=open_text[:at], ends_document=False))
            open_text = open_text[at:]
            yield close()
        if piece.ends_document:
            if open_text:
                done.append(Piece(data=open_text, ends_document=True))
            done_bytes += len(open_text)
            open_text = b""
            if done_bytes >= segment_bytes // 2:
                yield close()
    if done:
        yield close()


def _chosen(block: int, every: int) -> int:
    key = hashlib.blake2b(block.to_bytes(8, "little"), key=b"dualray.heldout", digest_size=8)
    return int.from_bytes(key.digest(), "little") % every


def _cut_point(text: bytes, room: int) -> int:
    """Where to cut text that is longer than `room`: after a line, a space, else a character."""
    for separator in (b"\n", b" "):
        if (at := text.rfind(separator, room // 2, room)) >= 0:
            return at + 1
    while text[room] & 0xC0 == 0x80:
        room -= 1
    return room
