"""A worker's part of a step: its stages over its owners' sequences.

`StageRunner` runs one held stage copy. `StepRunner` walks a worker's stages in the order in
which hidden states can arrive, and leaves the transport to two callables, so that the same
code serves one process and a pipeline of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dualray.inference.compiled_decode import CompiledDecode
from dualray.inference.latent_cache import LatentCache, PagedAttention, PagedBatch
from dualray.inference.plan import Owner, Sampled, SampleSpec, SequencePlan, StepPlan
from dualray.inference.sampler import sample
from dualray.model.context import ExpertDispatch, ForwardContext, RoutingTape
from dualray.model.stage import Stage
from dualray.parallel.groups import FORWARD
from dualray.parallel.p2p import PipelineLinks
from dualray.schedule.actions import Schedule


@dataclass(frozen=True, kw_only=True)
class StageOutput:
    """What the next stage reads (T, D), and the tokens that the last one chose."""

    hidden_TD: Tensor
    sampled: list[Sampled]


class StageRunner:
    """One held stage with its latent cache. Runs without gradients.

    `dispatch` is the direction's own. A stage that gets no sequences still runs its layers
    on zero tokens: the other expert ranks wait for it in every exchange. Decode steps of up to
    `compile_batch` sequences are compiled here, once, which takes minutes; 0 for none.
    """

    def __init__(
        self,
        stage: Stage,
        dispatch: ExpertDispatch,
        *,
        num_blocks: int,
        block_size: int,
        compile_batch: int = 0,
    ) -> None:
        weight = stage.get_parameter(f"layers.{stage.layer_range.start}.self_attn.o_proj.weight")
        self.stage = stage
        self.device, self.dtype = weight.device, weight.dtype
        self._dispatch = dispatch
        self.cache = LatentCache(
            stage.layer_range,
            num_blocks=num_blocks + (compile_batch > 0),
            block_size=block_size,
            row_dim=stage.config.cache_dim,
            dtype=self.dtype,
            device=self.device,
        )
        self._compiled: CompiledDecode | None = None
        if compile_batch:
            self._compiled = CompiledDecode(
                stage, self.cache, dispatch, max_batch=compile_batch, padding_block=num_blocks
            )
            self._compiled.warm_up()

    @torch.inference_mode()
    def run(
        self,
        sequences: Sequence[SequencePlan],
        hidden_TD: Tensor | None,
        tape: RoutingTape | None = None,
    ) -> StageOutput:
        """Runs the sequences' new tokens; `hidden_TD` is None for the first stage.

        `tape` records or replays the expert choices of this call's T rows.
        """
        if self._compiled is not None and tape is None and self._compiled.takes(sequences):
            out = self._compiled.run(sequences, hidden_TD)
            ends, asked = _asked(sequences)
            sampled = sample(out[ends], asked) if self.stage.is_last and asked else []
            return StageOutput(hidden_TD=out, sampled=sampled)
        batch = PagedBatch.build(sequences, self.cache.block_size, self.device)
        ctx = ForwardContext(
            positions_T=batch.positions_T,
            seq_lens=batch.seq_lens,
            attention=PagedAttention(self.cache, batch),
            dispatch=self._dispatch,
            tape=tape,
        )
        if self.stage.is_first:
            ids = [token for sequence in sequences for token in sequence.ids]
            ids_T = torch.tensor(ids, dtype=torch.int64, device=self.device)
            hidden_TD = self.stage.embed(ids_T, ctx)
        assert hidden_TD is not None, "only the first stage has no input"
        hidden_TD = self.stage(hidden_TD, ctx)
        ends, asked = _asked(sequences)
        sampled: list[Sampled] = []
        if self.stage.is_last and asked:
            sampled = sample(self.stage.logits(hidden_TD[ends], ctx), asked)
        return StageOutput(hidden_TD=hidden_TD, sampled=sampled)


def _asked(sequences: Sequence[SequencePlan]) -> tuple[list[int], list[tuple[str, SampleSpec]]]:
    """Last row of every sequence that has all its tokens, and how to choose its next one."""
    ends: list[int] = []
    asked = []
    stop = 0
    for sequence in sequences:
        stop += len(sequence.ids)
        if sequence.sample is not None:
            ends.append(stop - 1)
            asked.append((sequence.request_id, sequence.sample))
    return ends, asked


class Transport(Protocol):
    """Carries hidden states to the next stage of a direction and from the one before."""

    def send(self, direction: int, hidden_TD: Tensor) -> None:
        """Starts sending and returns at once; mirrored ranks send to each other first."""
        ...

    def receive(self, direction: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Waits for the hidden states that the stage before has sent."""
        ...

    def drain(self) -> None:
        """Waits until everything sent has left."""
        ...


