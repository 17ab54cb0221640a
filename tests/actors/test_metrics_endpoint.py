"""Prometheus metrics of a served tiny model, scraped over HTTP and parsed as Prometheus does."""

import asyncio
import dataclasses
import math
import socket
import urllib.error
import urllib.request

import pytest
from support.models import tiny_config, whole_model
from support.plan_workers import DoorWorker
from support.scrapes import Scrape, scraping
from support.serving import LIMITS, serving

from dualray.actors.engine_actor import EngineActor
from dualray.data.tokenizer import ByteTokenizer
from dualray.errors import ConfigError, RequestError, ResourceError
from dualray.inference.request import SamplingParams
from dualray.inference.scheduler import owners
from dualray.inference.serve_config import ServeConfig
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_runner import StepRunner
from dualray.model.moe import LocalDispatch
from dualray.platform.client import Client

# vLLM's, by hand: vllm/v1/metrics/loggers.py.
FIRST_TOKEN = (
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
)
NEXT_TOKEN = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
REQUEST = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
BUCKETS = {
    "time_to_first_token_seconds": FIRST_TOKEN,
    "inter_token_latency_seconds": NEXT_TOKEN,
    "e2e_request_latency_seconds": REQUEST,
    "request_queue_time_seconds": REQUEST,
    "request_inference_time_seconds": REQUEST,
    "request_prefill_time_seconds": REQUEST,
    "request_decode_time_seconds": REQUEST,
}
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = (
    *("prompt_tokens", "generation_tokens", "request_success"),
    *("num_preemptions", "prefix_cache_queries", "prefix_cache_hits"),
    *("spec_decode_num_drafts", "spec_decode_num_draft_tokens"),
    *("spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos"),
)
CALLS = ("grpc_server_started", "grpc_server_handled")


@pytest.fixture
def scrape(served):
    with scraping(served) as scrape:
        yield scrape


def submit(served, prompt, num_tokens=4, timeout_s=None, **params):
    """Queues a request of exactly `num_tokens`, unless told otherwise; returns its completion."""
    values = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1, **params)

    async def on_loop():
        return served.engine.submit(prompt, values, timeout_s)

    return served.call(on_loop())


def test_names_labels_and_buckets_are_those_of_vllm(scrape):
    answer = scrape()
    families = {name: f for name, f in answer.families.items() if not name.endswith("_created")}
    assert {name: f.type for name, f in families.items()} == {
        **{f"vllm:{name}": "histogram" for name in BUCKETS},
        **{f"vllm:{name}": "gauge" for name in GAUGES},
        **{f"vllm:{name}": "counter" for name in COUNTERS},
        **dict.fromkeys(CALLS, "counter"),
        "dualray:expert_balancedness": "gauge",
    }
    for sample in answer.samples:
        assert (sample.labels["model_name"], sample.labels["engine"]) == ("tiny", "0")
        assert set(sample.labels) <= {"model_name", "engine", "finished_reason", "le"}
    for name, text in BUCKETS.items():
        samples = answer.families[f"vllm:{name}"].samples
        bounds = [float(s.labels["le"]) for s in samples if s.name.endswith("_bucket")]
        assert bounds == [*map(float, text.split()), math.inf], name


def test_counts_are_what_was_asked(served, scrape):
    asked = [submit(served, "ab", 4), submit(served, "cde", 1), submit(served, "f", 6)]
    asked.append(submit(served, "ghij", 9, stop_token_ids=tuple(range(257))))
    for completion in asked:
        served.call(completion.whole())
    answer = scrape()
    assert answer.ended() == {"length": 3, "stop": 1}
    assert answer("prompt_tokens_total") == 2 + 3 + 1 + 4
    assert answer("generation_tokens_total") == 4 + 1 + 6 + 1
    assert answer.counts() == dict.fromkeys(BUCKETS, 4) | {"inter_token_latency_seconds": 3 + 5}


def test_balance_of_experts_has_a_series_a_layer(served, scrape):
    served.engine.metrics.show_balance({1: 0.5, 3: 1.0})
    served.engine.metrics.show_balance({1: 0.75})
    samples = scrape().families["dualray:expert_balancedness"].samples
    labels = {"model_name": "tiny", "engine": "0"}
    assert [(s.labels, s.value) for s in samples] == [
        (labels | {"layer": "1"}, 0.75), (labels | {"layer": "3"}, 1.0),
    ]  # fmt: skip


