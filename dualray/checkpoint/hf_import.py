"""A Hugging Face model folder becomes a checkpoint of ours, some rows of one tensor at a time.

    with HfFolder(folder) as source:
        plan = plan_import(source, fp8="keep")
        import_checkpoint(source, plan, out, meta)

What is held in memory is one chunk of rows and, of an FP8 weight, its scales.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualray.checkpoint import fp8_blocks
from dualray.checkpoint.attached_files import file_piece
from dualray.checkpoint.hf_files import HfFolder, refuse_existing_out
from dualray.checkpoint.hf_names import HEAD, copies_of_shared
from dualray.checkpoint.hf_plan import ImportPlan, Target
from dualray.checkpoint.hf_rows import in_order, row_ranges
from dualray.checkpoint.manifest import DTYPE_NAMES, PieceEntry, TensorEntry
from dualray.checkpoint.shard import Stream, batches, write_streams
from dualray.checkpoint.writer import (
    FILE_LIMIT_BYTES,
    RankFiles,
    begin_at,
    commit,
    fsync_dir,
    write_rank,
    writing,
)
from dualray.errors import CheckpointError

TOKENIZER = "tokenizer"
"""Prefix of the attached files of the text side."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of config.json that are no part of the architecture and come back at export."""


def import_checkpoint(
    source: HfFolder,
    plan: ImportPlan,
    out: Path,
    meta: Mapping[str, Any],
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the checkpoint into the new folder `out`; nothing is left behind if that fails.

    `meta` joins what the manifest says (`run`, `versions`); `progress` is told bytes written.
    Raises CheckpointError when copies differ, the disk refuses, or `out` exists.
    """
    refuse_existing_out(out)
    for name, original in copies_of_shared(plan.model).items():
        if name in plan.copies:
            _refuse_difference(source, name, original)
    temporary = begin_at(out)
    try:
        files, tensors = {}, {}
        streams = [_stream(source, plan, target) for target in plan.targets]
        for number, batch in enumerate(batches(streams, FILE_LIMIT_BYTES)):
            file = f"rank-00000-{number:05d}.safetensors"
            with writing(temporary / file):
                files[file] = write_streams(temporary / file, batch, progress=progress)
            for stream in batch:
                tensors[stream.key] = _entry(stream, file)
        with writing(temporary):
            fsync_dir(temporary)
        weights = RankFiles(rank=0, files=files, tensors=tensors)
        texts = (file_piece(path, TOKENIZER) for path in source.tokenizer_files())
        commit(
            temporary, out, [weights, write_rank(temporary, 1, texts)], _meta(source, plan, meta)
        )
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _meta(source: HfFolder, plan: ImportPlan, meta: Mapping[str, Any]) -> dict[str, Any]:
    config = source.config
    return {
        "step": 0,
        "model": asdict(plan.model),
        "tokenizer_sha256": plan.tokenizer_sha256,
        "data_sha256": None,
        "quantization_config": plan.quantization,
        "hugging_face": {
            "copies": list(plan.copies),
            **{field: config[field] for field in TOKEN_IDS if field in config},
        },
        **meta,
    }


def _refuse_difference(source: HfFolder, name: str, original: str) -> None:
    copy, main = source.tensors[name], source.tensors[original]
    same = (copy.shape, copy.dtype) == (main.shape, main.dtype)
    for start, stop in row_ranges(main.num_rows if same else 0, main.width):
        ours, theirs = (source.read(n, start, stop).view(torch.uint8) for n in (name, original))
        same = same and torch.equal(ours, theirs)
    if same:
        return
    if name == HEAD:
        raise CheckpointError(
            f"tensor {name} differs from {original}, and tie_word_embeddings of config.json is "
            "true",
            hint="set it to false if the model has a head of its own",
        )
    raise CheckpointError(
        f"tensor {name} differs from {original}, and the MTP modules here share it",
        hint="import the model without its MTP modules, or share the tensor",
    )


def _stream(source: HfFolder, plan: ImportPlan, target: Target) -> Stream:
    return Stream(
        key=target.name,
        shape=target.source.shape,
        dtype=target.dtype,
        chunks=lambda: _chunks(source, plan, target),
    )


def _chunks(source: HfFolder, plan: ImportPlan, target: Target) -> Iterator[Tensor]:
    tensor = target.source
    scales = None if target.scales is None else source.read(target.scales.name)

    def read(start: int, stop: int) -> Tensor:
        return source.read(tensor.name, start, stop)

    for rows, values in in_order(target.rows, tensor.num_rows, tensor.width, read):
        if scales is not None:
            values = fp8_blocks.dequantised(values, rows, scales, plan.block)
        yield values.to(target.dtype)


def _entry(stream: Stream, file: str) -> TensorEntry:
    piece = PieceEntry(file=file, key=stream.key, start=0, count=stream.numel)
    return TensorEntry(shape=stream.shape, dtype=DTYPE_NAMES[stream.dtype], pieces=(piece,))
