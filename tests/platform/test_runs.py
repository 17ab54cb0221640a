"""Runs from end to end, through the command line, in real Ray actors."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2
from support.fake_cluster import free_port, ray_head
from support.runs import (
    LIMIT_S,
    dualray,
    losses_of,
    make_corpus,
    metrics_of,
    started,
    state_of,
    write_run_file,
)

from dualray.actors.vllm_tokenizer import byte_level_json
from dualray.checkpoint.store import find, steps
from dualray.model.hugging_face import from_hugging_face
from dualray.platform.loads import loads_files

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

PROMPT = "the cat sat "
SERVING = r"serving at (\S+:\d+) from worker processes ([\d, ]+)$"
TWO_WORKERS = {"pipeline": 2, "experts": 1, "schedule": "1f1b"}
GREEDY = ("--temperature", "0", "--max-tokens", "12", "--ignore-eos")
ONE_WORKER = {"pipeline": 1, "experts": 1, "schedule": "1f1b"}
FOREVER = {"steps": 100_000, "lr": 1e-4}


def named(processes: Callable[[], list[psutil.Process]], name: str) -> psutil.Process:
    """The process of that name, once it is there."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for process in processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in process.name():
                    return process
    raise AssertionError(f"no process {name}")


def controller_of(run: Path) -> psutil.Process:
    """The actor's process: the workers' sibling that Ray has named so."""
    worker = psutil.Process(state_of(run)["workers"][0]["pid"])
    parent = worker.parent()
    assert parent is not None
    return named(parent.children, "ray::Controller")


def handed_out(target: str) -> dict[str, bytes]:
    """Files by name that a gateway is given with the tokenizer."""
    with grpc.insecure_channel(target) as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        pieces = list(stub.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=LIMIT_S))
    archive = zipfile.ZipFile(io.BytesIO(b"".join(piece.data for piece in pieces)))
    return {name: archive.read(name) for name in archive.namelist()}


def test_train_serve_and_serve_again(tmp_path: Path) -> None:
    data = make_corpus(tmp_path / "corpus")
    # Two steps at the tiny preset's own context, two with YaRN: what serves is the extended model.
    write_run_file(
        tmp_path / "tiny.yaml",
        data,
        train={"steps": 2, "eval_every": 2, "checkpoint_every": 2},
        extend={
            "rope_scaling": {"factor": 2, "mscale_all_dim": 1.0},
            "phases": [{"steps": 2, "seq_len": 300, "lr": 3e-3}],
        },
    )
    run = tmp_path / "runs" / "tiny"
    with started("train", "tiny.yaml", cwd=tmp_path) as train:
        for step in range(1, 5):
            train.line(rf"^step {step}/4 ")
        serving = train.line(SERVING)
        target, pids = serving[1], [int(pid) for pid in serving[2].split(",")]
        assert len(set(pids)) == 4
        assert set(pids) <= {process.pid for process in train.session()}
        train.line("^first token")

        streamed = dualray("generate", PROMPT, "--target", target, *GREEDY, cwd=tmp_path)
        assert streamed.out.startswith(PROMPT)
        assert "12 tokens (length)" in streamed.err
        assert "tiny after step 4" in streamed.err

        files = handed_out(target)
        assert files["tokenizer.json"] == byte_level_json()
        served = from_hugging_face(json.loads(files["config.json"]))
        assert (served.rope_scaling.factor, served.vocab_size) == (2, 512)

        status = dualray("status", "--json", cwd=tmp_path)
        [row] = json.loads(status.out)
        assert (row["name"], row["state"], row["target"]) == ("tiny", "serving", target)
        assert [worker["pid"] for worker in row["workers"]] == pids
        assert (row["step"], row["steps"]) == (4, 4)
        assert "auth_token" not in row
        assert (run / "run.json").stat().st_mode & 0o077 == 0

        refused = dualray("train", "tiny.yaml", "--resume", cwd=tmp_path)
        assert (refused.code, refused.err) == (
            2,
            "error: run tiny is serving already; stop it with `dualray stop tiny`, or give this "
            "run another name.\n",
        )
        stop = dualray("stop", "tiny", cwd=tmp_path)
        assert (stop.code, stop.out) == (0, "run tiny is stopped\n")
        ended = train.end()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith("next: dualray report runs/tiny\n")
    assert state_of(run) | {"workers": 0} == state_of(run) | {
        "workers": 0, "state": "stopped", "target": None, "auth_token": None,
    }  # fmt: skip

    assert list(losses_of(run)) == [1, 2, 3, 4]
    records = metrics_of(run)
    assert [r["step"] for r in records if r.get("event") == "checkpoint"] == [2, 4]
    assert [r["step"] for r in records if r.get("heldout_loss") is not None] == [2, 4]
    [switch] = [r for r in records if r.get("event") == "switch"]
    assert switch["workers_before"] == switch["workers_after"] == pids
    assert switch["seconds_to_first_token"] > 0
    assert find(run).path == run / "checkpoints" / "step-4"
    # Every token's choices have been computed by some expert, in each of the MoE layers.
    [table] = [file.read() for file in loads_files(run / "loads")]
    computed = Counter()
    for row in table.to_pylist():
        computed[row["step"], row["layer"]] += row["tokens"]
    chosen = {key: 8 * 16 * 2 if key[0] <= 2 else 8 * 300 * 2 for key in computed}
    assert computed == chosen
    assert {step for step, _ in computed} == {1, 2, 3, 4}

    report = dualray("report", "runs/tiny", cwd=tmp_path)
    assert report.code == 0, report.err
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "http-equiv" not in page.lower()

    with started("serve", "runs/tiny", cwd=tmp_path) as serve:
        target = serve.line(SERVING)[1]
        again = dualray("generate", PROMPT, "--target", target, *GREEDY, "--json", cwd=tmp_path)
        answer = json.loads(again.out)
        assert f"{PROMPT}{answer['text']}\n" == streamed.out
        assert answer["training_step"] == 4
        assert handed_out(target) == files
        # `timeout`, for one, sends SIGTERM to the group; the embedded Ray must outlive it.
        serve.signal_group(signal.SIGTERM)
        assert (serve.end().code, state_of(tmp_path / "runs" / "tiny-serve")["state"]) == (
            0, "stopped",
        )  # fmt: skip


