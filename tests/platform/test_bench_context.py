"""Before and after an extension: positions, needles, and what the command refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import save_stage
from support.models import tiny_config, training_context, whole_model
from support.runs import make_corpus
from typer.testing import CliRunner

from dualray.checkpoint.reader import Reader
from dualray.checkpoint.whole_model import load_stage
from dualray.data.dataset import TokenDataset
from dualray.errors import CheckpointError, ConfigError, DataError
from dualray.model.config import YarnConfig
from dualray.platform.bench import context, needle
from dualray.platform.bench.context import Contexts
from dualray.platform.commands.bench import app

SHORT = tiny_config(vocab_size=257, max_position_embeddings=32, num_nextn_predict_layers=1)
YARN = YarnConfig(factor=4, original_max_position_embeddings=32, mscale_all_dim=0.7)
LONG = replace(SHORT, rope_scaling=YARN, max_position_embeddings=128)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    return TokenDataset.open(make_corpus(tmp_path_factory.mktemp("corpora") / "bytes"))


def saved(folder: Path, dataset: TokenDataset, config, seed: int) -> Path:
    """A checkpoint of random weights that knows its tokenizer."""
    stage = whole_model(config, seed=seed)
    return save_stage(stage, folder / str(seed), tokenizer_sha256=dataset.tokenizer_sha256)


@pytest.fixture
def checkpoints(tmp_path, dataset) -> tuple[Path, Path]:
    return saved(tmp_path, dataset, SHORT, 1), saved(tmp_path, dataset, LONG, 2)


def logits_of(stage, ids: list[int]) -> torch.Tensor:
    ctx = training_context(stage.config, (len(ids),))
    with torch.no_grad():
        return stage.logits(stage(stage.embed(torch.tensor(ids), ctx), ctx), ctx)


def test_lengths_double_and_buckets_cover_every_position() -> None:
    eight = Contexts(original=128, extended=1024)
    assert eight.lengths == [128, 256, 512, 1024]
    assert eight.buckets == [(0, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
    assert Contexts(original=10, extended=35).buckets == [(0, 5), (5, 10), (10, 20), (20, 35)]


def test_windows_are_apart_and_at_most_as_many_as_asked(dataset) -> None:
    windows = context.heldout_windows(dataset, 100, 3)
    assert [len(window) for window in windows] == [101] * 3
    num_tokens = dataset.split("heldout").num_tokens
    assert len(context.heldout_windows(dataset, 100, 10**6)) == (num_tokens - 1) // 100
    with pytest.raises(DataError, match=rf"has {num_tokens} tokens and one window has 90001; "):
        context.heldout_windows(dataset, 90_000, 1)


def test_losses_are_the_models_at_those_positions(dataset) -> None:
    stage = whole_model(LONG, seed=3)
    windows = context.heldout_windows(dataset, 64, 2)
    found = context.losses_by_bucket(stage, windows, [(0, 16), (16, 64)])
    for window, means in zip(windows, found):
        losses = torch.nn.functional.cross_entropy(
            logits_of(stage, window[:-1]), torch.tensor(window[1:]), reduction="none"
        )
        expected = [float(losses[:16].mean()), float(losses[16:].mean())]
        assert means == pytest.approx(expected, rel=1e-5)


def test_a_gain_is_paired_by_window() -> None:
    losses = {"before": [[3.0], [9.0]], "before_with_yarn": [[1.0], [1.0]], "after": [[2.0], [7.0]]}
    (row,) = context.loss_rows(losses, [(0, 4)])
    assert (row["before"], row["after"], row["gain"]) == (6.0, 4.5, 1.5)
    assert row["gain_standard_error"] == pytest.approx(0.5)


@pytest.mark.parametrize("depth", needle.DEPTHS)
def test_a_needle_lies_where_it_should(dataset, depth) -> None:
    tokenizer = dataset.tokenizer()
    trials = needle.make_trials(dataset, 120, depth, 4)
    assert trials == needle.make_trials(dataset, 120, depth, 4)
    for trial in trials:
        assert len(trial.with_line) == len(trial.without) == 120
        text, plain = (tokenizer.decode(ids) for ids in (trial.with_line, trial.without))
        answer = tokenizer.decode(trial.with_line[-trial.answer_tokens :])
        assert answer.startswith(" ")
        line = f"\nThe secret word is{answer}.\n"
        assert text.endswith(line.removesuffix(".\n"))
        assert plain.endswith(line.removesuffix(".\n"))
        assert (text.count(line), plain.count(line)) == (1, 0)
        room = 120 - 2 * len(line) + len(".\n")
        assert text.index(line) == round(depth * room)


def test_no_room_for_a_needle(dataset) -> None:
    assert needle.make_trials(dataset, 50, 0.5, 4) == []


def test_retrieval_reads_the_answers_tokens(dataset) -> None:
    stage = whole_model(LONG, seed=3)
    trials = needle.make_trials(dataset, 100, 0.5, 3)
    gains, exact = [], []
    for trial in trials:
        sums = []
        for ids in (trial.with_line, trial.without):
            asked = logits_of(stage, list(ids))[-trial.answer_tokens - 1 : -1]
            answer = torch.tensor(ids[-trial.answer_tokens :])
            sums.append(float(asked.log_softmax(-1).gather(1, answer[:, None]).sum()))
            exact.append(bool((asked.argmax(-1) == answer).all()))
        gains.append(sums[0] - sums[1])
    found = needle.retrieve(stage, trials)
    assert found.gain == pytest.approx(sum(gains) / 3, abs=1e-4)
    assert (found.exact, found.exact_without) == (sum(exact[::2]) / 3, sum(exact[1::2]) / 3)


def test_the_command_shows_and_records(dataset, checkpoints, tmp_path) -> None:
    before, after = map(str, checkpoints)
    arguments = ["context", before, after, "--data", str(dataset.folder), "--windows", "4"]
    file = tmp_path / "lines.jsonl"
    told = CliRunner().invoke(app, [*arguments, "--needles", "2", "--json", "--record", str(file)])
    assert told.exit_code == 0, told.output
    line = json.loads(told.stdout)
    assert json.loads(file.read_text()) == line
    assert (line["config"]["original"], line["config"]["extended"]) == (32, 128)
    losses = [row for row in line["results"] if row["kind"] == "loss"]
    assert [(row["first"], row["end"]) for row in losses] == [
        (0, 16), (16, 32), (32, 64), (64, 128),
    ]  # fmt: skip
    needles = [row for row in line["results"] if row["kind"] == "needle"]
    assert [(row["length"], row["depth"]) for row in needles] == [
        (128, 0.1), (128, 0.5), (128, 0.9),
    ]  # fmt: skip

    # The weights under YaRN are the first checkpoint's at the second one's positions.
    stage = load_stage(Reader(checkpoints[0]))
    stage.set_rope(LONG)
    windows = context.heldout_windows(dataset, 128, 4)
    means = context.losses_by_bucket(stage, windows, [(64, 128)])
    found = losses[-1]["before_with_yarn"]
    assert found == pytest.approx(sum(mean for (mean,) in means) / 4)
    assert found != pytest.approx(losses[-1]["before"], rel=1e-6)

    shown = CliRunner().invoke(app, [*arguments, "--needles", "2"])
    assert shown.exit_code == 0, shown.output
    assert "64 to 127" in shown.stdout
    assert "128 tokens" in shown.stdout
    assert "needle" not in CliRunner().invoke(app, [*arguments, "--needles", "0"]).stdout


def test_what_cannot_be_compared(dataset, checkpoints, tmp_path) -> None:
    before, after = (Reader(path) for path in checkpoints)
    with pytest.raises(ConfigError) as caught:
        context.check(before, before, dataset)
    assert str(caught.value) == (
        f"checkpoint {before.folder} has the rope_scaling of {before.folder}, so nothing was "
        "extended; give a checkpoint from before the phases of section extend, then one from after."
    )
    other = Reader(saved(tmp_path, dataset, replace(LONG, rope_theta=5e4), 3))
    with pytest.raises(CheckpointError, match=r"model\.rope_theta is 10000.0 here but 50000.0 in"):
        context.check(before, other, dataset)
    assert context.check(before, after, dataset) == Contexts(original=32, extended=128)


def test_the_tokenizer_must_be_the_corpus_own(dataset, checkpoints, tmp_path) -> None:
    other = save_stage(whole_model(LONG), tmp_path / "other", tokenizer_sha256="0" * 64)
    with pytest.raises(
        CheckpointError, match=f"tokenizer_sha256 is {dataset.tokenizer_sha256} her"
    ):
        context.check(Reader(checkpoints[0]), Reader(other), dataset)
