"""Section `extend` from the run file to what starts: resuming, warm starts, serving."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import make_corpus, metrics_of, write_run_file

from dualray.checkpoint.reader import Reader
from dualray.checkpoint.writer import Piece, write_rank
from dualray.data.dataset import TokenDataset
from dualray.errors import CheckpointError, ConfigError, DataError
from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.phases import phase_at
from dualray.parallel.slots import contiguous_placement
from dualray.parallel.step_result import HeldOut, StepResult
from dualray.platform.console import Console
from dualray.platform.events import EventLog, Note
from dualray.platform.folder import RunFolder
from dualray.platform.launch import plan_serving, plan_training, summary_of
from dualray.platform.metrics_log import MetricsLog, read_metrics
from dualray.platform.report.page import write_report
from dualray.platform.run_file import RunFile, load_run_file, parse_run_file, to_mapping
from dualray.platform.scheduling.choice import start_of
from dualray.platform.training import Training

# The tiny preset takes 256 tokens.
EXTEND = {
    "rope_scaling": {"factor": 2},
    "phases": [
        {"steps": 2, "seq_len": 32, "lr": 1e-3, "micro_batch_size": 2},
        {"steps": 1, "seq_len": 300, "lr": 5e-4},
    ],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpora") / "bytes")


@pytest.fixture
def run(tmp_path, monkeypatch, corpus):
    """run(name="tiny", **sections) is a run file's, with the phases above."""
    monkeypatch.chdir(tmp_path)

    def make(name: str = "tiny", **sections: Any) -> RunFile:
        sections = {"extend": EXTEND} | sections
        return load_run_file(write_run_file(tmp_path / f"{name}.yaml", corpus, **sections))

    return make


class FakeGang:
    """One worker whose losses are the step's number; `phases` are those it was told to enter."""

    def __init__(self) -> None:
        self.phases: list[tuple[int, int]] = []
        self.steps = 0

    def call(self, method: str, *args: Any) -> list[Any]:
        if method == "write_checkpoint":
            return [write_rank(Path(args[0]), 0, [Piece.whole("w", torch.ones(3))])]
        if method == "enter_phase":
            self.phases.append((self.steps, args[0].number))
        if method == "evaluate":
            return [HeldOut(loss_sum=1.0, targets=1)]
        if method == "step":
            self.steps = args[0] + 1
            result = StepResult(
                loss=float(self.steps), mtp_loss=[], balance_loss=0.0, grad_norm=1.0, lr=0.1,
                bubble=0.0, exposed_communication=0.0, step_time_s=0.1, loads={}, max_vio={},
                work=ExpertWork(slot_rows={}, seconds={}), cross_node_bytes=0, spans=[],
            )  # fmt: skip
            return [result]
        return [None]


def train(run: RunFile, *, until: int = 100, first_step: int = 0) -> tuple[FakeGang, EventLog]:
    """Steps of fake workers, to the end or to step `until`."""
    gang, events, folder = FakeGang(), EventLog(), RunFolder.named(run.name)
    gang.steps = first_step
    folder.create(to_mapping(run))
    with MetricsLog.resume(folder.metrics, first_step) as log:
        dataset = TokenDataset.open(run.data.path, verify=False)
        start = start_of(run.layout, phase_at(run.phases(), first_step), None)
        training = Training(
            run, gang, folder, events, log, dataset=dataset, first_step=first_step, start=start,
            placement=contiguous_placement(run.model, run.layout.experts), nodes=None,
        )  # fmt: skip
        training.run(lambda: gang.steps >= until)
        training.commit()  # as a run does that is told to stop
    return gang, events


def checkpoint(run: RunFile, step: int) -> Path:
    return RunFolder.named(run.name).checkpoints / f"step-{step}"


def console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(stream=stream), stream


# The run file


def test_what_is_extended_is_the_models_context(run) -> None:
    tiny = run()
    assert tiny.extend.rope_scaling.original_max_position_embeddings == 256
    assert [phase.model.max_position_embeddings for phase in tiny.phases()] == [256, 512, 512]
    assert parse_run_file(to_mapping(tiny)) == tiny
    own = {"factor": 8, "original_max_position_embeddings": 64}
    assert run(extend=EXTEND | {"rope_scaling": own}).phases()[1].model.rope_scaling.factor == 8


