"""What is planned: a model, how it is trained, on which cluster, and the layouts to choose from."""

from __future__ import annotations

from dataclasses import dataclass

from dualray.model.config import ModelConfig
from dualray.platform.planning.hardware import Cluster
from dualray.platform.planning.precision import Precision
from dualray.platform.planning.work import Batch


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that all layouts of one plan share."""

    name: str
    """The preset, or the run."""
    model: ModelConfig
    cluster: Cluster
    precision: Precision
    seq_len: int
    """Tokens of a sequence."""
    num_sequences: int
    """Sequences of one step over all GPUs."""

    @property
    def tokens_per_step(self) -> int:
        return self.num_sequences * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with its micro-batches: all that a step's duration depends on besides."""

    pipeline: int
    experts: int
    replicas: int
    schedule: str
    micro_batch_size: int
    """Sequences of a micro-batch."""
    micro_batches: int
    """Micro-batches of a step for each (replica, expert rank)."""
    layers_per_stage: tuple[int, ...] = ()
    """How many layers each stage has, MTP modules not counted; empty as long as none is cut."""

    @property
    def num_gpus(self) -> int:
        return self.pipeline * self.experts * self.replicas

    @property
    def num_sequences(self) -> int:
        """Sequences of one step."""
        return self.replicas * self.experts * self.micro_batches * self.micro_batch_size

    def batch(self, seq_len: int) -> Batch:
        return Batch(num_sequences=self.micro_batch_size, seq_len=seq_len)
