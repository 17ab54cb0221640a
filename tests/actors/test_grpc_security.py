"""TLS, client certificates and message limits, over real connections on loopback."""

import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from support.certificates import Authority
from support.secured import asked, bearer, channel, index, stream, write
from support.serving import serving

from dualray.actors.grpc_security import Security
from dualray.errors import ConfigError
from dualray.inference.serve_config import ServeConfig
from dualray.platform.client import first_token_at

CODE = grpc.StatusCode


@pytest.fixture(scope="module")
def ca(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ca")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@pytest.fixture(scope="module")
def server(ca):
    return ca.issue("server")


@pytest.fixture(scope="module")
def client(ca):
    return ca.issue("client")


def tls(pair, client_ca: Path | None = None, **more) -> ServeConfig:
    return ServeConfig(
        tls_cert=str(pair.cert),
        tls_key=str(pair.key),
        tls_client_ca=None if client_ca is None else str(client_ca),
        **more,
    )


def test_without_settings_everybody_is_served():
    with asked(ServeConfig()) as (served, opened):
        assert index(opened)[0] is CODE.OK
        assert stream(opened, bearer("needless"))[0] is CODE.OK
        assert served.server.own_access.target == served.target


def test_tls_serves_who_trusts_it_and_nobody_in_the_clear(ca, stranger, server):
    with asked(tls(server), ca.cert) as (served, opened):
        assert index(opened)[0] is CODE.OK
        assert stream(opened)[0] is CODE.OK
        with channel(served.target) as plain:
            assert index(plain)[0] is CODE.UNAVAILABLE
        with channel(served.target, stranger.cert) as distrusting:
            code, details = index(distrusting)
    assert code is CODE.UNAVAILABLE
    assert "unable to get local issuer certificate" in details


def test_an_expired_server_certificate_is_refused_by_clients(ca):
    expired = ca.issue("expired", valid_days=-1)
    with asked(tls(expired), ca.cert) as (_, opened):
        code, details = index(opened)
    assert code is CODE.UNAVAILABLE
    assert "certificate has expired" in details


def test_mtls_serves_only_certificates_of_its_authority(ca, stranger, server, client):
    with serving(security=tls(server, ca.cert)) as served:
        with channel(served.target, ca.cert, client) as opened:
            assert index(opened)[0] is CODE.OK
            assert stream(opened)[0] is CODE.OK
        for shows in (None, stranger.issue("client"), ca.issue("late", valid_days=-1)):
            with channel(served.target, ca.cert, shows) as opened:
                assert index(opened)[0] is CODE.UNAVAILABLE
                assert stream(opened)[0] is CODE.UNAVAILABLE


def test_a_replaced_certificate_serves_the_next_connection(ca, stranger, caplog):
    """Trusting only `stranger` succeeds only with the new pair, only `ca` with the old."""
    pair = ca.issue("rotated")
    with serving(security=tls(pair)) as served, channel(served.target, ca.cert) as opened:
        assert index(opened)[0] is CODE.OK
        new = stranger.issue("rotated")
        write(pair.cert, new.cert.read_text())
        with channel(served.target, ca.cert) as between:  # the key is still the old one
            assert index(between)[0] is CODE.OK
        assert "certificates stay as they were: serve.tls_cert is" in caplog.text
        write(pair.key, new.key.read_text())
        with channel(served.target, stranger.cert) as later:
            assert index(later)[0] is CODE.OK
        with channel(served.target, ca.cert) as late:
            assert index(late)[0] is CODE.UNAVAILABLE
        assert index(opened)[0] is CODE.OK  # what is open stays open


@pytest.fixture
def tokens(tmp_path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("first-token\nsecond-token\n")
    return path


@pytest.mark.parametrize("with_tokens", [False, True])
def test_the_run_reaches_its_own_server_however_it_is_secured(ca, server, tokens, with_tokens):
    config = tls(server, ca.cert, tokens_file=str(tokens) if with_tokens else None)
    before = time.time()
    with serving(security=config) as served:
        own = served.server.own_access
        assert before < first_token_at(own.target, "tiny", own.token) <= time.time()
        folder = Path(own.target.removeprefix("unix:")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        if with_tokens:
            with channel(own.target) as opened:
                assert index(opened)[0] is CODE.UNAUTHENTICATED
            assert own.token not in repr(own)
    assert not folder.exists()


TRITON = """
import sys
import numpy
import tritonclient.grpc as triton

target, ca, cert, key = sys.argv[1:]
client = triton.InferenceServerClient(
    target, ssl=True, root_certificates=ca, private_key=key, certificate_chain=cert
)
prompt = triton.InferInput("text_input", [1], "BYTES")
prompt.set_data_from_numpy(numpy.array([b"ab"], dtype=object))
answer = client.infer("tiny", [prompt], headers={"authorization": "Bearer second-token"})
print(answer.get_response().model_name)
try:
    client.infer("tiny", [prompt])
except triton.InferenceServerException as error:
    print(error.status())
"""


def test_tritonclient_speaks_mtls_and_carries_a_token(ca, server, client, tokens):
    """In a process of its own: it registers the same protocol as we do."""
    config = tls(server, ca.cert, tokens_file=str(tokens))
    with serving(security=config) as served:
        files = map(str, (ca.cert, client.cert, client.key))
        command = [sys.executable, "-c", TRITON, served.target, *files]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert said.stdout.splitlines() == ["tiny", "StatusCode.UNAUTHENTICATED"], said.stderr


def test_a_message_above_the_limit_is_refused_and_the_server_goes_on():
    with asked(ServeConfig(max_message_bytes=4096)) as (served, opened):
        code, details = stream(opened, prompt=b"x" * 5000)
        assert code is CODE.RESOURCE_EXHAUSTED
        assert "larger than max" in details
        assert served.plans == []
        assert stream(opened, prompt=b"x" * 40)[0] is CODE.OK


def test_the_limit_is_4_mib_by_default():
    with asked(ServeConfig()) as (_, opened):
        # Too long a prompt, but read: its refusal is a message of the stream.
        assert stream(opened, prompt=b"x" * (4 * 2**20 - 200))[0] is CODE.OK
        assert stream(opened, prompt=b"x" * 4 * 2**20)[0] is CODE.RESOURCE_EXHAUSTED


def refused(config: ServeConfig) -> str:
    with pytest.raises(ConfigError) as raised:
        Security(config)
    return str(raised.value)


def test_files_that_cannot_be_used_are_sentences(ca, server, client, tmp_path):
    none = tmp_path / "none.pem"
    hint = "check the path and its permissions."
    assert refused(ServeConfig(tls_cert=str(none), tls_key=str(server.key))) == (
        f"serve.tls_cert is {none} and cannot be read (No such file or directory); {hint}"
    )
    assert refused(ServeConfig(tls_cert=str(server.cert), tls_key=str(tmp_path))) == (
        f"serve.tls_key is {tmp_path} and cannot be read (Is a directory); {hint}"
    )
    assert refused(tls(server, none)) == (
        f"serve.tls_client_ca is {none} and cannot be read (No such file or directory); {hint}"
    )
    assert refused(ServeConfig(tokens_file=str(none))) == (
        f"serve.tokens_file is {none} and cannot be read (No such file or directory); {hint}"
    )
    hint = "give the certificate, its chain below it, and the key that belongs to it."
    assert refused(ServeConfig(tls_cert=str(server.cert), tls_key=str(client.key))) == (
        f"serve.tls_cert is {server.cert} and serve.tls_key is {client.key}, and they are no PEM "
        f"certificate with its unencrypted key (key values mismatch); {hint}"
    )
    locked = ca.issue("locked", password=b"secret")
    assert "no PEM certificate with its unencrypted key" in refused(tls(locked))
    text = tmp_path / "text"
    text.write_text("hello\n")
    assert "no PEM certificate with its unencrypted key" in refused(
        ServeConfig(tls_cert=str(text), tls_key=str(text))
    )
    assert refused(tls(server, text)).startswith(
        f"serve.tls_client_ca is {text} and holds no PEM certificate ("
    )
    text.write_text("# none\n\n")
    assert refused(ServeConfig(tokens_file=str(text))) == (
        f"serve.tokens_file is {text} and holds no token; write one token a line into it."
    )
    text.write_bytes(b"good\nbad one\n")
    assert refused(ServeConfig(tokens_file=str(text))) == (
        f"serve.tokens_file is {text} and line 2 of it is no token: visible ASCII characters "
        "without spaces, at most 4096; correct the line or start it with #."
    )
    text.write_bytes("gr\u00fcn\n".encode())
    assert "line 1 of it is no token" in refused(ServeConfig(tokens_file=str(text)))
