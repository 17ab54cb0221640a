"""The learning rate at its corners, and the sentences of its configuration."""

import pytest

from dualray.errors import ConfigError
from dualray.parallel.lr import LrConfig, lr_at


def test_warm_up_rises_linearly_to_the_peak():
    config = LrConfig(lr=1.0, min_lr=0.1, warmup_steps=4, steps=20)
    assert [lr_at(step, config) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_passes_the_middle_and_ends_at_the_floor():
    config = LrConfig(lr=1.0, min_lr=0.2, warmup_steps=10, steps=30)
    assert lr_at(20, config) == pytest.approx(0.6)
    assert lr_at(15, config) == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)
    assert lr_at(30, config) == lr_at(1000, config) == pytest.approx(0.2)


def test_without_warm_up_and_all_warm_up():
    assert lr_at(0, LrConfig(lr=0.5, min_lr=0.5, steps=3)) == 0.5
    assert lr_at(2, LrConfig(lr=0.5, min_lr=0.0, warmup_steps=3, steps=3)) == 0.5


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"lr": 0.0}, "train.lr is 0.0 and must be above 0; set train.lr to, say, 3e-4."),
        (
            {"lr": 0.001, "min_lr": 0.01},
            "train.min_lr is 0.01 and must lie between 0 and train.lr = 0.001; "
            "set train.min_lr to 0.0001.",
        ),
        ({"steps": 0}, "train.steps is 0 and must be at least 1; set train.steps to 1."),
        (
            {"steps": 50, "warmup_steps": 60},
            "train.warmup_steps is 60 and must lie between 0 and train.steps = 50; "
            "set train.warmup_steps to 5.",
        ),
    ],
)
def test_sentences(fields, sentence):
    with pytest.raises(ConfigError) as error:
        LrConfig(**fields)
    assert str(error.value) == sentence