def test_a_lost_worker_then_resume_then_ctrl_c(tmp_path: Path) -> None:
    data = make_corpus(tmp_path / "corpus")
    write_run_file(
        tmp_path / "tiny.yaml",
        data,
        layout=TWO_WORKERS,
        train=FOREVER | {"checkpoint_every": 2},
        serve={"after_training": False},
    )
    run = tmp_path / "runs" / "tiny"
    with started("train", "tiny.yaml", cwd=tmp_path) as train:
        train.line("^checkpoint step-4 committed")
        worker = state_of(run)["workers"][1]
        os.kill(worker["pid"], signal.SIGKILL)
        ended = train.end()
    newest = find(run).path
    assert newest is not None
    assert re.fullmatch(
        rf"error: worker 1 \(process {worker['pid']} on {worker['node']}\) died during "
        rf"(step|write_checkpoint); the last committed checkpoint is {newest}, continue from it "
        r"with --resume\.\n",
        ended.err,
    ), ended
    assert ended.code == 2
    assert state_of(run)["state"] == "failed"
    before = losses_of(run)

    # Damage the newest checkpoint: the one before it must do, and its steps come out the same.
    last = steps(run / "checkpoints")[0][0]
    shard = next(path for path in newest.iterdir() if path.suffix == ".safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with started("train", "tiny.yaml", "--resume", cwd=tmp_path) as train:
        train.line(rf"{shard} does not match its hash, so its bytes have changed; skipped, and ")
        train.line(rf"^step +{last - 1}/")
        train.line(rf"^step +{last + 1}/")
        train.signal_group(signal.SIGINT)
        train.line("^stopping after this step")
        ended = train.end()
    assert (ended.code, ended.err) == (0, "")
    after = losses_of(run)
    common = set(range(last - 1, last + 2)) & before.keys()
    assert common >= {last - 1, last}
    assert {step: after[step] for step in common} == {step: before[step] for step in common}
    assert find(run).path == run / "checkpoints" / f"step-{max(after)}"
    assert state_of(run)["state"] == "stopped"

    refused = dualray("train", "tiny.yaml", cwd=tmp_path)
    assert (refused.code, refused.err) == (
        2,
        "error: runs/tiny already holds the metrics.jsonl of a run; continue it with --resume, or "
        "give this run another name.\n",
    )


def test_ctrl_c_while_starting_and_a_lost_head(tmp_path: Path) -> None:
    data = make_corpus(tmp_path / "corpus")
    write_run_file(
        tmp_path / "tiny.yaml",
        data,
        layout=ONE_WORKER,
        train=FOREVER | {"checkpoint_every": 2},
        serve={"after_training": False},
    )
    run = tmp_path / "runs" / "tiny"
    # While Ray starts there is nothing to save.
    with started("train", "tiny.yaml", cwd=tmp_path) as train:
        named(train.session, "gcs_server")
        train.signal_group(signal.SIGINT)
        ended = train.end()
    assert (ended.code, ended.out, ended.err) == (0, "stopped before the run had started\n", "")
    assert not run.exists()

    # Its actors still answer, and Ray would end the command after a minute without a word.
    with started("train", "tiny.yaml", cwd=tmp_path) as train:
        train.line("^checkpoint step-2 committed")
        head = named(train.session, "gcs_server")
        head.kill()
        ended = train.end()
    newest = steps(run / "checkpoints")[0][1]
    assert re.fullmatch(
        rf"error: the Ray head at \S+ is gone; the last committed checkpoint is {newest}; "
        r"continue from it with --resume\.\n",
        ended.err,
    ), ended
    assert ended.code == 2
    [row] = json.loads(dualray("status", "--json", cwd=tmp_path).out)
    assert row["state"] == "lost"


def test_runs_on_a_cluster(tmp_path: Path) -> None:
    data = make_corpus(tmp_path / "corpus")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    port = free_port()
    for folder in (tmp_path, elsewhere):
        write_run_file(
            folder / "tiny.yaml",
            data,
            layout=ONE_WORKER,
            train=FOREVER,
            serve={"port": port},
        )
    write_run_file(tmp_path / "wide.yaml", data)
    run = tmp_path / "runs" / "tiny"
    with ray_head(num_cpus=3) as head:
        at = ("--address", head.address)
        with started("train", "tiny.yaml", *at, cwd=tmp_path) as train:
            train.line("^step +1/")
            same_name = dualray("train", "tiny.yaml", *at, cwd=elsewhere)
            assert (same_name.code, same_name.err) == (
                2,
                "error: run tiny is training on this cluster already; stop it with `dualray stop "
                "tiny`, or give this run another name.\n",
            )
            # The engine listens from the start, so another run hears of a taken port at once.
            same_port = dualray("train", "tiny.yaml", *at, "--set", "name=other", cwd=elsewhere)
            assert same_port.err == (
                f"error: serve.port is {port} and 127.0.0.1:{port} cannot be listened on, it is "
                "taken by another process or not this machine's; choose another serve.port, or 0 "
                "for a free one.\n"
            )
            assert same_port.code == 2
            other = elsewhere / "runs" / "other"
            assert sorted(path.name for path in other.iterdir()) == ["run.json", "tokenizer"]
            train.kill_session()
        # Without its client the run goes on.
        [row] = json.loads(dualray("status", "--json", cwd=tmp_path).out)
        assert row["state"] == "training"
        assert dualray("stop", "tiny", cwd=tmp_path).out == "run tiny is stopped\n"
        newest = find(run).path
        assert newest == run / "checkpoints" / f"step-{max(losses_of(run))}"

        with started("train", "tiny.yaml", "--resume", *at, cwd=tmp_path) as train:
            train.line("^step ")
            controller_of(run).kill()
            ended = train.end()
        assert (ended.code, ended.err) == (
            2,
            f"error: the controller of run tiny died; the last committed checkpoint is {newest}; "
            "continue from it with --resume.\n",
        )
        # Whatever was reserved has been given back: three CPUs are free.
        wide = dualray("train", "wide.yaml", *at, cwd=tmp_path)
        assert (wide.code, wide.err) == (
            2,
            "error: the layout needs 4 workers x (1 CPU), the cluster has 3 CPUs and 0 GPUs free "
            "on 1 node, and no autoscaler brings nodes; fits: 3 workers, e.g. layout.pipeline 2 "
            "and layout.experts 1.\n",
        )
        assert not (tmp_path / "runs" / "wide").exists()
