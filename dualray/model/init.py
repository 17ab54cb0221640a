"""Logical tensors: the model's parts under Hugging Face's names, and their initial values.

A parameter of ours may hold several logical tensors back to back (gate and up projections;
all local experts). Initialisation, checkpoints and optimizer state speak of logical tensors
only, so they do not depend on which worker holds what.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dualray.model.linear import Linear
from dualray.model.moe import Experts
from dualray.model.stage import Stage


@dataclass(frozen=True, kw_only=True)
class LogicalSlice:
    """Logical tensor `name` of `shape` lies at flat offset `start` of its parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    is_copy: bool = False
    """Whether it is an expert's redundant copy, whose home is elsewhere."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def _split(prefix: str, parts: list[tuple[str, tuple[int, ...]]]) -> list[LogicalSlice]:
    slices, start = [], 0
    for name, shape in parts:
        slices.append(LogicalSlice(name=f"{prefix}{name}", shape=shape, start=start))
        start += math.prod(shape)
    return slices


def logical_slices(stage: Stage) -> dict[str, list[LogicalSlice]]:
    """For every parameter and persistent buffer of the stage: what it holds, in order."""
    result: dict[str, list[LogicalSlice]] = {}
    for module_name, module in stage.named_modules():
        prefix = "" if module_name == "lm_head" else "model."
        dot = f"{module_name}." if module_name else ""
        if isinstance(module, Experts):
            result |= expert_slices(module, dot, prefix=prefix)
            continue
        parent = dot.removesuffix(f"{module_name.rpartition('.')[2]}.")
        for name, tensor in _own_tensors(module):
            shape: tuple[int, ...] = tuple(tensor.shape)
            if isinstance(module, Linear) and module.parts:
                # Fused projections are named after what they hold.
                parts = module.parts.items()
                held: list[tuple[str, tuple[int, ...]]] = [
                    (f"{part}.{name}", (width, *shape[1:])) for part, width in parts
                ]
                result[f"{dot}{name}"] = _split(prefix + parent, held)
            else:
                result[f"{dot}{name}"] = _split(prefix + dot, [(name, shape)])
    return result


def expert_slices(
    module: Experts, dot: str, *, prefix: str = "model."
) -> dict[str, list[LogicalSlice]]:
    """What an expert group's weights hold; `dot` is the module's name and a dot."""
    _, two_width, hidden = module.gate_up_proj.shape
    width = two_width // 2
    gate_up, down = [], []
    for expert in module.ids:
        gate_up.append((f"{expert}.gate_proj.weight", (width, hidden)))
        gate_up.append((f"{expert}.up_proj.weight", (width, hidden)))
        down.append((f"{expert}.down_proj.weight", (hidden, width)))
    return {
        f"{dot}{name}": [
            replace(part, is_copy=index >= each * module.num_homes)
            for index, part in enumerate(_split(prefix + dot, parts))
        ]
        for name, parts, each in (("gate_up_proj", gate_up, 2), ("down_proj", down, 1))
    }


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def stage_tensors(stage: Stage) -> dict[str, Tensor]:
    """The stage's parameters and persistent buffers by module name."""
    return {**dict(stage.named_parameters()), **dict(stage.named_buffers())}


def logical_tensors(stage: Stage) -> dict[str, Tensor]:
    """Views onto the stage's parameters and buffers under their Hugging Face names."""
    tensors = stage_tensors(stage)
    views = {}
    for name, slices in logical_slices(stage).items():
        flat = tensors[name].detach().view(-1)
        for part in slices:
            views[part.name] = flat[part.start : part.start + part.numel].view(part.shape)
    return views


def seed_for(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and a global logical name, never from a rank."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def draw(weight: Tensor, name: str, std: float, seed: int) -> None:
    """Fill `weight` with the values that logical tensor `name` has in every layout."""
    generator = torch.Generator().manual_seed(seed_for(seed, name))
    weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))


@torch.no_grad()
def initialise(stage: Stage, seed: int) -> None:
    """Normal weights of std `initializer_range`, norms at one, biases at zero.

    Values are drawn in fp32 from a generator seeded by (seed, logical name), so every
    layout starts from the same model.
    """
    for name, view in logical_tensors(stage).items():
        if name.endswith("norm.weight"):
            view.fill_(1.0)
        elif name.endswith("bias"):
            view.zero_()
        else:
            draw(view, name, stage.config.initializer_range, seed)
