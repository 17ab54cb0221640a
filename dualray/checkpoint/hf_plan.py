"""What a Hugging Face model folder becomes, decided from its headers alone.

`plan_import` finds every fault that can be found without reading tensors, so that nothing has
been written when it refuses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dualray.checkpoint import fp8_blocks
from dualray.checkpoint.hf_files import HfFolder, HfTensor
from dualray.checkpoint.hf_names import copies_of_shared, expected_shapes
from dualray.checkpoint.manifest import DTYPES, most_common_dtype
from dualray.errors import CheckpointError
from dualray.model.config import ModelConfig
from dualray.model.hugging_face import from_hugging_face, is_interleaved, rotary_rows

FP8_CHOICES = ("dequantise", "keep")

_PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One logical tensor of the checkpoint and what it is made of."""

    name: str
    source: HfTensor
    dtype: torch.dtype
    """As it will be stored."""
    rows: Tensor | None = None
    """Row of the source for each of ours; None for the same order."""
    scales: HfTensor | None = None
    """Scales to multiply FP8 elements with; None to store elements as they are."""


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """What will be written, decided from headers alone."""

    model: ModelConfig
    targets: tuple[Target, ...]
    copies: tuple[str, ...]
    """Tensors that are stored twice on the other side (MTP's embedding and head)."""
    block: tuple[int, int]
    """Rows and columns of an FP8 block; (1, 1) without FP8."""
    quantization: dict[str, Any] | None
    """The `quantization_config`, if FP8 weights are kept."""
    dtype: torch.dtype
    """Of most elements once FP8 is dequantised."""
    tokenizer_sha256: str | None
    """None without a tokenizer.json."""
    notes: tuple[str, ...]
    """What a person should know."""

    @property
    def size_bytes(self) -> int:
        return sum(t.source.numel * t.dtype.itemsize for t in self.targets)


def plan_import(source: HfFolder, *, fp8: str = "dequantise") -> ImportPlan:
    """Match the folder's tensors with those of the model its config.json describes.

    Raises ConfigError for a model that is not ours, CheckpointError for tensors that are
    missing, too many, of another shape or of a dtype that is not read.
    """
    if fp8 not in FP8_CHOICES:
        raise CheckpointError(
            f"--fp8 is {fp8} and must be one of {', '.join(FP8_CHOICES)}",
            hint="write --fp8 dequantise",
        )
    notes: list[str] = []
    model = _with_depths_found(from_hugging_face(source.config), source, notes)
    wanted = expected_shapes(model)
    copies = tuple(name for name in copies_of_shared(model) if name in source.tensors)
    scaled = {
        name
        for name, shape in wanted.items()
        if len(shape) == 2 and fp8_blocks.scale_name(name) in source.tensors
    }
    block = (1, 1)
    # Before the names, which other ways to quantise change.
    if scaled or source.config.get("quantization_config"):
        block = fp8_blocks.block_of(source.config.get("quantization_config"))
    known = wanted.keys() | {fp8_blocks.scale_name(name) for name in scaled}
    _refuse_other_names(source, wanted.keys(), known | set(copies))
    if not scaled and fp8 == "keep":
        notes.append("no weight of it is FP8, so there is nothing to keep")
    keep = bool(scaled) and fp8 == "keep"
    interleaved = is_interleaved(source.config)
    targets: list[Target] = []
    for name, shape in wanted.items():
        rows = rotary_rows(model, name) if interleaved else None
        target = _target(source, name, shape, rows, block if name in scaled else None)
        if keep and name in scaled:
            targets.append(_kept(target, block))
            scales = source.tensors[fp8_blocks.scale_name(name)]
            targets.append(Target(name=scales.name, source=scales, dtype=torch.float32))
        else:
            targets.append(target)
    tokenizer = source.path / "tokenizer.json"
    if not tokenizer.is_file():
        notes.append("it has no tokenizer.json, so it can be trained and scored but not served")
    return ImportPlan(
        model=model,
        targets=tuple(targets),
        copies=copies,
        block=block,
        quantization=dict(source.config["quantization_config"]) if keep else None,
        dtype=most_common_dtype((t.dtype, t.source.numel) for t in targets),
        tokenizer_sha256=(
            hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None
        ),
        notes=tuple(notes),
    )


