"""`dualray checkpoint list` and `verify`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dualray.errors import CheckpointError
from dualray.platform.commands.checkpoint import app


@pytest.fixture
def run(tmp_path: Path, save, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/demo with steps 5 and 10, seen from the folder that has `runs`."""
    monkeypatch.chdir(tmp_path)
    for step in (5, 10):
        save(Path("runs/demo/checkpoints"), step)
    return Path("runs/demo")


def call(*args: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result.output


def refusal(*args: str) -> str:
    error = CliRunner().invoke(app, args).exception
    assert isinstance(error, CheckpointError)
    return str(error)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["demo", "runs/demo", "runs/demo/checkpoints"])
def test_list_shows_newest_first(run: Path, name: str) -> None:
    output = call("list", name)
    assert output.index("step-10") < output.index("step-5")
    assert output.endswith(f"check their bytes: dualray checkpoint verify {name}\n")
    rows = json.loads(call("list", name, "--json"))["checkpoints"]
    assert [(row["step"], row["ok"], row["num_tensors"], row["num_files"]) for row in rows] == [
        (10, True, 3, 2),
        (5, True, 3, 2),
    ]
    files = (run / "checkpoints" / "step-10").glob("*.safetensors")
    assert rows[0]["size_bytes"] == sum(path.stat().st_size for path in files)


def test_verify_a_sound_run_or_step(run: Path) -> None:
    output = call("verify", "demo")
    assert output.count("verified") == 2
    assert output.endswith("serve it: dualray serve runs/demo/checkpoints/step-10\n")
    assert call("verify", "runs/demo/checkpoints/step-5").count("verified") == 1


def test_verify_names_the_damaged_file_and_fails(run: Path) -> None:
    path = run / "checkpoints" / "step-10" / "rank-00000-00001.safetensors"
    flip(path)
    problem = f"{path} does not match its hash, so its bytes have changed"
    output = call("verify", "demo", exit_code=2)
    assert f"error: {problem}; restore it from a copy, or use an older checkpoint.\n" in output
    assert output.count("verified") == output.count("damaged") == 1
    rows = json.loads(call("verify", "demo", "--json", exit_code=2))["checkpoints"]
    assert [row["ok"] for row in rows] == [False, True]
    assert rows[0]["problem"].startswith(problem)
    assert path.exists()  # looking never moves anything
    assert json.loads(call("list", "demo", "--json"))["checkpoints"][0]["ok"], "sizes are right"


def test_bad_input(run: Path) -> None:
    assert refusal("list", "other") == (
        f"other is neither a folder nor a run in {Path('runs').absolute()}; name a run, its "
        "folder or a step-N folder in it."
    )
    Path("runs/fresh/checkpoints").mkdir(parents=True)
    assert refusal("list", "fresh") == (
        "there is no checkpoint in runs/fresh; set train.checkpoint_every to have them written."
    )
    Path("empty").mkdir()
    assert "error: empty is not a checkpoint, since it has no manifest.json; name a step-N" in call(
        "verify", "empty", exit_code=2
    )
