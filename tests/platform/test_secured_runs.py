"""A run whose server is secured: in real Ray actors, asked through the command line."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from support.certificates import Authority
from support.runs import dualray, make_corpus, metrics_of, started, write_run_file
from support.secured import TIMEOUT_S, bearer, channel

from dualray.proto import admin_pb2 as pb
from dualray.proto import admin_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

LAYOUT = {"pipeline": 1, "experts": 1, "schedule": "1f1b"}


def test_a_secured_run_asks_itself_and_serves_only_who_may(tmp_path: Path) -> None:
    """Its controller has neither a certificate nor a token of the file, and gets its token."""
    data = make_corpus(tmp_path / "corpus")
    ca = Authority(tmp_path, "ca")
    server, client = ca.issue("server"), ca.issue("client")
    (tmp_path / "tokens").write_text("# ours\nnot-a-secret\n")
    (tmp_path / "admin").write_text("not-a-secret-either\n")
    secured = {
        "tls_cert": server.cert.name,
        "tls_key": server.key.name,
        "tls_client_ca": ca.cert.name,
        "tokens_file": "tokens",
        "admin_port": 0,
        "admin_tokens_file": "admin",
    }
    write_run_file(tmp_path / "tiny.yaml", data, layout=LAYOUT, train={"steps": 1}, serve=secured)
    run = tmp_path / "runs" / "tiny"
    with started("train", "tiny.yaml", cwd=tmp_path) as train:
        admin = train.line(r"^admin service at (\S+)$")[1]
        target = train.line(r"serving at (\S+:\d+) from")[1]
        train.line("^first token")
        generate = ("generate", "the cat", "--target", target, "--max-tokens", "3")
        tls = ("--ca", ca.cert, "--cert", client.cert, "--key", client.key)
        answered = dualray(*generate, *tls, "--token-file", "tokens", cwd=tmp_path)
        assert "tiny after step 1" in answered.err, answered
        strange = dualray(*generate, *tls, cwd=tmp_path)
        assert (strange.code, strange.err.splitlines()[-1]) == (
            2,
            f"error: {target} refused the call, the call carries no bearer token; give a token "
            "that is valid now with --token-file.",
        )
        # One line: gRPC's own about the handshake would stand beside it.
        bare = dualray(*generate, "--ca", ca.cert, cwd=tmp_path)
        [said] = bare.err.splitlines()
        assert f"--target is {target} and the server there ends the connection at once" in said
        with channel(admin, ca.cert, client) as opened:
            stub = pb_grpc.AdminStub(opened)
            asks = pb.GetModeRequest()
            said = stub.GetMode(asks, metadata=bearer("not-a-secret-either"), timeout=TIMEOUT_S)
            assert (said.mode, said.engine_state) == (pb.MODE_SERVE, "serving")
            with pytest.raises(grpc.RpcError) as raised:
                stub.GetMode(asks, metadata=bearer("not-a-secret"), timeout=TIMEOUT_S)
            assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert dualray("stop", "tiny", cwd=tmp_path).code == 0
        assert train.end().code == 0
    [switch] = [r for r in metrics_of(run) if r.get("event") == "switch"]
    assert switch["seconds_to_first_token"] > 0
    for path in (*run.glob("*.json*"), run / "run.yaml"):
        assert "not-a-secret" not in path.read_text(), path


def test_a_missing_file_ends_the_run_before_it_trains(tmp_path: Path) -> None:
    data = make_corpus(tmp_path / "corpus")
    write_run_file(
        tmp_path / "tiny.yaml", data, layout=LAYOUT, serve={"tokens_file": "none/tokens"}
    )
    ended = dualray("train", "tiny.yaml", cwd=tmp_path)
    assert ended.code == 2
    assert ended.err == (
        "error: serve.tokens_file is none/tokens and cannot be read (No such file or directory); "
        "check the path and its permissions.\n"
    )
    assert "step 1/" not in ended.out
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()
