"""`dualray bench rebalance`, at its smallest, and what it makes of steps that are known."""

from __future__ import annotations

import json

import pytest
import torch
from support.models import tiny_config
from typer.testing import CliRunner

from dualray.model.moe import Experts
from dualray.model.router import Router
from dualray.parallel.expert_groups import Moved
from dualray.parallel.proposal import LayerChange, Proposal
from dualray.parallel.slots import contiguous_placement
from dualray.parallel.weight_grads import WeightGrads, attach_main_grads
from dualray.platform.bench.rebalance import QUICK, MadeUpTokens, skew_routers
from dualray.platform.bench.rebalance_ranks import (
    Migration,
    Step,
    ThreadClock,
    Training,
    slow_down,
)
from dualray.platform.bench.rebalance_result import Rebalanced, goals, migration_of, row_of
from dualray.platform.commands.bench import app
from dualray.platform.commands.bench_rebalance import _migration

MODEL = tiny_config()


@pytest.mark.multiproc
def test_skewed_routers_are_evened_out_in_real_processes(tmp_path) -> None:
    record = tmp_path / "results.jsonl"
    result = CliRunner().invoke(app, ["rebalance", "--quick", "--json", "--record", str(record)])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.splitlines()[-1])
    assert json.loads(record.read_text()) == line
    rows = {row["setting"]: row for row in line["results"]}
    assert list(rows) == ["stays", "copies", "moved", "slow", "slow_moved"]
    config = line["config"]
    tokens = 4 * config["micro_batches"] * config["sequences"] * config["seq_len"]
    for row in rows.values():
        assert row["rows"] == tokens * config["num_experts_per_tok"]
        assert row["imbalance"] == max(row["imbalance_by_layer"]) >= 1
        assert row["slowest_s"] >= row["mean_s"] > 0
        assert row["timed_steps"] == config["rounds"] * (config["steps_per_look"] - 1)
    assert rows["stays"]["imbalance"] > 1.8
    assert rows["copies"]["imbalance"] > 1.8
    assert rows["moved"]["imbalance"] < rows["stays"]["imbalance"]
    # The slow rank has its quarter until its speed counts.
    assert rows["slow_moved"]["share_of_slow_rank"] < rows["slow"]["share_of_slow_rank"]
    moved, slow_moved = line["migrations"]
    assert (moved["setting"], slow_moved["setting"]) == ("moved", "slow_moved")
    for migration in (moved, slow_moved):
        assert migration["adopted"] == migration["looks"] == config["rounds"]
        assert migration["bytes"] > 0
        assert len(migration["second_looks"]) == config["rounds"]
        # Equal sums in another order, fp32; and copies that had not learned alike would show.
        assert migration["loss_difference_next_step"] <= 1e-6
        assert migration["loss_difference_later"] <= 1e-5
    met = {goal["goal"]: goal["met"] for goal in line["goals"]}
    assert list(met) == ["balance", "slowest_worker", "loss", "unequal_ranks"]
    assert met["loss"]


def test_slowed_experts_compute_everything_again_to_the_same_results() -> None:
    torch.manual_seed(0)
    rows = torch.randn(60, MODEL.hidden_size, dtype=torch.float64)
    offsets = torch.tensor([25, 25, 60], dtype=torch.int32)
    found, calls = [], []
    for times in (1, 3):
        experts = Experts(MODEL, (4, 5, 6)).double()
        with torch.no_grad():
            for number, weight in enumerate(experts.parameters()):
                weight.copy_(_filled(weight, number))
        attach_main_grads(experts.parameters())
        counted = _Counted(experts)
        if times > 1:
            slow_down(experts, times)
        given = rows.clone().requires_grad_()
        out = experts(given, offsets, WeightGrads())
        forwards = counted.calls
        out.square().sum().backward()
        calls.append((forwards, counted.calls))
        grads = [weight.main_grad.clone() for weight in experts.parameters()]
        found.append([out.detach(), given.grad, *grads])
    # Twice more forwards; and a backward costs two forwards each time.
    assert calls == [(1, 1), (3, 3 + 2 * 2)]
    for plain, slowed in zip(*found, strict=True):
        assert torch.equal(plain, slowed)


