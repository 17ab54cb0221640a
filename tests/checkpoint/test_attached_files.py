"""Files inside a checkpoint: given back byte for byte, and never outside of their folder."""

import pytest
import torch

from dualray.checkpoint.attached_files import file_pieces, restore_files
from dualray.checkpoint.reader import Reader
from dualray.checkpoint.writer import Piece, begin, commit, step_dir, write_rank
from dualray.errors import CheckpointError


def checkpoint(folder, pieces) -> Reader:
    temporary = begin(folder, 1)
    commit(temporary, step_dir(folder, 1), [write_rank(temporary, 0, pieces)], {"step": 1})
    return Reader(step_dir(folder, 1))


def test_files_come_back_byte_for_byte(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    contents = {"a.json": b'{"x": 1}\n', "empty": b"", "every_byte": bytes(range(256))}
    for name, content in contents.items():
        (source / name).write_bytes(content)
    reader = checkpoint(tmp_path, file_pieces(source, "tokenizer"))
    restore_files(reader, "tokenizer", tmp_path / "back")
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == contents


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/b", ".."])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    values = torch.zeros(3, dtype=torch.uint8)
    reader = checkpoint(tmp_path, [Piece.whole(f"tokenizer/{name}", values)])
    with pytest.raises(CheckpointError) as error:
        restore_files(reader, "tokenizer", tmp_path / "inner" / "back")
    assert error.value.sentence == (
        f"checkpoint {reader.folder} holds a file named {name!r}, which is no plain name"
    )
    assert not any((tmp_path / "inner" / "back").iterdir())
    assert not (tmp_path / "inner" / "evil").exists()


def test_no_files_is_one_sentence(tmp_path):
    reader = checkpoint(tmp_path, [Piece.whole("w", torch.zeros(2))])
    with pytest.raises(CheckpointError, match="the checkpoint holds no tokenizer files"):
        restore_files(reader, "tokenizer", tmp_path / "back")
