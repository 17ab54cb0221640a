"""`dualray plan`: every printed formula gives the figure beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from support.configs import configs
from support.models import tiny_config
from typer.testing import CliRunner

from dualray.errors import ConfigError
from dualray.model.config import YarnConfig
from dualray.model.formulas import parameter_count
from dualray.platform.cli import app
from dualray.platform.planner import Plan, make_plan
from dualray.platform.preset import load_model, preset_names


def evaluate(plan: Plan, formula: str) -> float:
    """Names are replaced by their values, the longest first; the rest is arithmetic."""
    for name in sorted(plan.figures, key=len, reverse=True):
        formula = re.sub(rf"\b{name}\b", repr(plan.figures[name].value), formula)
    assert re.fullmatch(r"[\d.ex+\-*/() ]*", formula), formula
    return eval(formula.replace(" x ", " * "))


def check(plan: Plan) -> None:
    for figure in plan.figures.values():
        assert evaluate(plan, figure.formula) == figure.value, figure


@pytest.mark.parametrize("name", preset_names())
def test_formulas_of_presets(name: str) -> None:
    check(make_plan(name, load_model(name)))


@settings(deadline=None, max_examples=60)
@given(config=configs())
def test_formulas_of_any_model(config) -> None:
    check(make_plan("any", config, seq_len=48))


def test_contexts_reach_from_training_to_the_longest() -> None:
    yarn = YarnConfig(factor=40, original_max_position_embeddings=16)
    assert make_plan("t", tiny_config(max_position_embeddings=640, rope_scaling=yarn)).contexts == (
        16,
        128,
        640,
    )
    assert make_plan("t", tiny_config(max_position_embeddings=64)).contexts == (64,)
    assert make_plan("t", tiny_config(max_position_embeddings=64), 48).contexts == (48, 64)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_deepseek_v3_in_words() -> None:
    output = run("deepseek-v3")
    assert output.startswith(
        "deepseek-v3: 671B parameters, 36.6B active a token, 11.5B more in MTP layers; "
        "70,272 bytes of cache a token in BF16\n"
    )
    assert re.search(r"^  cache a token in BF16 +70,272  61 x \(512 \+ 64\) x 2$", output, re.M)
    assert re.search(r"^  training +250B  3 x prefill of 4096 tokens$", output, re.M)
    assert "the same 671,026,404,352 parameters." in output


def test_a_run_file_as_json(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nmodel: {preset: tiny, hidden_size: 48}\ndata: {path: d}\n"
        "train: {steps: 3, seq_len: 96}\n"
    )
    made = json.loads(run(str(path), "--json"))
    config = load_model("tiny")
    expected = parameter_count(type(config)(**vars(config) | {"hidden_size": 48}))
    assert (made["name"], made["seq_len"], made["contexts"]) == ("mine", 96, [96, 256])
    assert made["total_parameters"] == expected.total
    assert made["active_parameters"] == expected.active
    assert made["mtp_parameters"] == expected.mtp
    assert made["cache_bytes_per_token"] == 4 * 24 * 2
    assert made["figures"]["bytes"]["cache a token in BF16"] == {
        "value": 192,
        "formula": "4 x (16 + 8) x 2",
    }
    assert made["meta_device_agrees"] is True


@pytest.mark.parametrize(
    ("name", "hint"),
    [("deepseek-v4", "did you mean deepseek-v3?"), ("x.yaml", "name a preset or check the path.")],
)
def test_neither_a_preset_nor_a_file(name: str, hint: str) -> None:
    error = CliRunner().invoke(app, ["plan", name]).exception
    assert isinstance(error, ConfigError)
    assert str(error) == (
        f"MODEL_OR_RUN is {name} and must be a preset (deepseek-v2-lite, deepseek-v3, demo, "
        f"moonlight, tiny) or a run file that exists; {hint}"
    )


def test_a_model_that_the_formulas_miscount_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = parameter_count(tiny_config())
    monkeypatch.setattr("dualray.model.count.count_parameters", lambda _: counted)
    error = CliRunner().invoke(app, ["plan", "tiny"]).exception
    assert isinstance(error, AssertionError)