class PipelineTransport:
    """`Transport` over the process groups that training used for its activations."""

    def __init__(
        self, links: PipelineLinks, schedule: Schedule, pipeline_rank: int, device: torch.device
    ) -> None:
        self._links = links
        self._schedule = schedule
        self._rank = pipeline_rank
        self._device = device
        self._handed: dict[int, Tensor] = {}
        """By receiving direction, what goes from one stage of this rank to the next."""

    def send(self, direction: int, hidden_TD: Tensor) -> None:
        to = self._schedule.downstream(self._rank, direction)
        assert to is not None, "the last stage sends nothing on"
        rank, to_direction = to
        if rank == self._rank:
            self._handed[to_direction] = hidden_TD
        else:
            self._links.send(FORWARD, to_direction, hidden_TD, rank)

    def receive(self, direction: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if direction in self._handed:
            return self._handed.pop(direction)
        source = self._schedule.upstream(self._rank, direction)
        assert source is not None, "the first stage receives nothing"
        incoming = self._links.post(FORWARD, direction, shape, dtype, self._device, source[0])
        return self._links.wait(incoming)

    def drain(self) -> None:
        self._links.drain()


class StepRunner:
    """One worker's walk through a step.

    `stages[direction]` is the stage that this worker applies to that direction. Its requests
    entered in direction `entries[direction]` and belong to that: another one on the way back of a
    V, by default the same.
    """

    def __init__(
        self,
        *,
        replica: int,
        expert: int,
        stages: Mapping[int, StageRunner],
        transport: Transport | None = None,
        entries: Mapping[int, int] | None = None,
    ) -> None:
        self._replica = replica
        self._expert = expert
        self._stages = stages
        self._entries = {d: d for d in stages} if entries is None else entries
        self._transport = transport

    def run(self, plan: StepPlan) -> list[Sampled]:
        """Runs this worker's stages; returns the tokens chosen here, if a last stage is held.

        Stages run in pipeline order: a worker's early stage feeds others before its late
        stage waits for them, so no two workers wait for each other.
        """
        sampled: list[Sampled] = []
        entered = plan.directions(self._replica)
        active = [d for d in self._stages if self._entries[d] in entered]
        for direction in sorted(active, key=lambda d: self._stages[d].stage.layer_range.start):
            runner = self._stages[direction]
            entry = self._entries[direction]
            owner = Owner(replica=self._replica, expert=self._expert, direction=entry)
            sequences = plan.sequences(owner)
            num_tokens = sum(len(sequence.ids) for sequence in sequences)
            output = runner.run(sequences, self._input(runner, direction, num_tokens))
            sampled += output.sampled
            if not runner.stage.is_last and num_tokens:
                assert self._transport is not None
                self._transport.send(direction, output.hidden_TD)
        if self._transport is not None:
            self._transport.drain()
        return sampled

    def _input(self, runner: StageRunner, direction: int, num_tokens: int) -> Tensor | None:
        if runner.stage.is_first:
            return None
        shape = (num_tokens, runner.stage.config.hidden_size)
        if not num_tokens:
            return torch.empty(shape, dtype=runner.dtype, device=runner.device)
        assert self._transport is not None
        return self._transport.receive(direction, shape, runner.dtype)