def test_phases_add_up(served, scrape):
    """The same moments bound several histograms, so that their sums must agree."""
    for _ in range(2):
        batch = [submit(served, "x" * n, n) for n in range(1, 7)]
        for completion in batch:
            served.call(completion.whole())
    answer = scrape()
    first, nexts, whole, queue, inference, prefill, decode = (
        answer(f"{name}_sum") for name in BUCKETS
    )
    stats = served.engine.stats
    # Sums of a few dozen float64: rounding only.
    assert first == pytest.approx(queue + prefill, rel=1e-9)
    assert nexts == pytest.approx(decode, rel=1e-9)
    assert inference == pytest.approx(prefill + decode, rel=1e-9)
    assert whole == pytest.approx(stats.succeeded_ns / 1e9, rel=1e-9)
    assert queue == pytest.approx(stats.queued_ns / 1e9, rel=1e-9)
    assert whole >= first + decode > first > prefill > 0


def test_gauges_show_the_load_and_return_to_zero(served, scrape):
    served.hold()
    asked = [submit(served, "ab")]
    served.until(lambda: served.engine.scheduler.num_running == 1)
    first = scrape()
    assert [first(name) for name in GAUGES[:2]] == [1, 0]
    # They join at the next step, and this one is held.
    asked += [submit(served, "cd") for _ in range(3)]
    answer = scrape()
    usage = served.engine.scheduler.cache_usage
    assert [answer(name) for name in GAUGES] == [1, 3, usage]
    assert 0 < usage < 1
    served.hold(False)
    for completion in asked:
        served.call(completion.whole())
    answer = scrape()
    assert [answer(name) for name in GAUGES] == [0, 0, 0]
    assert answer.ended() == {"length": 4}


def cancel(served, completion):
    async def on_loop():
        completion.cancel()

    served.call(on_loop())


def test_cancelled_requests_are_aborted_and_counted_as_far_as_they_came(served, scrape):
    def stay_in_step_four(plan, sampled):
        if len(served.plans) == 3:
            served.gate.clear()
        return sampled

    served.fault = stay_in_step_four
    completion = submit(served, "abc", 50)
    served.until(lambda: served.engine.stats.num_steps == 3)
    cancel(served, completion)
    cancel(served, completion)
    served.hold(False)
    answer = scrape()
    assert answer.ended() == {"abort": 1}
    assert (answer("prompt_tokens_total"), answer("generation_tokens_total")) == (3, 3)
    assert answer.counts() == dict.fromkeys(BUCKETS, 1) | {"inter_token_latency_seconds": 2}
    assert [answer(name) for name in GAUGES] == [0, 0, 0]


def test_a_request_cancelled_while_it_waits_has_no_phases(served, scrape):
    served.hold()
    running = submit(served, "ab", 1)
    served.until(lambda: served.engine.scheduler.num_running == 1)
    waiting = submit(served, "waits")
    assert scrape()("num_requests_waiting") == 1
    cancel(served, waiting)
    assert scrape()("num_requests_waiting") == 0
    served.hold(False)
    served.call(running.whole())
    answer = scrape()
    assert answer.ended() == {"abort": 1, "length": 1}
    assert answer("prompt_tokens_total") == 2
    ones = dict.fromkeys(BUCKETS, 1)
    twice = {"e2e_request_latency_seconds": 2, "inter_token_latency_seconds": 0}
    assert answer.counts() == ones | twice


def test_an_expired_request_is_aborted(served, scrape):
    served.hold()
    completion = submit(served, "ab", timeout_s=0.01)
    with pytest.raises(RequestError, match="time ran out"):
        served.call(completion.whole())
    answer = scrape()
    assert answer.ended() == {"abort": 1}
    assert [answer(name) for name in GAUGES] == [0, 0, 0]
    served.hold(False)


def test_our_own_faults_are_errors(served, scrape):
    served.fault = lambda plan, sampled: [dataclasses.replace(s, logprob=math.nan) for s in sampled]
    with pytest.raises(RequestError, match="NaN"):
        served.call(submit(served, "ab").whole())
    assert scrape().ended() == {"error": 1}

    def lose(plan, sampled):
        raise ConnectionError("gone")

    served.fault = lose
    with pytest.raises(RequestError, match="the workers failed"):
        served.call(submit(served, "ab").whole())
    answer = scrape()
    assert answer.ended() == {"error": 2}
    assert answer("generation_tokens_total") == 0
    assert [answer(name) for name in GAUGES] == [0, 0, 0]


