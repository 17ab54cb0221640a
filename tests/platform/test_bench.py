"""`bench model`: both sides compute the same, and its records are whole."""

from __future__ import annotations

import builtins
import json
import re
from dataclasses import replace

import pytest
import torch
from support.models import tiny_config, whole_model
from typer.testing import CliRunner

from dualray.errors import ConfigError, RunError
from dualray.parallel.optimizer import OptimizerConfig
from dualray.platform.bench import model, training
from dualray.platform.bench.decode import Decoder
from dualray.platform.bench.decode_peer import DecodeCase, HuggingFaceDecoder, _check
from dualray.platform.bench.hugging_face import HuggingFaceTrainer, new_model
from dualray.platform.bench.model import Size
from dualray.platform.bench.record import append, check_target
from dualray.platform.bench.training import (
    CLIP_NORM,
    LR,
    Comparison,
    DualrayTrainer,
    Workload,
    compare,
    measure,
)
from dualray.platform.commands.bench import app

# transformers' grouped_mm wants rows of a multiple of 16 bytes, in bf16 too.
TINY = Workload(
    model=tiny_config(
        num_nextn_predict_layers=0, num_hidden_layers=2, hidden_size=40, moe_intermediate_size=24
    ),
    batch_size=2,
    seq_len=24,
)
OPTIMIZER = OptimizerConfig(kind="adamw")


def both_sides(workload: Workload = TINY) -> tuple[DualrayTrainer, HuggingFaceTrainer]:
    ours = DualrayTrainer(workload.model, torch.float32, OPTIMIZER)
    return ours, HuggingFaceTrainer(workload.model, ours.stage, OPTIMIZER, LR, CLIP_NORM)


def test_both_sides_train_alike_and_the_loss_falls() -> None:
    heard: list[int] = []
    result = compare(TINY, "fp32", pairs=6, warmup=2, on_pair=heard.append)
    assert heard == list(range(1, 9))
    assert len(result.ours_s) == len(result.theirs_s) == 6
    ours, theirs = result.last_loss
    # Eight steps of Adam, which divides rounding errors by tiny second moments.
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours < result.first_loss[0] - 0.05


def test_the_peer_runs_at_its_best_settings() -> None:
    _, theirs = both_sides()
    config = theirs.model.config
    assert config._attn_implementation == "sdpa"
    assert config._experts_implementation == "grouped_mm"
    assert theirs.model.training


def test_bf16_has_bf16_weights_on_both_sides() -> None:
    ours = DualrayTrainer(TINY.model, torch.bfloat16, OPTIMIZER)
    theirs = HuggingFaceTrainer(TINY.model, ours.stage, OPTIMIZER, LR, CLIP_NORM)
    for side in (ours.stage, theirs.model):
        assert {p.dtype for p in side.parameters()} == {torch.bfloat16}
    # Converting the built model instead would round the rotary frequencies.
    assert theirs.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_other_weights_are_refused_at_the_first_step() -> None:
    ours, theirs = both_sides()
    with torch.no_grad():
        theirs.model.model.layers[1].mlp.experts.down_proj[0] *= 3.0
    with pytest.raises(RunError, match=r"the fp32 loss of step 0 is \d\.\d{6} in dualray and"):
        measure(ours, theirs, TINY, "fp32", pairs=1, warmup=2)


def test_a_step_that_does_not_train_is_refused_at_the_second(monkeypatch) -> None:
    ours, theirs = both_sides()
    monkeypatch.setattr(ours._optimizer, "step", lambda lr: None)
    with pytest.raises(RunError, match="the fp32 loss of step 1 is"):
        measure(ours, theirs, TINY, "fp32", pairs=1, warmup=2)


