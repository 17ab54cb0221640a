"""What `commit` refuses, what `prune` deletes, and what a kill at any instant leaves."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dualray.checkpoint.manifest import COMMIT
from dualray.checkpoint.reader import Reader
from dualray.checkpoint.store import latest, prune, steps
from dualray.checkpoint.writer import Piece, begin, commit, step_dir, write_rank
from dualray.errors import CheckpointError


def piece(start: int, stop: int, **changes) -> Piece:
    flat = changes.pop("tensor", torch.arange(12.0))[start:stop]
    return Piece(**{"name": "w", "shape": (3, 4), "start": start, "tensor": flat} | changes)


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        (
            [[piece(0, 8)], [piece(6, 12)]],
            "tensor w has elements [6:8] in two pieces, the second in rank-00001-00000.safetensors",
        ),
        (
            [[piece(0, 12)], [piece(0, 12)]],
            "tensor w has elements [0:12] in two pieces, the second in "
            "rank-00001-00000.safetensors",
        ),
        ([[piece(0, 4)], [piece(6, 12)]], "tensor w has elements [4:6] in no piece"),
        ([[piece(2, 12)], []], "tensor w has elements [0:2] in no piece"),
        ([[], [piece(0, 11)]], "tensor w has elements [11:12] in no piece"),
        (
            [[piece(0, 6)], [piece(6, 12, shape=(12,))]],
            "tensor w is F32 [12] in rank-00001-00000.safetensors but F32 [3, 4] in "
            "rank-00000-00000.safetensors",
        ),
        (
            [[piece(0, 6)], [piece(6, 12, tensor=torch.arange(12.0).bfloat16())]],
            "tensor w is BF16 [3, 4] in rank-00001-00000.safetensors but F32 [3, 4] in "
            "rank-00000-00000.safetensors",
        ),
    ],
)
def test_pieces_must_cover_every_tensor_once(
    tmp_path: Path, ranks: list[list[Piece]], sentence: str
) -> None:
    temporary = begin(tmp_path, 1)
    files = [write_rank(temporary, rank, pieces) for rank, pieces in enumerate(ranks)]
    with pytest.raises(CheckpointError) as caught:
        commit(temporary, step_dir(tmp_path, 1), files, {"step": 1})
    assert caught.value.sentence == sentence
    assert latest(tmp_path) == (None, ())


def test_a_step_is_never_written_twice(tmp_path: Path, save) -> None:
    first, second = begin(tmp_path, 1), begin(tmp_path, 1)
    for temporary, value in ((first, 1.0), (second, 2.0)):
        files = write_rank(temporary, 0, [Piece.whole("w", torch.tensor(value))])
        if temporary is first:
            commit(temporary, step_dir(tmp_path, 1), [files], {"step": 1})
            continue
        with pytest.raises(CheckpointError) as caught:
            commit(temporary, step_dir(tmp_path, 1), [files], {"step": 1})
        assert str(caught.value) == (
            f"{tmp_path / 'step-1'} exists and a checkpoint is never overwritten; resume from "
            "it, or move it away."
        )
    with pytest.raises(CheckpointError, match="step-1 exists and a checkpoint is never overwri"):
        begin(tmp_path, 1)
    assert Reader(tmp_path / "step-1").read("w").item() == 1.0


def test_two_commits_at_the_same_instant_do_not_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save
) -> None:
    temporary = begin(tmp_path, 1)
    files = write_rank(temporary, 0, [Piece.whole("w", torch.tensor(2.0))])
    final = save(tmp_path, 1)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # both looked before either renamed
    with pytest.raises(CheckpointError, match=r"cannot write .*step-1 \(Directory not empty\)"):
        commit(temporary, final, [files], {"step": 1})
    monkeypatch.undo()
    assert "w" not in Reader(final)


def test_files_that_are_not_here_are_not_committed(tmp_path: Path) -> None:
    temporary = begin(tmp_path, 1)
    files = write_rank(temporary, 3, [piece(0, 12)])
    (temporary / "rank-00003-00000.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        commit(temporary, step_dir(tmp_path, 1), [files], {"step": 1})
    assert str(caught.value) == (
        f"{temporary / 'rank-00003-00000.safetensors'} was written by a worker but is not "
        "complete where it is committed; put the run's folder on storage that every node shares."
    )


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    temporary = begin(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError) as caught:
        write_rank(temporary, 0, [piece(0, 12)])
    assert str(caught.value) == (
        f"cannot write {temporary / 'rank-00000-00000.safetensors'} (No space left on device); "
        "check the free space and the permissions there."
    )


def test_prune_deletes_only_older_committed_ones_and_stale_folders(tmp_path: Path, save) -> None:
    stale, current = begin(tmp_path, 4), begin(tmp_path, 5)
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "step-2" / COMMIT).unlink()  # evidence of damage is for people to look at
    (tmp_path / "step-5" / "rank-00000-00000.safetensors").unlink()  # counts as none
    (tmp_path / "notes").mkdir()

    assert prune(tmp_path, keep=2) == [tmp_path / "step-1"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-2", "step-3", "step-4", "step-5", current.name, "notes",
    }  # fmt: skip
    assert not stale.exists()
    assert prune(tmp_path, keep=2) == []
    assert latest(tmp_path).path == tmp_path / "step-4"
    assert prune(tmp_path / "absent", keep=1) == []


KILL = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from dualray.checkpoint.store import prune
    from dualray.checkpoint.writer import Piece, begin, commit, step_dir, write_rank

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])

    def save(checkpoints, step):
        temporary = begin(checkpoints, step)
        pieces = [Piece.whole(f"t.{i}", torch.full((4,), float(step))) for i in range(3)]
        files = write_rank(temporary, 0, pieces, limit_bytes=16)
        commit(temporary, step_dir(checkpoints, step), [files], {"step": step})
        prune(checkpoints, keep=1)

    def kill_at(countdown):
        # Before and after whatever makes anything durable or visible or gone.
        def hooked(call):
            def wrapper(*args, **kwargs):
                for act in (lambda: None, lambda: call(*args, **kwargs)):
                    result = act()
                    nonlocal countdown
                    countdown -= 1
                    if countdown < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                return result
            return wrapper
        for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, hooked(getattr(os, name)))

    for point in range(200):
        checkpoints = folder / str(point)
        save(checkpoints, 1)
        child = os.fork()
        if child == 0:
            kill_at(point)
            save(checkpoints, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status), flush=True)
        if status == 0:
            break
"""