def _with_depths_found(model: ModelConfig, source: HfFolder, notes: list[str]) -> ModelConfig:
    """transformers writes a number of MTP modules into config.json and no MTP weights."""
    first = model.num_hidden_layers
    names = source.tensors.keys()
    depths = model.num_nextn_predict_layers
    if depths == 0:
        while any(name.startswith(f"model.layers.{first + depths}.") for name in names):
            depths += 1
    elif not any(name.startswith(f"model.layers.{first}.") for name in names):
        notes.append(f"config.json names {depths} MTP modules and there are no weights of any")
        depths = 0
    return replace(model, num_nextn_predict_layers=depths)


def _refuse_other_names(source: HfFolder, wanted: Collection[str], known: Collection[str]) -> None:
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        raise CheckpointError(
            f"{source.path} has no tensor {missing[0]}"
            + (f" and lacks {len(missing) - 1} more" if len(missing) > 1 else "")
            + ", which the model of its config.json has",
            hint="take files and config.json of one version of the model",
        )
    # A computed buffer that old versions of transformers saved, and FFNs of no width.
    unknown = [
        name
        for name, tensor in source.tensors.items()
        if name not in known and not name.endswith(".rotary_emb.inv_freq") and tensor.numel
    ]
    if unknown:
        raise CheckpointError(
            f"{source.path} has tensor {unknown[0]}"
            + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
            + " that the model of its config.json does not have",
            hint="take files and config.json of one version of the model",
        )


def _target(
    source: HfFolder,
    name: str,
    shape: tuple[int, ...],
    rows: Tensor | None,
    block: tuple[int, int] | None,
) -> Target:
    tensor = source.tensors[name]
    _expect(tensor, shape, ("F8_E4M3",) if block else _PLAIN_DTYPES)
    if block is None:
        bias = name.endswith("e_score_correction_bias") and tensor.dtype != "F64"
        dtype = torch.float32 if bias else DTYPES[tensor.dtype]
        return Target(name=name, source=tensor, dtype=dtype, rows=rows)
    scales = source.tensors[fp8_blocks.scale_name(name)]
    _expect(scales, fp8_blocks.scale_shape(shape, block), ("F32",))
    return Target(name=name, source=tensor, dtype=torch.bfloat16, rows=rows, scales=scales)


def _expect(tensor: HfTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"tensor {tensor.name} has shape {list(tensor.shape)} in {tensor.path} and "
            f"{list(shape)} by its config.json",
            hint="take files and config.json of one version of the model",
        )
    if tensor.dtype not in dtypes:
        raise CheckpointError(
            f"tensor {tensor.name} is {tensor.dtype} in {tensor.path} and must be "
            f"{' or '.join(dtypes)}",
            hint=f"F8_E4M3 weights need their {fp8_blocks.SCALE_SUFFIX} tensors beside them"
            if tensor.dtype == "F8_E4M3"
            else "take the weights in bfloat16",
        )


def _kept(target: Target, block: tuple[int, int]) -> Target:
    """The same with its FP8 elements; a scale must go on belonging to the rows it was made for."""
    rows = target.rows
    if rows is not None:
        moved = rows // block[0] != torch.arange(len(rows)) // block[0]
        if moved.any():
            row = int(moved.nonzero()[0])
            raise CheckpointError(
                f"tensor {target.name} has rotary rows on both sides of a block's edge (row {row} "
                f"comes from row {int(rows[row])}, blocks have {block[0]} rows), so its FP8 blocks "
                "cannot be kept",
                hint="write --fp8 dequantise",
            )
    return replace(target, dtype=torch.float8_e4m3fn, scales=None)
