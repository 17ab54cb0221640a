"""`dualray data`: what is printed, what is written, and errors left to the command line."""

import json

import pytest
from typer.testing import CliRunner

from dualray.data import fetch as fetch_module
from dualray.data.dataset import TokenDataset
from dualray.errors import DataError
from dualray.platform.commands.data import app


def invoke(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of some words\n" for i in range(800)))
    return path


def test_build_prints_a_table_and_the_next_command(text, tmp_path):
    out = tmp_path / "shards"
    result = invoke("build", text, "--tokenizer", "bpe:300", "--out", out)
    assert result.exit_code == 0, result.output
    for word in ("train", "heldout", "bytes per token", "bpe with 300 tokens"):
        assert word in result.stdout
    assert result.stdout.splitlines()[-1] == f"next: dualray train RUN.yaml --set data.path={out}"
    assert TokenDataset.open(out).vocab_size == 300


def test_build_json_is_the_manifest_and_nothing_else(text, tmp_path):
    out = tmp_path / "shards"
    result = invoke("build", text, "--tokenizer", "bytes", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((out / "manifest.json").read_text())


def test_errors_propagate(text, tmp_path):
    result = invoke("build", tmp_path / "none", "--tokenizer", "bytes", "--out", tmp_path / "o")
    assert isinstance(result.exception, DataError)
    assert str(result.exception) == f"source {tmp_path}/none does not exist; check the path."
    result = invoke("fetch", "shakspeare", "--out", tmp_path / "o")
    assert isinstance(result.exception, DataError)
    assert str(result.exception).endswith("; did you mean shakespeare.")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_fetch_names_the_build_command(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(fetch_module.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    out = tmp_path / "corpus"
    result = invoke("fetch", "python-stdlib", "--out", out)
    assert result.exit_code == 0, result.output
    assert "1 files, 6 bytes of text" in result.stdout
    assert result.stdout.splitlines()[-1] == (
        f"next: dualray data build {out} --tokenizer bpe:4096 --out {out}-tokens"
    )
