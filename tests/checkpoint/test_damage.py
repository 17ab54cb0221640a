"""Whatever is done to a checkpoint's bytes is found, said, and survived."""

import shutil
from pathlib import Path

import pytest
import torch

from dualray.checkpoint.manifest import COMMIT, MANIFEST, DamagedError, commit_text
from dualray.checkpoint.reader import Reader
from dualray.checkpoint.store import find, latest, verify
from dualray.errors import CheckpointError

NEW = 20
FILES = ["rank-00000-00000.safetensors", "rank-00000-00001.safetensors", MANIFEST, COMMIT]


@pytest.fixture
def new(tmp_path: Path, save) -> Path:
    """The newer of two sound checkpoints."""
    save(tmp_path, 10)
    return save(tmp_path, NEW)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return tmp_path / "step-10"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_bit_is_found_and_its_file_named(new: Path, file: str) -> None:
    path = new / file
    num_bits = path.stat().st_size * 8
    # All bits of the small files; of the larger ones a stride that is no multiple of 8.
    for bit in {*range(0, num_bits, max(num_bits // 300, 1) | 1), num_bits - 1}:
        flip(path, bit)
        with pytest.raises(DamagedError) as caught:
            verify(new)
        assert file in str(caught.value)
        flip(path, bit)
    verify(new)


@pytest.mark.parametrize("file", FILES)
def test_latest_falls_back_and_says_so(tmp_path: Path, new: Path, old: Path, file: str) -> None:
    flip(new / file, 77)
    found = latest(tmp_path)
    assert found.path == old
    (message,) = found.messages
    assert file in message
    assert message.endswith(f"; skipped, and moved to {tmp_path / 'quarantine' / 'step-20'}")
    assert not new.exists()
    assert latest(tmp_path) == (old, ())


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("keep_bytes", [None, 0, -1])
def test_truncation_and_loss_are_found(new: Path, file: str, keep_bytes: int | None) -> None:
    path = new / file
    data = path.read_bytes()
    path.unlink()
    if keep_bytes is not None:
        path.write_bytes(data[:keep_bytes])
    with pytest.raises(DamagedError, match=file):
        verify(new)


def test_reading_a_truncated_file_is_an_error_and_no_bus_error(new: Path) -> None:
    path = new / FILES[0]
    size_bytes = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError) as caught:
        Reader(new).read("model.norm.weight")
    assert caught.value.sentence == (
        f"{path} has {size_bytes - 4} bytes and was written with {size_bytes}"
    )


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x08" + b"\0" * 7 + b"not json"])
def test_reading_past_a_damaged_header_is_an_error(new: Path, header: bytes) -> None:
    path = new / FILES[0]
    path.write_bytes(header + path.read_bytes()[len(header) :])
    with pytest.raises(CheckpointError, match=r"00000\.safetensors has no readable safetensors"):
        Reader(new).read("model.norm.weight")


def test_quarantine_keeps_every_damaged_copy(tmp_path: Path, new: Path, old: Path, save) -> None:
    for name in ("step-20", "step-20-2"):
        (new / COMMIT).unlink()
        (message,) = latest(tmp_path).messages
        assert message == (
            f"{new} has no COMMIT, so writing it never finished; skipped, and moved to "
            f"{tmp_path / 'quarantine' / name}"
        )
        save(tmp_path, NEW)  # the step's name is free again
    assert latest(tmp_path) == (new, ())


def test_find_takes_a_step_a_run_or_its_checkpoints(tmp_path: Path, save) -> None:
    run = tmp_path / "run"
    step = save(run / "checkpoints", 5)
    for path in (step, run, run / "checkpoints"):
        assert find(path) == (step, ())
    renamed = step.rename(tmp_path / "best")
    assert find(renamed) == (renamed, ())
    (renamed / COMMIT).unlink()
    with pytest.raises(CheckpointError) as caught:
        find(renamed)
    assert str(caught.value) == (
        f"{renamed} has no COMMIT, so writing it never finished; use an older checkpoint; this "
        "one can be deleted."
    )
    assert renamed.exists()  # named by a person, so not moved


def test_a_folder_without_checkpoints(tmp_path: Path, save) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        assert latest(path) == (None, ())
        with pytest.raises(CheckpointError) as caught:
            find(path)
        assert str(caught.value) == (
            f"there is no checkpoint in {path}; train without --resume first, or name a folder "
            "that has step-N folders."
        )
    with pytest.raises(CheckpointError, match="step-3 is not a checkpoint, since it has no man"):
        find(tmp_path / "step-3")
    only = save(tmp_path, 3)
    flip(only / FILES[0], 0)
    with pytest.raises(CheckpointError) as caught:
        find(tmp_path)
    assert str(caught.value).startswith(f"{only / FILES[0]} does not match its hash")
    assert f"There is no checkpoint in {tmp_path}" in str(caught.value)


def rewrite(folder: Path, old: str, new: str) -> None:
    """Changes the manifest and vouches for it, as another program would."""
    text = (folder / MANIFEST).read_bytes().replace(old.encode(), new.encode(), 1)
    (folder / MANIFEST).write_bytes(text)
    (folder / COMMIT).write_bytes(commit_text(text))


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path, new: Path) -> None:
    rewrite(new, '"schema_version": 1', '"schema_version": 2')
    for act in (verify, Reader, find, lambda _: latest(tmp_path)):
        with pytest.raises(CheckpointError) as caught:
            act(new)
        assert str(caught.value) == (
            f"{new / MANIFEST} has schema_version 2 and this dualray reads up to 1; upgrade "
            "dualray to the version that wrote the checkpoint."
        )
    assert new.exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"size_bytes"', '"size"'),
        ("rank-00000-00000.safetensors", "../rank-00000-00000.safetensors"),
        ('"schema_version": 1', '"schema_version": "one"'),
        ('"dtype": "F32"', '"dtype": "F31"'),
    ],
)
def test_a_manifest_of_something_else(new: Path, before: str, after: str) -> None:
    rewrite(new, before, after)
    with pytest.raises(DamagedError, match=r"manifest\.json is not a manifest of dualray"):
        verify(new)


