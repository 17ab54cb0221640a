"""The training of a run: one call per worker and step, metrics, held-out loss, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import dualray
from dualray.actors.gang import Gang
from dualray.actors.stage_worker import phase_loader
from dualray.checkpoint.store import prune
from dualray.checkpoint.writer import RankFiles, begin, commit, step_dir
from dualray.data.dataset import TokenDataset
from dualray.data.yardsticks import bits_per_byte
from dualray.parallel.balance import max_violation
from dualray.parallel.nodes import NodeMap
from dualray.parallel.phases import Phase, phase_at, phase_behind
from dualray.parallel.slots import ExpertPlacement
from dualray.parallel.step_result import HeldOut, StepResult
from dualray.platform.arrangement import Arrangement
from dualray.platform.events import EventLog, Note
from dualray.platform.expert_moves import ExpertMoves, imbalance
from dualray.platform.folder import RunFolder
from dualray.platform.loads import LoadsLog, Place, tokens_by_place
from dualray.platform.metrics import CheckpointSaved, Decided, PhaseEntered, StepMetrics
from dualray.platform.metrics_log import MetricsLog
from dualray.platform.run_file import RunFile, to_mapping
from dualray.platform.scheduling.choice import Start
from dualray.platform.scheduling.table import decision_lines
from dualray.platform.timeline import step_trace, worker_title
from dualray.platform.trace import Category, Span, Trace, write_trace


class Training:
    """Steps a gang from `first_step` to the last, or until told to stop."""

    def __init__(
        self,
        run: RunFile,
        gang: Gang,
        folder: RunFolder,
        events: EventLog,
        log: MetricsLog,
        *,
        dataset: TokenDataset,
        first_step: int,
        start: Start,
        placement: ExpertPlacement,
        nodes: NodeMap | None,
    ) -> None:
        """`start` is how the workers have started, `placement` where their experts are, `nodes`
        where expert ranks are if that matters."""
        self._run, self._gang, self._folder = run, gang, folder
        self._events, self._log = events, log
        self._loads = LoadsLog.resume(folder.loads, first_step)
        self.experts = ExpertMoves(run, gang, events, log, placement=placement, nodes=nodes)
        self._dataset = dataset
        self._phases = run.phases()
        self._phase = phase_at(self._phases, first_step)
        """The one that the workers are in."""
        self.arrangement = Arrangement(run, gang, self._phase, start)
        self.steps_done = first_step
        """Optimizer steps that the workers' weights have seen."""
        self._trace = Trace(())
        """Of the last step that was traced."""
        self.last_checkpoint: Path | None = None
        self.last_step_ended = time.time()
        """Seconds of the epoch when the last optimizer step had ended."""

    @property
    def phase(self) -> Phase:
        """The one that the workers are in."""
        return self._phase

    @property
    def is_done(self) -> bool:
        """Whether the run's last step has been made."""
        return self.steps_done >= self._phases[-1].end_step

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Train, evaluate and write checkpoints until all is done or `should_stop` says so between
        two steps; a later call goes on there. The last step of a phase is always committed."""
        with self._loads:
            self._run_steps(should_stop)

    def commit(self) -> Path | None:
        """Commit the present state if it is not; None before the first step."""
        if not self.is_committed:
            self.save()
        return self.last_checkpoint

    @property
    def is_committed(self) -> bool:
        """Whether the state after the last step is in a checkpoint of this run."""
        last = self.last_checkpoint
        return last is not None and last.name == f"step-{self.steps_done}"

    def _run_steps(self, should_stop: Callable[[], bool]) -> None:
        train = self._run.train
        while not self.is_done and not should_stop():
            step = self.steps_done + 1
            self._enter_phase_of(step)
            is_last = step == self._phase.end_step
            evaluates = is_last or _due(step, train.eval_every)
            traces = evaluates or _due(step, train.trace_every)
            wants_costs = self.arrangement.prepare()
            started = time.perf_counter()
            results = self._gang.call("step", step - 1, traces or wants_costs)
            elapsed = time.perf_counter() - started
            self.steps_done = step
            self.last_step_ended = time.time()
            if traces:
                self._trace_step(results)
            heldout = None
            if evaluates:
                batches = None if is_last else train.eval_batches
                heldout = self._gang.call("evaluate", batches)[0]
            self._loads.add(step, self._tokens_by_place(results))
            if evaluates:
                self._loads.flush()
            metrics = self._metrics(results, step, elapsed, heldout)
            self._log.append(metrics)
            self._events.append(metrics)
            if not is_last:
                # First, so that a checkpoint of this step knows of it.
                self.experts.after(
                    results, step, self.arrangement.layout, self.arrangement.schedule
                )
                self._decide(results)
            if is_last or _due(step, train.checkpoint_every):
                self.save()

    def _enter_phase_of(self, step: int) -> None:
        """Tell the workers if step number `step`, counted from 1, begins another phase."""
        phase = phase_at(self._phases, step - 1)
        if phase is not self._phase:
            self.arrangement.enter(phase, self.steps_done, self._saved)
            self._phase = phase
        if phase.number > 0 and step == phase.first_step + 1:
            train, context = phase.train, phase.model.max_position_embeddings
            self._log.append(
                PhaseEntered(step=step, seq_len=train.seq_len, context=context, lr=train.lr)
            )
            self._events.append(
                Note(
                    f"phase {phase.number} of {self._phases[-1].number}, steps {step} to "
                    f"{phase.end_step}: {train.seq_len} tokens a sequence, lr {train.lr:.2e}, "
                    f"YaRN up to {context} tokens"
                )
            )

    def _decide(self, results: list[StepResult]) -> None:
        """Let the scheduler see the step, and say what it made of it."""
        decision = self.arrangement.after(results, self.steps_done, self._saved)
        if decision is None:
            return
        self._log.append(
            Decided(
                step=self.steps_done,
                schedule=decision.choice.schedule,
                layers=decision.choice.layers,
                micro_batch_size=decision.choice.micro_batch_size,
                micro_batches=decision.choice.micro_batches,
                step_time_s_before=decision.before.step_s,
                step_time_s=decision.after.step_s,
                reason=decision.reason,
            )
        )
        for line in decision_lines(decision, self.steps_done):
            self._events.append(Note(line))

    def _saved(self) -> Path:
        self.save()
        assert self.last_checkpoint is not None
        return self.last_checkpoint

    def save(self) -> None:
        """Commit a checkpoint of the present weights and forget the oldest ones."""
        if self.steps_done == 0:
            return
        started = time.perf_counter()
        folder = self._folder.checkpoints
        final = step_dir(folder, self.steps_done)
        if not final.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._loads.flush()  # a checkpoint's steps have their loads
            temporary = begin(folder, self.steps_done)
            files = self._gang.call("write_checkpoint", str(temporary))
            commit(temporary, final, files, self._meta())
            seconds = time.perf_counter() - started
            self._log.append(CheckpointSaved(step=self.steps_done, seconds=seconds))
            self._events.append(Note(f"checkpoint {final.name} committed in {seconds:.1f} s"))
            self._trace_checkpoint(files)
            prune(folder, keep=self._run.train.keep_checkpoints)
        self.last_checkpoint = final

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint says besides tensors. No random state: every draw is a function of
        the seed and a name or step."""
        phase = phase_behind(self._phases, self.steps_done)
        loader = phase_loader(self._dataset, phase, seed=self._run.seed)
        return {
            "step": self.steps_done,
            "run": to_mapping(self._run),
            "model": asdict(phase.model),
            "tokenizer_sha256": self._dataset.tokenizer_sha256,
            "data_sha256": self._dataset.data_sha256,
            "loader": loader.fingerprint(),
            "arrangement": self.arrangement.remembered,
            "experts": self.experts.remembered,
            "global_sequences": phase.train.global_sequences(self._run.layout),
            "versions": {"dualray": dualray.__version__},
        }

    def _metrics(
        self, results: list[StepResult], step: int, elapsed_s: float, heldout: HeldOut | None
    ) -> StepMetrics:
        phase, first, layout = self._phase, results[0], self.arrangement.layout
        seconds = [sum(result.work.seconds.values()) for result in results]
        crossed = sum(result.cross_node_bytes for result in results)
        max_vio: dict[int, float] = {}
        for result in results:
            max_vio |= result.max_vio
        max_vio_run = {
            layer: max_violation(torch.from_numpy(total_E))
            for layer, total_E in self._loads.totals.items()
        }
        tokens = phase.tokens_per_step(self._run.layout)
        nats = None if heldout is None else heldout.loss_sum / max(heldout.targets, 1)
        bits = None
        if heldout is not None:
            bits = bits_per_byte(heldout.loss_sum, heldout.targets * self._bytes_per_target)
        return StepMetrics(
            step=step,
            tokens=phase.tokens_before + (step - phase.first_step) * tokens,
            seq_len=phase.train.seq_len,
            loss=first.loss,
            mtp_loss=first.mtp_loss,
            balance_loss=first.balance_loss,
            grad_norm=first.grad_norm,
            lr=first.lr,
            tokens_per_s=tokens / elapsed_s,
            step_time_s=elapsed_s,
            bubble=first.bubble,
            bubble_simulated=self._trace.bubble_simulated() if self._trace.step == step else None,
            exposed_communication=first.exposed_communication,
            max_vio=max(max_vio.values()) if max_vio else None,
            max_vio_per_layer=dict(sorted(max_vio.items())),
            max_vio_run=max(max_vio_run.values()) if max_vio_run else None,
            max_vio_run_per_layer=dict(sorted(max_vio_run.items())),
            rank_imbalance=imbalance(layout, results) if layout.experts > 1 else None,
            expert_s=max(seconds) if any(seconds) else None,
            expert_s_mean=sum(seconds) / len(seconds) if any(seconds) else None,
            cross_node_bytes_per_token=crossed / tokens if crossed else None,
            heldout_loss=nats,
            heldout_bits_per_byte=bits,
        )

    def _tokens_by_place(self, results: list[StepResult]) -> dict[Place, int]:
        """What each expert computed in a step on which expert rank and node."""
        slot_rows = [result.work.slot_rows for result in results]
        if not any(slot_rows):
            return {}
        layout = self.arrangement.layout
        ranks = [layout.coordinate(rank).expert for rank in range(len(results))]
        nodes = [info.node for info in self._gang.infos]
        return tokens_by_place(slot_rows, self.experts.placement, ranks, nodes)

    @property
    def _bytes_per_target(self) -> float:
        """Bytes of held-out text per token that is predicted, which is all but the first."""
        split = self._dataset.split("heldout")
        return split.num_bytes / (split.num_tokens - 1)

    def _trace_step(self, results: list[StepResult]) -> None:
        """Let the step that has just ended be the one that trace.json shows."""
        spans = [result.spans for result in results]
        self._trace = step_trace(
            spans,
            step=self.steps_done,
            layout=self.arrangement.layout,
            schedule=self.arrangement.schedule,
        )
        self._write_trace()

    def _trace_checkpoint(self, files: list[RankFiles]) -> None:
        """Add a checkpoint to the trace if it followed the step that is shown."""
        if self._trace.step == self.steps_done:
            spans = [
                Span(rank, "write checkpoint", Category.CHECKPOINT, *written.written_s)
                for rank, written in enumerate(files)
                if written.written_s is not None
            ]
            self._trace = replace(self._trace, spans=(*self._trace.spans, *spans))
            self._write_trace()

    def _write_trace(self) -> None:
        layout = self._run.layout
        titles = {rank: worker_title(rank, layout) for rank in range(layout.world_size)}
        write_trace(self._folder.trace, self._trace, worker_names=titles)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
