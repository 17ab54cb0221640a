"""Calls to a secured server, and how they end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from support.certificates import Pair
from support.serving import Served, serving

from dualray.inference.serve_config import ServeConfig
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

TIMEOUT_S = 30.0
Metadata = tuple[tuple[str, str], ...]
Outcome = tuple[grpc.StatusCode, str]


def channel(target: str, trusts: Path | None = None, shows: Pair | None = None) -> grpc.Channel:
    """A connection of its own, which shakes hands anew."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if trusts is None:
        return grpc.insecure_channel(target, options)
    shown = () if shows is None else (shows.key.read_bytes(), shows.cert.read_bytes())
    credentials = grpc.ssl_channel_credentials(trusts.read_bytes(), *shown)
    return grpc.secure_channel(target, credentials, options)


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


def outcome(call: Callable[[], object]) -> Outcome:
    """How a call ended: OK, or code and details."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def request_of(prompt: bytes) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="tiny")
    contents = pb.InferTensorContents(bytes_contents=[prompt])
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1], contents=contents)
    return request


def index(open_channel: grpc.Channel, metadata: Metadata = ()) -> Outcome:
    stub = pb_grpc.GRPCInferenceServiceStub(open_channel)
    request = pb.RepositoryIndexRequest()
    return outcome(lambda: stub.RepositoryIndex(request, metadata=metadata, timeout=TIMEOUT_S))


def stream(open_channel: grpc.Channel, metadata: Metadata = (), prompt: bytes = b"ab") -> Outcome:
    stub = pb_grpc.GRPCInferenceServiceStub(open_channel)
    requests = iter([request_of(prompt)])
    return outcome(
        lambda: list(stub.ModelStreamInfer(requests, metadata=metadata, timeout=TIMEOUT_S))
    )


@contextlib.contextmanager
def asked(
    config: ServeConfig, trusts: Path | None = None, shows: Pair | None = None
) -> Iterator[tuple[Served, grpc.Channel]]:
    """A server of this security and a channel to it."""
    with serving(security=config) as served, channel(served.target, trusts, shows) as opened:
        yield served, opened


def write(path: Path, text: str) -> None:
    """Replaces the file as one act, the way that secrets rotate."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)
