"""Cuts, memory and ranking of layouts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import configs

from dualray.model.config import ModelConfig
from dualray.model.formulas import parameter_count
from dualray.platform.planning.cluster_plan import preset_setting
from dualray.platform.planning.estimate import estimate
from dualray.platform.planning.fit import outline
from dualray.platform.planning.hardware import parse_cluster
from dualray.platform.planning.holding import held_by_stage
from dualray.platform.planning.layouts import candidates, planned, rank
from dualray.platform.planning.memory import kept_by_rank, least_bytes
from dualray.platform.planning.precision import FP8
from dualray.platform.planning.setting import Candidate, Setting
from dualray.platform.planning.split import balanced_split
from dualray.platform.preset import load_model
from dualray.schedule.make import KINDS, make_schedule
from dualray.schedule.memory import peaks_of


def setting_of(name: str, spec: str) -> Setting:
    return preset_setting(name, load_model(name), parse_cluster(spec))


def small(model: ModelConfig) -> Setting:
    return Setting(
        name="small",
        model=model,
        cluster=parse_cluster("h100x8"),
        precision=FP8,
        seq_len=64,
        num_sequences=64,
    )


@given(
    layers=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    last=st.integers(0, 30),
    data=st.data(),
)
def test_every_stage_gets_a_layer(layers: list[int], last: int, data: st.DataObject) -> None:
    paired = data.draw(st.booleans())
    if paired and len(layers) < 2:
        return
    stages = data.draw(st.integers(1, len(layers) // 2)) * 2 if paired else None
    stages = stages or data.draw(st.integers(1, len(layers)))
    split = balanced_split(tuple(layers), last, stages, paired=paired)
    assert len(split) == stages
    assert min(split) >= 1
    assert sum(split) == len(layers)


def test_the_head_takes_layers_from_the_last_stage() -> None:
    assert balanced_split((1,) * 8, 0, 4, paired=False) == (2, 2, 2, 2)
    # Of equal cuts the first stages, which keep most micro-batches, have fewest.
    assert balanced_split((1,) * 9, 2, 4, paired=False) == (2, 3, 3, 1)
    assert balanced_split((1,) * 8, 1, 3, paired=False) == (3, 3, 2)
    # A rank of a pair has the last stage and the first.
    assert balanced_split((1,) * 6, 2, 4, paired=True) == (1, 2, 2, 1)


def test_deepseek_v3_is_cut_into_stages_of_four_layers() -> None:
    setting = setting_of("deepseek-v3", "h800x2048")
    report = Candidate(
        pipeline=16,
        experts=64,
        replicas=2,
        schedule="dualpipe",
        micro_batch_size=1,
        micro_batches=120,
    )
    assert planned(setting, report).candidate.layers_per_stage == (4,) * 15 + (1,)


@settings(deadline=None, max_examples=30)
@given(config=configs())
def test_held_parameters_are_the_model(config: ModelConfig) -> None:
    one = Candidate(
        pipeline=1,
        experts=1,
        replicas=1,
        schedule="1f1b",
        micro_batch_size=1,
        micro_batches=1,
        layers_per_stage=(config.num_hidden_layers,),
    )
    count = parameter_count(config)
    (held,) = held_by_stage(config, one, outline("1f1b", 1))
    assert held.total == count.total + count.mtp


@pytest.mark.parametrize("kind", KINDS)
def test_kept_micro_batches_are_those_of_the_schedule(kind: str) -> None:
    """All stages alike, so that the fullest moment is the one with most micro-batches. ZB1P keeps
    more than are live: those whose weight gradients wait."""
    setting = setting_of("deepseek-v3", "h800x2048")
    schedule = make_schedule(kind, 4, 16)
    candidate = Candidate(
        pipeline=4,
        experts=64,
        replicas=8,
        schedule=kind,
        micro_batch_size=1,
        micro_batches=16,
        layers_per_stage=(7,) * schedule.num_stages,
    )
    kept = kept_by_rank(setting, candidate, schedule)
    totals = [sum(each.micro_batches for each in rank_kept) for rank_kept in kept]
    live = peaks_of(schedule.steps).activations
    if kind == "zb1p":
        assert all(total >= number for total, number in zip(totals, live))
    else:
        assert totals == list(live)


@pytest.mark.parametrize(
    ("name", "spec"), [("deepseek-v3", "h800x2048"), ("deepseek-v2-lite", "h100x64")]
)
def test_ranked_layouts_fit_and_use_the_cluster(name: str, spec: str) -> None:
    setting = setting_of(name, spec)
    ranking = rank(setting, 10)
    assert len(ranking.estimates) == 10
    speeds = [each.tokens_per_s_per_gpu for each in ranking.estimates]
    assert speeds == sorted(speeds, reverse=True)
    for each in ranking.estimates:
        assert each.memory.total <= setting.cluster.hardware.memory_bytes
        assert sum(vars(each.memory).values()) == pytest.approx(each.memory.total)
        assert each.candidate.num_gpus == setting.cluster.num_gpus
        assert each.candidate.num_sequences == setting.num_sequences
        assert sum(each.candidate.layers_per_stage) == setting.model.num_hidden_layers
        parts = sum(each.phases_s.values()) + each.bubble_s + each.fit.optimizer_s
        assert parts == pytest.approx(each.step_s)


def test_bounds_hold_and_the_search_misses_nothing() -> None:
    setting = small(load_model("tiny"))
    fits = [planned(setting, each) for each in candidates(setting)]
    everything = [estimate(setting, fit) for fit in fits]
    assert len(everything) > 50
    for fit, simulated in zip(fits, everything):
        assert fit.shortest_s <= simulated.step_s * (1 + 1e-9)
        assert least_bytes(setting, fit.candidate) <= fit.memory.total
    best = sorted(each.step_s for each in everything)[:7]
    assert [each.step_s for each in rank(setting, 7).estimates] == best


@settings(deadline=None, max_examples=15)
@given(config=configs())
def test_any_model_can_be_planned(config: ModelConfig) -> None:
    ranking = rank(small(config), 3)
    assert ranking.num_fitting == ranking.num_possible
    for each in ranking.estimates:
        assert 0 <= each.bubble_fraction < 1
        assert each.exposed_s >= 0
        assert each.hidden_s >= 0
