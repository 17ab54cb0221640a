"""`dualray bench serve`: at its smallest, and how it judges what it has seen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dualray.data.tokenizer import ByteTokenizer
from dualray.errors import RunError
from dualray.platform.bench.serve import _agreement, percentile
from dualray.platform.bench.serve_client import Answer
from dualray.platform.bench.serve_gang import EngineStep, WorkerStep
from dualray.platform.bench.serve_idle import IdleCase, idle_shares
from dualray.platform.bench.serve_requests import (
    BenchRequest,
    arriving_requests,
    equal_requests,
    num_tokens,
)
from dualray.platform.bench.serve_result import goals
from dualray.platform.bench.serve_steps import busy_shares, step_overhead
from dualray.platform.bench.serve_streams import judge
from dualray.platform.bench.serve_workload import QUICK
from dualray.platform.preset import load_model

TEXT = "".join(f"line {number}: the cat\u00e9 sat on a mat\n" for number in range(500))


def test_requests_have_the_lengths_asked_for_and_are_the_same_every_time():
    tokenizer = ByteTokenizer()
    batch = equal_requests(tokenizer, TEXT, count=5, prompt_tokens=9, new_tokens=4, seed=1)
    assert len({r.prompt for r in batch}) > 1
    assert {(len(r.prompt_ids), r.max_tokens, r.arrives_s) for r in batch} == {(9, 4, 0.0)}
    assert all(tokenizer.encode(r.prompt) == list(r.prompt_ids) for r in batch)
    assert num_tokens(batch) == 20

    def mixed():
        return arriving_requests(
            tokenizer, TEXT, count=400, prompt_tokens=(4, 64), new_tokens=(2, 8), per_s=20.0, seed=2
        )

    mix = mixed()
    assert mix == mixed()
    lengths = sorted(len(r.prompt_ids) for r in mix)
    assert 4 <= lengths[0] < 6
    assert 58 < lengths[-1] <= 64
    assert 13 <= lengths[200] <= 19  # the middle in the logarithm is 16
    arrivals = [r.arrives_s for r in mix]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0.0
    # The mean of 399 gaps of a Poisson process: within four of its standard errors.
    assert arrivals[-1] / 399 == pytest.approx(0.05, rel=4 / 399**0.5)


def answer(name: str, text: str, tokens: int, error: str = "") -> Answer:
    return Answer(
        name=name, text=text, num_tokens=tokens, sent_s=0, first_s=1, last_s=61, error=error
    )


def test_what_streams_lose_or_mix_up_is_counted():
    def request(name, forced_id=None):
        return BenchRequest(
            name=name, prompt="", prompt_ids=(1,), max_tokens=12, forced_id=forced_id
        )

    streams = [(request("k"), request(f"e{i}", i)) for i in range(2)]
    expected = {"k": "abcdefghijkl", "e0": "x" * 12, "e1": "y" * 12}
    k, e0, e1 = (answer(name, expected[name], 12) for name in ("k", "e0", "e1"))

    def judged(*answers):
        return judge(streams, expected, answers, 60.0)

    fine = judged([k, e0, k], [k, e1])
    assert (fine["lost"], fine["mixed_up"], fine["requests"], fine["tokens"]) == (0, 0, 5, 60)
    assert (fine["known_completions"], fine["same_completions"], fine["held_s"]) == (3, 3, 61)
    tie = answer("k", "abcdefghiZZZ", 12)
    swapped = answer("k", "yyyyyyyyyyyy", 12)
    # Another's echo, and one letter of it in the own one.
    strange, spoiled = answer("e0", "y" * 12, 12), answer("e1", "y" * 11 + "x", 12)
    found = judged([tie, strange, swapped], [k, spoiled])
    assert (found["lost"], found["mixed_up"], found["same_completions"]) == (0, 3, 1)
    short, failed = answer("k", "abc", 3), answer("e0", "", 0, error="UNAVAILABLE: gone")
    assert judged([short, failed], [])["lost"] == 3


def test_completions_must_begin_alike_and_may_part_later():
    request = BenchRequest(name="r", prompt="", prompt_ids=(1,), max_tokens=3)
    ours, parted = {"r": (5, 6, 7)}, {"r": (5, 6, 8)}
    assert _agreement([request], ours, ours) == {"completions": 1, "same_completions": 1}
    assert _agreement([request], ours, parted)["same_completions"] == 0
    with pytest.raises(RunError, match="begins with token 5 of 3 here and with 4 of 3 in Hugging"):
        _agreement([request], ours, {"r": (4, 6, 7)})


def test_step_times_are_taken_apart():
    def walk(step, began, ended, cpu):
        ms = 1_000_000
        return WorkerStep(step=step, began_ns=began * ms, ended_ns=ended * ms, cpu_ns=cpu * ms)

    def step(number, began, ended):
        ms = 1_000_000
        return EngineStep(step=number, num_tokens=1, began_ns=began * ms, ended_ns=ended * ms)

    engine = [step(1, 0, 10), step(2, 13, 23)]
    workers = [
        [walk(1, 1, 8, 6), walk(2, 14, 21, 6)],
        [walk(1, 3, 9, 3), walk(2, 16, 22, 3)],
    ]
    assert step_overhead(engine, workers) == {
        "steps": 2,
        "step_ms": 10.0,
        "beyond_slowest_ms": 3.0,  # 10 less the first worker's 7
        "until_last_began_ms": 3.0,
        "after_last_end_ms": 1.0,
        "between_ms": 3.0,
    }
    shares = busy_shares(engine, workers, cores=2)
    assert shares["cores_busy"] == pytest.approx(18 / 40)
    assert shares["idle_with_own_cores"] == pytest.approx(1 - 18 / 24)
    assert step_overhead([], [[], []])["between_ms"] is None


def test_percentiles_are_values_that_came():
    values = list(range(1, 21))
    assert (percentile(values, 0.95), percentile(values, 0.5), percentile([7.0], 0.95)) == (
        19,
        10,
        7,
    )


def test_stages_in_order_idle_as_the_formula_says_and_less_in_groups():
    model = load_model("tiny")
    cases = [
        IdleCase(words="two ranks", num_ranks=2, num_sequences=2, num_new=1, context=4),
        IdleCase(words="prompts", num_ranks=4, num_sequences=6, num_new=32, context=0),
    ]
    two, four = idle_shares(model, cases, repeats=1)
    assert two["one_group"] == two["chosen"]
    assert (four["one_group"]["groups"], four["chosen"]["groups"]) == (1, 2)
    # Stages differ a little, so the measured shares are near those of equal ones: 1/2 and 1/3.
    assert four["chosen"]["idle"] < four["one_group"]["idle"] < 0.9


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_at_its_smallest(tmp_path):
    record = tmp_path / "results.jsonl"
    arguments = ("bench", "serve", "--quick", "--json", "--record", str(record))
    done = subprocess.run(
        [sys.executable, "-m", "dualray.platform.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert json.loads(record.read_text()) == line
    rows = {row["part"]: row for row in line["results"]}
    tokens = QUICK.requests * QUICK.new_tokens
    assert (rows["batch"]["tokens"], rows["batch"]["completions"]) == (tokens, QUICK.requests)
    assert rows["grpc"]["same_texts"] == QUICK.requests
    streams = rows["streams"]
    assert (streams["lost"], streams["mixed_up"]) == (0, 0)
    assert streams["requests"] >= 2 * QUICK.streams
    assert streams["held_s"] >= QUICK.hold_s
    overhead = rows["overhead"]
    assert overhead["steps"] >= QUICK.rounds * QUICK.new_tokens
    assert 0 < overhead["beyond_slowest_ms"] <= overhead["step_ms"]
    assert line["goals"] == goals(line["results"])
    assert [goal["met"] for goal in line["goals"] if "lost" in goal["words"]] == [True]
