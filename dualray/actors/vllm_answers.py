"""A call's `GenerateResponse`s: tokens as they come, and each completion's whole at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from smg_grpc_proto import vllm_engine_pb2 as pb

from dualray.actors.completion import Completion, Delta
from dualray.actors.vllm_requests import GenerateCall
from dualray.inference.plan import Sampled
from dualray.inference.request import FinishReason


class GenerateAnswers:
    """Builds the messages of one call.

    Ids of a stop string are sent like any others, as by vLLM: whoever makes the text finds the
    string in it and cuts it there, which may be inside a token, where no list of ids can end.
    """

    def __init__(self, call: GenerateCall, completions: Sequence[Completion]) -> None:
        self._call = call
        self._completions = completions
        self._prompt_ids = completions[0].request.prompt_ids
        self._prompt: Sequence[Sampled] | None = None
        self._tokens: list[list[Sampled]] = [[] for _ in range(call.params.n)]

    def messages(self, index: int, delta: Delta) -> Iterator[pb.GenerateResponse]:
        """What completion `index` has gained: a chunk if the call streams, its whole at the end.

        A scored prompt comes with completion 0: in its first chunk, and in its whole.
        """
        self._tokens[index] += delta.tokens
        if delta.prompt is not None:
            self._prompt = delta.prompt
        if self._call.stream and delta.tokens:
            yield pb.GenerateResponse(
                chunk=pb.GenerateStreamChunk(
                    index=index,
                    token_ids=[token.token_id for token in delta.tokens],
                    prompt_tokens=len(self._prompt_ids),
                    # Of this chunk, not so far: gateways add them up.
                    completion_tokens=len(delta.tokens),
                    cached_tokens=self._completions[index].num_cached_tokens,
                    output_logprobs=self._logprobs(delta.tokens),
                    input_logprobs=self._input_logprobs(delta.prompt),
                )
            )
        if delta.finish is not None:
            yield pb.GenerateResponse(complete=self._complete(index, delta))

    def _complete(self, index: int, last: Delta) -> pb.GenerateComplete:
        tokens = self._tokens[index]
        complete = pb.GenerateComplete(
            index=index,
            output_ids=[token.token_id for token in tokens],
            finish_reason=str(last.finish),
            prompt_tokens=len(self._prompt_ids),
            completion_tokens=len(tokens),
            cached_tokens=self._completions[index].num_cached_tokens,
            output_logprobs=self._logprobs(tokens),
            input_logprobs=self._input_logprobs(self._prompt if index == 0 else None),
        )
        if last.matched_stop is not None:
            complete.matched_stop_str = last.matched_stop
        elif last.finish is FinishReason.STOP:
            ended_by = tokens[-1].token_id
            # The end of a text is no stop that the caller gave, and goes without saying.
            if ended_by in self._call.params.stop_token_ids:
                complete.matched_token_id = ended_by
        return complete

    def _logprobs(self, tokens: Sequence[Sampled]) -> pb.OutputLogProbs | None:
        if self._call.params.logprobs is None:
            return None
        return pb.OutputLogProbs(
            token_ids=[token.token_id for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[_top(token) for token in tokens],
        )

    def _input_logprobs(self, scored: Sequence[Sampled] | None) -> pb.InputLogProbs | None:
        """One entry for each token of the prompt; the first follows nothing and has no value."""
        if scored is None:
            return None
        values = [pb.InputTokenLogProb(value=token.logprob) for token in scored]
        return pb.InputLogProbs(
            token_ids=self._prompt_ids,
            token_logprobs=[pb.InputTokenLogProb(), *values],
            top_logprobs=[pb.TopLogProbs(), *map(_top, scored)],
        )


def _top(token: Sampled) -> pb.TopLogProbs:
    return pb.TopLogProbs(
        token_ids=[token_id for token_id, _ in token.top],
        values=[logprob for _, logprob in token.top],
    )
