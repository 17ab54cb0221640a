"""Loads as Arrow tables: what is added is read, by any reader, and survives kill and resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest

from dualray.errors import RunError
from dualray.parallel.slots import ExpertPlacement
from dualray.platform.loads import (
    SCHEMA,
    STEPS_PER_FILE,
    LoadsLog,
    Place,
    loads_files,
    tokens_by_place,
)

NODES = ("10.0.0.1", "10.0.0.2")


def tokens_of(step: int) -> dict[Place, int]:
    """Two layers of four experts on two ranks, each on a node of its own; expert 0 lives twice."""
    return {
        Place(layer, expert, rank, NODES[rank]): (step * 7 + layer * 5 + expert * 3 + rank) % 11
        for layer in (1, 12)
        for rank, experts in enumerate(((0, 1), (2, 3, 0)))
        for expert in experts
    }


def rows_of(folder: Path) -> list[tuple]:
    return [tuple(row.values()) for file in loads_files(folder) for row in file.read().to_pylist()]


def expected(steps) -> list[tuple]:
    return [
        (step, *place, count) for step in steps for place, count in sorted(tokens_of(step).items())
    ]


def totals(steps) -> dict[int, list[int]]:
    summed = {1: [0] * 4, 12: [0] * 4}
    for step in steps:
        for place, count in tokens_of(step).items():
            summed[place.layer][place.expert] += count
    return summed


def log_of(folder: Path, steps, *, after: int = 0, flush_at=()) -> dict[int, list[int]]:
    with LoadsLog.resume(folder, after) as log:
        for step in steps:
            log.add(step, tokens_of(step))
            if step in flush_at:
                log.flush()
        return {layer: total.tolist() for layer, total in log.totals.items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_added_is_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "loads"
    found = log_of(folder, range(1, 601), flush_at=(10, 10, 200, 256, 300))
    assert names(folder) == [
        "steps-00000001-00000256.arrow",
        "steps-00000257-00000512.arrow",
        "steps-00000513-00000600.arrow",
    ]
    assert rows_of(folder) == expected(range(1, 601))
    assert found == totals(range(1, 601))


def test_files_are_feather_with_the_documented_columns(tmp_path: Path) -> None:
    log_of(tmp_path, range(1, 4))
    (file,) = loads_files(tmp_path)
    table = pa.feather.read_table(str(file.path))
    assert table.schema == SCHEMA
    assert table["node"].chunk(0).dictionary.to_pylist() == list(NODES)
    with pa.ipc.open_file(str(file.path)) as reader:
        assert reader.read_all() == table
    assert (file.first, file.last) == (1, 3)
    # Compressed: 8 rows repeat their columns, save one.
    log_of(tmp_path, range(1, 257))
    assert loads_files(tmp_path)[0].path.stat().st_size < table.nbytes / 3 * 256 / 2


def test_a_flush_writes_all_so_far_in_place_of_what_it_wrote_before(tmp_path: Path) -> None:
    with LoadsLog.resume(tmp_path, 0) as log:
        log.add(1, tokens_of(1))
        assert names(tmp_path) == []
        log.flush()
        log.flush()
        assert names(tmp_path) == ["steps-00000001-00000001.arrow"]
        log.add(2, tokens_of(2))
        assert rows_of(tmp_path) == expected([1])
        log.flush()
        assert names(tmp_path) == ["steps-00000001-00000002.arrow"]
        assert rows_of(tmp_path) == expected([1, 2])


@pytest.mark.parametrize("step", [0, 1, 99, 255, 256, 257, 299, 300, 400])
def test_resume_drops_later_steps_and_goes_on(tmp_path: Path, step: int) -> None:
    log_of(tmp_path, range(1, 301), flush_at=(280,))
    done = min(step, 300)
    found = log_of(tmp_path, range(done + 1, 601), after=step)
    assert found == totals(range(1, 601))
    assert rows_of(tmp_path) == expected(range(1, 601))
    assert len(names(tmp_path)) == 3


def test_resume_alone_leaves_the_steps_until_then(tmp_path: Path) -> None:
    log_of(tmp_path, range(1, 301))
    (tmp_path / "steps-00000257-00000290.arrow").write_bytes(b"superseded")
    (tmp_path / "notes.txt").touch()
    log_of(tmp_path, (), after=260)
    assert names(tmp_path) == [
        "notes.txt", "steps-00000001-00000256.arrow", "steps-00000257-00000260.arrow"
    ]  # fmt: skip
    assert rows_of(tmp_path) == expected(range(1, 261))
    log_of(tmp_path, (), after=0)
    assert names(tmp_path) == ["notes.txt"]


def test_rows_reach_the_disk_when_a_run_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with LoadsLog.resume(tmp_path, 0) as log:
            log.add(1, tokens_of(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert rows_of(tmp_path) == expected([1])


def test_a_run_without_experts_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "loads"
    with LoadsLog.resume(folder, 0) as log:
        log.add(1, {})
        log.flush()
    assert not folder.exists()
    assert loads_files(folder) == []


def test_nodes_may_come_and_go(tmp_path: Path) -> None:
    with LoadsLog.resume(tmp_path, 0) as log:
        for step, node in enumerate(("c", "a", "b"), start=1):
            log.add(step, {Place(1, 0, 0, node): step})
    assert rows_of(tmp_path) == [(1, 1, 0, 0, "c", 1), (2, 1, 0, 0, "a", 2), (3, 1, 0, 0, "b", 3)]


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    log_of(tmp_path, range(1, 4))
    (file,) = loads_files(tmp_path)
    whole = file.path.read_bytes()
    other = pa.table({"step": [1]})
    for damage in (b"", b"nonsense" * 40, whole[: len(whole) // 2]):
        file.path.write_bytes(damage)
        with pytest.raises(RunError, match=r"is no table of loads \(.*\); delete it: the report "):
            LoadsLog.resume(tmp_path, 3)
    pa.feather.write_feather(other, str(file.path))
    with pytest.raises(RunError) as caught:
        file.read()
    assert str(caught.value).startswith(f"{file.path} is no table of loads (")
    assert str(caught.value).endswith(
        "); delete it: the report then lacks the loads of steps 1 to 3."
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    place = tmp_path / "loads"
    place.write_text("a file")
    log = LoadsLog(place)
    log.add(1, tokens_of(1))
    with pytest.raises(RunError, match=r"the loads of steps 1 to 1 cannot be written to .*make ro"):
        log.flush()


def test_places_are_summed_over_replicas_and_mirrors() -> None:
    placement = ExpertPlacement(
        held={1: ((0, 1), (2, 3, 0)), 2: ((3, 2), (0, 1, 3))}, num_homes={1: (2, 2), 2: (2, 2)}
    )
    drawn = np.random.default_rng(0)
    workers = [(rank, NODES[rank]) for rank in (0, 1, 0, 1)] + [(1, NODES[0])]
    slot_rows = [
        {layer: drawn.integers(9, size=len(placement.held[layer][rank])).tolist()}
        for layer, (rank, _) in zip((1, 1, 2, 2, 1), workers)
    ]
    slow: Counter[Place] = Counter()
    for rows, (rank, node) in zip(slot_rows, workers):
        for layer in rows:
            for slot, count in enumerate(rows[layer]):
                slow[Place(layer, placement.held[layer][rank][slot], rank, node)] += count
    found = tokens_by_place(slot_rows, placement, *zip(*workers))
    assert found == slow
    # Two workers of rank 1 hold layer 1, on different nodes.
    assert {place.node for place in found if place.layer == 1 and place.rank == 1} == set(NODES)
    assert sum(found.values()) == sum(sum(r) for rows in slot_rows for r in rows.values())


_WRITER = """
import sys
from pathlib import Path
from dualray.platform.loads import LoadsLog, Place
log = LoadsLog.resume(Path(sys.argv[1]), 0)
for step in range(1, 10**9):
    log.add(step, {Place(1, expert, 0, "n"): step + expert for expert in range(8)})
    log.flush()
    if step == 30:
        print("thirty", flush=True)
"""


def test_tables_are_whole_after_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "thirty\n"
        os.kill(writer.pid, signal.SIGKILL)
    rows = rows_of(tmp_path)
    last = rows[-1][0]
    assert last >= 30
    assert rows == [
        (step, 1, expert, 0, "n", step + expert)
        for step in range(1, last + 1)
        for expert in range(8)
    ]
    assert last <= STEPS_PER_FILE or len(loads_files(tmp_path)) > 1
