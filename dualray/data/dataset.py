"""`TokenDataset`: an opened, verified folder of token shards, read through memory maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import zstandard

from dualray.data.manifest import DataManifest, Shard, Split, read_manifest
from dualray.data.shards import hash_file
from dualray.data.tokenizer import Tokenizer, load_tokenizer
from dualray.errors import DataError


class TokenDataset:
    """Token streams by split. Opening maps the shards; nothing is read before it is asked for."""

    def __init__(self, folder: Path, manifest: DataManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shards = {
            name: [_map(folder / shard.file, shard) for shard in split.shards]
            for name, split in manifest.splits.items()
        }
        self._starts = {
            name: np.cumsum([0, *(len(tokens) for tokens in shards)])
            for name, shards in self._shards.items()
        }

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> TokenDataset:
        """Opens what `build` wrote; `verify` hashes every file (XXH3, some 10 GB/s when cached).

        Raises DataError that names the missing or damaged file.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        files = [s for split in manifest.splits.values() for s in split.shards]
        for shard in [*files, manifest.heldout_text]:
            _check(folder / shard.file, shard, verify=verify)
        return cls(folder, manifest)

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def eos_id(self) -> int:
        return self.manifest.eos_id

    @property
    def tokenizer_sha256(self) -> str:
        return self.manifest.tokenizer_sha256

    @property
    def data_sha256(self) -> str:
        return self.manifest.data_sha256

    def split(self, name: str) -> Split:
        """Raises DataError for a split that does not exist."""
        if name not in self.manifest.splits:
            raise DataError(
                f"split is {name} and must be one of {', '.join(self.manifest.splits)}",
                hint="use train or heldout",
            )
        return self.manifest.splits[name]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the shards were made with. Raises DataError if its file was exchanged."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise DataError(
                f"tokenizer_sha256 of {self.folder} is {self.tokenizer_sha256[:12]} and the "
                f"tokenizer.json in it has {tokenizer.sha256[:12]}",
                hint="build the shards again",
            )
        return tokenizer

    def tokens(self, split: str, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of a split's stream, uint16 or uint32.

        A view of the mapped file where they lie in one shard; fewer at the stream's end.
        """
        self.split(split)
        starts, shards = self._starts[split], self._shards[split]
        stop = min(start + count, int(starts[-1]))
        first = int(np.searchsorted(starts, start, side="right")) - 1
        parts = []
        while start < stop:
            offset = start - int(starts[first])
            part = shards[first][offset : offset + stop - start]
            parts.append(part)
            start += len(part)
            first += 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.manifest.dtype)

    def heldout_text(self) -> bytes:
        """The held-out text, UTF-8: what the held-out tokens encode, without the ends."""
        with (self.folder / self.manifest.heldout_text.file).open("rb") as file:
            return zstandard.ZstdDecompressor().stream_reader(file).read()


def _check(path: Path, shard: Shard, *, verify: bool) -> None:
    hint = "restore the file or build the shards again"
    if not path.is_file():
        raise DataError(f"shard {path} is missing", hint=hint)
    if (size := path.stat().st_size) != shard.num_bytes:
        raise DataError(
            f"shard {path} is damaged: it has {size} bytes and the manifest says {shard.num_bytes}",
            hint=hint,
        )
    if verify and (found := hash_file(path)) != shard.xxh3:
        raise DataError(
            f"shard {path} is damaged: its xxh3 is {found[:12]} and the manifest says "
            f"{shard.xxh3[:12]}",
            hint=hint,
        )


def _map(path: Path, shard: Shard) -> np.ndarray:
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    tokens = batch.column("tokens").to_numpy(zero_copy_only=True)
    if len(tokens) != shard.num_tokens:
        raise DataError(f"shard {path} is damaged", hint="build the shards again")
    return tokens
