"""`loads/*.arrow`: how many tokens each expert computed where, step by step.

Arrow IPC files (zstd; pyarrow's `open_file`, pandas' and polars' `read_feather` and `read_ipc` read
them), one for every 256 steps. A row says how many rows of a step an expert of a layer computed
on one expert rank and node, summed over replicas, mirrors and micro-batches; an expert that lives
twice has a row for each place, and one that nobody chose has a row with 0 tokens.

A file is named for its steps, `steps-00000257-00000512.arrow`, and is replaced by a longer one
as its steps come in: a new file appears under its name only when it is whole, and then the old
one goes. Of two that begin alike, which a killed run may leave, the longer one counts.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dualray.errors import RunError
from dualray.parallel.slots import ExpertPlacement

STEPS_PER_FILE = 256
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("expert", pa.int32(), nullable=False),
        pa.field("rank", pa.int16(), nullable=False),
        pa.field("node", pa.dictionary(pa.int16(), pa.string()), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
    ]
)
"""step counts from 1, expert is the logical one, rank the expert rank (`layout.experts`), node the
address of a Ray node, tokens a count of rows."""
_NAME = re.compile(r"steps-(\d{8,})-(\d{8,})\.arrow")


class Place(NamedTuple):
    """Where an expert of a layer computes."""

    layer: int
    expert: int
    rank: int
    """Expert rank."""
    node: str


def tokens_by_place(
    slot_rows: Sequence[Mapping[int, Sequence[int]]],
    placement: ExpertPlacement,
    ranks: Sequence[int],
    nodes: Sequence[str],
) -> Counter[Place]:
    """Sums what the workers computed in a step, by place.

    `slot_rows[worker][layer]` are the rows in each of the worker's slots, whose experts
    `placement` names; `ranks` are the workers' expert ranks and `nodes` their addresses.
    """
    tokens: Counter[Place] = Counter()
    for by_layer, rank, node in zip(slot_rows, ranks, nodes, strict=True):
        for layer, rows in by_layer.items():
            for expert, count in zip(placement.held[layer][rank], rows, strict=True):
                tokens[Place(layer, expert, rank, node)] += count
    return tokens


@dataclass(frozen=True)
class LoadsFile:
    """One table, which holds steps `first` to `last`, both included."""

    path: Path
    first: int
    last: int

    def read(self) -> pa.Table:
        """The table. Raises RunError naming the file if it is damaged."""
        try:
            with pa.memory_map(str(self.path)) as source, pa.ipc.open_file(source) as reader:
                return reader.read_all().cast(SCHEMA)
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
            raise RunError(
                f"{self.path} is no table of loads ({str(error).partition(chr(10))[0]})",
                hint=f"delete it: the report then lacks the loads of steps {self.first} to "
                f"{self.last}",
            ) from None


def loads_files(folder: Path) -> list[LoadsFile]:
    """The tables of a run in the order of their steps, without those that longer ones replace."""
    longest: dict[int, LoadsFile] = {}
    for file in sorted(_named(folder), key=lambda file: file.last):
        longest[file.first] = file
    return [longest[first] for first in sorted(longest)]


class LoadsLog:
    """Collects the loads of steps and writes them; a context manager.

    What was added is in a file after the next `flush`, when a file is full, and at the end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tables: list[pa.Table] = []
        """Of the file that grows, step by step."""
        self._first = self._last = 0
        """Its steps."""
        self._written: LoadsFile | None = None
        """What is on disk of it."""
        self.totals: dict[int, np.ndarray] = {}
        """Tokens of every expert by layer, (E,) int64, over all steps of the tables."""

    @classmethod
    def resume(cls, folder: Path, step: int) -> LoadsLog:
        """Continue the tables after `step`: what was written about later steps is dropped.

        A missing folder is made with the first table. Raises RunError if a table is damaged.
        """
        log = cls(folder)
        kept = [file for file in loads_files(folder) if file.first <= step]
        for file in kept:
            table = file.read()
            if file.last > step:
                table = table.filter(pc.field("step") <= step)
            log._count(table)
            last = min(file.last, step)
            if file is kept[-1] and last % STEPS_PER_FILE:
                log._tables, log._first, log._last = [table], file.first, last
                log._written = file if file.last == last else None
            elif file.last > last:
                log._write([table], file.first, last)
        log.flush()
        for file in [file for file in _named(folder) if file.last > step]:
            file.path.unlink()
        for file in set(_named(folder)) - set(loads_files(folder)):
            file.path.unlink()
        return log

    def add(self, step: int, tokens: Mapping[Place, int]) -> None:
        """The tokens of step `step`, counted from 1; there may be none, without experts."""
        if not tokens:
            return
        places = sorted(tokens)
        columns = [
            [step] * len(places),
            *([getattr(place, name) for place in places] for name in Place._fields),
            [tokens[place] for place in places],
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA)]
        table = pa.Table.from_arrays(arrays, schema=SCHEMA)
        self._count(table)
        self._tables.append(table)
        self._first, self._last = self._first or step, step
        if step % STEPS_PER_FILE == 0:
            self.flush()
            self._tables, self._first, self._written = [], 0, None

    def flush(self) -> None:
        """Write what was added since the last time. Raises RunError if that is refused."""
        before = self._written
        if not self._tables or (before is not None and before.last == self._last):
            return
        self._written = self._write(self._tables, self._first, self._last)
        if before is not None:
            before.path.unlink(missing_ok=True)

    def close(self) -> None:
        self.flush()

    def __enter__(self) -> LoadsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What ended the run is the news, not that its last loads have no room.
        with contextlib.suppress(RunError) if error is not None else contextlib.nullcontext():
            self.close()

    def _count(self, table: pa.Table) -> None:
        layers, experts, tokens = (table[name].to_numpy() for name in ("layer", "expert", "tokens"))
        for layer in np.unique(layers).tolist():
            chosen = layers == layer
            total_E = self.totals.get(layer, np.zeros(0, np.int64))
            longest = max(len(total_E), int(experts[chosen].max()) + 1)
            total_E = np.pad(total_E, (0, longest - len(total_E)))
            np.add.at(total_E, experts[chosen], tokens[chosen])
            self.totals[layer] = total_E

    def _write(self, tables: Sequence[pa.Table], first: int, last: int) -> LoadsFile:
        """A file for these steps, in place of one with the same name."""
        table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
        path = self._folder / f"steps-{first:08d}-{last:08d}.arrow"
        partial = path.with_suffix(".partial")
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (
                pa.OSFile(str(partial), "wb") as sink,
                pa.ipc.new_file(sink, SCHEMA, options=options) as writer,
            ):
                writer.write_table(table)
            os.replace(partial, path)
        except OSError as error:
            raise RunError(
                f"the loads of steps {first} to {last} cannot be written to {path} "
                f"({error.strerror or error})",
                hint="make room and continue the run with --resume",
            ) from None
        return LoadsFile(path, first, last)


def _named(folder: Path) -> Iterator[LoadsFile]:
    for path in sorted(folder.glob("steps-*.arrow")):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            yield LoadsFile(path, int(match[1]), int(match[2]))
