"""The lm-eval harness asks a served run: a model plugin by the name `dualray`.

    python -m dualray.platform.evaluation --model dualray --model_args target=HOST:PORT --tasks ...

Arguments are those of `lm_eval`, which from its plugins on (later than 0.4.13) finds the model by
itself. Text becomes ids here, with the server's own tokenizer, since only then it is known where
in a prompt the continuation begins. Needs the extra `eval`: nothing else may import this.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dualray.data.tokenizer import load_tokenizer
from dualray.errors import ConfigError, DualrayError
from dualray.platform.access import read_access
from dualray.platform.generation_arguments import read_generation
from dualray.platform.token_client import Stamp, TokenClient

NAME = "dualray"
"""What `--model` calls it."""
DEFAULT_CONCURRENT = 16
_log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
TokenRequest = tuple[tuple[str, str], list[int], list[int]]
"""Texts of context and continuation, and the ids of both; the harness' own shape."""


class DualrayLM(TemplateLM):
    """One served model. Raises RunError if the server does not answer."""

    def __init__(
        self,
        target: str,
        *,
        tokenizer: str | None = None,
        num_concurrent: int = DEFAULT_CONCURRENT,
        timeout_s: float | None = None,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        token_file: str | None = None,
        batch_size: str | int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """`target` is HOST:PORT. The tokenizer is the server's; `tokenizer`, a folder or a
        tokenizer.json, stands in for one that it does not hand out. `num_concurrent` requests are
        under way at once, each for at most `timeout_s` seconds; the server batches them, so that
        the harness' batch_size, max_batch_size and device mean nothing here. The last four are
        those of `dualray generate`, for a secured server.
        """
        super().__init__()
        if num_concurrent < 1:
            raise ConfigError(
                f"num_concurrent is {num_concurrent} and must be at least 1",
                hint="leave it out for 16",
            )
        access = read_access(*(None if p is None else Path(p) for p in (ca, cert, key, token_file)))
        self._client = TokenClient(target, access, timeout_s=timeout_s)
        self._model = self._client.model()
        self._tokenizer = (
            self._client.tokenizer() if tokenizer is None else load_tokenizer(tokenizer)
        )
        self._num_concurrent = num_concurrent
        self._stamps: set[Stamp] = set()

    @property
    def eot_token_id(self) -> int:
        """The end of a document, which is also what a document follows in training."""
        return self._model.eos_id

    @property
    def max_length(self) -> int:
        """Most tokens that something may be conditioned on. A scored token is part of the prompt,
        and the protocol wants room for one more behind it."""
        return self._model.max_context - 2

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in the harness' cache of requests."""
        return f"{NAME}-{self._tokenizer.sha256[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Text never turns into special tokens, in training neither."""
        return self._tokenizer.encode(string)

    def get_model_info(self) -> dict[str, Any]:
        """Which weights answered, for the results file."""
        stamps = sorted(self._stamps, key=lambda stamp: stamp.training_step)
        return {
            "model_name": self._model.name,
            "training_steps": [stamp.training_step for stamp in stamps],
            "weight_digests": [stamp.weight_digest for stamp in stamps],
        }

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(sum of the continuation's log-probabilities, whether greedy decoding gives it).

        What is longer than the model's context loses its beginning.
        """

        def score(request: TokenRequest) -> tuple[float, bool]:
            texts, context, continuation = request
            answer = self._score(context, continuation)
            self.cache_hook.add_partial("loglikelihood", texts, answer)
            return answer

        return self._all(score, requests, "Running loglikelihood requests", disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole documents, each token given as many before it as the context holds."""

        def score(request: Instance) -> float:
            [text] = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [self._score(*make_disjoint_window(window))[0] for window in windows]
            answer = math.fsum(parts)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
            return answer

        return self._all(score, requests, "Running rolling requests", disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions up to the first of the strings in `until`, which are left out."""

        def complete(request: Instance) -> str:
            context, given = request.args
            generation = read_generation(given, self._model.max_context)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            ids = ids[-(self._model.max_context - generation.max_tokens) :]
            answer = self._client.complete(ids, generation.sampling)
            self._saw(answer.stamp)
            text = generation.cut(self._tokenizer.decode(answer.ids))
            self.cache_hook.add_partial("generate_until", request.args, text)
            return text

        return self._all(complete, requests, "Running generate_until requests", disable_tqdm)

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = (context + continuation)[-(self.max_length + 1) :]
        num_scored = min(len(continuation), len(ids) - 1)
        if num_scored < 1:
            return 0.0, True
        scored = self._client.score(ids)
        self._saw(scored.stamp)
        return math.fsum(scored.logprobs[-num_scored:]), all(scored.likeliest[-num_scored:])

    def _saw(self, stamp: Stamp) -> None:
        if self._stamps and stamp not in self._stamps:
            _log.warning("other weights answer than before: those of step %d", stamp.training_step)
        self._stamps.add(stamp)

    def _all(
        self,
        ask: Callable[[Item], Result],
        requests: Sequence[Item],
        title: str,
        disable_tqdm: bool,
    ) -> list[Result]:
        """Answers in the order of the requests; the first failure is raised."""
        with ThreadPoolExecutor(self._num_concurrent) as pool:
            answers = pool.map(ask, requests)
            return list(tqdm(answers, total=len(requests), desc=title, disable=disable_tqdm))


def main() -> None:
    """`lm_eval` with this model among its own; what a user can mend is a sentence, exit code 2."""
    import lm_eval.models  # noqa: F401 (registers its own, which it does only while there are none)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="dualray.platform.evaluation:DualrayLM")
    try:
        cli_evaluate()
    except DualrayError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
