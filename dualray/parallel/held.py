"""What one worker holds: its stages, and which of their tensors are shared with whom."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dualray.errors import ConfigError
from dualray.model.block import Block
from dualray.model.config import ModelConfig
from dualray.model.init import LogicalSlice, draw, initialise, logical_slices, stage_tensors
from dualray.model.linear import Embedding
from dualray.model.moe import Experts, MoE
from dualray.model.router import Router
from dualray.model.stage import Stage
from dualray.parallel.layout import Coordinate
from dualray.parallel.slots import ExpertPlacement
from dualray.schedule.actions import Schedule

EMBEDDING = "embed_tokens.weight"


def split_layers(num_layers: int, num_stages: int, layers: Sequence[int] = ()) -> list[range]:
    """Contiguous layer ranges: `layers[s]` for stage s, or nearly equal ones if that is empty.

    Of nearly equal ranges the earlier ones take what is left over: the last stage also has the
    head and the MTP modules, so it gets no extra layer. Raises ConfigError if there are more
    stages than layers, or `layers` does not cut them.
    """
    if num_stages > num_layers:
        raise ConfigError(
            f"model.num_hidden_layers {num_layers} is fewer than the schedule's {num_stages} "
            "stages, and every stage needs a layer",
            hint=f"choose layout.pipeline and layout.schedule for {num_layers} stages or less",
        )
    if layers and (
        len(layers) != num_stages or sum(layers) != num_layers or min(layers, default=1) < 1
    ):
        raise ConfigError(
            f"layout.layers is {list(layers)} and must be {num_stages} numbers of at least 1, one "
            f"a stage, that sum to model.num_hidden_layers {num_layers}",
            hint="correct it, or leave it out for nearly equal stages",
        )
    share, extra = divmod(num_layers, num_stages)
    counts = layers or [share + (stage < extra) for stage in range(num_stages)]
    ends = list(itertools.accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts)]


class HeldStages:
    """The stages of one worker, built and initialised.

    Names of parameters (`layers.3.mlp.gate.weight`) are unique over the model, so the
    worker's stages share one namespace. `embedding_copy` is set where the last stage needs
    the embedding and stage 0 is on another worker; `embedding_is_copied` says on every worker
    whether the model has such a copy, since its gradients join those of stage 0.
    """

    def __init__(
        self,
        config: ModelConfig,
        schedule: Schedule,
        at: Coordinate,
        placement: ExpertPlacement,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        layers: Sequence[int] = (),
    ) -> None:
        """`layers` cuts the model as in `split_layers`."""
        ranges = split_layers(config.num_hidden_layers, schedule.num_stages, layers)
        self.config = config
        self.stages: dict[int, Stage] = {}
        for index in sorted(set(schedule.stage_of[at.pipeline])):
            stage = Stage(
                config, ranges[index], expert_ids=lambda layer: placement.held[layer][at.expert]
            )
            for layer, experts in experts_of(stage).items():
                experts.num_homes = placement.num_homes[layer][at.expert]
            initialise(stage, seed)
            self.stages[index] = stage.to(device=device, dtype=dtype)
            for router in _routers(stage):
                # Biases move by gamma = 0.001: bf16 would swallow the steps.
                bias = router.e_score_correction_bias
                router.e_score_correction_bias = bias.to(torch.promote_types(dtype, torch.float32))
        self.embedding_copy: Embedding | None = None
        ends_meet = any({0, schedule.num_stages - 1} <= set(stages) for stages in schedule.stage_of)
        self.embedding_is_copied = config.embedding_is_used_last and not ends_meet
        last = self.stages.get(schedule.num_stages - 1)
        if last is not None and last.needs_embedding and not last.is_first:
            last.borrow_embedding(self._embedding_for_last(seed, dtype, device))

    def _embedding_for_last(self, seed: int, dtype: torch.dtype, device: torch.device) -> Embedding:
        if 0 in self.stages:
            return self.stages[0].embed_tokens
        copy = Embedding(self.config.vocab_size, self.config.hidden_size)
        draw(copy.weight, f"model.{EMBEDDING}", self.config.initializer_range, seed)
        self.embedding_copy = copy.to(device=device, dtype=dtype)
        return self.embedding_copy

    @property
    def hidden_size(self) -> int:
        """The width of what travels between stages."""
        return self.config.hidden_size

    def set_rope(self, config: ModelConfig) -> None:
        """Rotate and scale as `config` says, which differs in nothing else."""
        self.config = config
        for stage in self.stages.values():
            stage.set_rope(config)

    def routers(self) -> Iterator[Router]:
        for stage in self.stages.values():
            yield from _routers(stage)

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters replicated over the expert ranks, without any embedding that is apart."""
        experts = self.expert_parameters()
        return {n: p for n, p in self._parameters().items() if n not in experts}

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """The routed experts' stacked weights, redundant copies included."""
        return {
            expert_prefix(layer) + name: parameter
            for layer, module in self.experts().items()
            for name, parameter in module.named_parameters(recurse=False)
        }

    def experts(self) -> dict[int, Experts]:
        """This worker's expert groups by layer."""
        return {
            layer: experts
            for stage in self.stages.values()
            for layer, experts in experts_of(stage).items()
        }

    def put_experts(self, layer: int, experts: Experts) -> None:
        """Replace a layer's expert group."""
        for stage in self.stages.values():
            if layer in experts_of(stage):
                stage.get_submodule(f"layers.{layer}.mlp").experts = experts

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for stage in self.stages.values() for n, p in stage.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, the embedding's copy excluded."""
        return {n: t for stage in self.stages.values() for n, t in stage_tensors(stage).items()}

    def slices(self) -> dict[str, list[LogicalSlice]]:
        """The logical tensors in each of `tensors()`."""
        return {n: s for stage in self.stages.values() for n, s in logical_slices(stage).items()}


def expert_prefix(layer: int) -> str:
    """What names of the parameters of a layer's expert group begin with."""
    return f"layers.{layer}.mlp.experts."


def experts_of(stage: Stage) -> dict[int, Experts]:
    """A stage's expert groups by layer."""
    return {
        int(layer): block.mlp.experts
        for layer, block in stage.layers.items()
        if isinstance(block, Block) and isinstance(block.mlp, MoE)
    }


def _routers(stage: Stage) -> Iterator[Router]:
    return (module for module in stage.modules() if isinstance(module, Router))