def test_a_refused_request_is_not_counted(served, scrape):
    with pytest.raises(RequestError):
        submit(served, "")
    answer = scrape()
    assert answer.ended() == {}
    assert answer("prompt_tokens_total") == 0


def test_two_engines_of_one_process_do_not_add_up(served, scrape):
    with serving() as other, scraping(other) as scrape_other:
        served.call(submit(served, "ab", 3).whole())
        for _ in range(2):
            other.call(submit(other, "abcd", 5).whole())
        assert [s()("prompt_tokens_total") for s in (scrape, scrape_other)] == [2, 8]
        assert [s()("generation_tokens_total") for s in (scrape, scrape_other)] == [3, 10]


def actor_of(**config) -> EngineActor:
    """`EngineActor` without Ray, with a worker that holds the whole model."""
    model = tiny_config(vocab_size=257, num_nextn_predict_layers=0)
    stage = StageRunner(
        whole_model(model),
        LocalDispatch(model.n_routed_experts),
        num_blocks=LIMITS.num_blocks,
        block_size=LIMITS.block_size,
    )
    walk = StepRunner(replica=0, expert=0, stages={0: stage})

    return EngineActor(
        model_name="tiny",
        tokenizer=ByteTokenizer(),
        owners=owners(1, 1, 1),
        limits=LIMITS,
        config=ServeConfig(port=0, **config),
        workers=[DoorWorker(walk.run)],
    )


def test_the_actor_serves_metrics_for_as_long_as_it_lives():
    async def scenario():
        actor = actor_of(metrics_port=0)
        target = await actor.start()
        metrics = (await actor.stats())["metrics_url"]
        before = await asyncio.to_thread(Scrape, metrics)  # before anything is served
        await actor.serve(3, "d", owners(1, 1, 1))

        def ask():
            with Client(target) as client:
                sampling = {"max_tokens": 5, "ignore_eos": True, "seed": 1}
                return "".join(client.generate("xyz", sampling))

        await asyncio.to_thread(ask)
        after = await asyncio.to_thread(Scrape, metrics)
        await actor.stop(grace_s=0)
        with pytest.raises(urllib.error.URLError):
            await asyncio.to_thread(Scrape, metrics)
        await actor.stop(grace_s=0)  # the second time there is nothing to close
        return before, after

    before, after = asyncio.run(scenario())
    assert (before.ended(), before("prompt_tokens_total")) == ({}, 0)
    assert (after.ended(), after("prompt_tokens_total")) == ({"length": 1}, 3)
    assert after("generation_tokens_total") == 5


def test_without_a_port_nothing_listens():
    async def scenario():
        actor = actor_of()
        await actor.start()
        stats = await actor.stats()
        await actor.stop(grace_s=0)
        return stats

    assert asyncio.run(scenario())["metrics_url"] is None


def test_a_taken_port_is_one_sentence():
    async def scenario(port):
        actor = actor_of(metrics_port=port)
        with pytest.raises(ResourceError) as raised:
            await actor.start()
        await actor.stop(grace_s=0)
        return str(raised.value)

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert asyncio.run(scenario(port)) == (
            f"serve.metrics_port is {port} and 127.0.0.1:{port} cannot be listened on, it is taken "
            "by another process or not this machine's; choose another serve.metrics_port, or 0 for "
            "a free one."
        )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"metrics_port": 70000},
            "serve.metrics_port is 70000 and must lie between 0 and 65535; choose a port, 0 for a "
            "free one, or leave it out for no metrics.",
        ),
        (
            {"port": 50051, "metrics_port": 50051},
            "serve.metrics_port and serve.port are both 50051 and must differ; choose another "
            "serve.metrics_port.",
        ),
    ],
)
def test_a_wrong_metrics_port_is_one_sentence(values, sentence):
    with pytest.raises(ConfigError) as raised:
        ServeConfig(**values)
    assert str(raised.value) == sentence


def test_both_ports_may_be_the_systems_choice():
    assert ServeConfig(port=0, metrics_port=0).metrics_port == 0