def test_fields_of_a_phase_can_be_overridden_and_misspelt(run, tmp_path) -> None:
    run()
    path = tmp_path / "tiny.yaml"
    assert load_run_file(path, ["extend.phases.1.steps=7"]).extend.phases[1].steps == 7
    with pytest.raises(ConfigError) as caught:
        load_run_file(path, ["extend.phases.1.sek_len=7"])
    assert str(caught.value) == (
        "extend.phases.1.sek_len is not a field of the run file; did you mean "
        "extend.phases.1.seq_len?"
    )
    with pytest.raises(ConfigError, match=r"extend\.phases\.0\.lr is missing; set "):
        load_run_file(path, ["extend.phases=[{steps: 1, seq_len: 32}]"])


def test_no_steps_need_something_to_extend(run, tmp_path) -> None:
    assert run(train={"steps": 0, "init_from": "runs/a"}).phases()[0].number == 1
    for missing in ("train.init_from=null", "extend=null"):
        with pytest.raises(ConfigError) as caught:
            load_run_file(tmp_path / "tiny.yaml", [missing])
        assert str(caught.value) == (
            "train.steps is 0 and must be at least 1, unless section extend continues "
            "train.init_from; set train.steps to 1 or more."
        )


def test_a_phase_that_the_corpus_is_too_short_for(run) -> None:
    huge = {"steps": 1, "seq_len": 512, "lr": 1e-3, "micro_batch_size": 50}
    tiny = run(extend=EXTEND | {"phases": [huge]})
    with pytest.raises(
        DataError, match=r"the train split has \d+ sequences of 512 tokens"
    ) as caught:
        plan_training(tiny, resume=False, console=console()[0])
    assert caught.value.hint == (
        "give more text, or lower extend.phases.0.seq_len, extend.phases.0.micro_batches or "
        "extend.phases.0.micro_batch_size"
    )


# Training


def test_workers_are_told_once_and_metrics_count_on(run) -> None:
    tiny = run()
    gang, events = train(tiny)
    assert gang.phases == [(4, 1), (6, 2)]
    rows = metrics_of(RunFolder.named("tiny").path)
    steps = [row for row in rows if "loss" in row]
    assert [row["seq_len"] for row in steps] == [16, 16, 16, 16, 32, 32, 300]
    # 8 sequences a step, then 16, then 8 again.
    assert [row["tokens"] for row in steps] == [128, 256, 384, 512, 1024, 1536, 3936]
    phases = [row for row in rows if row.get("event") == "phase"]
    assert [(row["step"], row["seq_len"], row["context"]) for row in phases] == [
        (5, 32, 512), (7, 300, 512),
    ]  # fmt: skip
    # Each phase ends with a whole evaluation and a checkpoint.
    assert [row["step"] for row in rows if row.get("event") == "checkpoint"] == [4, 6, 7]
    assert [row["step"] for row in steps if "heldout_loss" in row] == [4, 6, 7]
    notes = [event.text for event in events.read(0, 0.0) if isinstance(event, Note)]
    assert [note for note in notes if note.startswith("phase")] == [
        "phase 1 of 2, steps 5 to 6: 32 tokens a sequence, lr 1.00e-03, YaRN up to 512 tokens",
        "phase 2 of 2, steps 7 to 7: 300 tokens a sequence, lr 5.00e-04, YaRN up to 512 tokens",
    ]
    page = write_report(RunFolder.named("tiny").path).read_text()
    assert "32 tokens" in page
    assert "300 tokens" in page
    assert len(read_metrics(RunFolder.named("tiny").metrics).phases) == 2


def test_a_checkpoint_holds_the_model_of_its_phase(run) -> None:
    tiny = run()
    train(tiny)
    contexts = [
        Reader(checkpoint(tiny, step)).meta["model"]["max_position_embeddings"]
        for step in (4, 6, 7)
    ]
    assert contexts == [256, 512, 512]


def test_the_console_names_the_phases(run) -> None:
    told, stream = console()
    told.header(summary_of(plan_training(run(), resume=False, console=told)))
    assert "steps   7 steps\n" in stream.getvalue()
    assert (
        "phases  4 at 16 tokens, then 2 at 32 tokens, then 1 at 300 tokens (YaRN up to 512)\n"
    ) in stream.getvalue()


# Resuming


@pytest.mark.parametrize(
    ("stopped", "entered"), [(3, [(4, 1), (6, 2)]), (4, [(6, 2)]), (5, [(6, 2)])]
)
def test_resuming_in_any_phase(run, stopped, entered) -> None:
    tiny = run()
    train(tiny, until=stopped)
    assignment = plan_training(tiny, resume=True, console=console()[0])
    assert assignment.first_step == stopped
    gang, _ = train(tiny, first_step=stopped)
    # At a boundary the workers are built in the phase that follows.
    assert gang.phases == entered
    rows = metrics_of(RunFolder.named("tiny").path)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in rows if row.get("event") == "phase"] == [5, 7]


