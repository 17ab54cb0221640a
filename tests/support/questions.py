"""Requests of the inference protocol as tests ask them."""

from __future__ import annotations

import json

from support.secured import request_of

from dualray.proto import inference_pb2 as pb


def question(prompt: bytes, request_id: str = "", **sampling) -> pb.ModelInferRequest:
    """Four tokens, whatever the model thinks of it, unless `sampling` says otherwise."""
    request = request_of(prompt)
    request.id = request_id
    values = {"max_tokens": 4, "ignore_eos": True, "seed": 1} | sampling
    contents = pb.InferTensorContents(bytes_contents=[json.dumps(values).encode()])
    request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1], contents=contents)
    return request
