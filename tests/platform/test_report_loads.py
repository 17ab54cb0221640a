"""What the report draws of experts' loads: by expert, by place, and where there are no tables."""

import json

import numpy as np
from report_pages import bare_run, page_of
from synthetic_run import make_loads, make_steps, write_loads

from dualray.platform.loads import LoadsLog, Place
from dualray.platform.report.experts import has_places, layers_shown, places_figure
from dualray.platform.report.loads import MAX_COLUMNS, read_history, relative_to_mean


def history_of(folder, steps, nodes=("a",)):
    write_loads(folder, steps, nodes=nodes)
    history = read_history(folder)
    assert history is not None
    return history


def test_relative_loads_have_mean_one_and_bounded_columns(tmp_path):
    steps = make_loads(500, layers=(4,), num_experts=8)
    history = history_of(tmp_path / "a", steps)
    assert history.experts_LEC.shape == (1, 8, MAX_COLUMNS)
    assert (history.first, history.last, history.layers) == (1, 500, (4,))
    np.testing.assert_allclose(history.relative(4).mean(axis=0), 1.0)
    # Every step is in one column, in order.
    per_step = np.array([loads[4] for loads in steps]).T
    np.testing.assert_array_equal(history.experts_LEC[0].sum(axis=1), per_step.sum(axis=1))
    np.testing.assert_array_equal(history.experts_LEC[0, :, 0], per_step[:, :3].sum(axis=1))
    np.testing.assert_array_equal(history.experts_LEC[0, :, -1], per_step[:, -2:].sum(axis=1))
    one = history_of(tmp_path / "b", steps[:1]).relative(4)
    np.testing.assert_allclose(one[:, 0], per_step[:, 0] / per_step[:, 0].mean())


def test_many_layers_are_sampled_with_both_ends(tmp_path):
    loads = make_loads(1, layers=tuple(range(3, 61)), num_experts=2)
    shown, total = layers_shown(history_of(tmp_path, loads))
    assert (len(shown), total, shown[0], shown[-1]) == (12, 58, 3, 60)


def test_places_are_compared_with_those_that_hold_the_layer(tmp_path):
    """Layer 1 lives on nodes a and b, layer 2 on b alone; rank 1 has three quarters of layer 1."""
    with LoadsLog.resume(tmp_path, 0) as log:
        for step in (1, 3):
            log.add(
                step,
                {
                    Place(1, 0, 0, "a"): 10,
                    Place(1, 1, 1, "b"): 30,
                    Place(2, 0, 0, "b"): 7,
                    Place(2, 1, 1, "b"): 7,
                },
            )
    history = read_history(tmp_path)
    assert history is not None
    nodes = relative_to_mean(history.nodes_LNC)
    np.testing.assert_allclose(nodes, [[0.5, np.nan, 0.5], [1.25, np.nan, 1.25]])
    ranks = relative_to_mean(history.ranks_LRC)
    np.testing.assert_allclose(ranks, [[0.75, np.nan, 0.75], [1.25, np.nan, 1.25]])
    # A step without rows is a gap in the picture, not an idle one.
    assert np.isnan(history.relative(1)[:, 1]).all()
    assert "node" in places_figure(history)


def test_a_single_place_is_not_compared(tmp_path):
    one = history_of(tmp_path / "one", make_loads(3))
    two = history_of(tmp_path / "two", make_loads(3), nodes=("a", "b"))
    assert not has_places(one)
    assert has_places(two)
    svg = places_figure(two)
    assert "load of every expert rank" in svg
    assert "load of every node" in svg


def test_a_run_of_before_loads_were_tables(tmp_path):
    folder = bare_run(tmp_path / "a", make_steps(40))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["max_vio_run"], line["max_vio_run_per_layer"]
        line["loads"] = {"1": [1, 2]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(folder)
    assert "Experts" in page.headings
    assert page.tags.count("svg") == 6
    assert any(caption.endswith("got twice its share.") for caption in page.captions)
