"""Runs as Ray jobs, against a real head with its dashboard."""

import os
import subprocess

import pytest
import typer
import yaml
from support.fake_cluster import FakeNodes, free_port, ray_head
from typer.testing import CliRunner

from dualray.data.shards import build
from dualray.errors import ConfigError, RunError
from dualray.platform import submit as jobs
from dualray.platform.commands import submit
from dualray.platform.run_file import load_run_file, parse_run_file

LOOK = """python - <<'END'
import dualray, os, sys
print("code", os.path.dirname(dualray.__file__) == os.path.join(os.getcwd(), "dualray"))
print("run", "steps: 5" in open("run.yaml").read(), sorted(os.listdir("data")))
sys.exit(3)
END"""

# Longer than Ray's default patience of 3 s, as a checkpoint may take.
CHECKPOINT_ON_STOP = (
    "trap 'for i in 1 2 3 4 5; do sleep 1; done; echo committed; exit 0' TERM; "
    "echo training; while :; do sleep 0.1; done"
)


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "manifest.json").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "walk",
                "model": "tiny",
                "data": {"path": "shards"},
                "layout": {"schedule": "1f1b"},
                "train": {"steps": 5, "seq_len": 16, "micro_batch_size": 1, "micro_batches": 2},
            }
        )
    )
    return path


def test_what_travels(run_file):
    with jobs.staged(load_run_file(run_file, ["train.steps=7"])) as folder:
        assert (folder / "dualray" / "platform" / "presets" / "tiny.yaml").is_file()
        assert not list(folder.rglob("__pycache__"))
        assert (folder / "data" / "manifest.json").read_text() == "{}"
        sent = parse_run_file(yaml.safe_load((folder / "run.yaml").read_text()))
    assert sent == load_run_file(run_file, ["train.steps=7"])
    assert not folder.exists()


def test_shards_that_are_elsewhere_stay_there(run_file):
    with jobs.staged(load_run_file(run_file, ["data.path=/mnt/shards"])) as folder:
        assert not (folder / "data").exists()


def test_shards_too_large_to_travel(run_file, monkeypatch):
    monkeypatch.setattr(jobs, "DATA_LIMIT_BYTES", 1)
    with pytest.raises(ConfigError) as caught, jobs.staged(load_run_file(run_file)):
        pass
    assert str(caught.value) == (
        "data.path shards holds 0 MiB, and at most 0 MiB travel with a job; copy the folder to "
        "storage that every node sees and give its absolute path."
    )


@pytest.mark.parametrize(
    ("workspace", "place"), [("~/my runs", "home/my runs"), ("deep/er", "deep/er")]
)
@pytest.mark.parametrize("ships_data", [True, False])
def test_the_command_trains_in_the_workspace(tmp_path, workspace, place, ships_data):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\npwd; printf "%s\\n" "$@"; exit 5\n')
    python.chmod(0o755)
    shipped = tmp_path / "shipped here"
    shipped.mkdir()
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        jobs.train_command(
            workspace if workspace.startswith("~") else str(tmp_path / workspace),
            ships_data=ships_data,
        ),
        shell=True,
        cwd=shipped,
        env={"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    data = ["--set", f"data.path={shipped}/data"] if ships_data else []
    assert done.stdout.splitlines() == [
        str(tmp_path / place),
        *("-m", "dualray.platform.cli", "train", f"{shipped}/run.yaml", "--address", "auto"),
        *data,
    ]
    assert done.returncode == 5


def test_an_address_where_nothing_answers(run_file):
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RunError) as caught:
        jobs.submit(run_file, address)
    assert str(caught.value) == (
        f"--address is {address} and no Ray dashboard answers there; check the host, the port "
        "(8265 by default) and that the cluster has its dashboard."
    )


def test_an_address_that_is_no_dashboard(run_file):
    with pytest.raises(ConfigError) as caught:
        jobs.submit(run_file, "127.0.0.1:6379")
    assert str(caught.value) == (
        "--address is 127.0.0.1:6379 and must be the head's dashboard; write http://HOST:8265."
    )


@pytest.mark.ray
def test_a_job_from_submission_to_its_end(run_file, capfd):
    with ray_head(num_cpus=1, dashboard=True) as head:
        address = head.dashboard
        with pytest.raises(RunError) as unknown:
            jobs.job_status(address, "walk")
        assert str(unknown.value).startswith(f"job walk is unknown to the cluster at {address};")

        capfd.readouterr()
        job = jobs.submit(run_file, address, entrypoint=LOOK)
        assert job.submission_id == "walk"
        heard = []
        assert jobs.follow(address, "walk", heard.append) == 3
        text = "".join(heard)
        assert "code True\nrun True ['manifest.json']\n" in text
        assert text in jobs.job_logs(address, "walk")
        job = jobs.job_status(address, "walk")
        assert (job.status, job.exit_code) == ("FAILED", 3)
        assert capfd.readouterr() == ("", "")

        with pytest.raises(RunError) as taken:
            jobs.submit(run_file, address, submission_id="walk", entrypoint="true")
        assert str(taken.value) == "job walk exists already (FAILED); give another --id."

        # The name again, numbered: the earlier job has ended.
        job = jobs.submit(run_file, address, entrypoint=CHECKPOINT_ON_STOP)
        assert job.submission_id == "walk-2"
        for text in _log_of(address, "walk-2"):
            if "training" in text:
                break
        with pytest.raises(RunError, match=r"job walk-2 exists already \(RUNNING\); stop it first"):
            jobs.submit(run_file, address, entrypoint="true")
        assert jobs.job_stop(address, "walk-2").status == "STOPPED"
        assert "committed" in jobs.job_logs(address, "walk-2")
        assert jobs.follow(address, "walk-2", heard.append) == jobs.STOPPED_EXIT_CODE


def _log_of(address, job):
    while True:
        yield jobs.job_logs(address, job)


@pytest.mark.ray
def test_a_submitted_run_trains_when_an_autoscaler_has_brought_its_nodes(run_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of a corpus that {n % 7} can learn\n" for n in range(2000)))
    build([str(text)], tokenizer="bytes", out=tmp_path / "tokens")
    app = typer.Typer()
    app.command()(submit.submit)
    arguments = [str(run_file), "--workspace", str(tmp_path / "far away")]
    for setting in (
        *("data.path=tokens", "layout.experts=2", "train.steps=2", "train.checkpoint_every=2"),
        "serve.after_training=false",
    ):
        arguments += ["--set", setting]
    with ray_head(num_cpus=0, nodes=FakeNodes(num_cpus=1, max_workers=3), dashboard=True) as head:
        result = CliRunner().invoke(app, [*arguments, "--address", head.dashboard])
    log = result.output
    assert result.exit_code == 0, log
    assert log.startswith(f"job walk is accepted by {head.dashboard}\n")
    assert "waiting up to 600 s for the autoscaler to bring 2 workers x (1 CPU)\n" in log
    assert "the nodes have come: 2 workers x (1 CPU) placed after" in log
    assert "step 2/2" in log
    assert (tmp_path / "far away/runs/walk/checkpoints/step-2/COMMIT").is_file()
