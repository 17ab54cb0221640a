"""Runs that are switched between training and serving, in real Ray actors."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.runs import (
    LIMIT_S,
    dualray,
    losses_of,
    make_corpus,
    metrics_of,
    started,
    state_of,
    write_run_file,
)

from dualray.checkpoint.manifest import load_manifest
from dualray.checkpoint.store import find
from dualray.proto import admin_pb2 as pb
from dualray.proto import admin_pb2_grpc as pb_grpc
from dualray.proto import inference_pb2 as infer
from dualray.proto import inference_pb2_grpc as infer_grpc

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

TRAIN = {"steps": 100_000, "lr": 1e-4, "checkpoint_every": 25, "keep_checkpoints": 10_000}
"""Both runs end when they are told to; what they have both done must be the same."""


LENGTH = 240
"""Tokens of a completion: all that a context of the tiny model has room for, nearly."""


def completion(*, stream: bool = True) -> infer.ModelInferRequest:
    message = infer.ModelInferRequest(model_name="tiny")
    text = message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"the cat ")
    flags = ("return_num_output_tokens", "stream") if stream else ("return_num_output_tokens",)
    for name in flags:
        flag = message.inputs.add(name=name, datatype="BOOL", shape=[1])
        flag.contents.bool_contents.append(True)
    message.parameters["max_tokens"].int64_param = LENGTH
    message.parameters["ignore_eos"].bool_param = True
    return message


def tokens_of(response: infer.ModelStreamInferResponse) -> int:
    assert not response.error_message
    return sum(
        tensor.contents.uint_contents[0]
        for tensor in response.infer_response.outputs
        if tensor.name == "num_output_tokens"
    )


def hashes_of(run: Path, step: int) -> dict[str, str]:
    """Of every file of a checkpoint that holds tensors: weights, masters and moments."""
    files = load_manifest(run / "checkpoints" / f"step-{step}").files
    return {name: entry.xxh3 for name, entry in files.items() if name.endswith(".safetensors")}


def test_a_run_that_served_meanwhile_trains_to_the_same_weights(tmp_path: Path) -> None:
    data = make_corpus(tmp_path / "corpus")
    for name in ("switched", "plain"):
        write_run_file(tmp_path / f"{name}.yaml", data, train=TRAIN)
    run = tmp_path / "runs" / "switched"
    with started("train", "switched.yaml", cwd=tmp_path) as train:
        train.line("^step +1/")
        served = dualray("mode", "switched", "serve", "--json", cwd=tmp_path)
        assert served.code == 0, served
        answer = json.loads(served.out)
        assert min(answer["kept_bytes"]) > 0
        assert min(answer["cache_bytes"]) > 0
        target = answer["target"]
        completed = dualray("generate", "the cat", "--target", target, "--json", cwd=tmp_path)
        assert json.loads(completed.out)["training_step"] == answer["step"]
        back = dualray("mode", "switched", "train", cwd=tmp_path)
        assert back.out.startswith(f"training again, step {answer['step'] + 1} ended "), back
        refused = dualray("generate", "the cat", "--target", target, cwd=tmp_path)
        assert refused.code == 2
        assert "does not serve now, it is training" in refused.err
        paused = json.loads(dualray("mode", "switched", "pause", "--json", cwd=tmp_path).out)
        state = state_of(run)
        assert (state["state"], state["target"]) == ("paused", None)
        assert dualray("mode", "switched", "train", cwd=tmp_path).code == 0
        last = paused["step"] // 25 * 25 + 25
        train.line(rf"^checkpoint step-{last} committed")
        assert dualray("stop", "switched", cwd=tmp_path).code == 0
        assert train.end().code == 0
    with started("train", "plain.yaml", cwd=tmp_path) as train:
        train.line(rf"^checkpoint step-{last} committed")
        assert dualray("stop", "plain", cwd=tmp_path).code == 0
        assert train.end().code == 0
    plain = tmp_path / "runs" / "plain"
    ours, theirs = losses_of(run), losses_of(plain)
    common = ours.keys() & theirs.keys()
    assert max(common) >= last > paused["step"] > answer["step"]
    assert {step: ours[step] for step in common} == {step: theirs[step] for step in common}
    assert hashes_of(run, last) == hashes_of(plain, last)

    records = metrics_of(run)
    [switch] = [record for record in records if record.get("event") == "switch"]
    assert switch["workers_before"] == switch["workers_after"]
    assert (switch["step"], switch["came_from"]) == (answer["step"], "train")
    backs = [record for record in records if record.get("event") == "back_to_training"]
    assert [(each["step"], each["came_from"]) for each in backs] == [
        (answer["step"] + 1, "serve"),
        (paused["step"] + 1, "pause"),
    ]
    assert min(each["seconds_to_first_step"] for each in backs) > 0
    assert dualray("report", "runs/switched", cwd=tmp_path).code == 0
    page = (run / "report.html").read_text()
    assert "latent cache" in page
    assert "workers free to first step" in page


def test_a_stream_at_sigterm_ends_whole_in_a_run_of_dropped_state(tmp_path: Path) -> None:
    """Switched through its admin service, for the optimizer state's sake from a checkpoint."""
    data = make_corpus(tmp_path / "corpus")
    write_run_file(
        tmp_path / "tiny.yaml",
        data,
        layout={"pipeline": 1, "experts": 1, "schedule": "1f1b"},
        train=TRAIN | {"checkpoint_every": 0},
        serve={"optimizer": "drop", "admin_port": 0},
    )
    run = tmp_path / "runs" / "tiny"
    with started("train", "tiny.yaml", cwd=tmp_path) as train:
        admin = train.line(r"^admin service at (\S+)$")[1]
        train.line("^step +1/")
        with grpc.insecure_channel(admin) as channel:
            stub = pb_grpc.AdminStub(channel)
            assert stub.GetMode(pb.GetModeRequest()).engine_state == "training"
            served = stub.SetMode(pb.SetModeRequest(mode=pb.MODE_SERVE), timeout=LIMIT_S)
            assert served.first_token_s > 0
            assert (run / "checkpoints" / f"step-{served.step}").is_dir()
            version = stub.GetWeightVersion(pb.GetWeightVersionRequest())
            assert (version.training_step, version.serving) == (served.step, True)
            layers = stub.GetExpertPlacement(pb.GetExpertPlacementRequest()).layers
            assert [len(layer.ranks) for layer in layers] == [1] * len(layers)
            back = stub.SetMode(pb.SetModeRequest(mode=pb.MODE_TRAIN), timeout=LIMIT_S)
            assert back.first_step_s > 0
            again = stub.SetMode(pb.SetModeRequest(mode=pb.MODE_SERVE), timeout=LIMIT_S)
            assert again.step > served.step
            stub.PauseGeneration(pb.PauseGenerationRequest())
            assert stub.GetMode(pb.GetModeRequest()).engine_state == "held"
            resumed = stub.SetMode(pb.SetModeRequest(mode=pb.MODE_SERVE), timeout=LIMIT_S)
            assert (resumed.switched, list(resumed.sentences)) == (
                False,
                ["run tiny serves already, and its generation, which was paused, goes on"],
            )
            assert stub.GetMode(pb.GetModeRequest()).engine_state == "serving"
        target = train.line(r"serving at (\S+:\d+) from")[1]
        with grpc.insecure_channel(target) as channel:
            stub = infer_grpc.GRPCInferenceServiceStub(channel)
            service = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
            statuses = health_pb2_grpc.HealthStub(channel).Watch(service, timeout=LIMIT_S)
            assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING
            requests = iter([completion() for _ in range(16)])
            responses = stub.ModelStreamInfer(requests, timeout=LIMIT_S)
            tokens = tokens_of(next(responses))
            train.signal_group(signal.SIGTERM)
            assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError) as raised:
                stub.ModelInfer(completion(stream=False), timeout=LIMIT_S)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert dict(raised.value.trailing_metadata())["retry-after"] == "30"
            assert stub.ServerReady(infer.ServerReadyRequest()).ready is False
            # What was accepted ends whole, though the server takes nothing more.
            tokens += sum(map(tokens_of, responses))
        assert tokens == 16 * LENGTH
        assert train.end().code == 0
    # What was dropped had been committed, so there was nothing to save at the end.
    assert find(run).path == run / "checkpoints" / f"step-{again.step}"
    assert len(losses_of(run)) == again.step
