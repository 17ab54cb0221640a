"""The inference engine: one asyncio loop between callers and workers.

It holds tokenizer and inference scheduler, never a tensor. Per step it sends a plan to the
workers through `run_step` and hands the new text to whoever waits for it. A plain class:
`EngineActor` is its Ray form, tests give it a stage in their own process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from dualray.actors.completion import Completion, Weights
from dualray.actors.engine_pausing import Pausing
from dualray.actors.engine_state import ENDED, EngineState, States, StepGate
from dualray.actors.error_words import error_words
from dualray.actors.grammar_compiler import GrammarCompiler
from dualray.actors.metrics import EngineMetrics, EngineStats
from dualray.actors.new_request import new_request, text_of
from dualray.actors.replicas import ReplicasLostError
from dualray.data.tokenizer import Tokenizer
from dualray.inference.grammar_matcher import GrammarMatcher
from dualray.inference.grammars import grammar_failure
from dualray.inference.plan import Outcome, Owner, Sampled, StepPlan
from dualray.inference.request import (
    DeadlineError,
    FinishReason,
    NotServingError,
    RequestError,
    SamplingParams,
    ServerFaultError,
)
from dualray.inference.scheduler import CacheCounts, Limits, Scheduler

_log = logging.getLogger(__name__)

BeforeStep = Callable[[], Awaitable[None]]
"""Called between steps, when no worker computes."""

RunStep = Callable[[StepPlan], Awaitable[Iterable[Outcome]]]
"""Runs a step on all workers and returns what the last stages scored and chose."""


class Engine:
    """Turns requests into steps and steps into text. Use from one event loop only."""

    def __init__(
        self,
        *,
        model_name: str,
        tokenizer: Tokenizer,
        owners: Iterable[Owner],
        limits: Limits,
        max_request_s: float,
        run_step: RunStep,
        before_step: BeforeStep | None = None,
        retry_after_s: float = 30.0,
        stream_interval_s: float = 0.0,
    ) -> None:
        self.model_name = model_name
        self.limits = limits
        self.stats = EngineStats()
        self.metrics = EngineMetrics(model_name)
        self.weights = Weights(training_step=0, digest="")
        self.tokenizer = tokenizer
        self._owners = tuple(owners)
        self._cache_counts = CacheCounts()
        self.scheduler = self._new_scheduler()
        self.grammars = GrammarCompiler(tokenizer)
        self.max_request_s, self.stream_interval_s = max_request_s, stream_interval_s
        self._run_step, self._before_step = run_step, before_step
        self._completions: dict[str, Completion] = {}
        self._names = itertools.count(1)
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.states, self._gate = States(retry_after_s), StepGate()
        self.pausing = Pausing(
            model_name,
            self.states,
            self._gate,
            self._idle,
            self._completions.values,
            self._fail_all,
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> EngineState:
        return self.states.now

    async def start(self) -> None:
        """Starts the loop. Requests are refused until `serve`."""
        self._task = asyncio.create_task(self._loop(), name="engine")

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            owners=self._owners,
            limits=self.limits,
            eos_id=self.tokenizer.eos_id,
            counts=self._cache_counts,
        )

    async def serve(
        self,
        weights: Weights,
        owners: Iterable[Owner] | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Takes requests from now on, answered by `weights`.

        `owners` and `limits` replace those that the engine was made with: training may have ended
        in another layout than it began with, or in another phase than its last.

        Raises:
            NotServingError: the engine has failed or stopped, so no loop would answer.
        """
        if self.state in ENDED:
            raise NotServingError(
                f"model {self.model_name} cannot serve again, its engine has {self.state}",
                hint="start the run again",
            )
        assert not self._completions, "their latents are of other weights"
        if owners is not None:
            self._owners = tuple(owners)
        self.limits = limits or self.limits
        # The old one would find blocks of the old weights.
        self.scheduler = self._new_scheduler()
        self.weights = weights
        self.stats.first_token_unix_s = None
        self._gate.open()
        await self.states.enter(EngineState.SERVING)

    async def drain(
        self, then: EngineState = EngineState.TRAINING, within_s: float | None = None
    ) -> int:
        """See `Pausing`."""
        return await self.pausing.drain(then, within_s)

    async def stop(self) -> None:
        """Ends the loop; whoever still waits is told."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail_all(NotServingError("the server is stopping", hint="ask another server"))
        await self.grammars.close()
        await self.states.enter(EngineState.STOPPED)

    async def wait_for_change(self, known: EngineState) -> EngineState:
        """Returns the state as soon as it differs from `known`."""
        return await self.states.wait_for_change(known)

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        timeout_s: float | None = None,
        *,
        every_token: bool = False,
        grammar: GrammarMatcher | None = None,
    ) -> Completion:
        """Queues a request, of text or token ids; it joins the next step.

        `every_token` makes tokens come as they are made, before their text may be shown. `grammar`
        is what `grammars` has compiled of structured_outputs.

        Raises:
            RequestError: prompt or parameters break a rule.
            NotServingError, NoWeightsError, QueueFullError: not now.
        """
        self.states.need_serving(self.model_name)
        loop = asyncio.get_running_loop()
        time_left = min(self.max_request_s, math.inf if timeout_s is None else timeout_s)
        deadline = loop.time() + time_left
        request = new_request(
            str(next(self._names)),
            prompt,
            params,
            tokenizer=self.tokenizer,
            max_context=self.limits.max_context,
            deadline=deadline,
            grammar=grammar,
        )
        self.scheduler.add(request)
        text = text_of(request, self.tokenizer)
        completion = Completion(
            request,
            text,
            self.weights,
            self._cancel,
            every_token=every_token,
            interval_s=self.stream_interval_s,
        )
        completion.timer = loop.call_at(deadline, self._expire, deadline)
        self._completions[request.request_id] = completion
        self.stats.prompt_tokens += len(request.prompt_ids)
        self.metrics.show_load(self.scheduler)
        self._idle.clear()
        self._wake.set()
        return completion

    async def _loop(self) -> None:
        try:
            await self._run_steps()
        except Exception as error:  # our own bug: nobody may be left waiting for it
            _log.exception("the engine failed")
            await self.states.enter(EngineState.FAILED)
            self._fail_all(
                ServerFaultError(
                    f"the engine failed: {error_words(error)}", hint="see the engine's log"
                )
            )

    async def _run_steps(self) -> None:
        """Steps until cancelled, or until the workers are lost."""
        while True:
            await self._gate.wait_open()
            plan = self.scheduler.plan()
            if plan is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._note_started(plan)
            self.metrics.show_load(self.scheduler)
            try:
                with self._gate.step():
                    if self._before_step is not None:
                        await self._before_step()
                    started = time.perf_counter()
                    results = list(await self._run_step(plan))
                    self.scheduler.took(plan, time.perf_counter() - started)
            except ReplicasLostError as lost:
                results = lost.outcomes
                self._lose(lost)
            except Exception as error:  # whatever loses a worker ends serving, not the server
                await self.states.enter(EngineState.FAILED)
                self._fail_all(
                    NotServingError(
                        f"the workers failed in step {plan.step}: {error_words(error)}",
                        hint="see the run's log",
                    )
                )
                return
            self.stats.num_steps += 1
            self._hand_out(results)

    def _lose(self, lost: ReplicasLostError) -> None:
        """Ends what ran on replicas that are gone; what waits goes to the others."""
        for replica, reason in lost.reasons.items():
            for request_id in self.scheduler.lose(replica):
                error = NotServingError(
                    f"the request's workers are gone, {reason.sentence}",
                    hint="send it again, the server has other workers",
                )
                self._drop(request_id, error)

    def _hand_out(self, results: list[Outcome]) -> None:
        now_ns = time.monotonic_ns()
        for outcome in results:
            if outcome.is_nan:
                self.scheduler.remove(outcome.request_id, spoiled=True)
                self._drop(
                    outcome.request_id,
                    ServerFaultError(
                        "the model gave NaN instead of a token's probability",
                        hint="report it with the run file and the training step",
                    ),
                )
        sampled: list[Sampled] = []
        for outcome in results:
            if isinstance(outcome, Sampled):
                sampled.append(outcome)
            elif (completion := self._completions.get(outcome.request_id)) is not None:
                completion.take_prompt(outcome)
        for progress in self.scheduler.apply(sampled):
            completion = self._completions.get(progress.request_id)
            if completion is None:
                continue  # the text of a token before, of the same step, has ended it
            if progress.finish is FinishReason.ERROR:
                self._drop(progress.request_id, grammar_failure(completion.request.grammar))
                continue
            self.stats.generation_tokens += 1
            self.metrics.add_token(completion, now_ns)
            if self.stats.first_token_unix_s is None:
                self.stats.first_token_unix_s = time.time()
            finish = completion.take(progress)
            if finish is not None:
                self.scheduler.remove(progress.request_id)
                self._forget(completion, finish)

    def _note_started(self, plan: StepPlan) -> None:
        now = time.monotonic_ns()
        for sequences in plan.owners.values():
            for sequence in sequences:
                self.stats.note_started(self._completions[sequence.request_id], now)

    def _cancel(self, completion: Completion) -> None:
        self._drop(completion.request.request_id, None)

    def _expire(self, deadline: float) -> None:
        # A timer may fire a clock tick early, and this one fires only once.
        now = max(deadline, asyncio.get_running_loop().time())
        for request_id in self.scheduler.expire(now):
            self._drop(
                request_id,
                DeadlineError(
                    "the request's time ran out before its completion ended",
                    hint="allow more time or ask for fewer tokens",
                ),
            )

    def _drop(self, request_id: str, error: RequestError | None) -> None:
        """Frees a request's blocks and tells its reader, if it has not ended before."""
        self.scheduler.remove(request_id)
        completion = self._completions.get(request_id)
        if completion is not None:
            by_caller = error is None or isinstance(error, DeadlineError)
            self._forget(completion, FinishReason.ABORT if by_caller else FinishReason.ERROR)
            if error is not None:
                completion.fail(error)

    def _fail_all(self, error: RequestError) -> None:
        for request_id in list(self._completions):
            self._drop(request_id, error)

    def _forget(self, completion: Completion, reason: FinishReason) -> None:
        del self._completions[completion.request.request_id]
        if completion.timer is not None:
            completion.timer.cancel()
        completion.finish = reason
        now_ns = time.monotonic_ns()
        took_ns = now_ns - completion.arrived_ns
        self.metrics.end(completion, reason, now_ns)
        self.metrics.show_load(self.scheduler)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.stats.num_succeeded += 1
            self.stats.succeeded_ns += took_ns
        else:
            self.stats.num_failed += 1
            self.stats.failed_ns += took_ns
        self.stats.last_finished_ms = time.time_ns() // 1_000_000
        if not self._completions:
            self._idle.set()
