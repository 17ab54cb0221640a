"""Mistakes that `train` and `serve` find before Ray starts: one sentence, exit code 2, no trace."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from support.runs import dualray, make_corpus, write_run_file

from dualray.actors.cluster import ClusterConfig, Connection, connect
from dualray.checkpoint.writer import Piece, write_rank
from dualray.data.dataset import TokenDataset
from dualray.parallel.slots import contiguous_placement
from dualray.platform import cli, launch
from dualray.platform.events import EventLog
from dualray.platform.folder import RunFolder
from dualray.platform.metrics_log import MetricsLog
from dualray.platform.run_file import load_run_file, to_mapping
from dualray.platform.scheduling.choice import start_of
from dualray.platform.training import Training


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "bytes": make_corpus(folder / "bytes"),
        "bpe": make_corpus(folder / "bpe", "bpe:280"),
    }


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here, corpora, monkeypatch, capsys):
    """refused("train", ...) runs a command that must fail, and returns its sentence."""

    def run(*args: str) -> str:
        before = traces(here)
        monkeypatch.setattr(sys, "argv", ["dualray", *args])
        monkeypatch.setattr(launch, "connect", connect_elsewhere)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n"), err[:7]) == (2, "", 1, "error: "), err
        assert traces(here) == before
        return err.removeprefix("error: ").removesuffix("\n")

    return run


def connect_elsewhere(cluster: ClusterConfig, num_workers: int) -> Connection:
    assert cluster.address is not None, "the mistake was not found and Ray would start"
    return connect(cluster, num_workers)


def traces(folder: Path) -> dict[str, bytes | None]:
    paths = sorted((folder / "runs").rglob("*")) if (folder / "runs").exists() else []
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


class OneTensor:
    """Stands for the workers of a run: what they write is one small tensor."""

    def call(self, method: str, folder: str) -> list:
        assert method == "write_checkpoint"
        return [write_rank(Path(folder), 0, [Piece.whole("model.norm.weight", torch.ones(3))])]


def trained(run_file: Path, *, step: int = 4) -> RunFolder:
    """The folder of a run that has committed a checkpoint after `step` steps."""
    run = load_run_file(run_file)
    folder = RunFolder.named(run.name)
    folder.create(to_mapping(run))
    dataset = TokenDataset.open(run.data.path)
    with MetricsLog.create(folder.metrics) as log:
        start = start_of(run.layout, run.phases()[0], None)
        Training(
            run, OneTensor(), folder, EventLog(), log,
            dataset=dataset, first_step=step, start=start,
            placement=contiguous_placement(run.model, run.layout.experts), nodes=None,
        ).save()  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "train.stepz=4",
            "train.stepz is not a field of the run file; did you mean train.steps?",
        ),
        (
            "layout.experts=3",
            "model.n_routed_experts 8 is not divisible by layout.experts 3; choose a number of "
            "expert ranks that divides the experts, or give experts.slots.",
        ),
        (
            "experts.redundant=3",
            "model.n_routed_experts 8 and experts.redundant 3 are 11 slots, which layout.experts 2 "
            "does not divide; set experts.redundant to 4, or give experts.slots.",
        ),
        (
            "experts.slots=[3,4]",
            "experts.slots is [3, 4] and must be 2 numbers of at least 1, one an expert rank, that "
            "sum to model.n_routed_experts 8 or more; give every expert rank its slots, or leave "
            "experts.slots out.",
        ),
        (
            "experts.load_decay=1.0",
            "experts.load_decay is 1.0 and must be at least 0 and below 1; set experts.load_decay "
            "to 0.9.",
        ),
        (
            "experts.dispatch=tree",
            "experts.dispatch is tree and must be one of auto, flat, node_limited; set "
            "experts.dispatch to auto.",
        ),
        (
            "layout.pipeline=3",
            "layout.pipeline is 3 and must be even with dualpipe; set layout.pipeline to 2 or 4, "
            "or layout.schedule to 1f1b.",
        ),
        (
            "train.micro_batches=5",
            "train.micro_batches is 5 and must be even with dualpipe, which splits them between "
            "two directions; set train.micro_batches to 6.",
        ),
        (
            "train.micro_batches=2",
            "train.micro_batches is 2 and dualpipe needs at least 2 x layout.pipeline = 4; set "
            "train.micro_batches to 4, or layout.schedule to 1f1b.",
        ),
        (
            "model={preset: tiny, n_group: 3}",
            "model.n_routed_experts 8 is not divisible by model.n_group 3; choose a number of "
            "groups that divides the experts.",
        ),
        (
            "layout={pipeline: 6, schedule: 1f1b}",
            "model.num_hidden_layers 4 is fewer than the schedule's 6 stages, and every "
            "stage needs a layer; choose layout.pipeline and layout.schedule for 4 stages or less.",
        ),
        (
            "train.seq_len=300",
            "train.seq_len 300 exceeds model.max_position_embeddings 256; shorten the sequences or "
            "raise model.max_position_embeddings.",
        ),
        (
            "serve.max_context=300",
            "serve.max_context 300 exceeds model.max_position_embeddings 256; lower "
            "serve.max_context or leave it out.",
        ),
        (
            "data.path=nowhere",
            "data folder nowhere does not exist; build it with `dualray data build SRC --tokenizer "
            "bpe:4096 --out nowhere`.",
        ),
        (
            "model.vocab_size=200",
            "model.vocab_size is 200 and the tokenizer of CORPUS has 257 ids; set model.vocab_size "
            "to 257 or more.",
        ),
        (
            "train.micro_batch_size=1000",
            "the train split has SAMPLES sequences of 16 tokens and one step needs 8000; give more "
            "text, or lower train.seq_len, train.micro_batches or train.micro_batch_size.",
        ),
        (
            "train.init_from=nowhere",
            "there is no checkpoint in nowhere; train without --resume first, or name a folder "
            "that has step-N folders.",
        ),
        (
            "cluster.address=127.0.0.1:1",
            "cluster.address is 127.0.0.1:1 and no Ray head answers there; check the host, the "
            "port (6379 by default) and that the cluster is up.",
        ),
        (
            "train.steps",
            "--set 'train.steps' is not KEY=VALUE; write, say, train.steps=10.",
        ),
    ],
)
def test_a_wrong_run_file(here, corpora, refused, setting, sentence) -> None:
    write_run_file(here / "tiny.yaml", corpora["bytes"])
    samples = TokenDataset.open(corpora["bytes"]).split("train").num_tokens // 16
    expected = sentence.replace("CORPUS", str(corpora["bytes"])).replace("SAMPLES", str(samples))
    assert refused("train", "tiny.yaml", "--set", setting) == expected
    assert not (here / "runs").exists()


def test_no_run_file(refused) -> None:
    assert refused("train", "tiny.yaml") == "run file tiny.yaml does not exist; check the path."


def test_resume_needs_a_checkpoint(here, corpora, refused) -> None:
    write_run_file(here / "tiny.yaml", corpora["bytes"])
    assert refused("train", "tiny.yaml", "--resume") == (
        f"there is no checkpoint in {here}/runs/tiny; train without --resume first, or name a "
        "folder that has step-N folders."
    )


def test_a_run_is_not_started_over(here, corpora, refused) -> None:
    write_run_file(here / "tiny.yaml", corpora["bytes"])
    folder = trained(here / "tiny.yaml")
    assert refused("train", "tiny.yaml") == (
        "runs/tiny already holds the metrics.jsonl of a run; continue it with --resume, or give "
        "this run another name."
    )
    # Without a checkpoint there is nothing to continue.
    shutil.rmtree(folder.checkpoints)
    assert refused("train", "tiny.yaml") == (
        "runs/tiny already holds the metrics.jsonl of a run; it has no checkpoint: delete it, or "
        "give this run another name."
    )


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "model.num_hidden_layers=5",
            "model.num_hidden_layers is 5 here but 4 in checkpoint CHECKPOINT; use what the "
            "checkpoint was written with, or start a run of another name.",
        ),
        (
            "data.path=BPE",
            "tokenizer_sha256 is OURS here but THEIRS in checkpoint CHECKPOINT; use what the "
            "checkpoint was written with, or start a run of another name.",
        ),
        (
            "seed=1",
            "seed is 1 and the checkpoint was trained with 0; resume with the same data, seed, "
            "sequence length and phases before, or start a new run with train.init_from.",
        ),
        (
            "layout.experts=1",
            "a step has 4 sequences (layout.replicas x layout.experts x train.micro_batches x "
            "train.micro_batch_size) and the checkpoint's steps have 8, so samples would be "
            "repeated or skipped; keep the product, or start a new run with train.init_from.",
        ),
        (
            "train.dtype=bfloat16",
            "train.dtype is bfloat16 and the checkpoint was trained in float32; set train.dtype "
            "to float32, or start a new run with train.init_from.",
        ),
    ],
)
def test_resume_of_another_run(here, corpora, refused, setting, sentence) -> None:
    write_run_file(here / "tiny.yaml", corpora["bytes"])
    folder = trained(here / "tiny.yaml")
    for word, value in (
        ("CHECKPOINT", str(folder.checkpoints / "step-4")),
        ("OURS", TokenDataset.open(corpora["bpe"]).tokenizer_sha256),
        ("THEIRS", TokenDataset.open(corpora["bytes"]).tokenizer_sha256),
    ):
        sentence = sentence.replace(word, value)
    setting = setting.replace("BPE", str(corpora["bpe"]))
    assert refused("train", "tiny.yaml", "--resume", "--set", setting) == sentence


def test_a_warm_start_needs_the_same_tokenizer(here, corpora, refused) -> None:
    write_run_file(here / "tiny.yaml", corpora["bytes"])
    folder = trained(here / "tiny.yaml")
    write_run_file(here / "warm.yaml", corpora["bpe"], train={"init_from": str(folder.path)})
    assert refused("train", "warm.yaml").startswith("tokenizer_sha256 is ")


def test_serve_needs_a_checkpoint(here, refused) -> None:
    assert refused("serve", "runs/nothing") == (
        "there is no checkpoint in runs/nothing; train without --resume first, or name a folder "
        "that has step-N folders."
    )


def test_serve_refuses_a_damaged_checkpoint_by_name(here, corpora, refused) -> None:
    write_run_file(here / "tiny.yaml", corpora["bytes"])
    step = trained(here / "tiny.yaml").checkpoints / "step-4"
    shard = next(step.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert refused("serve", str(step)).startswith(f"{shard} does not match its hash")


def test_a_real_process_shows_no_traceback(here, corpora) -> None:
    write_run_file(here / "tiny.yaml", corpora["bytes"], layout={"piepline": 4})
    ended = dualray("train", "tiny.yaml", cwd=here)
    assert (ended.code, ended.out, ended.err) == (
        2,
        "",
        "error: layout.piepline is not a field of the run file; did you mean layout.pipeline?\n",
    )
