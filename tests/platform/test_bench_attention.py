"""The attention benchmark: equal models, the same work for all, and decoding that is right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import training_context, whole_model
from typer.testing import CliRunner

from dualray.data.dataset import TokenDataset
from dualray.data.shards import build
from dualray.errors import ConfigError, DataError, RunError
from dualray.inference.scoring import score
from dualray.model.count import count_parameters
from dualray.parallel.lr import LrConfig
from dualray.platform.bench import attention
from dualray.platform.bench.attention import FULL, KINDS, QUICK, Workload, make_models
from dualray.platform.bench.attention_result import check, curve, decode_row
from dualray.platform.bench.decode import Decoder, heldout_ids
from dualray.platform.cli import app

TINY = Workload(
    base=attention._base(hidden=32, ffn=64, layers=2, heads=4, width=8, context=48),
    seq_len=16,
    batch_size=4,
    lr=LrConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, steps=12),
    contexts=(20, 48),
    decode_batch=3,
    repeats=2,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = [f"{n} times {n + 1} makes {n * (n + 1)}.\n\n" for n in range(600)]
    (folder / "text.txt").write_text("".join(lines))
    build([folder / "text.txt"], "bytes", folder / "tokens")
    return folder / "tokens"


@pytest.mark.parametrize("workload", [FULL, QUICK, TINY])
def test_all_kinds_have_the_same_parameters(workload: Workload) -> None:
    models = make_models(workload.base, 2048)
    assert tuple(models) == KINDS
    counts = {kind: count_parameters(config) for kind, config in models.items()}
    totals = [count.total for count in counts.values()]
    assert max(totals) / min(totals) < 1.02
    # Dense layers only, so what a token uses is as equal as what there is.
    actives = [count.active for count in counts.values()]
    assert max(actives) - min(actives) == max(totals) - min(totals)
    widths = {kind: config.intermediate_size for kind, config in models.items()}
    assert widths["mha"] == workload.base.intermediate_size
    assert widths["mha"] < widths["gqa"] <= widths["mqa"]


def test_what_is_cached_is_as_in_the_paper() -> None:
    """arXiv 2405.04434, table 1: MLA caches as much as GQA with 2.25 groups."""
    models = make_models(FULL.base, 2048)
    head = 2 * FULL.base.v_head_dim
    cached = {kind: config.cache_dim / head for kind, config in models.items()}
    assert cached == {"mha": 8, "gqa": 2, "mqa": 1, "mla": 2.25}


def test_models_too_far_apart_are_a_bug() -> None:
    """A width of 8 more or less is a third of this model: nothing between can be reached."""
    base = attention._base(hidden=8, ffn=16, layers=1, heads=4, width=2, context=16)
    total = count_parameters(base).total
    assert attention.with_parameters(base, total) == base
    with pytest.raises(AssertionError, match=r"mha differs by \d+\.\d% in parameters"):
        attention.with_parameters(base, total + 3 * 8 * 3)


def test_training_is_the_same_for_all(corpus: Path) -> None:
    heard: list[int] = []
    trained = attention.train(TINY, TokenDataset.open(corpus), on_step=heard.append)
    assert heard == list(range(1, 13))
    for kind in KINDS:
        losses = trained[kind].losses
        assert len(losses) == 12
        assert losses[-1] < losses[0] - 1.0
        assert trained[kind].config.attention == kind
    # The first batch meets untrained models: near the logarithm of the vocabulary.
    assert all(abs(trained[kind].losses[0] - 5.55) < 0.05 for kind in KINDS)


def test_heldout_loss_is_the_mean_of_all_windows(corpus: Path) -> None:
    dataset = TokenDataset.open(corpus)
    stage = whole_model(make_models(TINY.base, dataset.vocab_size)["mla"])
    found = attention.evaluate(stage, dataset, TINY)
    tokens = dataset.tokens("heldout", 0, 1 << 20).tolist()
    windows = [tokens[start : start + 17] for start in range(0, len(tokens) - 1, 16)]
    scored = [value for window in score(stage, windows) for value in window]
    assert len(scored) == len(tokens) - 1
    nats = -sum(scored) / len(scored)
    assert found.nats_per_token == pytest.approx(nats, rel=1e-5)
    # One byte a token, and an end of document before the first and after each.
    num_bytes = dataset.split("heldout").num_bytes
    expected = nats / 0.693147180 * len(scored) / num_bytes
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoding_step_predicts_what_a_whole_forward_does(corpus: Path, kind: str) -> None:
    dataset = TokenDataset.open(corpus)
    stage = whole_model(make_models(TINY.base, dataset.vocab_size)[kind])
    ids = heldout_ids(dataset, 3, 48)
    decoder = Decoder(stage, ids)
    # The longer context first: a step must leave the cache as it found it.
    for context in (48, 20, 48):
        seconds, sampled = decoder.step(context)
        assert seconds > 0
        for row, token in zip(ids, sampled):
            ctx = training_context(stage.config, (context,))
            prefix = torch.from_numpy(row[:context].astype("int64"))
            with torch.no_grad():
                logits = stage.logits(stage(stage.embed(prefix, ctx), ctx), ctx)[-1]
            assert token.logprob == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)


def test_decoded_text_comes_from_all_of_the_heldout_text(corpus: Path) -> None:
    dataset = TokenDataset.open(corpus)
    num_tokens = dataset.split("heldout").num_tokens
    ids = heldout_ids(dataset, 3, 48)
    assert ids[0].tolist() == dataset.tokens("heldout", 0, 48).tolist()
    assert ids[-1].tolist() == dataset.tokens("heldout", num_tokens - 48, 48).tolist()
    with pytest.raises(DataError, match=f"has {num_tokens} tokens and a context of 99999 is to be"):
        heldout_ids(dataset, 3, 99_999)


def test_the_curve_is_of_means_at_the_last_of_their_steps() -> None:
    assert curve([3.0, 2.0]) == [(1, 3.0), (2, 2.0)]
    points = curve([float(n) for n in range(250)])
    assert points[:2] == [(3, 1.0), (6, 4.0)]
    assert points[-1] == (250, 249.0)
    assert len(points) == 84


def test_ratios_are_taken_step_by_step() -> None:
    # The machine was ten times slower in the second step of both.
    row = decode_row(256, 8, [0.5, 5.0, 0.5], [1.0, 10.0, 2.0])
    assert (row["context"], row["tokens_per_s"]) == (256, 16.0)
    assert (row["ratio_to_mha"], row["ratio_min"], row["ratio_max"]) == (2.0, 2.0, 4.0)


def test_a_corpus_of_less_than_a_step_is_refused(corpus: Path) -> None:
    dataset = TokenDataset.open(corpus)
    num_tokens = dataset.split("train").num_tokens
    with pytest.raises(ConfigError) as refused:
        check(replace(FULL, batch_size=1000), dataset)
    assert str(refused.value) == (
        f"--data {corpus} has {num_tokens} training tokens and a step takes 256000; give a larger "
        "corpus."
    )


@pytest.fixture
def tiny_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUICK", TINY)


def test_command_prints_json_and_writes_record_and_page(
    tiny_quick, corpus: Path, tmp_path: Path
) -> None:
    record, page = tmp_path / "results.jsonl", tmp_path / "page.html"
    options = ["--quick", "--data", corpus, "--record", record, "--out", page, "--json"]
    done = CliRunner().invoke(app, ["bench", "attention", *map(str, options)])
    assert done.exit_code == 0, (done.output, done.exception)
    line = json.loads(done.stdout)
    assert json.loads(record.read_text()) == line
    assert (line["benchmark"], line["config"]["vocab_size"]) == ("attention", 257)
    assert [row["attention"] for row in line["results"]] == list(KINDS)
    for row in line["results"]:
        assert row["heldout"]["bits_per_byte"] > 0
        assert [point[0] for point in row["training"]["curve"]] == list(range(1, 13))
        assert [speed["context"] for speed in row["decode"]] == [20, 48]
        assert all(speed["tokens_per_s"] > 0 for speed in row["decode"])
    assert line["results"][0]["decode"][0]["ratio_to_mha"] == 1.0
    assert line["results"][0]["cache_bytes_per_token"] == 2 * 4 * 16 * 2
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "tokens/s at 48" in text
    for row in line["results"]:
        assert f"<td>{row['parameters']:,}</td>" in text
    assert "http" not in text.replace("http://www.w3.org/", "")


def test_command_prints_a_table(tiny_quick, corpus: Path) -> None:
    options = ["bench", "attention", "--quick", "--data", str(corpus)]
    done = CliRunner().invoke(app, options, catch_exceptions=False, env={"COLUMNS": "80"})
    assert done.exit_code == 0
    first, head, *rows, last = done.stdout.splitlines()
    assert first.startswith("attention, 12 steps of 4 x 16 tokens each, ")
    assert head.split() == ("kind parameters FFN train held-out bits/B cache t/s 20 t/s 48".split())
    assert [row.split()[0] for row in rows] == ["MHA", "GQA", "MQA", "MLA"]
    assert last.endswith("of 3 sequences that decode together at that context")


def test_a_page_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    options = ["bench", "attention", "--quick", "--out", str(tmp_path)]
    error = CliRunner().invoke(app, options).exception
    assert isinstance(error, RunError)
    assert str(error) == (
        f"--out is {tmp_path} and that is a folder; name a file, such as "
        f"{tmp_path / 'attention.html'}."
    )