def test_resuming_an_extension_as_something_else(run) -> None:
    tiny = run()
    train(tiny, until=5)
    told = console()[0]

    def refusal(**sections: Any) -> str:
        with pytest.raises((CheckpointError, ConfigError, DataError)) as caught:
            plan_training(run(**sections), resume=True, console=told)
        return caught.value.sentence

    here = checkpoint(tiny, 5)
    assert refusal(extend=None).startswith("model.max_position_embeddings is 256 here but 512 in")
    assert refusal(extend=EXTEND | {"rope_scaling": {"factor": 3}}).startswith(
        "model.max_position_embeddings is 768 here"
    )
    beta = EXTEND | {"rope_scaling": {"factor": 2, "beta_fast": 16}}
    assert refusal(extend=beta) == (
        f"model.rope_scaling.beta_fast is 16.0 here but 32.0 in checkpoint {here}"
    )
    assert refusal(train={"steps": 3}) == ("first_step is 3 and the checkpoint was trained with 4")
    first, last = EXTEND["phases"]
    wider = EXTEND | {"phases": [first | {"micro_batch_size": 4}, last]}
    assert refusal(extend=wider).startswith("a step has 32 sequences (")
    longer = EXTEND | {"phases": [first | {"seq_len": 64}, last]}
    assert refusal(extend=longer) == "seq_len is 64 and the checkpoint was trained with 32"


def test_a_finished_run_is_extended_by_resuming(run) -> None:
    train(run(extend=None))
    assignment = plan_training(run(), resume=True, console=console()[0])
    assert assignment.first_step == 4
    assert train(assignment.run, first_step=4)[0].steps == 7


# Starting from weights


def test_weights_do_not_depend_on_the_context(run) -> None:
    short = run(extend=None)
    train(short)
    warm = {"steps": 0, "init_from": str(checkpoint(short, 4))}
    told, stream = console()
    assignment = plan_training(run("long", train=warm), resume=False, console=told)
    assert (assignment.restore_from, stream.getvalue()) == (checkpoint(short, 4).absolute(), "")

    yarn = {"factor": 4, "original_max_position_embeddings": 256}
    own = {"preset": "tiny", "max_position_embeddings": 1024, "rope_scaling": yarn}
    plan_training(
        run("own", model=own, extend=None, train={"init_from": warm["init_from"]}),
        resume=False,
        console=told,
    )
    assert (
        "model.max_position_embeddings is 1024 here and 256 in "
        f"{checkpoint(short, 4).relative_to(Path.cwd())}, whose weights go on with the one here\n"
    ) in stream.getvalue().replace(f"{Path.cwd()}/", "")

    other = {"preset": "tiny", "rope_theta": 5e4}
    with pytest.raises(CheckpointError, match=r"model\.rope_theta is 50000.0 here but 10000.0 in"):
        plan_training(run("theta", model=other, train=warm), resume=False, console=told)

    # A refusal is one sentence, with no word about the context before it.
    told, stream = console()
    with pytest.raises(CheckpointError, match=r"model\.rope_theta is 50000\.0"):
        plan_training(
            run("both", model=own | {"rope_theta": 5e4}, extend=None, train=warm | {"steps": 4}),
            resume=False,
            console=told,
        )
    assert stream.getvalue() == ""


# Serving


@pytest.mark.parametrize(("step", "context"), [(4, 256), (6, 512), (7, 512)])
def test_what_serves_is_the_model_of_the_checkpoint(run, step, context) -> None:
    tiny = run(serve={"max_context": 257})
    train(tiny)
    served = plan_serving(checkpoint(tiny, step), [], console=console()[0]).run
    assert served.model.max_position_embeddings == context
    assert (served.model.rope_scaling is None) == (context == 256)
    assert [phase.model for phase in served.phases()] == [served.model]
    if context == 256:
        with pytest.raises(ConfigError, match=r"serve\.max_context 257 exceeds"):
            served.serve.limits(served.model.max_position_embeddings)


def test_a_pure_continuation_can_be_served(run) -> None:
    tiny = run(train={"steps": 0, "init_from": "somewhere"})
    train(tiny)
    served = plan_serving(checkpoint(tiny, 3), ["serve.port=7"], console=console()[0]).run
    assert served == replace(
        served, extend=None, model=tiny.phases()[-1].model, train=tiny.phases()[-1].train
    )