def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    signals = [int(line) for line in child.stdout.split()]
    assert signals[-1] == 0
    assert set(signals[:-1]) == {9}
    assert len(signals) > 20
    newest = []
    for point in range(len(signals)):
        checkpoints = tmp_path / str(point)
        path, messages = latest(checkpoints)
        assert path is not None
        assert messages == (), "a crash leaves nothing damaged, only folders that do not count"
        step = Reader(path).meta["step"]
        assert path.name == f"step-{step}"
        for name in ("t.0", "t.1", "t.2"):
            assert Reader(path).read(name).tolist() == [float(step)] * 4
        newest.append(step)
        # The next run writes the step, or the one after, and sweeps what the crash left.
        temporary = begin(checkpoints, step + 1)
        files = write_rank(temporary, 0, [Piece.whole("w", torch.ones(1))])
        commit(temporary, step_dir(checkpoints, step + 1), [files], {"step": step + 1})
        prune(checkpoints, keep=1)
        assert [p.name for p in checkpoints.iterdir()] == [f"step-{step + 1}"]
    assert newest == sorted(newest)
    assert {1, 2} == set(newest)


def test_a_writer_killed_between_files_leaves_nothing_to_take(tmp_path: Path) -> None:
    script = """
        import sys, torch
        from pathlib import Path
        from dualray.checkpoint.writer import Piece, begin, write_rank

        def pieces():
            for index in range(3):
                yield Piece.whole(f"t.{index}", torch.zeros(4))
            print("writing", flush=True)
            sys.stdin.read()

        write_rank(begin(Path(sys.argv[1]), 1), 0, pieces(), limit_bytes=16)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        child.kill()
    assert child.returncode == -9
    assert [path.name for path in tmp_path.rglob("*.safetensors")]
    assert latest(tmp_path) == (None, ())
    assert steps(tmp_path) == []


def test_meta_is_json_and_comes_back(tmp_path: Path) -> None:
    temporary = begin(tmp_path, 7)
    meta = {"step": 7, "loader": {"samples": 123}, "rng": [1, 2**63], "lr": 0.1}
    files = write_rank(temporary, 0, [piece(0, 12)])
    commit(temporary, step_dir(tmp_path, 7), [files], meta)
    assert Reader(tmp_path / "step-7").meta == json.loads(json.dumps(meta)) == meta
