"""A served tiny model in this process: engine and gRPC server on a thread of their own.

Every step passes a gate that a test can hold, so that "in the middle of a completion" needs
no sleep. tritonclient must stay out of this process: both register the package `inference`.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.models import tiny_config, whole_model

from dualray.actors.completion import Weights
from dualray.actors.engine import Engine
from dualray.actors.grpc_server import InferenceServer
from dualray.actors.vllm_tokenizer import model_files
from dualray.data.tokenizer import ByteTokenizer, Tokenizer
from dualray.inference.scheduler import Limits, owners
from dualray.inference.serve_config import ServeConfig
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_runner import StepRunner
from dualray.model.config import ModelConfig
from dualray.model.moe import LocalDispatch

LIMITS = Limits(num_blocks=64, block_size=4, max_batch=8, max_context=64, max_waiting=8)
WEIGHTS = Weights(training_step=7, digest="abc123")


class Served:
    """`plans` are the steps run so far; `fault(plan, sampled)` may change or break a step."""

    def __init__(
        self,
        *,
        max_request_s: float = 60.0,
        security: ServeConfig | None = None,
        tokenizer: Tokenizer | None = None,
        files: bool = True,
        draft_tokens: int = 0,
        num_blocks: int = LIMITS.num_blocks,
    ) -> None:
        """Raw bytes without `tokenizer`; with `files` the server can hand its tokenizer out. Drafts
        need an MTP module, without which the model is the same one."""
        self._tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        modules = min(1, draft_tokens)
        config = tiny_config(
            vocab_size=self._tokenizer.vocab_size, num_nextn_predict_layers=modules
        )
        self.limits = replace(
            LIMITS, num_blocks=num_blocks, draft_tokens=draft_tokens, draft_modules=modules
        )
        self._files = text_side(self._tokenizer, config) if files else None
        stage = StageRunner(
            whole_model(config),
            LocalDispatch(config.n_routed_experts),
            num_blocks=num_blocks,
            block_size=LIMITS.block_size,
            draft_modules=modules,
        )
        self._walk = StepRunner(replica=0, expert=0, stages={0: stage})
        self._max_request_s = max_request_s
        self._security = security
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="served")
        self.plans: list[Any] = []
        self.fault: Callable[..., Any] | None = None
        self._thread.start()
        self.target = self.call(self._start())

    async def _start(self) -> str:
        self.gate = asyncio.Event()
        self.gate.set()
        self.engine = Engine(
            model_name="tiny",
            tokenizer=self._tokenizer,
            owners=owners(1, 1, 1),
            limits=self.limits,
            max_request_s=self._max_request_s,
            run_step=self._run_step,
        )
        self.server = InferenceServer(self.engine, self._security, self._files)
        target = await self.server.start("127.0.0.1", 0)
        await self.engine.start()
        return target

    async def _run_step(self, plan):
        await self.gate.wait()
        self.plans.append(plan)
        sampled = self._walk.run(plan)
        return self.fault(plan, sampled) if self.fault else sampled

    def call(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float = 60.0) -> Any:
        """Runs a coroutine on the server's loop and waits for it."""
        return self.begin(coroutine).result(timeout_s)

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def serve(self) -> None:
        self.call(self.engine.serve(WEIGHTS))

    def hold(self, held: bool = True) -> None:
        """Holds or releases the steps."""
        self._loop.call_soon_threadsafe(self.gate.clear if held else self.gate.set)

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition` holds on the server's loop; asks after each of its events."""

        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0)

        self.call(poll(), timeout_s=30.0)

    def close(self) -> None:
        self.call(self.engine.stop())
        self.call(self.server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def text_side(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, bytes]:
    """What a server of fp32 weights hands out beside them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return model_files(Path(folder), tokenizer, config, "float32")


@contextlib.contextmanager
def serving(**options):
    served = Served(**options)
    try:
        served.serve()
        yield served
    finally:
        served.close()
