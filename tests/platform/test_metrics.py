"""The metrics file: what is written is read, and a killed or resumed run leaves it whole."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from dualray.errors import RunError
from dualray.platform.metrics import (
    BackToTraining,
    CheckpointSaved,
    Paused,
    RunMetrics,
    StepMetrics,
    Switch,
    Yardsticks,
)
from dualray.platform.metrics_log import MetricsLog, read_metrics

YARDSTICKS = Yardsticks(gzip=3.1, bzip2=2.4, unigram=2.9, bigram=2.3)
SWITCH = Switch(seconds_to_first_token=0.5, workers_before=(11, 12), workers_after=(11, 12))
AGAIN = replace(
    SWITCH, step=3, switch_s=0.25, optimizer="park", parked_bytes=(70, 80), gradient_bytes=(9, 9),
    cache_bytes=(5, 6), came_from="pause",
)  # fmt: skip
PAUSED = Paused(step=3, came_from="serve", drain_s=0.5, num_cut=1)
BACK = BackToTraining(step=4, seconds_to_first_step=0.75, came_from="serve", optimizer="park")


def step(number: int, **changes) -> StepMetrics:
    values = {
        "step": number,
        "tokens": 100 * number,
        "loss": 5.0 - number / 10,
        "mtp_loss": (6.0, 7.5),
        "balance_loss": 1e-4,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens_per_s": 1000.0,
        "step_time_s": 0.1,
        "bubble": 0.25,
        "exposed_communication": 0.125,
        "max_vio": 0.75,
        "max_vio_per_layer": {1: 0.5, 10: 0.75},
        "max_vio_run": 0.25,
        "max_vio_run_per_layer": {1: 0.25, 10: 0.125},
    }
    return StepMetrics(**{**values, **changes})


def write(path, *lines):
    with MetricsLog.create(path) as log:
        for line in lines:
            log.append(line)
    return path


def test_every_kind_of_line_is_read_back(tmp_path):
    evaluated = step(2, heldout_loss=4.5, heldout_bits_per_byte=2.0)
    dense = step(3, mtp_loss=(), max_vio=None, max_vio_per_layer={}, max_vio_run=None)
    dense = replace(dense, max_vio_run_per_layer={})
    saved = CheckpointSaved(step=2, seconds=1.5)
    path = write(tmp_path / "metrics.jsonl", YARDSTICKS, step(1), evaluated, saved, dense, SWITCH)
    with MetricsLog.resume(path, 3) as log:
        for line in (PAUSED, AGAIN, BACK):
            log.append(line)
    assert read_metrics(path) == RunMetrics(
        steps=(step(1), evaluated, dense),
        checkpoints=(saved,),
        yardsticks=YARDSTICKS,
        mode_changes=(SWITCH, PAUSED, AGAIN, BACK),
    )
    # Behind a pause no optimizer step is what the seconds count from.
    assert read_metrics(path).switch == SWITCH
    # What happened in a later step has not happened to a run that is resumed before it.
    MetricsLog.resume(path, 3).close()
    assert read_metrics(path).mode_changes == (SWITCH, PAUSED, AGAIN)


def test_lines_are_objects_with_the_documented_keys(tmp_path):
    path = write(tmp_path / "metrics.jsonl", step(1), SWITCH)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {
        "step": 1,
        "tokens": 100,
        "loss": 4.9,
        "mtp_loss": [6.0, 7.5],
        "balance_loss": 1e-4,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens_per_s": 1000.0,
        "step_time_s": 0.1,
        "bubble": 0.25,
        "exposed_communication": 0.125,
        "max_vio": 0.75,
        "max_vio_per_layer": {"1": 0.5, "10": 0.75},
        "max_vio_run": 0.25,
        "max_vio_run_per_layer": {"1": 0.25, "10": 0.125},
    }
    assert second == {
        "event": "switch",
        "seconds_to_first_token": 0.5,
        "workers_before": [11, 12],
        "workers_after": [11, 12],
        "came_from": "train",
    }


def test_a_loss_that_is_not_finite_stays_json(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl", step(1, loss=math.nan, mtp_loss=(math.inf, 2.0), max_vio=0.0)
    )
    assert json.loads(path.read_text())["loss"] is None
    (read,) = read_metrics(path).steps
    assert math.isnan(read.loss)
    assert math.isnan(read.mtp_loss[0])
    assert read.mtp_loss[1] == 2.0
    assert read.max_vio == 0.0


def test_missing_file_reads_as_no_steps(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == RunMetrics()


def test_torn_last_line_is_ignored_and_cut_off_on_resume(tmp_path):
    path = write(tmp_path / "metrics.jsonl", step(1), step(2))
    whole = path.read_bytes()
    # A complete object without its newline may still be the start of a longer number.
    for torn in (b'{"step":3,"tok', b'{"step":3}', b"\xff"):
        path.write_bytes(whole + torn)
        assert read_metrics(path).steps == (step(1), step(2))
        with MetricsLog.resume(path, 2) as log:
            log.append(step(3))
        assert read_metrics(path).steps == (step(1), step(2), step(3))


def test_resume_drops_what_came_after_the_step(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        YARDSTICKS,
        step(1),
        step(2),
        CheckpointSaved(step=2, seconds=1.0),
        step(3),
        SWITCH,
    )
    with MetricsLog.resume(path, 2) as log:
        log.append(step(3, loss=1.0))
    metrics = read_metrics(path)
    assert metrics.steps == (step(1), step(2), step(3, loss=1.0))
    assert metrics.checkpoints == (CheckpointSaved(step=2, seconds=1.0),)
    assert metrics.yardsticks == YARDSTICKS
    assert metrics.switch is None


def test_resume_drops_a_checkpoint_of_a_later_step(tmp_path):
    path = write(tmp_path / "metrics.jsonl", step(1), CheckpointSaved(step=2, seconds=1.0))
    MetricsLog.resume(path, 1).close()
    assert read_metrics(path).checkpoints == ()


def test_resume_without_a_file_starts_one(tmp_path):
    with MetricsLog.resume(tmp_path / "metrics.jsonl", 4) as log:
        log.append(step(5))
    assert read_metrics(tmp_path / "metrics.jsonl").steps == (step(5),)


def test_a_new_run_does_not_append_to_an_old_one(tmp_path):
    path = write(tmp_path / "metrics.jsonl", step(1))
    with pytest.raises(RunError) as caught:
        MetricsLog.create(path)
    assert str(caught.value) == (
        f"{path} already holds the metrics of a run; "
        "continue that run with --resume, or give this one another name."
    )
    assert read_metrics(path).steps == (step(1),)


@pytest.mark.parametrize(
    ("line", "how"),
    [
        ("nonsense", "is not a JSON object"),
        ("[1]", "is not a JSON object"),
        ('{"step":2}', "lacks keys that a step has"),
        ('{"event":"checkpoint","step":2}', "lacks keys that a `checkpoint` event has"),
    ],
)
def test_damage_in_the_middle_is_named(tmp_path, line, how):
    path = write(tmp_path / "metrics.jsonl", step(1))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(RunError) as caught:
        read_metrics(path)
    assert str(caught.value) == (
        f"line 2 of {path} {how}; remove that line, or restore the file from a copy."
    )


def test_keys_and_events_of_other_versions_are_passed_over(tmp_path):
    path = write(tmp_path / "metrics.jsonl", step(1))
    later = {**json.loads(path.read_text()), "step": 2, "novelty": 1, "loads": {"1": [3, 1]}}
    path.write_text(path.read_text() + json.dumps(later) + '\n{"event":"moved","step":2}\n')
    assert [line.step for line in read_metrics(path).steps] == [1, 2]


_WRITER = """
import sys
from pathlib import Path
from dualray.platform.metrics import CheckpointSaved
from dualray.platform.metrics_log import MetricsLog
log = MetricsLog.create(Path(sys.argv[1]))
for number in range(1, 10**9):
    log.append(CheckpointSaved(step=number, seconds=1.0))
    if number == 50:
        print("fifty", flush=True)
"""


def test_lines_survive_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", _WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "fifty\n"
        os.kill(writer.pid, signal.SIGKILL)
    saved = read_metrics(path).checkpoints
    assert len(saved) >= 50
    assert [line.step for line in saved] == list(range(1, len(saved) + 1))
