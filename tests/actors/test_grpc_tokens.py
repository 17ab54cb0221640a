"""Bearer tokens: who is refused, and how they rotate."""

import asyncio
import logging
import os
import queue
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.secured import TIMEOUT_S, asked, bearer, index, outcome, request_of, stream, write
from support.serving import serving

from dualray.actors.grpc_security import OwnAccess
from dualray.actors.grpc_server import SERVICE, InferenceServer
from dualray.actors.watched_files import WatchedFiles
from dualray.inference.serve_config import ServeConfig
from dualray.platform.client import first_token_at
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

CODE = grpc.StatusCode
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


def test_an_open_stream_ends_once_its_token_is_gone(tokens):
    """What it was accepted for is answered first."""
    with asked(ServeConfig(tokens_file=str(tokens))) as (served, opened):
        requests: queue.Queue[pb.ModelInferRequest] = queue.Queue()
        stub = pb_grpc.GRPCInferenceServiceStub(opened)
        answers = stub.ModelStreamInfer(
            iter(requests.get, None), metadata=bearer("first-token"), timeout=TIMEOUT_S
        )
        requests.put(request_of(b"ab"))
        assert next(answers).infer_response.model_name == "tiny"
        served.hold()
        requests.put(request_of(b"cd"))
        served.until(
            lambda: served.engine.scheduler.num_running + served.engine.scheduler.num_waiting
        )
        write(tokens, "second-token\n")
        requests.put(request_of(b"ef"))
        served.hold(False)
        rest = []
        code, details = outcome(lambda: rest.extend(answers))
        requests.put(None)
        assert (code, details) == WRONG
        assert rest  # of the second request
        assert served.engine.stats.num_started == 2


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


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_run_reaches_a_server_on_every_address(tokens, host):
    with serving() as served:

        async def ask() -> OwnAccess:
            server = InferenceServer(served.engine, ServeConfig(tokens_file=str(tokens)))
            await server.start(host, 0)
            own = server.own_access
            await asyncio.to_thread(first_token_at, own.target, "tiny", own.token)
            await server.stop(0)
            return own

        own = served.call(ask())
    assert own.target.startswith(("127.0.0.1:", "[::1]:"))
