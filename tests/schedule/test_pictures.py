"""The drawings in docs/schedules are what the code draws now, and are whole documents."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dualray.schedule.actions import Kind, flatten
from dualray.schedule.baselines import one_f_one_b
from dualray.schedule.dualpipev import dualpipev
from dualray.schedule.make import KINDS
from dualray.schedule.pictures import pictures, write
from dualray.schedule.simulate import Costs, simulate
from dualray.schedule.svg import svg

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "schedules"
SVG = "{http://www.w3.org/2000/svg}"


def drawn(schedule, costs=None):
    return ElementTree.fromstring(svg(simulate(schedule, costs), schedule))


def boxes(root):
    """(class, x, width, y, height) of every box of the rows, in order."""
    return [
        (box.get("class"), *(float(box.get(name)) for name in ("x", "width", "y", "height")))
        for row in root.iter(f"{SVG}g")
        for box in row.iter(f"{SVG}rect")
    ]


def test_the_committed_pictures_are_current():
    """After a change: python -m dualray.schedule.pictures docs/schedules"""
    committed = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert sorted(committed) == sorted(f"{kind}.svg" for kind in KINDS)
    assert committed == pictures()


def test_writing_makes_the_folder(tmp_path):
    write(tmp_path / "new")
    assert sorted(path.stem for path in (tmp_path / "new").iterdir()) == sorted(KINDS)


def test_every_action_is_a_box_and_nothing_is_fetched():
    schedule = dualpipev(3, 7)
    root = drawn(schedule)
    expected = [f"{a.kind.value}{a.direction}" for steps in schedule.steps for a in flatten(steps)]
    assert [name for name, *_ in boxes(root)] == expected
    style = root.find(f"{SVG}style").text
    assert all(f".{name} {{ fill: #" in style for name in set(expected))
    assert not re.search("url|@import|href", ElementTree.tostring(root, encoding="unicode"))


def test_boxes_lie_where_the_timeline_says():
    schedule = one_f_one_b(2, 2)
    found = boxes(drawn(schedule, Costs(weight_grad=0.5)))
    timeline = simulate(schedule, Costs(weight_grad=0.5))
    unit = 1400 / timeline.makespan
    spans = [span for row in timeline.rows for span in row]
    assert len(found) == len(spans)
    for (name, x, width, *_), (step, start, end) in zip(found, spans):
        assert name == f"{step.kind.value}0"
        # Coordinates are written with two decimals.
        assert x == pytest.approx(104 + start * unit, abs=0.006)
        assert width == pytest.approx((end - start) * unit, abs=0.006)


def test_the_halves_of_a_pair_share_a_box():
    rows = boxes(drawn(dualpipev(2, 4)))
    halves = [box for box in rows if box[4] == 14]
    assert halves
    for (above, *at, y, _), (below, *same, under, _) in zip(halves[::2], halves[1::2]):
        assert (above[0], below[0]) == ("F", "B")
        assert at == same
        assert under == y + 14


def test_a_weight_gradient_without_duration_is_not_drawn():
    found = boxes(drawn(dualpipev(2, 4), Costs(weight_grad=0, overlapped=2)))
    assert not [name for name, *_ in found if name.startswith(Kind.WEIGHT_GRAD)]


@pytest.mark.parametrize(("chunks", "fits"), [(60, True), (90, False)])
def test_numbers_are_drawn_where_they_fit(chunks, fits):
    texts = [text.text for text in drawn(one_f_one_b(2, chunks)).iter(f"{SVG}text")]
    # Once in the forward and once in the backward of both ranks; a full backward is twice as wide.
    assert texts.count(str(chunks - 1)) == (4 if fits else 2)
