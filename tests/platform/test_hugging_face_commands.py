"""`dualray checkpoint import` and `export`: what they say, and what others do with the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import yaml
from support.hugging_face import QUANTIZATION, released_tensors, with_fp8, write_folder
from support.models import tiny_config
from typer.testing import CliRunner

from dualray.checkpoint.reader import Reader, expect
from dualray.data.tokenizer import ByteTokenizer
from dualray.errors import ConfigError, DualrayError
from dualray.platform.commands.checkpoint import app
from dualray.platform.console import Console
from dualray.platform.imported import shard_bytes
from dualray.platform.launch import plan_serving
from dualray.platform.run_file import parse_run_file, to_mapping

CONFIG = tiny_config(num_hidden_layers=2)
RUN = {"name": "next", "data": {"path": "x"}, "train": {"steps": 2, "seq_len": 8}}


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder `hf` below the working directory: FP8 weights and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    tensors = with_fp8(released_tensors(CONFIG))
    folder = write_folder(tmp_path / "hf", CONFIG, tensors, quantization_config=QUANTIZATION)
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[END]": 2}, "a"))
    inner.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    return folder


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments: str) -> str:
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, DualrayError)
    return str(error)


def test_import_says_how_to_go_on_and_it_is_so(tmp_path: Path) -> None:
    output = call("import", "hf", "--out", "My model!")
    said, _, section = output.partition("\n\n")
    assert said.splitlines()[-2:] == [
        "serve it: dualray serve My model!",
        "train on from it, with this in a run file:",
    ]
    assert "tensors, 0.00 GB, in My model!" in said
    run = parse_run_file(RUN | yaml.safe_load(section) | {"train": RUN["train"]})
    reader = Reader(tmp_path / "My model!")
    expect(reader, to_mapping(run)["model"], reader.meta["tokenizer_sha256"])
    assert "verified" in call("verify", "My model!")
    assert json.loads(call("list", "My model!", "--json"))["checkpoints"][0]["step"] == 0

    assignment = plan_serving(Path("My model!"), ["serve.port=0"], console=Console())
    assert assignment.run.name == "My-model--serve"
    assert assignment.run.model == CONFIG
    assert assignment.run.train.dtype == "bfloat16"
    assert (assignment.trains, assignment.first_step) == (False, 0)


def test_fp8_is_kept_if_asked_for() -> None:
    plain = json.loads(call("import", "hf", "--out", "plain", "--json"))
    kept = json.loads(call("import", "hf", "--out", "kept", "--fp8", "keep", "--json"))
    assert kept["size_bytes"] < plain["size_bytes"]
    assert kept["num_tensors"] > plain["num_tensors"]
    assert (plain["notes"], plain["path"]) == ([], "plain")
    assert plain["model"]["num_hidden_layers"] == 2
    assert plan_serving(Path("kept"), [], console=Console()).run.model == CONFIG


def test_export_of_a_step_or_of_a_runs_newest(tmp_path: Path) -> None:
    call("import", "hf", "--out", "runs/mine/checkpoints/step-7", "--fp8", "keep")
    output = call("export", "mine", "--out", "back", "--max-shard-size", "40 KB")
    first, second = output.splitlines()
    assert first.startswith("runs/mine/checkpoints/step-7: ")
    assert second == 'load it: transformers.AutoModelForCausalLM.from_pretrained("back")'
    files = len(list((tmp_path / "back").glob("*.safetensors")))
    assert first.endswith(f" {files} safetensors files in back")
    assert files > 1
    said = json.loads(call("export", "runs/mine/checkpoints/step-7", "--out", "again", "--json"))
    assert (said["num_files"], said["from"]) == (1, "runs/mine/checkpoints/step-7")
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == 2


def test_what_a_person_gets_wrong(source: Path) -> None:
    assert refusal("import", "nowhere", "--out", "x") == (
        "nowhere is not a folder; name a Hugging Face model's folder, which has config.json in it."
    )
    assert refusal("export", "nowhere", "--out", "x") == (
        "there is no checkpoint in nowhere; train without --resume first, or name a folder that "
        "has step-N folders."
    )
    assert refusal("export", "nowhere", "--out", "hf") == (
        "--out is hf, which exists; name a new folder."
    )
    (source / "tokenizer.json").write_text("{}")
    assert refusal("import", "hf", "--out", "x").startswith(
        "tokenizer hf/tokenizer.json is not a tokenizer.json"
    )
    ByteTokenizer().save(source)
    assert refusal("import", "hf", "--out", "x") == (
        "the tokenizer of hf has 257 ids and vocab_size of its config.json is 97; take "
        "tokenizer.json and config.json of one model."
    )
    (source / "tokenizer.json").unlink()
    output = call("import", "hf", "--out", "x", "--fp8", "keep")
    assert output.startswith(
        "note: it has no tokenizer.json, so it can be trained and scored but not served\n"
    )
    assert "serve it" not in output
    with pytest.raises(DualrayError) as caught:
        plan_serving(Path("x"), [], console=Console())
    assert str(caught.value) == (
        "checkpoint x was imported without a tokenizer.json, so no text can be served from it; "
        "put tokenizer.json beside the Hugging Face files and import them again."
    )


@pytest.mark.parametrize(
    ("stored", "computed"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_the_dtype_that_an_import_computes_in(tmp_path: Path, stored: str, computed: str) -> None:
    write_folder(tmp_path / "plain", CONFIG, released_tensors(CONFIG, dtype=getattr(torch, stored)))
    call("import", "plain", "--out", "ours")
    meta = Reader(tmp_path / "ours").meta
    assert parse_run_file(meta["run"]).train.dtype == computed


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("10kb", 10_000), ("7", 7)]
)
def test_shard_sizes(text: str, size: int) -> None:
    assert shard_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "big", "-1GB", "5TB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shard_bytes(text)
    assert str(caught.value) == (
        f"--max-shard-size is {text} and must be a number of bytes above 0, with KB, MB or GB; "
        "write --max-shard-size 5GB."
    )
