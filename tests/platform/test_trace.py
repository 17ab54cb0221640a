"""The trace file: Chrome's format, and the same spans again when it is read."""

import json

import pytest

from dualray.errors import RunError
from dualray.platform.trace import Category, Span, Trace, read_trace, write_trace


def span(rank, name, start_s, end_s, category=Category.COMPUTE):
    return Span(rank=rank, name=name, category=category, start_s=start_s, end_s=end_s)


SPANS = (
    span(0, "F0.0", 0.0, 0.25),
    span(1, "F1.0", 0.0, 0.5),
    span(0, "send", 0.125, 0.375, Category.COMMUNICATION),
    span(0, "step", 0.75, 1.0, Category.OPTIMIZER),
)


def test_spans_are_read_back_with_times_from_the_earliest(tmp_path):
    path = tmp_path / "trace.json"
    late = [span(s.rank, s.name, s.start_s + 64, s.end_s + 64, s.category) for s in SPANS]
    write_trace(path, Trace(tuple(reversed(late)), step=7))
    assert read_trace(path) == Trace(spans=SPANS, step=7)
    assert read_trace(path).ranks == (0, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


def test_file_is_a_chrome_trace(tmp_path):
    path = tmp_path / "trace.json"
    write_trace(path, Trace(SPANS), worker_names={1: "worker 1 on node b"})
    events = json.loads(path.read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert complete[1] == {
        "ph": "X",
        "name": "send",
        "cat": "communication",
        "pid": 0,
        "tid": 2,
        "ts": 125_000.0,
        "dur": 250_000.0,
    }
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "worker 0", 1: "worker 1 on node b"}
    # Spans of one thread must nest to be drawn, so each category has its own.
    assert {(e["cat"], e["tid"]) for e in complete} == {
        ("compute", 0),
        ("communication", 2),
        ("optimizer", 3),
    }


def threads_of(path):
    """Of each (process, thread) the name and the spans' names."""
    threads = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        thread = threads.setdefault((event["pid"], event["tid"]), [])
        if event["name"] == "thread_name":
            thread.insert(0, event["args"]["name"])
        elif event["ph"] == "X":
            thread.append(event["name"])
    return threads


def test_spans_that_cross_get_a_thread_of_their_own(tmp_path):
    path = tmp_path / "trace.json"
    crossing = (("a", 0.0, 0.5), ("within a", 0.25, 0.5), ("b", 0.375, 0.75), ("c", 0.5, 1.0))
    spans = [span(0, name, start, end, Category.COMMUNICATION) for name, start, end in crossing]
    write_trace(path, Trace(tuple(spans)))
    assert threads_of(path) == {
        (0, 0): [],  # where the process is named
        (0, 2): ["communication", "a", "within a", "c"],
        (0, 7): ["communication 2", "b"],
    }
    assert read_trace(path).spans == tuple(spans)


def test_the_simulated_schedule_is_a_track_of_its_own(tmp_path):
    path = tmp_path / "trace.json"
    simulated = (span(0, "F0.0", 0.0, 0.5), span(1, "F0.0", 0.5, 1.0))
    write_trace(path, Trace(SPANS, step=3, simulated=simulated))
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    # Perfetto sorts processes by their index, which is their pid.
    assert [names[pid] for pid in sorted(names)] == [
        "worker 0",
        "worker 1",
        "simulated: pipeline rank 0",
        "simulated: pipeline rank 1",
    ]
    trace = read_trace(path)
    assert trace == Trace(SPANS, step=3, simulated=simulated)
    assert trace.bubble_simulated() == 0.5
    assert trace.bubble() == Trace(SPANS).bubble() == 0.25


def test_bubble_is_the_idle_share_of_computing():
    # Rank 0 computes 0 to 0.25 and 0.5 to 1, rank 1 from 0 to 0.5: 1.25 of 2 seconds.
    spans = (
        span(0, "F0.0", 0.0, 0.25),
        span(1, "F1.0", 0.0, 0.5),
        span(1, "F1.0 part", 0.25, 0.5),
        span(1, "send", 0.5, 1.0, Category.COMMUNICATION),
        span(0, "B0.0", 0.5, 1.0),
        span(0, "step", 1.0, 2.0, Category.OPTIMIZER),
    )
    assert Trace(spans=spans).bubble() == pytest.approx(0.375)
    assert Trace(spans=spans[3:4]).bubble() is None
    assert Trace(spans=()).bubble() is None


def test_empty_trace(tmp_path):
    write_trace(tmp_path / "trace.json", Trace(()))
    assert read_trace(tmp_path / "trace.json") == Trace(spans=())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents":[{"ph":"X"}]}', '{"a":'])
def test_damaged_trace_is_named(tmp_path, text):
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(RunError) as caught:
        read_trace(path)
    assert str(caught.value) == (
        f"{path} is not a trace that dualray wrote; delete it to do without the pipeline "
        "timeline, or run the training again."
    )
