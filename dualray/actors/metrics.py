"""What the engine does, as plain counters and as Prometheus metrics under vLLM's names.

Dashboards and autoscalers written for vLLM then work unchanged: names, labels and buckets are
those of its `vllm/v1/metrics/loggers.py` and `vllm/v1/spec_decode/metrics.py`. Every engine has
a registry of its own, so that two in one process do not add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dualray.actors.completion import Completion
from dualray.actors.grpc_metrics import CallCounter
from dualray.inference.request import FinishReason
from dualray.inference.scheduler import CacheCounts, Scheduler

FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LABELS = ("model_name", "engine")


@dataclass(kw_only=True)
class EngineStats:
    """Counters since the engine started. Times in nanoseconds."""

    num_succeeded: int = 0
    succeeded_ns: int = 0
    num_failed: int = 0
    """Cancelled and expired requests included."""
    failed_ns: int = 0
    num_started: int = 0
    queued_ns: int = 0
    """Between arrival and the first step that ran the request."""
    num_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    last_finished_ms: int = 0
    """Milliseconds since the epoch."""
    first_token_unix_s: float | None = None
    """When the first token since `serve` was handed out, in seconds since the epoch."""

    def note_started(self, completion: Completion, now_ns: int) -> None:
        """A step runs the request, perhaps its first one."""
        if completion.started_ns is None:
            completion.started_ns = now_ns
            self.num_started += 1
            self.queued_ns += now_ns - completion.arrived_ns


class EngineMetrics:
    """Counters, gauges and histograms of one engine.

    The engine tells it what happens, on its own loop; `registry` may be read by any thread.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.calls = CallCounter(self.registry)
        """The interceptor of the gRPC server that asks the engine."""
        self._labels = (model_name, "0")  # vLLM counts the engines of a server; ours has one
        self._running = self._gauge("num_requests_running", "Requests in execution batches.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for admission.")
        self._cache = self._gauge("kv_cache_usage_perc", "Latent cache in use; 1 is all of it.")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._preemptions = self._counter("num_preemptions", "Times a request lost its blocks.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found and not run.")
        self._drafts = self._counter("spec_decode_num_drafts", "Steps that verified drafts.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Drafts verified.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Drafts accepted.")
        self._accepted_per_pos = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts accepted, by place behind the last token.",
            (*_LABELS, "position"),
            registry=self.registry,
        )
        self._counted = CacheCounts()
        self._balance = Gauge(
            "dualray:expert_balancedness",
            "Rows of the expert ranks' mean over those of the fullest, lately; 1 is balance.",
            (*_LABELS, "layer"),
            registry=self.registry,
        )
        ended = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._ended = {r: ended.labels(*self._labels, str(r)) for r in FinishReason}
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_BUCKETS_S
        )
        self._next_token = self._histogram(
            "inter_token_latency_seconds", "From token to token.", TOKEN_BUCKETS_S
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "Arrival to end.", REQUEST_BUCKETS_S
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "Arrival to first step.", REQUEST_BUCKETS_S
        )
        self._inference = self._histogram(
            "request_inference_time_seconds", "First step to last token.", REQUEST_BUCKETS_S
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "First step to first token.", REQUEST_BUCKETS_S
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "First to last token.", REQUEST_BUCKETS_S
        )

    def show_load(self, scheduler: Scheduler) -> None:
        """Sets the gauges and what the cache has counted.

        Not read when scraped: that is another thread's doing.
        """
        self._running.set(scheduler.num_running)
        self._waiting.set(scheduler.num_waiting)
        self._cache.set(scheduler.cache_usage)
        counts, counted = scheduler.counts, self._counted
        self._preemptions.inc(counts.num_preemptions - counted.num_preemptions)
        self._queries.inc(counts.prefix_queries - counted.prefix_queries)
        self._hits.inc(counts.prefix_hits - counted.prefix_hits)
        drafts, told = counts.drafts, counted.drafts
        self._drafts.inc(drafts.num_drafts - told.num_drafts)
        self._drafted.inc(drafts.num_draft_tokens - told.num_draft_tokens)
        self._accepted.inc(drafts.num_accepted_tokens - told.num_accepted_tokens)
        for place, count in enumerate(drafts.accepted_per_pos):
            of_place = self._accepted_per_pos.labels(*self._labels, str(place))
            of_place.inc(count - (told.accepted_per_pos[place : place + 1] or [0])[0])
        drafts = replace(drafts, accepted_per_pos=list(drafts.accepted_per_pos))
        self._counted = replace(counts, drafts=drafts)

    def show_balance(self, balance: Mapping[int, float]) -> None:
        """Sets what `balancedness` found, by layer."""
        for layer, value in balance.items():
            self._balance.labels(*self._labels, str(layer)).set(value)

    def add_token(self, completion: Completion, now_ns: int) -> None:
        """Counts a token that came at `now_ns`; the first one also counts its prompt."""
        if completion.last_token_ns is None:
            completion.first_token_ns = now_ns
            self._prompt.inc(len(completion.request.prompt_ids))
            self._first_token.observe(_seconds(completion.arrived_ns, now_ns))
        else:
            self._next_token.observe(_seconds(completion.last_token_ns, now_ns))
        completion.last_token_ns = now_ns
        self._generated.inc()

    def end(self, completion: Completion, reason: FinishReason, now_ns: int) -> None:
        """Counts a request that ended, and the time of every phase that it came through.

        Cancelled and expired ones too: without them an overloaded server would look fast.
        """
        self._ended[reason].inc()
        self._whole.observe(_seconds(completion.arrived_ns, now_ns))
        started, first, last = (
            completion.started_ns,
            completion.first_token_ns,
            completion.last_token_ns,
        )
        if started is not None:
            self._queue.observe(_seconds(completion.arrived_ns, started))
            if first is not None and last is not None:
                self._inference.observe(_seconds(started, last))
                self._prefill.observe(_seconds(started, first))
                self._decode.observe(_seconds(first, last))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(*self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        """A counter of `name`_total."""
        counter = Counter(f"vllm:{name}", text, _LABELS, registry=self.registry)
        return counter.labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets_s: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", text, _LABELS, registry=self.registry, buckets=buckets_s
        )
        return histogram.labels(*self._labels)


def _seconds(start_ns: int, end_ns: int) -> float:
    return (end_ns - start_ns) / 1e9
