"""The unmodified tritonclient against TARGET, in a process of its own: one scenario, one JSON line.

Not a test itself; test_tritonclient.py runs it.
"""

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def say(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def tensors(prompt, **flags):
    def one(name, value):
        if isinstance(value, bool):
            tensor = triton.InferInput(name, [1], "BOOL")
            tensor.set_data_from_numpy(np.array([value], dtype=bool))
        else:
            tensor = triton.InferInput(name, [1], "BYTES")
            tensor.set_data_from_numpy(np.array([value.encode()], dtype=np.object_))
        return tensor

    sampling = flags.pop("sampling", None)
    made = [one("text_input", prompt), *(one(name, value) for name, value in flags.items())]
    if sampling is not None:
        made.append(one("sampling_parameters", json.dumps(sampling)))
    return made


def value(result, name):
    array = result.as_numpy(name)
    if array is None:
        return None
    item = array[0]
    return item.decode() if isinstance(item, bytes) else item.item()


def message(result, error):
    if error is not None:
        return {"error": error.message(), "status": error.status()}
    response = result.get_response()
    names = [output.name for output in response.outputs]
    return {
        "id": response.id,
        "version": response.model_version,
        "final": response.parameters["triton_final_response"].bool_param,
        **{name: value(result, name) for name in names},
    }


SAMPLING = {"max_tokens": 6, "seed": 3, "temperature": "0.8", "top_p": 0.9, "ignore_eos": True}


def stream(client):
    """Two completions on one stream, and the same as unary calls."""
    found = queue.Queue()
    client.start_stream(lambda result, error: found.put(message(result, error)))
    flags = {
        "stream": True,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_logprobs": True,
    }
    client.async_stream_infer("tiny", tensors("ab", sampling=SAMPLING, **flags), request_id="1")
    client.async_stream_infer(
        "tiny",
        tensors("xyz", sampling=SAMPLING, **flags),
        request_id="2",
        enable_empty_final_response=True,
    )
    messages, finals = [], 0
    while finals < 2:
        messages.append(found.get(timeout=60))
        assert "error" not in messages[-1], messages[-1]
        finals += messages[-1]["final"]
    client.stop_stream()
    unary = {
        name: client.infer(
            "tiny",
            tensors(
                name, sampling=SAMPLING, exclude_input_in_output=True, return_finish_reason=True
            ),
        )
        for name in ("ab", "xyz")
    }
    return {
        "messages": messages,
        "unary": {name: value(result, "text_output") for name, result in unary.items()},
        "with_prompt": value(client.infer("tiny", tensors("ab", sampling=SAMPLING)), "text_output"),
    }


def several(client):
    """Three completions of one prompt, in one answer and piece by piece."""
    sampling = SAMPLING | {"n": 3}
    flags = {"exclude_input_in_output": True, "return_num_output_tokens": True}
    whole = client.infer("tiny", tensors("ab", sampling=sampling, **flags))
    found = queue.Queue()
    client.start_stream(lambda result, error: found.put((result, error)))
    client.async_stream_infer("tiny", tensors("ab", sampling=sampling, stream=True))
    texts, final = [b"", b"", b""], False
    while not final:
        result, error = found.get(timeout=60)
        assert error is None, error
        texts = [a + b for a, b in zip(texts, result.as_numpy("text_output"))]
        final = result.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()
    return {
        "whole": [text.decode() for text in whole.as_numpy("text_output")],
        "streamed": [text.decode() for text in texts],
        "counts": whole.as_numpy("num_output_tokens").tolist(),
    }


def describe(client):
    config = client.get_model_config("tiny").config
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("tiny"),
        "other_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(as_json=True),
        "model": client.get_model_metadata("tiny", as_json=True),
        "decoupled": config.model_transaction_policy.decoupled,
        "inputs": [[i.name, i.data_type, list(i.dims), i.optional] for i in config.input],
        "index": client.get_model_repository_index(as_json=True),
        "statistics": client.get_inference_statistics("tiny", as_json=True),
    }


def cancel(client):
    """Ends its stream in the middle of the completion; the server is held there by the test."""
    found = queue.Queue()
    client.start_stream(lambda result, error: found.put(message(result, error)))
    client.async_stream_infer(
        "tiny",
        tensors("abc", stream=True, sampling={"max_tokens": 50, "ignore_eos": True, "seed": 1}),
    )
    say("sent")
    sys.stdin.readline()
    client.stop_stream(cancel_requests=True)
    return {"cancelled": True}


def deadline(client):
    """Both kinds of calls against a server that makes no progress."""
    found = queue.Queue()
    client.start_stream(lambda result, error: found.put(message(result, error)), stream_timeout=0.3)
    client.async_stream_infer("tiny", tensors("ab", stream=True))
    streamed = found.get(timeout=60)
    client.stop_stream()
    try:
        client.infer("tiny", tensors("ab"), client_timeout=0.3)
        unary = None
    except InferenceServerException as error:
        unary = {"error": error.message(), "status": error.status()}
    # The protocol's own time-out, in microseconds, kept by the server.
    try:
        client.infer("tiny", tensors("ab"), timeout=200_000)
        own = None
    except InferenceServerException as error:
        own = {"error": error.message(), "status": error.status()}
    return {"streamed": streamed, "unary": unary, "own": own}


def refused(client):
    """Wrong requests, as unary calls, in a stream, and in a stream with status codes."""
    wrong = {
        "parameter": ("tiny", "ab", {"top_p": 3}),
        "unknown": ("tiny", "ab", {"tempratur": 1}),
        "empty": ("tiny", "", {}),
        "long": ("tiny", "a" * 64, {}),
        "model": ("other", "ab", {}),
    }
    answers = {}
    for name, (model, prompt, sampling) in wrong.items():
        try:
            client.infer(model, tensors(prompt, sampling=sampling))
        except InferenceServerException as error:
            answers[name] = [error.status(), error.message()]
    found = queue.Queue()
    for headers in (None, {"triton_grpc_error": "true"}):
        client.start_stream(
            lambda result, error: found.put(message(result, error)), headers=headers
        )
        client.async_stream_infer("tiny", tensors("ab", stream=True, sampling={"top_p": 3}))
        answer = found.get(timeout=60)
        answers[f"stream {bool(headers)}"] = [answer["status"], answer["error"]]
        client.stop_stream()
    return answers


if __name__ == "__main__":
    scenario, target = sys.argv[1:]
    with triton.InferenceServerClient(target) as client:
        say(json.dumps(globals()[scenario](client)))
