"""Scrapes of a served model's metrics, parsed as Prometheus does."""

from __future__ import annotations

import contextlib
import ssl
import urllib.request

from prometheus_client.parser import text_string_to_metric_families
from support.serving import Served

from dualray.actors.metrics_server import MetricsServer


class Scrape:
    """One answer of the endpoint."""

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        with urllib.request.urlopen(url, timeout=60, context=tls) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            text = answer.read().decode()
        self.families = {f.name: f for f in text_string_to_metric_families(text)}
        self.samples = [s for f in self.families.values() for s in f.samples]

    def __call__(self, name: str, **labels: str) -> float:
        wanted = {"model_name": "tiny", "engine": "0"} | labels
        (value,) = (s.value for s in self.samples if (s.name, s.labels) == (f"vllm:{name}", wanted))
        return value

    def ended(self) -> dict[str, float]:
        """Requests that ended, by reason; reasons that never occurred left out."""
        samples = [s for s in self.samples if s.name == "vllm:request_success_total"]
        assert {s.labels["finished_reason"] for s in samples} == {
            "stop",
            "length",
            "abort",
            "error",
        }
        return {s.labels["finished_reason"]: s.value for s in samples if s.value}

    def calls(self, name: str) -> dict[tuple[str, ...], float]:
        """Calls of the inference and health services by type, method and, if ended, code."""
        samples = [s for s in self.samples if s.name == f"grpc_server_{name}_total"]
        return {
            tuple(
                s.labels[k] for k in ("grpc_type", "grpc_method", "grpc_code") if k in s.labels
            ): s.value
            for s in samples
        }

    def counts(self) -> dict[str, float]:
        """Observations of every histogram."""
        return {
            name.removeprefix("vllm:"): self(f"{name.removeprefix('vllm:')}_count")
            for name, family in self.families.items()
            if family.type == "histogram"
        }


@contextlib.contextmanager
def scraping(served: Served):
    server = MetricsServer(served.engine.metrics.registry)
    target = served.call(server.start("127.0.0.1", 0))
    try:
        yield lambda: Scrape(f"http://{target}/metrics")
    finally:
        served.call(server.stop())
