"""Four ways to balance in every layout, biases that freeze, and settings that contradict."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from support.models import tiny_config
from support.processes import free_port, run_ranks
from support.training import make_trainer, tokens_for

from dualray.errors import ConfigError
from dualray.model.config import YarnConfig
from dualray.parallel.layout import Layout
from dualray.parallel.phases import ExtendConfig, PhaseConfig, plan_phases
from dualray.parallel.train_config import TrainConfig

STEPS, MOVING = 4, 2
TRAIN = TrainConfig(
    steps=STEPS, seq_len=12, micro_batch_size=1, micro_batches=16, lr=3e-3, optimizer="adamw",
    dtype="float64", gamma=0.01, alpha=1e-3,
)  # fmt: skip
SETTINGS = {
    "aux_loss_and_bias": replace(
        TRAIN, balance="aux_loss_and_bias", aux_alpha=0.05, gamma_steps=MOVING
    ),
    "aux_loss": replace(TRAIN, balance="aux_loss", aux_alpha=0.05, steps=2),
    "none": replace(TRAIN, balance="none", steps=1),
}
WIDE = Layout(pipeline=2, experts=2, replicas=2, schedule="dualpipe")


def biases_of(trainer) -> dict[int, list[float]]:
    return {r.layer: r.e_score_correction_bias.tolist() for r in trainer.held.routers()}


def train(rank: int, model, layout: Layout, ports: dict[str, int]) -> dict:
    found = {}
    for name, port in ports.items():
        # 16 sequences a step, one a micro-batch, whatever the layout.
        count = 16 // (layout.replicas * layout.experts)
        config = replace(SETTINGS[name], micro_batches=count)
        trainer = make_trainer(rank, model, layout, config, port)
        source, steps = tokens_for(model, config), []
        for step in range(config.steps):
            result = trainer.step(step, source)
            figures = (result.loss, sum(result.mtp_loss), result.balance_loss, result.grad_norm)
            held = {
                layer: ranks[trainer.at.expert] for layer, ranks in trainer.placement.held.items()
            }
            rows = {
                (layer, expert): count
                for layer, counts in result.work.slot_rows.items()
                for expert, count in zip(held[layer], counts, strict=True)
            }
            steps.append((figures, result.loads, biases_of(trainer), rows))
        trainer.close()
        found[name] = steps
    return found


@pytest.mark.multiproc
def test_replicas_experts_and_mirrors_balance_as_one_process() -> None:
    model = tiny_config(num_nextn_predict_layers=1)
    (alone,) = run_ranks(train, 1, model, Layout(), {name: free_port() for name in SETTINGS})
    wide = run_ranks(train, 8, model, WIDE, {name: free_port() for name in SETTINGS})
    chosen = 16 * TRAIN.seq_len * model.num_experts_per_tok
    for name, steps in alone.items():
        for number, (figures, loads, biases, rows) in enumerate(steps):
            assert sorted(loads) == sorted(biases) == [1, 2, 3, 4]
            assert all(sum(load) == chosen for load in loads.values())
            seen, computed = set(), Counter()
            for rank, results in enumerate(wide):
                theirs, their_loads, their_biases, their_rows = results[name][number]
                computed.update(their_rows)
                # float64: sums in another order, over as many terms as there are workers.
                assert theirs == pytest.approx(figures, rel=1e-9), (name, number, rank)
                for layer, load in their_loads.items():
                    seen.add(layer)
                    assert load == loads[layer], (name, number, rank, layer)
                    assert their_biases[layer] == biases[layer], (name, number, rank, layer)
            assert seen == set(loads)
            # What is loaded is computed, by somebody and once.
            for layer, load in loads.items():
                assert [rows[layer, expert] for expert in range(len(load))] == load
                assert [computed[layer, expert] for expert in range(len(load))] == load
    moved = [biases for _, _, biases, _ in alone["aux_loss_and_bias"]]
    assert moved[0] != moved[1]
    assert moved[MOVING - 1] == moved[MOVING] == moved[-1]
    for name in ("aux_loss", "none"):
        assert all(not any(bias) for _, _, biases, _ in alone[name] for bias in biases.values())
    balance = {name: [figures[2] for figures, *_ in steps] for name, steps in alone.items()}
    assert balance["none"] == [0.0]
    # Four layers whose losses lie a little above 1 each.
    assert all(4 * 0.05 < loss < 4 * 0.05 * 2 for loss in balance["aux_loss"])
    # The same first batch and weights, with the sequence-wise loss on top.
    assert 4e-3 < balance["aux_loss_and_bias"][0] - balance["aux_loss"][0] < 8e-3


def test_what_each_setting_switches_on() -> None:
    weights = {
        name: (config.gamma_at(0), config.sequence_loss_weight(), config.aux_loss_weight())
        for name in ("bias", "none", "aux_loss", "aux_loss_and_bias")
        for config in [replace(TRAIN, balance=name)]
    }
    assert weights == {
        "bias": (0.01, 1e-3, 0.0),
        "none": (0.0, 0.0, 0.0),
        "aux_loss": (0.0, 0.0, 0.001),
        "aux_loss_and_bias": (0.01, 1e-3, 0.001),
    }
    assert replace(TRAIN, balance="aux_loss", aux_alpha=0.0).aux_loss_weight() == 0.0
    frozen = replace(TRAIN, gamma_steps=3)
    assert [frozen.gamma_at(step) for step in range(5)] == [0.01] * 3 + [0.0] * 2
    assert replace(TRAIN, gamma_steps=0).gamma_at(0) == 0.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"balance": "biases"},
            "train.balance is biases and must be one of bias, none, aux_loss, aux_loss_and_bias; "
            "set train.balance to bias.",
        ),
        (
            {"aux_alpha": 0.01},
            "train.aux_alpha is 0.01 and train.balance bias has no auxiliary loss; remove "
            "train.aux_alpha, or set train.balance to aux_loss.",
        ),
        (
            {"balance": "aux_loss", "aux_alpha": -1.0},
            "train.aux_alpha is -1.0 and must be at least 0; set train.aux_alpha to 0 or more.",
        ),
        (
            {"gamma_steps": -1},
            "train.gamma_steps is -1 and must be at least 0; set train.gamma_steps to 0 or more.",
        ),
        (
            {"balance": "aux_loss", "gamma_steps": 5},
            "train.gamma_steps is 5 and train.balance aux_loss moves no biases; remove "
            "train.gamma_steps, or set train.balance to bias.",
        ),
    ],
)
def test_settings_that_contradict_are_refused(changes, sentence) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(TRAIN, **changes)
    assert str(caught.value) == sentence


def phases_of(gammas: tuple[float | None, ...], **changes):
    phases = tuple(PhaseConfig(steps=3, seq_len=12, lr=1e-3, gamma=gamma) for gamma in gammas)
    yarn = YarnConfig(factor=2.0, original_max_position_embeddings=32)
    model = tiny_config(rope_scaling=yarn)
    return plan_phases(model, replace(TRAIN, **changes), Layout(), ExtendConfig(phases=phases))


def test_a_phase_may_change_gamma() -> None:
    """Steps 0 to 3 are the run's, then come phases of three."""
    phases = phases_of((None, 0.002, 0.0), gamma_steps=9)
    assert [phase.train.gamma for phase in phases] == [0.01, 0.01, 0.002, 0.0]
    assert [phases[2].train.gamma_at(step) for step in (7, 8, 9)] == [0.002, 0.002, 0.0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"balance": "none"},
            "extend.phases.0.gamma is 0.002 and train.balance none moves no biases; remove "
            "extend.phases.0.gamma, or set train.balance to bias.",
        ),
        (
            {"gamma_steps": 4},
            "extend.phases.0.gamma is 0.002 and biases are frozen after train.gamma_steps = 4, "
            "before the phase's step 5; remove extend.phases.0.gamma, or raise train.gamma_steps.",
        ),
    ],
)
def test_a_phase_may_not_move_what_is_frozen(changes, sentence) -> None:
    with pytest.raises(ConfigError) as caught:
        phases_of((0.002,), **changes)
    assert str(caught.value) == sentence
