"""Who may scrape a secured server's metrics: the same files as the gRPC port's, real TLS."""

import asyncio
import socket
import ssl
import urllib.error

import pytest
from prometheus_client import CollectorRegistry, Gauge
from support.certificates import Authority
from support.scrapes import Scrape

from dualray.actors.metrics_server import MetricsServer
from dualray.errors import ConfigError
from dualray.inference.serve_config import ServeConfig


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("vllm:answer", "The answer.", registry=registry).set(42)
    return registry


def trusting(ca, shows=None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca.cert)
    if shows is not None:
        context.load_cert_chain(shows.cert, shows.key)
    return context


def listening(registry, config, scenario):
    """Runs `scenario(url)` in a thread while the server answers."""

    async def run():
        server = MetricsServer(registry, config)
        target = await server.start("127.0.0.1", 0)
        try:
            return await asyncio.to_thread(scenario, f"{server.scheme}://{target}/metrics")
        finally:
            await server.stop()

    return asyncio.run(run())


def answer(scrape: Scrape) -> float:
    return scrape.families["vllm:answer"].samples[0].value


def test_scrapes_are_encrypted_with_the_servers_certificate(registry, tmp_path):
    ca, other = Authority(tmp_path, "ca"), Authority(tmp_path, "other")
    pair = ca.issue("server")
    config = ServeConfig(tls_cert=str(pair.cert), tls_key=str(pair.key))

    def scenario(url):
        assert url.startswith("https://127.0.0.1:")
        assert answer(Scrape(url, trusting(ca))) == 42
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            Scrape(url, trusting(other))
        with pytest.raises(OSError):  # noqa: PT011 (refused, reset or closed, as it falls)
            Scrape(url.replace("https", "http"))
        assert answer(Scrape(url, trusting(ca))) == 42

    listening(registry, config, scenario)


def test_with_a_client_ca_a_scraper_shows_a_certificate(registry, tmp_path):
    ca, other = Authority(tmp_path, "ca"), Authority(tmp_path, "other")
    pair = ca.issue("server")
    config = ServeConfig(tls_cert=str(pair.cert), tls_key=str(pair.key), tls_client_ca=str(ca.cert))

    def scenario(url):
        for shows in (None, other.issue("stranger"), ca.issue("late", valid_days=-1)):
            with pytest.raises(OSError):  # noqa: PT011 (an alert or a reset, as it falls)
                Scrape(url, trusting(ca, shows))
        assert answer(Scrape(url, trusting(ca, ca.issue("prometheus")))) == 42

    listening(registry, config, scenario)


def test_a_silent_connection_keeps_nobody_out(registry, tmp_path):
    ca = Authority(tmp_path, "ca")
    pair = ca.issue("server")
    config = ServeConfig(tls_cert=str(pair.cert), tls_key=str(pair.key))

    def scenario(url):
        port = int(url.rpartition(":")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port)):
            assert answer(Scrape(url, trusting(ca))) == 42

    listening(registry, config, scenario)


def test_a_replaced_certificate_counts_from_the_next_connection_on(registry, tmp_path):
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    pair = old.issue("server")
    config = ServeConfig(tls_cert=str(pair.cert), tls_key=str(pair.key))

    def scenario(url):
        assert answer(Scrape(url, trusting(old))) == 42
        replacement = new.issue("replacement")
        replacement.key.replace(pair.key)
        # Half replaced: the pair of before goes on.
        assert answer(Scrape(url, trusting(old))) == 42
        replacement.cert.replace(pair.cert)
        assert answer(Scrape(url, trusting(new))) == 42

    listening(registry, config, scenario)


def test_an_unusable_certificate_is_one_sentence(registry, tmp_path):
    ca = Authority(tmp_path, "ca")
    one, two = ca.issue("one"), ca.issue("two")
    with pytest.raises(ConfigError, match=r"serve.tls_cert is .* and serve.tls_key is .*"):
        MetricsServer(registry, ServeConfig(tls_cert=str(one.cert), tls_key=str(two.key)))