def _filled(weight: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


class _Counted:
    """Counts calls of a module's `forward`, whoever makes them."""

    def __init__(self, experts: Experts) -> None:
        self.calls = 0
        self._forward = experts.forward
        experts.forward = self._count

    def _count(self, *args):
        self.calls += 1
        return self._forward(*args)


def test_the_clock_counts_forwards_layer_by_layer_and_sees_the_slowing() -> None:
    experts = Experts(MODEL, (0, 1))
    torch.nn.init.ones_(experts.gate_up_proj)
    torch.nn.init.ones_(experts.down_proj)
    clock, order = ThreadClock(), []
    clock.watch(3, experts)
    experts.register_forward_hook(lambda *_: order.append("behind the clock"))
    experts.register_forward_hook(lambda *_: order.append("slowing"), prepend=True)
    with torch.no_grad():
        experts(torch.ones(8, MODEL.hidden_size), torch.tensor([4, 8], dtype=torch.int32), None)
    assert order == ["slowing", "behind the clock"]
    assert list(clock.take()) == [3]
    assert clock.take() == {}


def test_every_layer_prefers_other_experts() -> None:
    routers = [Router(MODEL, layer) for layer in (1, 2)]
    skew_routers(routers, 0.5)
    first, second = (router.e_score_correction_bias for router in routers)
    assert first.argmax() == 0
    assert second.argmax() == 4
    assert torch.equal(first.roll(4), second)
    assert first.max() == 0.5
    assert first.min() == -0.5


def test_labels_are_the_next_ids_and_steps_differ() -> None:
    tokens = MadeUpTokens(vocab_size=50, seq_len=9)
    window = tokens.sequences(3, 4, 2, 8)
    assert window.ids.shape == (2, 9)
    assert window.labels.shape == (1, 2, 9)
    assert (window.ids[:, 1:] == window.labels[0, :, :-1]).all()
    assert (tokens.sequences(3, 5, 1, 8).ids == window.ids[1:]).all()
    assert not (tokens.sequences(4, 5, 1, 8).ids == window.ids[1:]).all()


def _everybody(rows: list[tuple[int, int]], seconds: list[tuple[float, float]], loss: float = 2.0):
    return [
        Step(
            loss=loss,
            step_s=1.0 + rank,
            rows={0: counts[0], 1: counts[1]},
            computed_s={0: took[0], 1: took[1]},
            wall_s={0: 2 * took[0], 1: 2 * took[1]},
        )
        for rank, (counts, took) in enumerate(zip(rows, seconds, strict=True))
    ]


def test_a_row_waits_in_every_layer_for_the_slowest() -> None:
    # Rank 1 works at half the speed of the others; 20 rows a layer.
    even = _everybody([(5, 5)] * 4, [(5.0, 5.0), (10.0, 10.0), (5.0, 5.0), (5.0, 5.0)])
    skewed = _everybody(
        [(14, 2), (2, 2), (2, 2), (2, 14)],
        [(14.0, 2.0), (4.0, 4.0), (2.0, 2.0), (2.0, 14.0)],
    )
    row = row_of("slow", [[even, even]])
    assert row["imbalance"] == 1.0
    assert row["slowest_s"] == 20.0
    assert row["slowest_wall_s"] == 40.0
    assert row["mean_s"] == 12.5
    # Three ranks and a half share 20 rows a layer.
    assert row["even_s"] == pytest.approx(2 * 20 / 3.5)
    assert row["slowest_per_even"] == pytest.approx(1.75)
    assert row["share_of_slow_rank"] == 0.25
    assert (row["rows"], row["step_s"], row["timed_steps"]) == (20, 4.0, 1)
    # Steps that warm up count in rows alone, round by round.
    row = row_of("slow", [[skewed, even], [even, even]])
    assert row["imbalance_by_layer"] == [pytest.approx((2.8 + 3) / 4)] * 2
    assert row["slowest_s"] == 20.0
    assert row["timed_steps"] == 2
    # The fullest rank differs from layer to layer, and both are waited for.
    assert row_of("slow", [[even, skewed]])["slowest_s"] == 28.0


def _proposal(adopt: bool, num_bytes: int = 0) -> Proposal:
    change = LayerChange(
        layer=0, imbalance_before=2.8, imbalance_after=1.0, seconds_before=3.0, seconds_after=1.0,
        cost_s=0.5, num_bytes=num_bytes, moves=(), moved=adopt,
    )  # fmt: skip
    return Proposal(
        adopt=adopt,
        reason="because",
        note="",
        placement=contiguous_placement(MODEL, 4),
        layers=(change,),
    )


def _trainings(losses: list[float], adopt: bool) -> list[Training]:
    seconds = [[(4.0, 4.0)] * 4] * QUICK.steps_per_look
    seconds += [[(3.0, 2.0)] * 4] * QUICK.steps_per_look
    steps = [_everybody([(5, 5)] * 4, took, loss) for loss, took in zip(losses, seconds)]
    moved = [Moved(layers=(0,), received_bytes=number, seconds=0.1 * number) for number in range(4)]
    migration = Migration(proposal=_proposal(adopt), moved=tuple(moved) if adopt else ())
    return [
        Training(steps=list(each), migration=migration, second_look=_proposal(False))
        for each in zip(*steps)
    ]


def test_a_migration_is_told_beside_what_was_foreseen() -> None:
    stays = [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    moves = [2.0, 2.0, 2.2, 2.002, 2.4, 2.0]
    found = migration_of(
        QUICK, "moved", [_trainings(moves, True)] * 2, [_trainings(stays, False)] * 2
    )
    assert (found["adopted"], found["looks"]) == (2, 2)
    assert (found["bytes"], found["seconds"]) == (6, pytest.approx(0.3))
    assert (found["foreseen_gain_s"], found["foreseen_cost_s"]) == (2.0, 0.5)
    assert found["measured_gain_s"] == 3 * (8.0 - 5.0)
    assert found["loss_difference_before"] == pytest.approx(0.1)
    assert found["loss_difference_next_step"] == pytest.approx(1e-3)
    assert found["loss_difference_later"] == pytest.approx(0.2)
    assert found["second_looks"] == ["because"] * 2
    assert "2 of 2 looks" in _migration(found)


def test_experts_that_stayed_are_no_migration_and_no_goal_met() -> None:
    stays = [_trainings([2.0] * QUICK.steps, False)]
    found = migration_of(QUICK, "moved", stays, stays)
    assert (found["adopted"], found["seconds"], found["bytes"]) == (0, None, None)
    assert _migration(found) == "moved in 0 of 1 looks (because)"
    even = _everybody([(5, 5)] * 4, [(5.0, 5.0)] * 4)
    names = ("stays", "copies", "moved", "slow", "slow_moved")
    rows = [row_of(name, [[even, even]]) for name in names]
    verdicts = goals(Rebalanced(rows=rows, migrations=[found], load_average=0.0))
    assert not any(goal["met"] for goal in verdicts)


def test_a_record_that_cannot_be_written_is_said_at_once(tmp_path) -> None:
    result = CliRunner().invoke(app, ["rebalance", "--record", str(tmp_path / "no" / "file")])
    assert result.exit_code != 0
    assert "--record is" in str(result.exception)
