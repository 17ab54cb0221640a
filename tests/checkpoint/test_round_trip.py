"""Any cut into pieces, ranks and files reads back bit for bit, in any ranges."""

import itertools
import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from dualray.checkpoint.manifest import DTYPES
from dualray.checkpoint.reader import Reader
from dualray.checkpoint.store import verify
from dualray.checkpoint.writer import Piece, begin, commit, step_dir, write_rank

dtypes = st.sampled_from(sorted(DTYPES))
shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern, NaNs included: nothing on the way may interpret the numbers."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_shard(path: Path, limit_bytes: int) -> None:
    """Bounded, without holes, and every element aligned to its own size."""
    raw = path.read_bytes()
    base = 8 + int.from_bytes(raw[:8], "little")
    end = 0
    for entry in json.loads(raw[8:base]).values():
        assert entry["data_offsets"][0] == end
        assert (base + end) % DTYPES[entry["dtype"]].itemsize == 0
        end = entry["data_offsets"][1]
    assert base + end == len(raw)
    assert end <= limit_bytes


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_splits_round_trip(data: st.DataObject) -> None:
    specs = data.draw(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=4))
    values = {f"t.{i}": random_bits(s, DTYPES[d], i) for i, (s, d) in enumerate(specs)}
    num_ranks = data.draw(st.integers(1, 3))
    by_rank: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for name, value in values.items():
        numel = value.numel()
        cuts = data.draw(st.lists(st.integers(0, numel), max_size=3, unique=numel > 0))
        edges = [0, *sorted(cuts), numel] if numel else [0, 0]
        for start, stop in itertools.pairwise(edges):
            flat = value.reshape(-1)[start:stop]
            piece = Piece(name=name, shape=tuple(value.shape), start=start, tensor=flat)
            by_rank[data.draw(st.integers(0, num_ranks - 1))].append(piece)
    limit_bytes = data.draw(st.sampled_from([8, 24, 1 << 20]))

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder)
        temporary = begin(checkpoints, 3)
        files = [
            write_rank(temporary, rank, iter(pieces), limit_bytes=limit_bytes)
            for rank, pieces in enumerate(by_rank)
        ]
        commit(temporary, step_dir(checkpoints, 3), files, {"step": 3})
        verify(step_dir(checkpoints, 3))
        for path in step_dir(checkpoints, 3).glob("*.safetensors"):
            check_shard(path, limit_bytes)
        reader = Reader(step_dir(checkpoints, 3))
        assert sorted(reader.names()) == sorted(values)
        for name, value in values.items():
            assert reader.shape(name) == tuple(value.shape)
            assert reader.dtype(name) == value.dtype
            assert bits(reader.read(name)) == bits(value)
            start = data.draw(st.integers(0, value.numel()))
            count = data.draw(st.integers(0, value.numel() - start))
            expected = value.reshape(-1)[start : start + count]
            assert bits(reader.read(name, start, count)) == bits(expected)


def test_read_into_fills_a_strided_view_across_pieces(tmp_path: Path) -> None:
    value = torch.arange(24.0).reshape(4, 6)
    flat = value.reshape(-1)
    temporary = begin(tmp_path, 1)
    files = [
        write_rank(temporary, rank, [Piece(name="w", shape=(4, 6), start=a, tensor=flat[a:b])])
        for rank, (a, b) in enumerate([(0, 7), (7, 8), (8, 24)])
    ]
    commit(temporary, step_dir(tmp_path, 1), files, {"step": 1})
    reader = Reader(step_dir(tmp_path, 1))

    parameter = torch.nn.Parameter(torch.zeros(2, 6))
    reader.read_into("w", parameter, start=6)
    assert torch.equal(parameter, value[1:3])

    wide = torch.zeros(3, 8, dtype=torch.float64)
    reader.read_into("w", wide[:, :6], start=6)
    assert torch.equal(wide[:, :6], value[1:].double())
    assert not wide[:, 6:].any()

    scalar = torch.zeros(())
    reader.read_into("w", scalar, start=23)
    assert scalar == 23.0


def test_only_the_files_of_the_asked_range_are_opened(tmp_path: Path) -> None:
    temporary = begin(tmp_path, 1)
    piece = Piece.whole("w", torch.arange(16.0))
    files = write_rank(temporary, 0, [piece], limit_bytes=16)
    commit(temporary, step_dir(tmp_path, 1), [files], {"step": 1})
    assert len(files.files) == 4
    for name in sorted(files.files)[:2]:
        (step_dir(tmp_path, 1) / name).unlink()
    assert Reader(step_dir(tmp_path, 1)).read("w", 8).tolist() == [*range(8, 16)]


def test_files_are_safetensors_under_plain_names(tmp_path: Path, save, tensors) -> None:
    folder = save(tmp_path, 1)
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].shape == value.shape
        assert bits(found[name]) == bits(value)
    assert not [path for path in folder.iterdir() if path.suffix in {".pt", ".pkl"}]


def test_what_a_rank_returns_is_plain_data(tmp_path: Path) -> None:
    files = write_rank(begin(tmp_path, 1), 0, [Piece.whole("w", torch.ones(3))])
    assert json.loads(json.dumps(asdict(files)))["tensors"]["w"]["pieces"][0]["count"] == 3


def test_a_generator_is_consumed_one_file_at_a_time(tmp_path: Path) -> None:
    def pieces():
        for index in range(8):
            num_files = len(list(tmp_path.rglob("*.safetensors")))
            assert num_files >= index // 2 - 1, "earlier files are on the disk by now"
            yield Piece.whole(f"t.{index}", torch.zeros(16))

    files = write_rank(begin(tmp_path, 1), 0, pieces(), limit_bytes=2 * 16 * 4)
    assert len(files.files) == 4
