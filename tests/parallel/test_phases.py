"""Phases as data, what they refuse, and workers that go from one into the next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import tiny_config
from support.processes import free_port, run_ranks
from support.training import make_trainer, tokens_for

from dualray.checkpoint import trainer_state
from dualray.checkpoint.reader import Reader
from dualray.checkpoint.writer import begin, commit, step_dir, write_rank
from dualray.errors import ConfigError
from dualray.model.config import YarnConfig
from dualray.parallel.layout import Layout
from dualray.parallel.phases import (
    ExtendConfig,
    PhaseConfig,
    phase_at,
    phase_behind,
    plan_phases,
)
from dualray.parallel.train_config import TrainConfig

MODEL = tiny_config(max_position_embeddings=16)
YARN = YarnConfig(factor=4, original_max_position_embeddings=16, mscale_all_dim=0.7)
LAYOUT = Layout(pipeline=2, experts=2, schedule="dualpipe")
TRAIN = TrainConfig(
    steps=2, seq_len=10, micro_batch_size=2, micro_batches=4, lr=3e-3, gamma=0.01, alpha=1e-3
)
SHORT = PhaseConfig(steps=2, seq_len=24, lr=1e-3, micro_batch_size=1)
LONG = PhaseConfig(
    steps=1, seq_len=50, lr=1e-3, min_lr=1e-4, warmup_steps=1, micro_batch_size=1, micro_batches=6
)
EXTEND = ExtendConfig(rope_scaling=YARN, phases=(SHORT, LONG))


def phases_of(train=TRAIN, extend=EXTEND, model=MODEL, layout=LAYOUT):
    return plan_phases(model, train, layout, extend)


def test_a_run_without_extension_has_one_phase() -> None:
    (only,) = phases_of(extend=None)
    assert (only.model, only.train, only.first_step, only.first_sample) == (MODEL, TRAIN, 0, 0)


def test_each_phase_changes_its_fields_and_counts_on() -> None:
    base, short, long = phases_of()
    assert (base.model, base.train) == (MODEL, TRAIN)
    assert short.model == long.model == replace(
        MODEL, rope_scaling=YARN, max_position_embeddings=64
    )  # fmt: skip
    assert short.train == replace(
        TRAIN, steps=2, seq_len=24, lr=1e-3, min_lr=1e-3, micro_batch_size=1
    )
    assert (long.train.min_lr, long.train.warmup_steps, long.train.micro_batches) == (1e-4, 1, 6)
    assert [phase.number for phase in (base, short, long)] == [0, 1, 2]
    assert [phase.first_step for phase in (base, short, long)] == [0, 2, 4]
    # 16 sequences of 10, then 8 of 24, each twice.
    assert [phase.tokens_before for phase in (base, short, long)] == [0, 320, 320 + 384]
    assert [phase.first_sample for phase in (base, short, long)] == [0, 14, 15]
    assert [phase_at((base, short, long), step).number for step in range(7)] == [
        *(0, 0, 1, 1, 2, 2, 2)
    ]
    assert [phase_behind((base, short, long), done).number for done in range(7)] == [
        *(0, 0, 0, 1, 1, 2, 2)
    ]


def test_an_extension_alone_starts_at_step_0() -> None:
    short, long = phases_of(replace(TRAIN, steps=0))
    assert (short.number, short.first_step, short.first_sample) == (1, 0, 0)
    assert long.first_step == 2


def test_a_model_with_yarn_is_trained_on() -> None:
    extended = phases_of()[1].model
    for extend in (EXTEND, replace(EXTEND, rope_scaling=None)):
        assert phases_of(extend=extend, model=extended)[1].model == extended


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=5))
def test_phases_cover_every_step_and_token_once(drawn) -> None:
    length, configs = TRAIN.seq_len, []
    for steps, longer in drawn:
        length = min(length + longer, 64)
        configs.append(PhaseConfig(steps=steps, seq_len=length, lr=1e-3))
    phases = phases_of(extend=replace(EXTEND, phases=tuple(configs)))
    ends = [phase.end_step for phase in phases]
    assert [0, *ends[:-1]] == [phase.first_step for phase in phases]
    assert ends[-1] == TRAIN.steps + sum(steps for steps, _ in drawn)
    tokens = 0
    for step in range(ends[-1]):
        phase = phase_at(phases, step)
        done = (step - phase.first_step) * phase.tokens_per_step(LAYOUT)
        assert phase.tokens_before + done == tokens
        # No window is read that lies before the tokens already read; at most one is skipped.
        behind = phase.first_sample * phase.train.seq_len - phase.tokens_before
        assert 0 <= behind < phase.train.seq_len
        tokens += phase.tokens_per_step(LAYOUT)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"phases": ()},
            "extend.phases is empty and must have at least one phase; give steps, seq_len and lr "
            "of one, or remove section extend.",
        ),
        (
            {"rope_scaling": None},
            "extend.rope_scaling is missing and the model has none; set "
            "extend.rope_scaling.factor to how many times longer the context becomes.",
        ),
        (
            {"rope_scaling": replace(YARN, original_max_position_embeddings=32)},
            "extend.rope_scaling.original_max_position_embeddings 32 exceeds "
            "model.max_position_embeddings 16; set it to the context that the model was trained "
            "with.",
        ),
        (
            {"rope_scaling": replace(YARN, original_max_position_embeddings=8)},
            "extend.rope_scaling.original_max_position_embeddings 8 is below train.seq_len 10; "
            "set it to the context that the model was trained with.",
        ),
        (
            {"rope_scaling": replace(YARN, original_max_position_embeddings=12, factor=1.25)},
            "extend.rope_scaling reaches 12 x 1.25 = 15 tokens and model.max_position_embeddings "
            "is 16 already; raise extend.rope_scaling.factor.",
        ),
        (
            {"phases": (SHORT, replace(LONG, seq_len=65))},
            "extend.phases.1.seq_len 65 exceeds the 64 tokens that rope_scaling reaches; shorten "
            "the sequences or raise extend.rope_scaling.factor.",
        ),
        (
            {"phases": (LONG, SHORT)},
            "extend.phases.1.seq_len 24 is below the 50 of the phase before it; order the phases "
            "from short sequences to long ones.",
        ),
        (
            {"phases": (replace(SHORT, seq_len=9),)},
            "extend.phases.0.seq_len 9 is below the 10 of the phase before it; order the phases "
            "from short sequences to long ones.",
        ),
        (
            {"phases": (SHORT, replace(LONG, steps=0))},
            "extend.phases.1.steps is 0 and must be at least 1; remove the phase, or set its "
            "steps to 1 or more.",
        ),
        (
            {"phases": (replace(SHORT, micro_batch_size=0),)},
            "extend.phases.0.micro_batch_size is 0 and must be at least 1; set "
            "extend.phases.0.micro_batch_size to 1 or more.",
        ),
        (
            {"phases": (SHORT, replace(LONG, lr=0.0))},
            "extend.phases.1.lr is 0.0 and must be above 0; set extend.phases.1.lr to, say, 3e-4.",
        ),
        (
            {"phases": (replace(SHORT, warmup_steps=3),)},
            "extend.phases.0.warmup_steps is 3 and must lie between 0 and extend.phases.0.steps = "
            "2; set extend.phases.0.warmup_steps to 0.",
        ),
        (
            {"phases": (replace(SHORT, micro_batches=2),)},
            "extend.phases.0.micro_batches is 2 and dualpipe needs at least 2 x layout.pipeline = "
            "4; set extend.phases.0.micro_batches to 4, or layout.schedule to 1f1b.",
        ),
    ],
)
def test_what_a_section_may_not_say(changes, sentence) -> None:
    with pytest.raises(ConfigError) as caught:
        phases_of(extend=replace(EXTEND, **changes))
    assert str(caught.value) == sentence


def test_a_model_is_extended_once() -> None:
    model = replace(MODEL, rope_scaling=replace(YARN, factor=2.0), max_position_embeddings=32)
    with pytest.raises(ConfigError) as caught:
        phases_of(model=model)
    assert str(caught.value) == (
        "extend.rope_scaling differs from model.rope_scaling, and a model is extended once; leave "
        "extend.rope_scaling out to train on with the model's."
    )


# Workers

SAVED = (2, 3)
"""The end of the first phase, and the middle of the second."""
CASES = {
    "fp32": (LAYOUT, TRAIN),
    "float64": (
        replace(LAYOUT, schedule="1f1b"),
        replace(TRAIN, optimizer="adamw", dtype="float64"),
    ),
}


def steps_of(trainer, first: int, phases, entered, before=lambda step: None) -> list[tuple]:
    """Steps from `first` to the end, and the held-out loss; `before` is called in front of each."""
    results = []
    for step in range(first, phases[-1].end_step):
        before(step)
        phase = phase_at(phases, step)
        if phase is not entered:
            trainer.enter_phase(phase, trainer.layout)
            entered = phase
        result = trainer.step(step, tokens_for(phase.model, phase.train))
        results.append((result.loss, *result.mtp_loss, result.grad_norm, result.lr))
    heldout = trainer.evaluate(tokens_for(phase.model, phase.train), 1)
    return [*results, (heldout.loss_sum, heldout.targets)]


def train_through(rank: int, folders: dict, ports: dict) -> dict:
    """Every step in one go; checkpoints are written before the steps in SAVED."""
    written = {}
    for name, (layout, train) in CASES.items():
        phases = phases_of(train, layout=layout)
        trainer = make_trainer(rank, phases[0].model, layout, train, ports[name])

        def save(step, name=name, trainer=trainer):
            if step in SAVED:
                pieces = trainer_state.pieces(trainer)
                written[name, step] = write_rank(folders[name, step], rank, pieces)

        written[name] = steps_of(trainer, 0, phases, phases[0], save)
        trainer.close()
    return written


def train_from(rank: int, checkpoints: dict, ports: dict) -> dict:
    """New trainers built in the phase that the checkpoint is followed by."""
    results = {}
    for (name, number), port in ports.items():
        layout, train = CASES[name]
        phases = phases_of(train, layout=layout)
        phase = phase_at(phases, number)
        trainer = make_trainer(
            rank, phase.model, layout, phase.train, port, first_step=phase.first_step
        )
        trainer_state.restore(trainer, Reader(checkpoints[name, number]), step=number)
        results[name, number] = steps_of(trainer, number, phases, phase)
        if (name, number) == ("float64", SAVED[0]):
            # What the first long step's loss would be had the positions stayed as they were.
            trainer_state.restore_weights(trainer, Reader(checkpoints[name, number]))
            trainer.enter_phase(replace(phase, model=MODEL), trainer.layout)
            results["old positions"] = trainer.step(number, tokens_for(MODEL, phase.train)).loss
        trainer.close()
    return results


@pytest.mark.multiproc
def test_a_phase_entered_equals_a_trainer_built_in_it(tmp_path: Path) -> None:
    """Bit for bit, from the boundary and from within a phase: same shapes in the same order."""
    keys = [(name, number) for name in CASES for number in SAVED]
    folders = {
        key: begin(tmp_path / "-".join(map(str, key)) / "checkpoints", key[1]) for key in keys
    }
    written = run_ranks(train_through, 4, folders, {name: free_port() for name in CASES})
    checkpoints = {}
    for key, folder in folders.items():
        checkpoints[key] = step_dir(folder.parent, key[1])
        commit(folder, checkpoints[key], [files[key] for files in written], {"step": key[1]})
    resumed = run_ranks(train_from, 4, checkpoints, {key: free_port() for key in keys})
    for rank in range(4):
        for name, number in keys:
            expected = written[rank][name]
            assert resumed[rank][name, number] == expected[number:], (rank, name, number)
        assert [step[-1] for step in expected[:-1]][2:] == [1e-3, 1e-3, 1e-3]
    right, wrong = written[0]["float64"][SAVED[0]][0], resumed[0]["old positions"]
    assert abs(right - wrong) > 1e-6
