"""TLS, client certificates, tokens and message limits, over real connections on loopback."""

import contextlib
import logging
import os
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.certificates import Authority
from support.serving import serving

from dualray.actors.grpc_security import Security
from dualray.actors.grpc_server import SERVICE
from dualray.actors.watched_files import WatchedFiles
from dualray.errors import ConfigError
from dualray.inference.serve_config import ServeConfig
from dualray.platform.client import first_token_at
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

CODE = grpc.StatusCode
TIMEOUT_S = 30.0
TOKENS = "# the morning's\nfirst-token\n\n  second-token\r\n"
NO = (
    CODE.UNAUTHENTICATED,
    (
        "the call carries no bearer token; send the metadata authorization: Bearer TOKEN with one "
        "of the server's tokens."
    ),
)
WRONG = (
    CODE.UNAUTHENTICATED,
    ("the call's bearer token is not one of the server's; ask for one that is valid now."),
)


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


def channel(target: str, trusts: Path | None = None, shows=None) -> grpc.Channel:
    """A connection of its own, which shakes hands anew."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if trusts is None:
        return grpc.insecure_channel(target, options)
    shown = () if shows is None else (shows.key.read_bytes(), shows.cert.read_bytes())
    credentials = grpc.ssl_channel_credentials(trusts.read_bytes(), *shown)
    return grpc.secure_channel(target, credentials, options)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def outcome(call) -> tuple[grpc.StatusCode, str]:
    """How a call ended: OK, or code and details."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details()
    return CODE.OK, ""


def index(open_channel: grpc.Channel, metadata=()) -> tuple[grpc.StatusCode, str]:
    stub = pb_grpc.GRPCInferenceServiceStub(open_channel)
    request = pb.RepositoryIndexRequest()
    return outcome(lambda: stub.RepositoryIndex(request, metadata=metadata, timeout=TIMEOUT_S))


def stream(open_channel: grpc.Channel, metadata=(), prompt: bytes = b"ab"):
    stub = pb_grpc.GRPCInferenceServiceStub(open_channel)
    request = pb.ModelInferRequest(model_name="tiny")
    contents = pb.InferTensorContents(bytes_contents=[prompt])
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1], contents=contents)
    return outcome(
        lambda: list(stub.ModelStreamInfer(iter([request]), metadata=metadata, timeout=TIMEOUT_S))
    )


@contextlib.contextmanager
def asked(config: ServeConfig, trusts: Path | None = None, shows=None):
    """A server of this security and a channel to it."""
    with serving(security=config) as served, channel(served.target, trusts, shows) as opened:
        yield served, opened


