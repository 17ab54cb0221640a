"""`build`: from documents to a folder of token shards that training maps into memory.

A split is one stream of tokens, `eos doc eos doc eos ...` (concat-and-chunk as in DeepSeek-V3,
arXiv 2412.19437 section 4.1; nothing masks across documents), stored as Arrow IPC files of one
uint16 or uint32 column in one record batch, so that numpy reads the mapped file without a copy.

The folder is made beside `out` under a temporary name, synced, and renamed last: `out` either is
complete or does not exist. Three passes over the sources: measure (which also finds every bad input
before anything is written), train the BPE on the training text, encode.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
import zstandard

from dualray.data.documents import read_pieces
from dualray.data.manifest import MANIFEST_FILE, DataManifest, Shard, Split
from dualray.data.segments import Segment, cut, segment_size
from dualray.data.sources import SourceFile, list_files
from dualray.data.tokenizer import Tokenizer, load_tokenizer, parse_bpe, train_bpe
from dualray.errors import DataError

SHARD_TOKENS = 1 << 25
HELDOUT_TEXT_FILE = "heldout.txt.zst"
BPE_TRAINING_BYTES = 256 << 20
_ENCODE_BYTES = 4 << 20

Progress = Callable[[str, int, int], None]
"""Called as progress(what, bytes done, bytes in all)."""


def build(
    sources: Iterable[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    heldout: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress = lambda what, done, total: None,
) -> DataManifest:
    """Writes the folder `out` and returns its manifest.

    `tokenizer` is `bytes`, `bpe:N` (trained on the training text, at most 256 MiB of it, evenly
    spread) or the path of a tokenizer.json. Raises DataError for bad sources, an existing `out`,
    or text too short to split.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise DataError(
            f"out is {out} and already exists", hint="remove it or choose another folder"
        )
    bpe_size = parse_bpe(str(tokenizer))
    chosen = load_tokenizer(tokenizer) if bpe_size is None else None
    named = tuple(str(source) for source in sources)
    corpus = _measure(named, list_files(named), heldout)
    if chosen is None:
        chosen = train_bpe(_training_text(corpus, progress), bpe_size or 0)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            manifest = _write(folder, corpus, chosen, shard_tokens, progress)
            os.chmod(folder, 0o755)
            os.rename(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        _sync(out.parent)
    except OSError as error:
        raise DataError(
            f"out is {out} and cannot be written: {error.strerror}",
            hint="check permissions and free space",
        ) from error
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    sources: tuple[str, ...]
    files: tuple[SourceFile, ...]
    total_bytes: int
    segment_bytes: int
    heldout: float

    def segments(self) -> Iterator[Segment]:
        pieces = (piece for file in self.files for piece in read_pieces(file))
        return cut(pieces, self.segment_bytes, self.heldout)


def _measure(sources: tuple[str, ...], files: list[SourceFile], heldout: float) -> _Corpus:
    total = sum(len(piece.data) for file in files for piece in read_pieces(file))
    return _Corpus(
        sources=sources,
        files=tuple(files),
        total_bytes=total,
        segment_bytes=segment_size(total, heldout),
        heldout=heldout,
    )


def _training_text(corpus: _Corpus, progress: Progress) -> Iterator[str]:
    stride = -(-corpus.total_bytes // BPE_TRAINING_BYTES)
    done = 0
    for segment in corpus.segments():
        done += segment.num_bytes
        progress("training the tokenizer", done, corpus.total_bytes)
        if not segment.heldout and segment.index % stride == 0:
            for piece in segment.pieces:
                yield piece.data.decode()


def _write(
    folder: Path, corpus: _Corpus, tokenizer: Tokenizer, shard_tokens: int, progress: Progress
) -> DataManifest:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    streams = {
        name: _Stream(folder=folder, name=name, dtype=dtype, shard_tokens=shard_tokens)
        for name in ("train", "heldout")
    }
    end = [tokenizer.eos_id]
    for stream in streams.values():
        stream.append(end)
    text_path = folder / HELDOUT_TEXT_FILE
    with text_path.open("wb") as raw, zstandard.ZstdCompressor(level=10).stream_writer(raw) as text:
        done = 0
        for batch in _batches(corpus.segments()):
            parts = [(s.heldout, piece) for s in batch for piece in s.pieces]
            encoded = tokenizer.encode_batch([piece.data.decode() for _, piece in parts])
            for (heldout, piece), ids in zip(parts, encoded):
                here, other = streams["heldout"], streams["train"]
                if heldout:
                    text.write(piece.data)
                else:
                    here, other = other, here
                # The other split's text stops here: what follows in it does not continue it.
                if other.in_document:
                    other.append(end, ends_document=True)
                here.append(ids, num_bytes=len(piece.data))
                here.in_document = True
                if piece.ends_document:
                    here.append(end, ends_document=True)
            done += sum(segment.num_bytes for segment in batch)
            progress("encoding", done, corpus.total_bytes)
    for stream in streams.values():
        if stream.in_document:
            stream.append(end, ends_document=True)
        stream.flush()
    tokenizer.save(folder)
    manifest = DataManifest(
        tokenizer=tokenizer.kind,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        heldout_fraction=corpus.heldout,
        segment_bytes=corpus.segment_bytes,
        splits={name: stream.split() for name, stream in streams.items()},
        heldout_text=_describe(text_path, num_tokens=0),
        sources=corpus.sources,
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)
    return manifest


def _batches(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    batch: list[Segment] = []
    size = 0
    for segment in segments:
        batch.append(segment)
        size += segment.num_bytes
        if size >= _ENCODE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(kw_only=True)
class _Stream:
    """Tokens of one split on their way into shards; holds at most one shard in memory."""

    folder: Path
    name: str
    dtype: np.dtype
    shard_tokens: int
    in_document: bool = False
    num_bytes: int = 0
    num_documents: int = 0
    shards: list[Shard] = field(default_factory=list)
    hasher: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    _waiting: list[np.ndarray] = field(default_factory=list)
    _num_waiting: int = 0

    def append(self, ids: list[int], *, num_bytes: int = 0, ends_document: bool = False) -> None:
        tokens = np.asarray(ids, dtype=self.dtype)
        self.hasher.update(tokens.tobytes())
        self.num_bytes += num_bytes
        if ends_document:
            self.num_documents += 1
            self.in_document = False
        while self._num_waiting + len(tokens) >= self.shard_tokens:
            room = self.shard_tokens - self._num_waiting
            self._keep(tokens[:room])
            tokens = tokens[room:]
            self.flush()
        self._keep(tokens)

    def _keep(self, tokens: np.ndarray) -> None:
        self._waiting.append(tokens)
        self._num_waiting += len(tokens)

    def flush(self) -> None:
        if not self._num_waiting:
            return
        path = self.folder / f"{self.name}-{len(self.shards):05d}.arrow"
        tokens = np.concatenate(self._waiting)
        batch = pa.record_batch({"tokens": pa.array(tokens)})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        self.shards.append(_describe(path, num_tokens=len(tokens)))
        self._waiting, self._num_waiting = [], 0

    def split(self) -> Split:
        return Split(
            num_tokens=sum(shard.num_tokens for shard in self.shards),
            num_bytes=self.num_bytes,
            num_documents=self.num_documents,
            xxh3=self.hasher.hexdigest(),
            shards=tuple(self.shards),
        )


def _describe(path: Path, *, num_tokens: int) -> Shard:
    return Shard(
        file=path.name,
        num_tokens=num_tokens,
        num_bytes=path.stat().st_size,
        xxh3=hash_file(path),
    )


def hash_file(path: Path) -> str:
    """XXH3-128 of a file, hexadecimal."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
