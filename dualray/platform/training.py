"""The training phase: one call per worker and step, metrics, held-out loss, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dualray
from dualray.actors.gang import Gang
from dualray.checkpoint.store import prune
from dualray.checkpoint.writer import begin, commit, step_dir
from dualray.data.dataset import TokenDataset
from dualray.data.loader import Loader
from dualray.data.yardsticks import bits_per_byte
from dualray.parallel.trainer import HeldOut, StepResult
from dualray.platform.events import EventLog, Note
from dualray.platform.folder import RunFolder
from dualray.platform.metrics import CheckpointSaved, MetricsLog, StepMetrics
from dualray.platform.run_file import RunFile, to_mapping
from dualray.platform.trace import Span, write_trace


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
    ) -> None:
        self._run, self._gang, self._folder = run, gang, folder
        self._events, self._log = events, log
        self._dataset = dataset
        self.steps_done = first_step
        """Optimizer steps that the workers' weights have seen."""
        self.last_checkpoint: Path | None = None
        self.last_step_ended = time.time()
        """Seconds of the epoch when the last optimizer step had ended."""

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Train, evaluate and write checkpoints. The last step's state is always committed."""
        train = self._run.train
        while self.steps_done < train.steps and not should_stop():
            step = self.steps_done + 1
            is_last = step == train.steps
            started = time.perf_counter()
            wants_spans = is_last or _due(step, train.eval_every)
            results = self._gang.call("step", step - 1, wants_spans)
            elapsed = time.perf_counter() - started
            self.steps_done = step
            self.last_step_ended = time.time()
            if wants_spans:
                self._write_trace(results, step)
            heldout = None
            if is_last or _due(step, train.eval_every):
                batches = None if is_last else train.eval_batches
                heldout = self._gang.call("evaluate", batches)[0]
            metrics = self._metrics(results, step, elapsed, heldout)
            self._log.append(metrics)
            self._events.append(metrics)
            if is_last or _due(step, train.checkpoint_every):
                self.save()
        if self.last_checkpoint is None or self.last_checkpoint.name != f"step-{self.steps_done}":
            self.save()

    def save(self) -> None:
        """Commit a checkpoint of the present weights and forget the oldest ones."""
        if self.steps_done == 0:
            return
        started = time.perf_counter()
        folder = self._folder.checkpoints
        final = step_dir(folder, self.steps_done)
        if not final.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = begin(folder, self.steps_done)
            files = self._gang.call("write_checkpoint", str(temporary))
            commit(temporary, final, files, self._meta())
            seconds = time.perf_counter() - started
            self._log.append(CheckpointSaved(step=self.steps_done, seconds=seconds))
            self._events.append(Note(f"checkpoint {final.name} committed in {seconds:.1f} s"))
            prune(folder, keep=self._run.train.keep_checkpoints)
        self.last_checkpoint = final

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint says besides tensors. No random state: every draw is a function of
        the seed and a name or step."""
        run = to_mapping(self._run)
        loader = Loader(
            self._dataset,
            seed=self._run.seed,
            seq_len=self._run.train.seq_len,
            depths=self._run.model.num_nextn_predict_layers,
        )
        return {
            "step": self.steps_done,
            "run": run,
            "model": run["model"],
            "tokenizer_sha256": self._dataset.tokenizer_sha256,
            "data_sha256": self._dataset.data_sha256,
            "loader": loader.fingerprint(),
            "global_sequences": self._run.train.global_sequences(self._run.layout),
            "versions": {"dualray": dualray.__version__},
        }

    def _metrics(
        self, results: list[StepResult], step: int, elapsed_s: float, heldout: HeldOut | None
    ) -> StepMetrics:
        run, first = self._run, results[0]
        loads: dict[int, list[int]] = {}
        max_vio: dict[int, float] = {}
        for result in results:
            loads |= result.loads
            max_vio |= result.max_vio
        tokens = run.train.global_sequences(run.layout) * run.train.seq_len
        nats = None if heldout is None else heldout.loss_sum / max(heldout.targets, 1)
        bits = None
        if heldout is not None:
            bits = bits_per_byte(heldout.loss_sum, heldout.targets * self._bytes_per_target)
        return StepMetrics(
            step=step,
            tokens=step * tokens,
            loss=first.loss,
            mtp_loss=first.mtp_loss,
            balance_loss=first.balance_loss,
            grad_norm=first.grad_norm,
            lr=first.lr,
            tokens_per_s=tokens / elapsed_s,
            step_time_s=elapsed_s,
            bubble=first.bubble,
            max_vio=max(max_vio.values()) if max_vio else None,
            max_vio_per_layer=dict(sorted(max_vio.items())),
            loads=dict(sorted(loads.items())),
            heldout_loss=nats,
            heldout_bits_per_byte=bits,
        )

    @property
    def _bytes_per_target(self) -> float:
        """Bytes of held-out text per token that is predicted, which is all but the first."""
        split = self._dataset.split("heldout")
        return split.num_bytes / (split.num_tokens - 1)

    def _write_trace(self, results: list[StepResult], step: int) -> None:
        spans = [Span(rank, *span) for rank, result in enumerate(results) for span in result.spans]
        write_trace(self._folder.trace, spans, step=step)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
