"""Moving averages of loads and speeds, and the numbers they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from dualray.errors import ConfigError, RunError
from dualray.parallel.load_forecast import LatestSpeeds, LoadForecast, level


def twin(values: list[float], decay: float) -> float:
    """Weighted mean, the newest value first with weight 1, then decay, decay^2, ..."""
    weights = [decay**age for age in reversed(range(len(values)))]
    return sum(w * v for w, v in zip(weights, values)) / sum(weights)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_a_forecast_is_the_weighted_mean_of_what_was_seen(decay) -> None:
    forecast = LoadForecast(decay=decay)
    loads = np.random.default_rng(0).integers(0, 100, (7, 3)).astype(float)
    for step, load in enumerate(loads):
        forecast.observe({4: load} if step % 2 else {4: load, 2: load})
    predicted = forecast.predict()
    assert list(predicted) == [2, 4]
    for expert in range(3):
        seen = loads[:, expert].tolist()
        assert predicted[4][expert] == pytest.approx(twin(seen, decay))
        assert predicted[2][expert] == pytest.approx(twin(seen[::2], decay))


def test_the_first_step_counts_whole() -> None:
    forecast = LoadForecast(decay=0.9)
    forecast.observe({0: [3, 5]})
    assert forecast.predict()[0] == pytest.approx([3, 5])


@pytest.mark.parametrize(
    ("loads", "sentence"),
    [
        (
            {0: [1, 2], 3: [1, float("nan")]},
            "the load of layer 3, expert 1 is nan and must be a finite number of at least 0; "
            "experts stay where they are; look for NaN in the router's scores.",
        ),
        (
            {0: [-1, 2]},
            "the load of layer 0, expert 0 is -1.0 and must be a finite number of at least 0; "
            "experts stay where they are; look for NaN in the router's scores.",
        ),
        (
            {0: [[1, 2]]},
            "the load of layer 0 has shape (1, 2) and must be [experts]; give one number of "
            "tokens per expert.",
        ),
        (
            {0: [1, 2], 1: [1, 2, 3]},
            "loads are of 2 and 3 experts, and all layers of all steps must have as many; make a "
            "new forecast for another model.",
        ),
    ],
)
def test_a_step_that_cannot_be_is_refused_whole(loads, sentence) -> None:
    forecast = LoadForecast(decay=0.5)
    forecast.observe({0: [10, 20]})
    with pytest.raises(RunError) as error:
        forecast.observe(loads)
    assert str(error.value) == sentence
    assert list(forecast.predict()) == [0]
    assert forecast.predict()[0].tolist() == [10, 20]


def test_a_decay_that_forgets_nothing_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        LoadForecast(decay=1.0)
    assert str(error.value) == (
        "the decay of a moving average is 1.0 and must be at least 0 and below 1; choose 0.9 to "
        "look about ten steps back."
    )


def test_unmeasured_ranks_keep_what_they_had_or_count_as_the_median() -> None:
    speeds = LatestSpeeds(4)
    assert speeds.predict(otherwise=7.0, tolerance=0.0).tolist() == [7.0] * 4
    speeds.observe([100.0, 200.0, 400.0, None])
    assert speeds.predict(otherwise=7.0, tolerance=0.0).tolist() == [100, 200, 400, 200]
    speeds.observe([None, 200.0, 400.0, 800.0])
    assert speeds.predict(otherwise=7.0, tolerance=0.0).tolist() == [100, 200, 400, 800]
    speeds.observe([200.0, None, None, None])
    assert speeds.predict(otherwise=7.0, tolerance=0.0).tolist() == [200, 200, 400, 800]


def test_speeds_near_each_other_are_one() -> None:
    speeds = np.array([1.0, 0.52, 0.95, 0.5, 1.02])
    assert level(speeds, 0.1) == pytest.approx([0.99, 0.51, 0.99, 0.51, 0.99])
    assert level(speeds, 0.0).tolist() == speeds.tolist()


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_speeds_are_refused(speed) -> None:
    speeds = LatestSpeeds(2)
    speeds.observe([10.0, 20.0])
    with pytest.raises(RunError) as error:
        speeds.observe([5.0, speed])
    assert str(error.value) == (
        f"the speed of expert rank 1 is {speed} rows/s and must be finite and above 0; experts "
        "stay where they are; give None for a rank that had no rows."
    )
    assert speeds.predict(otherwise=1.0, tolerance=0.0).tolist() == [10.0, 20.0]
    with pytest.raises(RunError) as error:
        speeds.observe([5.0])
    assert str(error.value) == (
        "speeds are of 1 expert ranks and there are 2; give one speed, or None, per expert rank."
    )
