"""The command line's surface, frozen, and how it ends.

A new setting is a field of the run file; whoever adds an option here says why.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import typer

import dualray
from dualray.platform.cli import app, main

README = Path(__file__).resolve().parents[2] / "README.md"

SURFACE: dict[str, list[str]] = {
    "": ["--version"],
    "bench context": [
        "BEFORE", "AFTER", "--data", "--json", "--needles", "--record", "--windows",
    ],
    "bench balance": ["--data", "--json", "--out", "--quick", "--record"],
    "bench attention": ["--data", "--json", "--out", "--quick", "--record"],
    "bench experts": ["--json", "--quick", "--record"],
    "bench model": [
        "--compiled", "--dtype", "--json", "--no-compiled", "--pairs", "--quick", "--record",
        "--threads",
    ],
    "bench overlap": ["--json", "--quick", "--record"],
    "bench serve": ["--json", "--quick", "--record"],
    "bench speculation": ["--checkpoint", "--data", "--json", "--quick", "--record"],
    "bench rebalance": ["--json", "--quick", "--record"],
    "bench schedule": ["--json", "--quick", "--ranks", "--record"],
    "checkpoint export": ["CHECKPOINT", "--json", "--max-shard-size", "--out"],
    "checkpoint import": ["HF_DIR", "--fp8", "--json", "--out"],
    "checkpoint list": ["RUN", "--json"],
    "checkpoint verify": ["PATH", "--json"],
    "data build": ["SRC...", "--json", "--out", "--tokenizer"],
    "data fetch": ["NAME", "--out"],
    "generate": [
        # What proves who asks belongs to the caller, who has no run file.
        "PROMPT", "--ca", "--cert", "--ignore-eos", "--json", "--key", "--max-tokens", "--min-p",
        "--seed", "--stop", "--target", "--temperature", "--timeout", "--token-file", "--top-k",
        "--top-p",
    ],
    "k8s render": ["RUN.yaml", "--kind", "--set"],
    "mode": [
        # How long to wait is the caller's business, as with stop.
        "RUN", "MODE", "--json", "--timeout",
    ],
    "logs": ["JOB", "--address", "--follow", "--no-follow"],
    "plan": ["MODEL_OR_RUN", "--cluster", "--json", "--plot"],
    "report": ["RUN_DIR", "--out"],
    "schedule": ["KIND", "--chunks", "--costs", "--json", "--ranks", "--trace"],
    "score": ["CHECKPOINT", "--json", "--text", "--tokens"],
    "serve": ["CHECKPOINT", "--address", "--set"],
    "status": ["RUN", "--address", "--json"],
    "stop": ["RUN", "--address", "--timeout"],
    "submit": [
        "RUN.yaml", "--address", "--follow", "--id", "--no-follow", "--set", "--workspace",
    ],
    "train": ["RUN.yaml", "--address", "--resume", "--set"],
}  # fmt: skip
"""Command to its arguments and options, the short and the negative forms included."""


def commands(command: click.Command, path: str = "") -> dict[str, click.Command]:
    """Every command by its words, groups with options of their own included."""
    if not hasattr(command, "commands"):
        return {path: command}
    found = {path: command} if not path or options_of(command) else {}
    for name, inner in command.commands.items():
        found |= commands(inner, f"{path} {name}".strip())
    return found


def options_of(command: click.Command) -> list[str]:
    arguments, options = [], []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            arguments.append(parameter.metavar or parameter.name.upper())
        else:
            options += [*parameter.opts, *parameter.secondary_opts]
    return arguments + sorted(set(options) - {"--help"})


def test_the_surface_is_frozen() -> None:
    root = typer.main.get_command(app)
    found = {path: options_of(command) for path, command in commands(root).items()}
    assert found == SURFACE


def test_every_command_says_what_it_does() -> None:
    for path, command in commands(typer.main.get_command(app)).items():
        if path:
            assert command.help, path


def test_the_readme_lists_exactly_these_commands() -> None:
    cells = re.findall(r"^\| `dualray ([^`]*)` \|", README.read_text(encoding="utf-8"), re.M)
    listed = [re.match(r"[a-z0-9]+(?: [a-z0-9]+)*", cell)[0] for cell in cells]
    assert sorted(listed) == sorted(path for path in SURFACE if path)
    for cell, path in zip(cells, listed):
        for option in re.findall(r"--[a-z0-9-]+", cell):
            assert option in SURFACE[path], cell


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def dualray_command(monkeypatch, capsys, tmp_path) -> Callable[..., Ended]:
    """Runs `main` in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["dualray", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Ended(ended.value.code, said.out, said.err)

    return run


def test_as_a_module(tmp_path: Path) -> None:
    """A process of its own: what a job on a cluster and a pod start."""
    command = [sys.executable, "-m", "dualray.platform.cli"]
    limits = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 120}
    version = subprocess.run([*command, "--version"], check=False, **limits)
    assert (version.returncode, version.stdout) == (0, f"dualray {dualray.__version__}\n")
    wrong = subprocess.run([*command, "train", "none.yaml"], check=False, **limits)
    assert wrong.stderr == "error: run file none.yaml does not exist; check the path.\n"
    assert (wrong.returncode, wrong.stdout) == (2, "")


def test_a_path_that_no_file_system_takes_is_one_sentence(dualray_command) -> None:
    ended = dualray_command("score", "x" * 300, "--text", "t")
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(
        r"error: x{97}\.{3}x+\S{,20} cannot be used \(File name too long\); check the path\.\n",
        ended.err,
    )


def test_version(dualray_command) -> None:
    assert dualray_command("--version") == Ended(0, f"dualray {dualray.__version__}\n", "")


RUN_FILE = "name: t\nmodel: tiny\ndata: {path: d}\ntrain: {steps: 3, seq_len: 16}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train none.yaml", "run file none.yaml does not exist; check the path."),
        (
            "train run.yaml --set train.stepz=1",
            "train.stepz is not a field of the run file; did you mean train.steps?",
        ),
        (
            "train run.yaml --address http://head:8265",
            "cluster.address is http://head:8265 and must be HOST:PORT or auto; use "
            "`dualray submit` for a dashboard address, or give HOST:6379 of the head.",
        ),
        ("mode t serv", "MODE is serv and must be train, serve or pause; did you mean serve?"),
        ("mode t serve", "run t has no run.json in runs/t; no run was started here yet."),
        ("stop t", "run t has no run.json in runs/t; no run was started here yet."),
        (
            "generate a --target localhost",
            "--target is localhost and must be HOST:PORT; try --target 127.0.0.1:50051.",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    dualray_command, tmp_path: Path, arguments: str, sentence: str
) -> None:
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    assert dualray_command(*arguments.split()) == Ended(2, "", f"error: {sentence}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("arguments", ["nonsense", "train", "train a --lr 3", "data nonsense"])
def test_wrong_usage_shows_the_usage(dualray_command, arguments: str) -> None:
    ended = dualray_command(*arguments.split())
    assert (ended.code, ended.out) == (2, "")
    assert "Usage: " in ended.err


def test_no_arguments_print_the_help(dualray_command) -> None:
    ended = dualray_command()
    for command in ("train", "serve", "generate", "data", "checkpoint"):
        assert re.search(rf"\b{command}\b", ended.out + ended.err)
