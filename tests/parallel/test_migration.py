"""Experts that move between living workers, and copies of them that train as one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.models import tiny_config
from support.processes import free_port, run_ranks
from support.training import make_trainer, tokens_for

from dualray.checkpoint.trainer_state import pieces
from dualray.parallel.layout import Layout
from dualray.parallel.slots import ExpertPlacement, contiguous_placement
from dualray.parallel.train_config import TrainConfig

MODEL = tiny_config(n_routed_experts=8)
LAYERS = tuple(MODEL.moe_layers)
TRAIN = TrainConfig(
    steps=8, seq_len=12, micro_batches=4, lr=3e-3, warmup_steps=0, clip_norm=0.5,
    optimizer="adamw", dtype="float64", gamma=0.01, alpha=1e-3, mtp_lambda=0.3,
)  # fmt: skip
TWO_BY_TWO = Layout(pipeline=2, experts=2, schedule="dualpipe")


def placed(*ranks: tuple[tuple[int, ...], int]) -> ExpertPlacement:
    """`ranks` are (experts held, how many of them are homes), alike in all layers."""
    return ExpertPlacement(
        held=dict.fromkeys(LAYERS, tuple(experts for experts, _ in ranks)),
        num_homes=dict.fromkeys(LAYERS, tuple(count for _, count in ranks)),
    )


SWAPPED = placed(((5, 0, 7, 2), 4), ((1, 4, 3, 6), 4))
ONE_LAYER = replace(
    SWAPPED,
    held={**SWAPPED.held, LAYERS[0]: ((7, 0, 5, 2), (4, 1, 3, 6))},
)
UNEQUAL = placed(((0, 1, 2, 3, 4, 7), 6), ((6, 5), 2))
COPIED = placed(((6, 1, 2, 0, 5), 4), ((7, 4, 5, 3, 2, 6), 4))
ONLY_COPIES = placed(((3, 2), 0), ((0, 1, 2, 3, 4, 5, 6, 7), 8))


def _state(trainer) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Every element of weights and optimizer state that this rank would write."""
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for piece in pieces(trainer):
        values = piece.tensor.detach().double().numpy().ravel().copy()
        found.setdefault(piece.name, []).append((piece.start, values))
    return found


def run(rank: int, layout: Layout, cases: list[tuple[TrainConfig, dict, int]]) -> list[tuple]:
    return [run_one(rank, layout, *case) for case in cases]


def run_one(
    rank: int, layout: Layout, train: TrainConfig, moves: dict[int, ExpertPlacement], port: int
) -> tuple:
    """Losses of six steps, with migrations before some of them, and the state at the end."""
    trainer = make_trainer(rank, MODEL, layout, train, port, placement=moves.get(0))
    losses, kept = [], []
    for step in range(6):
        if step and step in moves:
            before = _state(trainer)
            moved = trainer.move_experts(moves[step])
            kept.append((before, _state(trainer), len(moved.layers), moved.received_bytes))
        result = trainer.step(step, tokens_for(MODEL, train))
        losses.append((result.loss, result.grad_norm))
        rows = {layer: sum(counts) for layer, counts in result.work.slot_rows.items()}
        assert set(result.work.seconds) == set(rows)
        assert result.cross_node_bytes == 0
        assert all(seconds > 0 for layer, seconds in result.work.seconds.items() if rows[layer])
    weights = {
        layer: [weight.detach().double().numpy().copy() for weight in experts.parameters()]
        for layer, experts in trainer.held.experts().items()
    }
    heldout = trainer.evaluate(tokens_for(MODEL, train), 1).loss_sum
    trainer.close()
    return losses, kept, weights, heldout, rows


def joined(states: list[dict[str, list[tuple[int, np.ndarray]]]]) -> dict[str, np.ndarray]:
    """The whole state of a replica; every element must be written exactly once."""
    whole: dict[str, np.ndarray] = {}
    for name in sorted({name for state in states for name in state}):
        parts = [part for state in states for part in state.get(name, ())]
        parts.sort(key=lambda part: part[0])
        end = 0
        for start, values in parts:
            assert start == end, name
            end += len(values)
        whole[name] = np.concatenate([values for _, values in parts])
    return whole


FLOAT32 = replace(TRAIN, dtype="float32", optimizer="zero1")
BFLOAT16 = replace(TRAIN, dtype="bfloat16", optimizer="zero1")