def write(path: Path, text: str) -> None:
    """Replaces the file as one act, the way that secrets rotate."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


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


def test_a_replaced_certificate_serves_the_next_connection(ca, stranger):
    """Trusting only `stranger` succeeds only with the new pair, only `ca` with the old."""
    pair = ca.issue("rotated")
    with serving(security=tls(pair)) as served, channel(served.target, ca.cert) as opened:
        assert index(opened)[0] is CODE.OK
        new = stranger.issue("rotated")
        write(pair.cert, new.cert.read_text())
        with channel(served.target, ca.cert) as between:  # the key is still the old one
            assert index(between)[0] is CODE.OK
        write(pair.key, new.key.read_text())
        with channel(served.target, stranger.cert) as later:
            assert index(later)[0] is CODE.OK
        with channel(served.target, ca.cert) as late:
            assert index(late)[0] is CODE.UNAVAILABLE
        assert index(opened)[0] is CODE.OK  # what is open stays open


@pytest.fixture
def tokens(tmp_path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(TOKENS)
    return path


@pytest.mark.parametrize("call", [index, stream])
@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ((), NO),
        (bearer("first-token"), (CODE.OK, "")),
        (bearer("second-token"), (CODE.OK, "")),
        ((("authorization", "bearer second-token"),), (CODE.OK, "")),
        (bearer("first-toke"), WRONG),
        (bearer("first-tokens"), WRONG),
        (bearer("# the morning's"), WRONG),
        (bearer(""), NO),
        ((("authorization", "Basic first-token"),), NO),
        ((("authorization", "first-token"),), NO),
        ((*bearer("first-token"), *bearer("second-token")), NO),
        ((("token", "first-token"),), NO),
    ],
)
def test_unary_and_streamed_calls_need_a_token(shared, call, metadata, expected):
    code, details = call(shared, metadata)
    assert (code, details) == expected


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    path = tmp_path_factory.mktemp("shared") / "tokens"
    path.write_text(TOKENS)
    with asked(ServeConfig(tokens_file=str(path))) as (_, opened):
        yield opened


def test_every_method_but_health_and_reflection_is_guarded(shared):
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert len(service.methods) >= 10
    for method in service.methods:
        ask = shared.stream_stream(f"/{service.full_name}/{method.name}")
        assert outcome(lambda ask=ask: list(ask(iter([b""]))))[0] is CODE.UNAUTHENTICATED
    unknown = shared.unary_unary("/grpc.health.v1.HealthOfOthers/Check")
    assert outcome(lambda: unknown(b""))[0] is CODE.UNAUTHENTICATED
    health = health_pb2_grpc.HealthStub(shared)
    answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflect = reflection_pb2_grpc.ServerReflectionStub(shared)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = reflect.ServerReflectionInfo(iter([request]))
    assert SERVICE in [s.name for s in listed.list_services_response.service]


def test_a_refused_call_starts_nothing_and_its_message_is_not_read(tokens):
    with asked(ServeConfig(tokens_file=str(tokens))) as (served, opened):
        infer = opened.unary_unary(f"/{SERVICE}/ModelInfer")
        assert outcome(lambda: infer(b"\xff no message"))[0] is CODE.UNAUTHENTICATED
        assert stream(opened)[0] is CODE.UNAUTHENTICATED
        assert served.plans == []
        assert served.engine.stats.num_started == 0


def test_tokens_rotate_without_a_restart(tokens, caplog):
    with asked(ServeConfig(tokens_file=str(tokens))) as (_, opened):
        assert index(opened, bearer("first-token"))[0] is CODE.OK
        assert index(opened, bearer("third-token"))[0] is CODE.UNAUTHENTICATED
        write(tokens, "second-token\nthird-token\n")
        assert index(opened, bearer("first-token"))[0] is CODE.UNAUTHENTICATED
        assert index(opened, bearer("second-token"))[0] is CODE.OK
        assert index(opened, bearer("third-token"))[0] is CODE.OK
        # A file that cannot be used changes nothing; an empty one refuses everybody.
        with caplog.at_level(logging.WARNING):
            write(tokens, "fourth-token\nnot a token\n")
            assert index(opened, bearer("third-token"))[0] is CODE.OK
            assert index(opened, bearer("fourth-token"))[0] is CODE.UNAUTHENTICATED
            tokens.unlink()
            assert index(opened, bearer("third-token"))[0] is CODE.OK
        write(tokens, "# nobody\n")
        assert index(opened, bearer("third-token"))[0] is CODE.UNAUTHENTICATED
    assert "line 2 of it is no token" in caplog.text
    assert "fourth-token" not in caplog.text
    assert "not a token" not in caplog.text


def test_a_change_of_equal_size_within_one_tick_is_seen(tmp_path):
    """As after two writes in one tick of the clock: size, time and inode stay the same."""
    path = tmp_path / "file"
    path.write_text("one")
    watched = WatchedFiles([path])
    assert watched.changed()
    assert watched.changed()  # young files count as changed
    past = time.time_ns() - 10**10
    os.utime(path, ns=(past, past))
    assert watched.changed()
    assert not watched.changed()
    path.write_text("two")
    assert watched.changed()


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
