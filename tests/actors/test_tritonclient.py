"""The served protocol as an unmodified tritonclient sees it, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from support.secured import request_of
from support.serving import LIMITS

from dualray.inference.plan import Owner
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

PEER = Path(__file__).with_name("triton_peer.py")
OWNER = Owner(0, 0, 0)


def start_peer(scenario: str, target: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(PEER), scenario, target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_peer(process: subprocess.Popen) -> dict:
    out, err = process.communicate("\n", timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def peer(scenario: str, target: str) -> dict:
    return end_peer(start_peer(scenario, target))


def test_tritonclient_streams_completions(shared):
    answer = peer("stream", shared.target)
    by_id = {i: [m for m in answer["messages"] if m["id"] == i] for i in "12"}
    for request_id, prompt in (("1", "ab"), ("2", "xyz")):
        messages = by_id[request_id]
        parts = [m for m in messages if "text_output" in m]
        assert "".join(m["text_output"] for m in parts) == answer["unary"][prompt]
        assert sum(m["num_output_tokens"] for m in parts) == 6
        assert {m["num_input_tokens"] for m in parts} == {len(prompt)}
        assert [m["finish_reason"] for m in parts] == [""] * (len(parts) - 1) + ["length"]
        assert {m["version"] for m in messages} == {"7"}
        logprobs = [entry for m in parts for entry in json.loads(m["logprobs"])]
        assert len(logprobs) == 6
        total = sum(choice["logprob"] for entry in logprobs for choice in entry.values())
        # The wire carries fp32.
        assert parts[-1]["cumulative_logprob"] == pytest.approx(total, abs=1e-4)
    # The mark comes with the last text, or in a message of its own for those who asked.
    assert [m["final"] for m in by_id["1"]] == [False] * (len(by_id["1"]) - 1) + [True]
    assert by_id["1"][-1]["finish_reason"] == "length"
    assert [m["final"] for m in by_id["2"]] == [False] * (len(by_id["2"]) - 1) + [True]
    assert "text_output" not in by_id["2"][-1]
    assert answer["with_prompt"] == "ab" + answer["unary"]["ab"]


def test_tritonclient_learns_what_is_served(shared):
    answer = peer("describe", shared.target)
    assert (answer["live"], answer["ready"]) == (True, True)
    assert (answer["model_ready"], answer["other_ready"]) == (True, False)
    assert answer["server"]["name"] == "dualray"
    assert answer["model"]["versions"] == ["7"]
    assert answer["model"]["inputs"][0] == {
        "name": "text_input",
        "datatype": "BYTES",
        "shape": ["1"],
    }
    assert answer["decoupled"] is True
    assert answer["inputs"][:2] == [
        ["text_input", pb.TYPE_STRING, [1], False],
        ["stream", pb.TYPE_BOOL, [1], True],
    ]
    assert answer["index"]["models"] == [{"name": "tiny", "version": "7", "state": "READY"}]
    assert answer["statistics"]["model_stats"][0]["name"] == "tiny"


def test_tritonclient_cancels_and_the_blocks_are_free(served):
    served.hold()
    process = start_peer("cancel", served.target)
    assert process.stdout.readline() == "sent\n"
    served.until(lambda: served.engine.scheduler.num_running == 1)
    assert served.engine.scheduler.free_blocks()[OWNER] < LIMITS.num_blocks
    assert end_peer(process) == {"cancelled": True}
    served.until(lambda: served.engine.scheduler.num_running == 0)
    assert served.engine.scheduler.free_blocks() == {OWNER: LIMITS.num_blocks}
    assert served.engine.stats.num_failed == 1
    # The step that was in flight ends, and the server goes on.
    served.hold(False)
    with grpc.insecure_channel(served.target) as channel:
        response = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request_of(b"ab"))
    assert response.id == ""


def test_tritonclient_gets_deadline_exceeded(served):
    served.hold()
    answer = peer("deadline", served.target)
    assert answer["streamed"]["status"] == "StatusCode.DEADLINE_EXCEEDED"
    assert answer["unary"]["status"] == "StatusCode.DEADLINE_EXCEEDED"
    assert answer["own"] == {
        "status": "StatusCode.DEADLINE_EXCEEDED",
        "error": "the request's time ran out before its completion ended; allow more time or "
        "ask for fewer tokens.",
    }
    served.until(lambda: served.engine.scheduler.num_running == 0)
    assert served.engine.scheduler.free_blocks() == {OWNER: LIMITS.num_blocks}


def test_tritonclient_gets_codes_and_sentences_for_wrong_requests(shared):
    top_p = "sampling_parameters.top_p is 3.0 and must be above 0 and at most 1; correct top_p."
    assert peer("refused", shared.target) == {
        "parameter": ["StatusCode.INVALID_ARGUMENT", top_p],
        "unknown": [
            "StatusCode.INVALID_ARGUMENT",
            "sampling_parameters.tempratur is not a sampling parameter; did you mean temperature?",
        ],
        "empty": [
            "StatusCode.INVALID_ARGUMENT",
            "text_input is empty and the model needs at least one token to continue; "
            "send a prompt.",
        ],
        "long": [
            "StatusCode.INVALID_ARGUMENT",
            "text_input has 64 tokens and must leave room for one more in the context of 64; "
            "shorten the prompt to at most 63 tokens.",
        ],
        "model": [
            "StatusCode.NOT_FOUND",
            "model_name is 'other' and this server has 'tiny'; ask for 'tiny'.",
        ],
        "stream False": [None, f"INVALID_ARGUMENT: {top_p}"],
        "stream True": ["StatusCode.INVALID_ARGUMENT", top_p],
    }