@pytest.mark.multiproc
def test_a_run_goes_on_alike_when_experts_have_moved() -> None:
    moves = {2: SWAPPED, 3: ONE_LAYER, 4: COPIED, 5: UNEQUAL}
    trains = (TRAIN, FLOAT32, BFLOAT16)
    cases = [(train, then, free_port()) for train in trains for then in ({}, moves)]
    results = run_ranks(run, 4, TWO_BY_TWO, cases)
    for index, tolerance in enumerate((1e-9, 1e-6, 5e-3)):
        still = [found[2 * index] for found in results]
        moved = [found[2 * index + 1] for found in results]
        for found, wanted in zip(moved[0][0], still[0][0], strict=True):
            assert found[0] == pytest.approx(wanted[0], rel=tolerance)
            assert found[1] == pytest.approx(wanted[1], rel=tolerance * 100)
        assert moved[0][3] == pytest.approx(still[0][3], rel=tolerance)
        for number in range(len(moves)):
            before = joined([found[1][number][0] for found in moved])
            after = joined([found[1][number][1] for found in moved])
            assert before.keys() == after.keys()
            for name in before:
                assert np.array_equal(before[name], after[name]), name
        # Only layers that change are touched; each of two mirrored workers has them all.
        counts = [[kept[2] for kept in found[1]] for found in moved]
        assert counts == [[len(LAYERS), 1, len(LAYERS), len(LAYERS)]] * 4
        received = [[kept[3] for kept in found[1]] for found in moved]
        assert all(min(swapped, *others) > 0 for swapped, _, *others in received)
        # Another order of the slots of a rank sends no weights.
        assert all(reordered < swapped for swapped, reordered, *_ in received)


@pytest.mark.multiproc
def test_a_rank_may_lose_its_last_home_and_get_others() -> None:
    moves = {1: ONLY_COPIES, 4: COPIED}
    cases = [(train, then, free_port()) for train in (TRAIN, FLOAT32) for then in ({}, moves)]
    results = run_ranks(run, 4, TWO_BY_TWO, cases)[0]
    for still, moved, tolerance in ((*results[:2], 1e-9), (*results[2:], 1e-6)):
        for found, wanted in zip(moved[0], still[0], strict=True):
            assert found[0] == pytest.approx(wanted[0], rel=tolerance)


@pytest.mark.multiproc
def test_copies_train_as_one_expert() -> None:
    layout = Layout(pipeline=1, experts=2, replicas=2, schedule="1f1b")
    choices = [(TRAIN, COPIED), (TRAIN, ONLY_COPIES), (FLOAT32, COPIED), (FLOAT32, ONLY_COPIES)]
    cases = [(TRAIN, {}, free_port()), (FLOAT32, {}, free_port())]
    cases += [(train, {0: placement}, free_port()) for train, placement in choices]
    results = run_ranks(run, 4, layout, cases)
    for index, (train, placement) in enumerate(choices, start=2):
        exact = train is TRAIN
        plain = [found[0 if exact else 1] for found in results]
        copied = [found[index] for found in results]
        for found, wanted in zip(copied[0][0], plain[0][0], strict=True):
            assert found[0] == pytest.approx(wanted[0], rel=1e-9 if exact else 1e-6)
        _check_copies(placement, [found[2] for found in copied[:2]])
        # An expert's copies take turns; of its rows none are lost.
        rows = [[found[4] for found in run] for run in (copied, plain)]
        totals = [{k: sum(row[k] for row in each) for k in LAYERS} for each in rows]
        assert totals[0] == totals[1]


def _check_copies(placement: ExpertPlacement, weights: list[dict[int, list[np.ndarray]]]) -> None:
    for layer in LAYERS:
        homes = placement.home_ranks(layer)
        for rank, experts in enumerate(placement.held[layer]):
            for slot, expert in enumerate(experts):
                at = placement.homes(layer, homes[expert]).index(expert)
                for own, home in zip(weights[rank][layer], weights[homes[expert]][layer]):
                    assert np.array_equal(own[slot], home[at]), (layer, expert)


def _lost(rank: int, port: int):
    trainer = make_trainer(rank, MODEL, TWO_BY_TWO, TRAIN, port)
    trainer.step(0, tokens_for(MODEL, TRAIN))
    if rank == 3:
        return None  # leaves without a word
    before = _state(trainer)
    with pytest.raises(RuntimeError):
        trainer.move_experts(SWAPPED)
    after = _state(trainer)
    assert trainer.placement == contiguous_placement(MODEL, 2)
    same = all(
        start == other and np.array_equal(values, values_after)
        for name in before
        for (start, values), (other, values_after) in zip(before[name], after[name], strict=True)
    )
    return same and before.keys() == after.keys() and torch.is_grad_enabled()


@pytest.mark.multiproc
def test_a_worker_that_leaves_in_a_migration_takes_nothing_with_it() -> None:
    assert run_ranks(_lost, 4, free_port()) == [True, True, True, None]
