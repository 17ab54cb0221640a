"""The balance benchmark: the same work for all settings, figures that are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import whole_model
from typer.testing import CliRunner

from dualray.data.dataset import TokenDataset
from dualray.data.loader import Loader
from dualray.data.shards import build
from dualray.errors import ConfigError, RunError
from dualray.inference.scoring import score
from dualray.parallel.train_config import BALANCES
from dualray.platform.bench import balance
from dualray.platform.bench.balance import FULL, QUICK, Trained, evaluate, train_one
from dualray.platform.bench.balance_result import (
    SETTINGS,
    check,
    claims,
    compare_balance,
    judged,
    row,
)
from dualray.platform.cli import app

TINY = replace(
    QUICK,
    model=balance._model(hidden=32, layers=3, experts=8, chosen=2, width=16, context=16),
    train=replace(QUICK.train, steps=10, seq_len=16, micro_batch_size=4, gamma_steps=8, gamma=0.05),
    aux_alpha=0.5,
    heldout_batches=3,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = [f"{n} times {n + 1} makes {n * (n + 1)}.\n\n" for n in range(600)]
    (folder / "text.txt").write_text("".join(lines))
    build([folder / "text.txt"], "bytes", folder / "tokens")
    return folder / "tokens"


@pytest.mark.parametrize("workload", [FULL, QUICK, TINY])
def test_settings_differ_in_balance_alone(workload) -> None:
    assert sorted(SETTINGS) == sorted(BALANCES)
    plain = {"balance": "bias", "aux_alpha": None, "gamma_steps": workload.train.gamma_steps}
    for setting in SETTINGS:
        config = workload.config(setting)
        assert config.balance == setting
        assert replace(config, **plain) == workload.train
        assert config.aux_loss_weight() == ("aux" in setting) * workload.aux_alpha
        # Constant, then 0, for the share of training that DeepSeek-V3 froze its biases for.
        assert (config.gamma_at(0) > 0) == ("bias" in setting)
        assert config.gamma_at(workload.train.steps - 1) == 0
    assert 0.02 < 1 - FULL.train.gamma_steps / FULL.train.steps < 0.05


def test_settings_share_weights_and_batches_of_a_seed(corpus: Path) -> None:
    found = {setting: train_one(TINY, setting, 1, corpus) for setting in SETTINGS}
    firsts = {run.losses[0] for run in found.values()}
    assert len(firsts) == 1
    assert all(len(run.losses) == len(run.max_vio) == 10 for run in found.values())
    assert len({run.losses for run in found.values()}) == 4
    assert len({run.max_vio[0] for run in found.values()}) == 1
    assert found["bias"] == replace(train_one(TINY, "bias", 1, corpus), step_s=found["bias"].step_s)
    other = train_one(TINY, "bias", 2, corpus)
    assert other.losses[0] not in firsts


def test_max_vio_over_the_run_is_of_summed_loads(corpus: Path, monkeypatch) -> None:
    loads: list[dict[int, list[int]]] = []
    step = balance.Trainer.step

    def noted(self, *args):
        result = step(self, *args)
        loads.append(result.loads)
        return result

    monkeypatch.setattr(balance.Trainer, "step", noted)
    run = train_one(TINY, "none", 0, corpus)
    vios = []
    for layer in (1, 2):
        summed = [sum(each) for each in zip(*(step[layer] for step in loads))]
        vios.append(max(summed) * 8 / (10 * 64 * 2) - 1)
    assert run.max_vio_run == pytest.approx(sum(vios) / 2, rel=1e-12)
    assert run.last_max_vio == pytest.approx((run.max_vio[-2] + run.max_vio[-1]) / 2)


def test_heldout_figures_are_those_of_its_first_batches(corpus: Path) -> None:
    dataset = TokenDataset.open(corpus)
    model = balance.model_for(TINY, dataset)
    stage = whole_model(model)
    found = evaluate(stage, Loader(dataset, seed=0, seq_len=16, depths=0), TINY.train, 3)
    tokens = dataset.tokens("heldout", 0, 12 * 16 + 1).tolist()
    windows = [tokens[start : start + 17] for start in range(0, 12 * 16, 16)]
    scored = [value for window in score(stage, windows) for value in window]
    # fp32 forwards of other shapes.
    assert found.loss == pytest.approx(-sum(scored) / len(scored), rel=1e-5)
    assert found.loads_LE.shape == (2, 8)
    assert found.loads_LE.sum(1).tolist() == [12 * 16 * 2] * 2
    # A text of less than that is read as far as whole batches go.
    short = Loader(dataset, seed=0, seq_len=16, depths=0)
    everything = evaluate(stage, short, TINY.train, 10_000)
    assert int(everything.loads_LE[0].sum()) == short.num_samples("heldout") // 4 * 4 * 16 * 2


def test_mean_violation_is_of_each_layer() -> None:
    loads_LE = torch.tensor([[1, 1, 4, 2], [3, 3, 3, 3]])
    assert balance.mean_violation(loads_LE) == 0.5


@pytest.mark.parametrize(
    ("differences", "lower", "verdict"),
    [
        ([-1.0, -1.1, -0.9], True, "yes"),
        ([-1.0, 0.9, -0.2], True, "undecided"),
        ([0.0, 0.1, 0.2], True, "no"),
        ([-0.5], True, "undecided"),
        ([0.5], True, "no"),
        ([-1.0, 0.9, -0.2], False, "yes"),
        ([0.01, -0.005, 0.001], False, "undecided"),
        ([0.1, 0.11, 0.1], False, "no"),
        ([0.0, 0.0], False, "yes"),
        ([0.0, 0.0], True, "no"),
        # Three seeds need 2.920 standard errors, which here are 1 / sqrt(3) each: 1.686.
        ([-2.68, -1.68, -0.68], True, "undecided"),
        ([-2.69, -1.69, -0.69], True, "yes"),
    ],
)
def test_verdicts(differences, lower, verdict) -> None:
    found = judged(differences, lower=lower)
    assert found["verdict"] == verdict
    assert found["mean"] == pytest.approx(sum(differences) / len(differences))


def made_up(setting: str, seed: int, loss: float, vio: float) -> Trained:
    return Trained(
        setting=setting, seed=seed, losses=(5.0, loss + 1, loss), max_vio=(1.0, vio, vio),
        max_vio_run=vio, heldout_loss=loss + 0.1 * seed, heldout_bits_per_byte=loss / 2,
        heldout_max_vio=vio / 2, step_s=0.1,
    )  # fmt: skip


def test_claims_pair_seeds() -> None:
    losses = {"none": 3.0, "aux_loss": 3.1, "bias": 3.02, "aux_loss_and_bias": 3.2}
    vios = {"none": 4.0, "aux_loss": 0.5, "bias": 0.25, "aux_loss_and_bias": 0.2}
    rows = [
        row(s, [made_up(s, seed, losses[s], vios[s] * (1 + seed / 100)) for seed in (0, 1, 2)])
        for s in SETTINGS
    ]
    assert rows[2]["mean"]["max_vio_batch"] == pytest.approx(0.25 * 1.01)
    # Seeds differ by 0.1 in loss, and not at all in differences between settings.
    by_claim = {claim["claim"]: claim for claim in claims(rows)}
    assert {claim: found["verdict"] for claim, found in by_claim.items()} == {
        "bias has a lower MaxVio of a batch than none": "yes",
        "bias has a lower MaxVio of the held-out text than none": "yes",
        "bias has a lower MaxVio of a batch than auxiliary loss": "yes",
        "bias has a lower MaxVio of the held-out text than auxiliary loss": "yes",
        "bias has no higher held-out loss than auxiliary loss": "yes",
        "bias has no higher held-out loss than none": "no",
    }
    found = by_claim["bias has no higher held-out loss than auxiliary loss"]
    assert found["differences"] == pytest.approx([-0.08] * 3)
    assert found["standard_error"] == pytest.approx(0.0, abs=1e-12)


def test_a_corpus_of_less_than_a_batch_is_refused(corpus: Path) -> None:
    tokens = TokenDataset.open(corpus).split("train").num_tokens
    large = replace(TINY, train=replace(TINY.train, micro_batch_size=1000))
    with pytest.raises(ConfigError) as caught:
        check(large, corpus)
    assert str(caught.value) == (
        f"--data {corpus} has {tokens} tokens of train text and a batch takes 16000; give a larger "
        "corpus."
    )


@pytest.mark.multiproc
def test_command_prints_a_table_and_writes_record_and_page(
    monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(balance, "QUICK", TINY)
    record, page = tmp_path / "results.jsonl", tmp_path / "page.html"
    options = ["--quick", "--data", corpus, "--record", record, "--out", page]
    done = CliRunner().invoke(app, ["bench", "balance", *map(str, options)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, (done.output, done.exception)
    line = json.loads(record.read_text())
    assert (line["benchmark"], line["config"]["vocab_size"]) == ("balance", 257)
    assert [row["balance"] for row in line["results"]] == list(SETTINGS)
    # Processes of one thread compute what this one does.
    torch.set_num_threads(1)
    here = train_one(TINY, "bias", 1, corpus)
    found = line["results"][2]["seeds"][1]
    assert (found["seed"], found["heldout_loss"]) == (1, here.heldout_loss)
    assert found["max_vio_global"] == here.heldout_max_vio
    first, head, *rest = done.stdout.splitlines()
    assert first.startswith("balance, 10 steps of 4 x 16 tokens each, 2 seeds, gamma 0.05, ")
    assert head.split()[:3] == ["balance", "training", "loss"]
    assert [line.split("  ")[0].strip() for line in rest[:4]] == [
        "none", "auxiliary loss", "bias", "both"
    ]  # fmt: skip
    assert rest[4].startswith("bias has a lower MaxVio of a batch than none: ")
    assert rest[10] == f"appended to {record}"
    text = page.read_text()
    assert text.count("<svg") == 2
    for claim in line["claims"]:
        assert f"<td>{claim['verdict']}</td>" in text
    assert "http" not in text.replace("http://www.w3.org/", "")


@pytest.mark.multiproc
def test_an_error_of_a_training_is_the_commands(corpus: Path) -> None:
    broken = replace(TINY, train=replace(TINY.train, lr=1e30))
    with pytest.raises(RunError, match=r"the gradient norm of step \d is nan and must be finite"):
        compare_balance(broken, corpus)
