"""A client that speaks token ids: log-probabilities of given ones, and completions.

It asks `vllm.grpc.engine.VllmEngine`, whose text is the caller's affair, so that it is told the
server's tokenizer too. Safe to use from several threads at once.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from smg_grpc_proto.generated import common_pb2 as common

from dualray.data.tokenizer import Tokenizer, load_tokenizer
from dualray.errors import RunError
from dualray.platform.access import Access
from dualray.platform.client import CONNECT_TIMEOUT_S, explain


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """Which weights answered."""

    model: str
    training_step: int
    weight_digest: str


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What a server says of its model."""

    name: str
    max_context: int
    """Prompt and completion together, in tokens."""
    eos_id: int


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A prompt's tokens but the first, given those before them."""

    logprobs: tuple[float, ...]
    """Natural logarithms of their probabilities."""
    likeliest: tuple[bool, ...]
    """Whether greedy decoding would have chosen them."""
    stamp: Stamp


@dataclass(frozen=True, kw_only=True)
class Completed:
    """What came after a prompt. Ids of a stop string are among them, whole."""

    ids: tuple[int, ...]
    stamp: Stamp


class TokenClient:
    """Speaks to one server, as `access` says. Use as a context manager or `close` it.

    Methods raise RequestError for a refused request and RunError for a server that cannot answer.
    """

    def __init__(
        self, target: str, access: Access | None = None, *, timeout_s: float | None = None
    ) -> None:
        """`timeout_s` is for one request; None leaves it to the server's own limit."""
        access = access or Access()
        self.target = target
        self._timeout_s = timeout_s
        self._metadata = access.metadata
        self._channel = access.channel(target)
        self._stub = pb_grpc.VllmEngineStub(self._channel)

    def __enter__(self) -> TokenClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def model(self) -> ServedModel:
        """The model that this server has."""
        try:
            info = self._stub.GetModelInfo(
                pb.GetModelInfoRequest(), timeout=CONNECT_TIMEOUT_S, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise explain(error, self.target) from error
        return ServedModel(
            name=info.served_model_name,
            max_context=info.max_context_length,
            eos_id=info.eos_token_ids[0],
        )

    def tokenizer(self) -> Tokenizer:
        """The server's own, which gives the ids that its model was trained on."""
        call = self._stub.GetTokenizer(
            common.GetTokenizerRequest(), timeout=CONNECT_TIMEOUT_S, metadata=self._metadata
        )
        try:
            chunks = list(call)
        except grpc.RpcError as error:
            raise explain(error, self.target) from error
        data = b"".join(chunk.data for chunk in chunks)
        if not chunks or chunks[-1].sha256 != hashlib.sha256(data).hexdigest():
            raise RunError(
                f"{self.target} sent a tokenizer that is not what its sha256 says",
                hint="try again, or give the tokenizer's folder",
            )
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(io.BytesIO(data)) as packed:
                packed.extractall(folder)  # drops what would leave the folder
            return load_tokenizer(folder)

    def score(self, ids: Sequence[int]) -> Scored:
        """Log-probabilities of all of `ids`, at least two, but the first.

        The protocol has no request without a completion: one token is made and dropped.
        """
        # With it comes each token's likeliest alternative.
        complete, stamp = self._ask(ids, {"max_tokens": 1, "prompt_logprobs": 1})
        scores = complete.input_logprobs
        assert list(scores.token_ids) == list(ids), "the answer is of another prompt"
        return Scored(
            logprobs=tuple(score.value for score in scores.token_logprobs[1:]),
            likeliest=tuple(
                top.token_ids[0] == token for top, token in zip(scores.top_logprobs[1:], ids[1:])
            ),
            stamp=stamp,
        )

    def complete(self, ids: Sequence[int], sampling: Mapping[str, Any]) -> Completed:
        """`sampling` are vLLM's sampling parameters, n being 1; greedy without a temperature."""
        assert sampling.get("n", 1) == 1, "a Completed is one completion"
        answer, stamp = self._ask(ids, sampling)
        return Completed(ids=tuple(answer.output_ids), stamp=stamp)

    def _ask(
        self, ids: Sequence[int], sampling: Mapping[str, Any]
    ) -> tuple[pb.GenerateComplete, Stamp]:
        request = pb.GenerateRequest(
            tokenized=pb.TokenizedInput(input_ids=ids),
            sampling_params=pb.SamplingParams(**{"temperature": 0.0} | dict(sampling)),
        )
        call = self._stub.Generate(request, timeout=self._timeout_s, metadata=self._metadata)
        try:
            messages = list(call)
        except grpc.RpcError as error:
            raise explain(error, self.target) from error
        [complete] = [m.complete for m in messages if m.HasField("complete")]
        if complete.finish_reason not in ("stop", "length"):
            raise RunError(
                f"{self.target} ended the request with {complete.finish_reason}",
                hint="see the run's log and try again",
            )
        said = dict(call.trailing_metadata())
        stamp = Stamp(
            model=said["dualray-model"],
            training_step=int(said["dualray-training-step"]),
            weight_digest=said["dualray-weight-digest"],
        )
        return complete, stamp
