"""`bench experts`: all sides compute the same, times are of what they say, records are whole."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from dualray.errors import RunError
from dualray.platform.bench import experts, experts_sides
from dualray.platform.bench.experts import (
    Case,
    Workload,
    cases,
    check,
    choose_way,
    compare_case,
    new_batch,
    new_weights,
)
from dualray.platform.bench.experts_sides import (
    BareProducts,
    DualrayLayer,
    HuggingFaceLayer,
    NaiveLayer,
    Parts,
)
from dualray.platform.commands.bench import app

TINY = replace(
    experts._workload(hidden=32, experts=8, tokens=160, rounds=2),
    threads=(1,),
)
FP32 = Case(device="cpu", dtype="fp32", threads=1, routing="fresh")


def sides(case: Case, workload: Workload = TINY):
    generator = torch.Generator().manual_seed(1)
    weights = new_weights(workload, case, generator)
    batch = new_batch(workload, case, generator)
    layers = (kind(workload.model, weights) for kind in (DualrayLayer, HuggingFaceLayer))
    return *layers, NaiveLayer(workload.model, weights), batch


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_sides_give_the_same_output_and_gradients(dtype) -> None:
    case = replace(FP32, dtype=dtype)
    ours, theirs, naive, batch = sides(case)
    for way in experts_sides.HUGGING_FACE_WAYS:
        theirs.use(way)
        check(case, way, ours, theirs, batch)
    check(case, "naive", ours, naive, batch)


def test_other_weights_are_refused() -> None:
    ours, theirs, _, batch = sides(FP32)
    with torch.no_grad():
        theirs._experts.down_proj[1] *= 1.01
    with pytest.raises(RunError) as refused:
        check(FP32, "hugging_face", ours, theirs, batch)
    assert re.fullmatch(
        r"cpu, 1 thread, fp32, fresh routing: the output differs by \de-03 between dualray and "
        r"hugging_face, and may by 1e-05",
        re.sub(r"\d\.\d", "1", refused.value.sentence),
    )


def test_another_gradient_is_refused(monkeypatch) -> None:
    ours, theirs, _, batch = sides(FP32)
    grads = theirs.weight_grads
    monkeypatch.setattr(theirs, "weight_grads", lambda: (grads()[0], grads()[1] * 1.01))
    with pytest.raises(RunError, match=r"the down weights' gradient differs by 9\.9e-03"):
        check(FP32, "hugging_face", ours, theirs, batch)


def test_the_layer_cut_into_its_phases_gives_the_same_gradients() -> None:
    ours, _, _, batch = sides(FP32)
    ours(batch)
    whole = [t.clone() for t in (batch.x_TD.grad, batch.gates_TK.grad, *ours.weight_grads())]
    ours.forget()
    batch.forget()
    parts = ours.parts(batch)
    cut = (batch.x_TD.grad, batch.gates_TK.grad, *ours.weight_grads())
    assert all(torch.equal(a, b) for a, b in zip(whole, cut))
    assert min(parts.dispatch_s, parts.experts_s, parts.combine_s) > 0
    assert parts.padding == 0


def test_padding_is_bookkeeping_too() -> None:
    case = replace(FP32, dtype="bf16")
    ours, _, _, batch = sides(case)
    counts = torch.bincount(batch.experts_TK.flatten(), minlength=8)
    padded = int(((counts + 15) // 16 * 16).sum())
    assert ours.parts(batch).padding == pytest.approx(1 - 4 * 160 / padded)
    parts = Parts(dispatch_s=1.0, experts_s=6.0, combine_s=3.0, padding=0.5)
    assert parts.bookkeeping == pytest.approx(0.7)


def test_fresh_rounds_have_choices_of_their_own_and_all_sides_the_same(monkeypatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    def timed(side, batch) -> float:
        seen.setdefault(type(side).__name__, []).append(batch.experts_TK)
        return 1.0

    monkeypatch.setattr(experts, "timed", timed)
    for routing, same in (("fresh", False), ("repeated", True)):
        seen.clear()
        row = compare_case(TINY, replace(FP32, routing=routing))
        assert (row["ratio"], row["rounds"]) == (1.0, 2)
        choices = seen["DualrayLayer"]
        assert len(choices) == experts.WARMUP + 2
        for other in ("HuggingFaceLayer", "BareProducts"):
            assert all(a is b for a, b in zip(choices, seen[other][-len(choices) :]))
        assert all(torch.equal(choices[0], c) for c in choices[1:]) == same


def test_hugging_face_takes_its_fastest_way(monkeypatch) -> None:
    _, theirs, _, batch = sides(FP32)
    seconds = {"grouped_mm": 2.0, "eager": 1.0}
    monkeypatch.setattr(
        experts, "timed", lambda side, batch: seconds[side._config._experts_implementation]
    )
    assert choose_way(theirs, batch) == "eager"
    assert theirs._config._experts_implementation == "eager"


def test_bare_products_are_six() -> None:
    weights = new_weights(TINY, FP32, torch.Generator())
    bare = BareProducts(weights, 4 * 160)
    *_, batch = sides(FP32)
    with torch.profiler.profile() as profile:
        bare(batch)
    found = {event.key: event.count for event in profile.key_averages()}
    assert found["aten::_grouped_mm"] == 6


def test_a_gpu_has_cases_of_its_own() -> None:
    on_cpu = cases(TINY, has_gpu=False)
    assert len(on_cpu) == 4
    assert cases(TINY, has_gpu=True)[:4] == on_cpu
    assert {case.device for case in cases(TINY, has_gpu=True)[4:]} == {"cuda"}


@pytest.fixture
def tiny_quick(monkeypatch) -> None:
    monkeypatch.setattr(experts, "QUICK", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_command_prints_json_and_appends_a_line(tiny_quick, tmp_path) -> None:
    path, threads = tmp_path / "results.jsonl", torch.get_num_threads()
    options = ["experts", "--quick", "--record", str(path), "--json"]
    done = CliRunner().invoke(app, options, catch_exceptions=False)
    assert done.exit_code == 0
    line = json.loads(done.stdout)
    assert json.loads(path.read_text()) == line
    assert torch.get_num_threads() == threads
    assert (line["benchmark"], line["config"]["tokens"], line["config"]["gpu"]) == (
        "experts",
        160,
        None,
    )
    assert [(row["dtype"], row["routing"]) for row in line["results"]] == [
        (dtype, routing) for dtype in ("fp32", "bf16") for routing in ("fresh", "repeated")
    ]
    for row in line["results"]:
        assert row["threads"] == 1
        assert row["hugging_face_experts"] in experts_sides.HUGGING_FACE_WAYS
        assert 0 < row["bookkeeping"] < 1
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert (row["padding"] > 0) == (row["dtype"] == "bf16")


def test_command_prints_a_table(tiny_quick) -> None:
    done = CliRunner().invoke(
        app, ["experts", "--quick"], catch_exceptions=False, env={"COLUMNS": "80"}
    )
    assert done.exit_code == 0
    first, head, *rows, legend, gpu = done.stdout.splitlines()
    assert first.startswith("experts, ")
    assert head.split()[:4] == ["case", "dualray", "HF", "ratio"]
    assert [re.split(r"  +", row.strip())[0] for row in rows] == [
        f"{dtype} 1 thread {routing}"
        for dtype in ("fp32", "bf16")
        for routing in ("fresh", "repeated")
    ]
    assert legend.startswith("times in ms. ratio: how many times faster dualray is")
    assert gpu.startswith("no GPU here: ")
