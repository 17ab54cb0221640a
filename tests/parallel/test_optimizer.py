"""Plain AdamW in one process, against the formula."""

import pytest
import torch
from torch.nn import Parameter

from dualray.errors import ConfigError
from dualray.parallel.adamw import AdamW
from dualray.parallel.optimizer import (
    OptimizerConfig,
    ParamGroup,
    make_optimizer,
)


def parameter(*shape, dtype=torch.float64, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    param = Parameter(values.to(dtype))
    param.main_grad = torch.zeros_like(
        param, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=False
    )
    return param


def alone(*params, **fields):
    named = tuple((f"p{index}", param) for index, param in enumerate(params))
    return ParamGroup(params=named, process_group=None, group_ranks=(0,), **fields)


def feed(optimizer, params, step, lr=0.01, factor=None):
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + index)
        param.main_grad += torch.randn(param.shape, generator=generator)
    optimizer.reduce()
    if factor is not None:
        optimizer.scale(factor)
    optimizer.step(lr)


def formula(values, grads, lr, decay, config):
    first = second = torch.zeros_like(values)
    for t, grad in enumerate(grads, start=1):
        first = config.beta1 * first + (1 - config.beta1) * grad
        second = config.beta2 * second + (1 - config.beta2) * grad**2
        update = (first / (1 - config.beta1**t)) / (
            (second / (1 - config.beta2**t)).sqrt() + config.eps
        )
        values = values - lr * (update + decay * values)
    return values


def test_follows_the_formula_and_spares_one_dimensional_parameters_from_decay():
    config = OptimizerConfig(kind="adamw", weight_decay=0.3)
    params = [parameter(4, 3, seed=1), parameter(5, seed=2)]
    start = [param.detach().clone() for param in params]
    optimizer = make_optimizer([alone(*params)], config)
    for step in range(4):
        feed(optimizer, params, step, factor=0.5)
    assert optimizer.step_count == 4
    for index, (param, values, decay) in enumerate(zip(params, start, (0.3, 0.0))):
        grads = [
            0.5
            * torch.randn(
                param.shape, generator=torch.Generator().manual_seed(100 * step + index)
            ).double()
            for step in range(4)
        ]
        expected = formula(values, grads, 0.01, decay, config)
        # torch keeps the step count in fp32, exact here; the rest is float64.
        assert torch.allclose(param, expected, rtol=1e-12, atol=0)
        assert not param.main_grad.any()
        assert param.grad is None


def test_low_precision_parameters_move_by_an_fp32_master():
    param = parameter(64, 8, dtype=torch.bfloat16)
    reference = parameter(64, 8, dtype=torch.bfloat16)
    reference = Parameter(reference.detach().float())
    reference.main_grad = torch.zeros_like(reference, requires_grad=False)
    config = OptimizerConfig(kind="adamw")
    small, exact = (
        make_optimizer([alone(param)], config),
        make_optimizer([alone(reference)], config),
    )
    # Steps far below a bf16 ulp of the values: without a master they would all be lost.
    for step in range(20):
        feed(small, [param], step, lr=1e-4)
        feed(exact, [reference], step, lr=1e-4)
    assert torch.equal(param, reference.to(torch.bfloat16))
    masters = [piece for piece in small.state_pieces() if piece[1] == "master"]
    assert len(masters) == 1
    assert torch.equal(masters[0][3].view(64, 8), reference)


def test_squared_norm_counts_what_is_counted():
    mine, copied = parameter(3, 3), parameter(2, 2)
    mine.main_grad += 2
    copied.main_grad += 5
    groups = [
        alone(mine),
        ParamGroup(params=[("c", copied)], process_group=None, group_ranks=(0,), count=False),
    ]
    optimizer = AdamW(groups, OptimizerConfig(kind="adamw"))
    assert optimizer.squared_norm().item() == 36
    assert optimizer.squared_norm().dtype == torch.float64
    assert {piece[0] for piece in optimizer.state_pieces()} == {"p0"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_moves_to_a_new_optimizer_bit_for_bit(dtype):
    params = [parameter(6, 5, dtype=dtype, seed=3), parameter(7, dtype=dtype, seed=4)]
    config = OptimizerConfig(kind="adamw")
    optimizer = make_optimizer([alone(*params)], config)
    for step in range(3):
        feed(optimizer, params, step)
    saved = {(name, kind): values.clone() for name, kind, _, values in optimizer.state_pieces()}
    kinds = {kind for _, kind in saved}
    assert kinds == {"exp_avg", "exp_avg_sq"} | ({"master"} if dtype == torch.bfloat16 else set())

    again = [Parameter(param.detach().clone()) for param in params]
    for param, old in zip(again, params):
        param.main_grad = torch.zeros_like(old.main_grad)
    resumed = make_optimizer([alone(*again)], config)
    resumed.load_state(
        lambda name, kind, start, count: saved[name, kind][start : start + count],
        step_count=optimizer.step_count,
    )
    for step in range(3, 5):
        feed(optimizer, params, step)
        feed(resumed, again, step)
    assert resumed.step_count == 5
    assert all(torch.equal(new, old) for new, old in zip(again, params))


def test_masters_can_follow_new_values():
    param = parameter(4, 4, dtype=torch.bfloat16)
    optimizer = make_optimizer([alone(param)], OptimizerConfig(kind="adamw", weight_decay=0.0))
    with torch.no_grad():
        param.fill_(3.0)
    optimizer.refresh_masters()
    optimizer.step(0.1)
    assert torch.equal(param, torch.full_like(param, 3.0))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"kind": "sgd"},
            "train.optimizer is sgd and must be zero1 or adamw; set train.optimizer to zero1.",
        ),
        (
            {"beta2": 1.0},
            "train.beta2 is 1.0 and must be at least 0 and below 1; set train.beta2 to 0.95.",
        ),
        ({"eps": 0.0}, "train.eps is 0.0 and must be above 0; set train.eps to 1e-8."),
        (
            {"weight_decay": -0.1},
            "train.weight_decay is -0.1 and must be at least 0; set train.weight_decay to 0.1.",
        ),
    ],
)
def test_sentences(fields, sentence):
    with pytest.raises(ConfigError) as error:
        OptimizerConfig(**fields)
    assert str(error.value) == sentence


def test_zero1_refuses_float64():
    with pytest.raises(ConfigError) as error:
        make_optimizer([alone(parameter(2, 2))], OptimizerConfig(kind="zero1"))
    assert str(error.value) == (
        "train.optimizer is zero1 and train.dtype is float64, but zero1 keeps fp32 masters; "
        "set train.optimizer to adamw."
    )


@pytest.mark.parametrize("kind", ["adamw", "zero1"])
def test_a_worker_that_only_serves_has_an_optimizer_of_nothing(kind) -> None:
    optimizer = make_optimizer([], OptimizerConfig(kind=kind))
    assert not list(optimizer.state_pieces())
    optimizer.close()