class Scripted:
    """A side whose losses agree with every other's, and which logs its turns."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name, self.turns = name, turns

    def step(self, ids_BS, labels_BS) -> float:
        assert torch.equal(ids_BS[:, 1:], labels_BS[:, :-1])
        self.turns.append(self.name)
        return 1.0


def test_steps_alternate_and_the_warm_up_is_not_measured(monkeypatch) -> None:
    turns: list[str] = []
    # Every step takes as long as its number.
    ticks = iter(float(n * (n + 1) // 2) for n in range(100) for _ in range(2))
    next(ticks)
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(ticks))
    result = measure(Scripted("a", turns), Scripted("b", turns), TINY, "bf16", pairs=2, warmup=3)
    assert turns == ["a", "b"] * 5
    assert result.ours_s == (7.0, 9.0)
    assert result.theirs_s == (8.0, 10.0)


def test_the_ratio_is_taken_pair_by_pair() -> None:
    comparison = Comparison(
        dtype="fp32",
        tokens=100,
        # The machine was four times slower in the second pair: a ratio of medians gives 1.
        ours_s=(1.0, 4.0, 2.0),
        theirs_s=(2.0, 12.0, 2.0),
        first_loss=(3.0, 3.0),
        last_loss=(2.0, 2.0),
    )
    result = comparison.as_dict()
    assert result["ratio"] == 2.0
    assert (result["ratio_min"], result["ratio_max"], result["pairs"]) == (1.0, 3.0, 3)
    assert result["dualray"]["median_step_s"] == 2.0
    assert result["dualray"]["tokens_per_s"] == 50.0


@pytest.fixture
def tiny_quick(monkeypatch):
    cases = (DecodeCase(batch=2, context=9), DecodeCase(batch=1, context=20))
    monkeypatch.setattr(model, "QUICK", Size(workload=TINY, cases=cases))


def test_command_prints_json_and_appends_lines(tiny_quick, tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    arguments = ["model", "--quick", "--pairs", "1", "--record", str(path), "--json"]
    for number in (1, 2):
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0
        lines = path.read_text().splitlines()
        assert len(lines) == number
        assert json.loads(lines[-1]) == json.loads(done.stdout)
    record = json.loads(lines[0])
    assert record["benchmark"] == "model"
    assert record["machine"]["cpu"]
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["transformers"]
    assert record["config"]["model"]["n_routed_experts"] == 8
    assert record["config"]["batch_size"] * record["config"]["seq_len"] == TINY.tokens
    parts = [(r["part"], r["dtype"]) for r in record["results"]]
    names = ["training", "memory", "decode", "decode"]
    assert parts == [(name, dtype) for dtype in ("fp32", "bf16") for name in names]
    for result in record["results"]:
        unit = "peak_bytes" if result["part"] == "memory" else "median_step_s"
        ratio = result["hugging_face"][unit] / result["dualray"][unit]
        assert result["ratio"] == pytest.approx(ratio)  # one pair
    training_row, _, decode_row, _ = record["results"][:4]
    for row, tokens in ((training_row, TINY.tokens), (decode_row, 2)):
        step_s = row["dualray"]["median_step_s"]
        assert row["dualray"]["tokens_per_s"] == pytest.approx(tokens / step_s)


def test_command_prints_a_table(tiny_quick) -> None:
    arguments = ["model", "--quick", "--pairs", "1", "--dtype", "fp32"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "120"})
    assert done.exit_code == 0
    first, head, *rows, last = done.stdout.splitlines()
    assert first.startswith("model, ")
    assert head.split()[:3] == ["dtype", "what", "dualray"]
    assert [re.split(r"  +", row.strip())[1] for row in rows] == [
        "training, 2 x 24",
        "memory of a step, 2 x 24",
        "decode 2 at context 9",
        "decode 1 at context 20",
    ]
    assert last.startswith("ratio: how many times faster, or smaller, dualray is")


def test_decoding_something_else_is_refused() -> None:
    config = replace(TINY.model, max_position_embeddings=64)
    stage = whole_model(config)
    ids_BS = torch.arange(12).view(1, 12).numpy()
    sampled = Decoder(stage, ids_BS).step(12)[1]
    theirs = HuggingFaceDecoder(new_model(config, stage), ids_BS)
    first, again = theirs.step()[1], theirs.step()[1]
    assert sampled[0].logprob == pytest.approx(first[0], abs=1e-5)
    assert again == first  # the cache does not grow
    with pytest.raises(RunError) as raised:
        _check("fp32", "1 x 12", sampled, [first[0] - 0.01])
    assert raised.value.sentence.startswith("decoding 1 x 12 in fp32, the likeliest token has")


def test_without_transformers_one_sentence(monkeypatch) -> None:
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    done = CliRunner().invoke(app, ["model", "--quick"])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.exit_code == 2
    assert str(done.exception) == (
        "bench model compares with the package transformers, which is not installed; "
        "install it with: pip install 'transformers>=5.20,<6'."
    )


def test_a_record_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path) -> None:
    for path, reason in (
        (tmp_path / "nowhere" / "results.jsonl", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        sentence = (
            f"--record is {path} and cannot be written ({reason}); "
            "name a file in a folder that exists."
        )
        for refuse in (lambda path=path: append(path, {}), lambda path=path: check_target(path)):
            with pytest.raises(ConfigError) as raised:
                refuse()
            assert str(raised.value) == sentence
        done = CliRunner().invoke(app, ["model", "--record", str(path)])
        assert str(done.exception) == sentence


def test_the_peer_decodes_with_its_fastest_experts(monkeypatch) -> None:
    config = replace(TINY.model, max_position_embeddings=64)
    peer = HuggingFaceDecoder(
        new_model(config, whole_model(config)), ids_BS=torch.arange(12).view(1, 12).numpy()
    )
    seconds = {"grouped_mm": 3.0, "batched_mm": 1.0, "eager": 2.0}
    chosen = peer._model.config
    monkeypatch.setattr(peer, "step", lambda: (seconds[chosen._experts_implementation], []))
    assert peer.choose_experts() == "batched_mm"
    assert chosen._experts_implementation == "batched_mm"
