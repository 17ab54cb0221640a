"""A worker that is killed in the middle of a stream, in a real run of two replicas."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import grpc
import pytest
from support.runs import dualray, make_corpus, started, state_of, write_run_file

from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

LENGTH = 200


def stream(stub, seed: int):
    message = pb.ModelInferRequest(model_name="two")
    text = message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"the cat ")
    flag = message.inputs.add(name="stream", datatype="BOOL", shape=[1])
    flag.contents.bool_contents.append(True)
    message.outputs.add(name="num_output_tokens")
    message.parameters["max_tokens"].int64_param = LENGTH
    message.parameters["seed"].int64_param = seed
    message.parameters["ignore_eos"].bool_param = True
    return stub.ModelStreamInfer(iter([message]), timeout=120)


def rest(call, first) -> str:
    """How a stream ends: its tokens, or its error."""
    answers = [first, *call]
    if answers[-1].error_message:
        return answers[-1].error_message
    count = sum(
        output.contents.uint_contents[0]
        for answer in answers
        for output in answer.infer_response.outputs
        if output.name == "num_output_tokens"
    )
    return f"{count} tokens"


def test_the_other_replica_answers_on(tmp_path: Path) -> None:
    write_run_file(
        tmp_path / "two.yaml",
        make_corpus(tmp_path / "corpus"),
        layout={"pipeline": 1, "experts": 1, "replicas": 2, "schedule": "1f1b"},
        train={"steps": 2, "micro_batches": 2},
    )
    with started("train", "two.yaml", cwd=tmp_path) as run:
        target = run.line(r"serving at (\S+:\d+) from")[1]
        victim = state_of(tmp_path / "runs/two")["workers"][0]["pid"]
        with grpc.insecure_channel(target) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            calls = [stream(stub, seed) for seed in (1, 2)]
            firsts = [next(call) for call in calls]
            os.kill(victim, signal.SIGKILL)
            ends = sorted(rest(call, first) for call, first in zip(calls, firsts))
            assert ends == [
                f"{LENGTH} tokens",
                "UNAVAILABLE: the request's workers are gone, worker 0 is lost; send it again, "
                "the server has other workers.",
            ]
            run.line(rf"worker 0 \(process {victim} on .*\) died, and replica 0 serves no more")
            again = stream(stub, 3)
            assert rest(again, next(again)) == f"{LENGTH} tokens"
        refused = dualray("mode", "two", "pause", cwd=tmp_path)
        assert refused.code == 2
        assert refused.err.strip().endswith(
            "run two has lost replica 0 and can only go on serving; stop it and start it again, "
            "from its last checkpoint with --resume."
        )
        stopped = dualray("stop", "two", cwd=tmp_path)
        assert stopped.code == 0, stopped
        assert run.end().code == 0