@pytest.mark.parametrize(
    ("before", "after"),
    [('"key": "model.norm.weight"', '"key": "model.norm"'), ('"dtype": "F32"', '"dtype": "F64"')],
)
def test_a_manifest_at_odds_with_its_files(new: Path, before: str, after: str) -> None:
    rewrite(new, before, after)
    with pytest.raises(DamagedError, match=r"00000\.safetensors does not hold what its manifest"):
        Reader(new).read("model.norm.weight")


def test_missing_tensors_and_other_shapes(new: Path) -> None:
    reader = Reader(new)
    assert "model.norm.weight" in reader
    with pytest.raises(CheckpointError) as caught:
        reader.read("model.head.weight")
    assert caught.value.sentence == f"checkpoint {new} has no tensor model.head.weight"
    reader.expect_shape("model.norm.weight", (5,))
    with pytest.raises(CheckpointError) as caught:
        reader.expect_shape("model.norm.weight", torch.Size([5, 1]))
    assert caught.value.sentence == (
        f"tensor model.norm.weight has shape [5, 1] here but [5] in checkpoint {new}"
    )
    for start, count in [(0, 6), (3, 3), (-1, 1), (6, 0), (9, None)]:
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight has 5 elements in"):
            reader.read("model.norm.weight", start, count)


def test_a_checkpoint_pruned_while_it_is_looked_at_is_no_damage(
    tmp_path: Path, new: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dualray.checkpoint.store as store

    def vanish(path: Path) -> str:
        if path.parent == new:
            shutil.rmtree(new)
        return real(path)

    real = store.hash_file
    monkeypatch.setattr(store, "hash_file", vanish)
    assert latest(tmp_path) == (old, ())
