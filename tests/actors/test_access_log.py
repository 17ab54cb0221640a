"""The access log of a served tiny model: a line for each request, however it ends."""

import json
import logging
import os
import re
import stat
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as vllm_grpc
from support.questions import question
from support.secured import bearer, channel, index, outcome, stream
from support.serving import serving

from dualray.actors import line_file
from dualray.actors.access_log import AccessLog
from dualray.actors.line_file import LineFile
from dualray.errors import ConfigError
from dualray.inference.serve_config import ServeConfig
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "access.jsonl"


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_what_a_request_was_and_how_it_ended(path):
    with (
        serving(security=ServeConfig(access_log=str(path))) as served,
        channel(served.target) as opened,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(opened)
        parent = (("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"),)
        stub.ModelInfer(question(b"abc", "mine"), metadata=parent)
        both = [question(b"ab", max_tokens=2), question(b"cde", "two", n=2, max_tokens=3)]
        assert len(list(stub.ModelStreamInfer(iter(both)))) > 0
        generate = vllm.GenerateRequest(request_id="gateway-1", text="hello", stream=True)
        generate.sampling_params.max_tokens = 3
        generate.sampling_params.ignore_eos = True
        assert list(vllm_grpc.VllmEngineStub(opened).Generate(generate))
        # None of these asks for a completion.
        health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest())
        stub.ServerLive(pb.ServerLiveRequest())
        with pytest.raises(grpc.RpcError):
            stub.ModelMetadata(pb.ModelMetadataRequest(name="other"))
    first, *streamed, last = lines(path)
    assert first == {
        "time": first["time"],
        "request_id": "mine",
        "method": INFER,
        "peer": first["peer"],
        "model": "tiny",
        "training_step": 7,
        "code": "OK",
        "n": 1,
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "output_tokens": 4,
        "finish_reason": "length",
        "preemptions": 0,
        "queue_s": first["queue_s"],
        "first_token_s": first["first_token_s"],
        "total_s": first["total_s"],
        "trace_id": TRACE,
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert re.fullmatch(r"ipv4:127\.0\.0\.1:\d+", first["peer"])
    assert 0 <= first["queue_s"] <= first["first_token_s"] <= first["total_s"]
    two, one = sorted(streamed, key=lambda line: line["n"], reverse=True)
    assert [one["method"], one["n"], one["prompt_tokens"], one["output_tokens"]] == [
        STREAM,
        1,
        2,
        2,
    ]
    assert one["request_id"].isdigit(), "without a name of the caller's it has the engine's"
    assert [two["request_id"], two["prompt_tokens"], two["output_tokens"]] == ["two", 3, 6]
    assert (last["request_id"], last["output_tokens"]) == ("gateway-1", 3)
    assert last["method"] == "/vllm.grpc.engine.VllmEngine/Generate"
    assert all("prompt" not in line and "trace_id" not in line for line in (one, two, last))


def test_refused_requests_have_lines_and_tokens_appear_in_none(path, tmp_path):
    (tmp_path / "tokens").write_text("s3cret-and-valid\n")
    config = ServeConfig(access_log=str(path), tokens_file=str(tmp_path / "tokens"))
    with serving(security=config) as served, channel(served.target) as opened:
        stub = pb_grpc.GRPCInferenceServiceStub(opened)
        valid = bearer("s3cret-and-valid")
        stream(opened)
        index(opened, bearer("s3cret-but-wrong"))
        for wrong in (question(b"hot", temperature=-1), pb.ModelInferRequest(model_name="no")):
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(wrong, metadata=valid)
        raw = opened.unary_unary(INFER)
        code, _ = outcome(lambda: raw(b"\xff\xff\xff", metadata=valid))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        [answer] = stub.ModelStreamInfer(iter([question(b"", "empty")]), metadata=valid)
        assert answer.error_message
        stub.ModelInfer(question(b"fine"), metadata=valid)
    text = path.read_text()
    assert "s3cret" not in text
    assert [(line["method"], line["code"], line.get("field")) for line in lines(path)] == [
        (STREAM, "UNAUTHENTICATED", None),
        ("/inference.GRPCInferenceService/RepositoryIndex", "UNAUTHENTICATED", None),
        (INFER, "INVALID_ARGUMENT", "temperature"),
        (INFER, "NOT_FOUND", "model_name"),
        (INFER, "INVALID_ARGUMENT", None),
        (STREAM, "INVALID_ARGUMENT", "text_input"),
        (INFER, "OK", None),
    ]
    refused = lines(path)[:-1]
    assert [line["request_id"] for line in refused] == ["", "", "", "", "", "empty"]
    for line in refused:
        assert (line["n"], line["output_tokens"], line["finish_reason"]) == (0, 0, None)
        assert line["queue_s"] is line["first_token_s"] is None
        assert line["peer"].startswith("ipv4:127.0.0.1:")


def test_cancelled_and_failed_requests_say_how_far_they_came(path):
    with serving(security=ServeConfig(access_log=str(path))) as served:

        def stay_in_step_three(plan, sampled):
            if len(served.plans) == 2:
                served.gate.clear()
            return sampled

        served.fault = stay_in_step_three
        with channel(served.target) as opened:
            call = pb_grpc.GRPCInferenceServiceStub(opened).ModelStreamInfer(
                iter([question(b"abc", max_tokens=40)])
            )
            served.until(lambda: served.engine.stats.num_steps == 2)
            call.cancel()
            served.until(lambda: served.engine.stats.num_failed == 1)
            served.fault = None
            served.hold(False)
            served.until(lambda: served.engine.stats.num_steps == 3)

            def lose(plan, sampled):
                raise ConnectionError("gone")

            served.fault = lose
            with pytest.raises(grpc.RpcError):
                pb_grpc.GRPCInferenceServiceStub(opened).ModelInfer(question(b"x"))
    cancelled, lost = lines(path)
    assert [cancelled[k] for k in ("code", "finish_reason", "output_tokens")] == [
        "CANCELLED", "abort", 2,
    ]  # fmt: skip
    assert [lost[k] for k in ("code", "finish_reason", "output_tokens", "first_token_s")] == [
        "UNAVAILABLE", "error", 0, None,
    ]  # fmt: skip
    assert lost["queue_s"] >= 0


def test_a_line_says_what_the_prefix_cache_had_of_the_prompt(path):
    with (
        serving(security=ServeConfig(access_log=str(path))) as served,
        channel(served.target) as opened,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(opened)
        for _ in range(2):
            stub.ModelInfer(question(b"abcdefghi"))
    # Two whole blocks of four; the last token is run in any case.
    assert [line["cached_tokens"] for line in lines(path)] == [0, 8]


@pytest.mark.parametrize("prompts", [False, True])
def test_prompts_are_written_only_when_asked_for_and_then_in_private(path, prompts):
    path.touch(0o666)
    path.chmod(0o666)
    config = ServeConfig(access_log=str(path), access_log_prompts=prompts)
    with serving(security=config) as served, channel(served.target) as opened:
        stream(opened, prompt="pr\u00efvate".encode())
    [line] = lines(path)
    assert line.get("prompt") == ("pr\u00efvate" if prompts else None)
    assert stat.S_IMODE(path.stat().st_mode) == (0o600 if prompts else 0o666)
    path.unlink()
    with serving(security=config):
        assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0


def until_written(path, text: str) -> None:
    """Lines are written by a thread; the test's own time limit bounds this."""
    while not path.exists() or text not in path.read_text():
        os.sched_yield()


def test_a_file_that_was_moved_away_or_truncated_goes_on(path, tmp_path, caplog):
    log = LineFile(str(path), "serve.access_log", mode=0o640)
    log.add(lambda: "one")
    until_written(path, "one")
    path.rename(tmp_path / "access.1")
    log.add(lambda: "two")
    until_written(path, "two")
    os.truncate(path, 0)
    log.add(lambda: "three")
    until_written(path, "three")
    # The folder itself goes: nothing is lost while the old file is open.
    moved = tmp_path / "moved"
    moved.mkdir()
    away = moved / "access.jsonl"
    other = LineFile(str(away), "serve.access_log", mode=0o640)
    other.add(lambda: "before")
    until_written(away, "before")
    moved.rename(tmp_path / "elsewhere")
    for text in ("after", "and after"):
        other.add(lambda text=text: text)
        until_written(tmp_path / "elsewhere" / "access.jsonl", text)
    for each in (log, other):
        each.stop()
    assert (tmp_path / "access.1").read_text() == "one\n"
    assert path.read_text() == "three\n"
    assert (tmp_path / "elsewhere" / "access.jsonl").read_text() == "before\nafter\nand after\n"
    [warning] = [r.getMessage() for r in caplog.records]
    assert warning.startswith("lines go on into the file that was moved away: serve.access_log is")


def test_who_adds_a_line_never_waits_and_what_is_lost_is_told(path, caplog, monkeypatch):
    monkeypatch.setattr(line_file, "MAX_WAITING", 8)
    disk = threading.Event()

    def stuck() -> str:
        disk.wait()
        return "first"

    log = LineFile(str(path), "serve.access_log", mode=0o640)
    log.add(stuck)
    while not log._lines.empty():  # the thread has taken it
        os.sched_yield()
    for number in range(11):
        log.add(lambda number=number: str(number))
    disk.set()
    log.stop()
    assert path.read_text().split() == ["first", *map(str, range(8))]
    assert [r.getMessage() for r in caplog.records] == ["serve.access_log: 3 lines were lost"]


def test_a_line_that_cannot_be_made_costs_no_other(path, caplog):
    log = LineFile(str(path), "serve.access_log", mode=0o640)
    log.add(lambda: str(1 // 0))
    log.add(lambda: "next")
    log.stop()
    assert path.read_text() == "next\n"
    assert [r.levelno for r in caplog.records] == [logging.ERROR]


def test_a_full_disk_is_told_once_and_nobody_else_is_disturbed(caplog):
    log = LineFile("/dev/full", "serve.access_log", mode=0o640)
    for _ in range(3):
        log.add(lambda: "lost")
    log.stop()
    assert [r.getMessage() for r in caplog.records] == [
        "serve.access_log: lines are lost, [Errno 28] No space left on device"
    ]


def test_standard_output_is_a_file_like_any(capsys):
    log = LineFile("-", "serve.access_log", mode=0o640)
    log.add(lambda: '{"a": 1}')
    log.stop()
    assert capsys.readouterr().out == '{"a": 1}\n'


def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reasons = {
        tmp_path / "none" / "log": "No such file or directory",
        tmp_path: "Is a directory",
        tmp_path / "pipe": "No such device or address",
    }
    for path, reason in reasons.items():
        with pytest.raises(ConfigError) as raised:
            AccessLog(str(path))
        assert str(raised.value) == (
            f"serve.access_log is {path} and cannot be written ({reason}); make its folder, see to "
            "its permissions, or choose another path."
        )
