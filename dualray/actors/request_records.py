"""The records that a server keeps of its requests: access log and traces, as `serve` asks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from dualray.actors.access_log import AccessLog
from dualray.actors.engine import Engine
from dualray.actors.request_watch import Observer, RequestWatch
from dualray.errors import ConfigError
from dualray.inference.serve_config import ServeConfig

if TYPE_CHECKING:
    from dualray.actors.tracing import RequestTracer


class RequestRecords:
    """`watch` is for services to put around their requests; it costs nothing if no record is kept.

    Raises:
        ConfigError: the log cannot be written, or what traces need is not installed.
    """

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        observers: list[Observer] = []
        self._log: AccessLog | None = None
        self._tracer: RequestTracer | None = None
        if config.otlp_endpoint is not None:
            self._tracer = _tracer(config.otlp_endpoint)
            observers.append(self._tracer)
        if config.access_log is not None:
            decode = engine.tokenizer.decode if config.access_log_prompts else None
            self._log = AccessLog(config.access_log, decode)
            observers.append(self._log)
        self.watch = RequestWatch(engine, observers)
        engine.metrics.calls.when_ended = self.watch.call_ended

    async def stop(self) -> None:
        """Writes and sends what is left."""
        if self._log is not None:
            await asyncio.to_thread(self._log.stop)
        if self._tracer is not None:
            await self._tracer.stop()


def _tracer(endpoint: str) -> RequestTracer:
    try:
        from dualray.actors.tracing import RequestTracer, otlp_exporter
    except ImportError as error:
        raise ConfigError(
            f"serve.otlp_endpoint is {endpoint} and OpenTelemetry's exporter is not installed "
            f"({error})",
            hint='install it with pip install "dualray[otel]"',
        ) from None
    return RequestTracer(otlp_exporter(endpoint))
