"""A checkpoint of ours becomes a Hugging Face model folder, some rows of one tensor at a time.

Weights keep the dtype they are stored in. What transformers, vLLM and SGLang expect of
`deepseek_v3` is put back: interleaved rotary rows, the MTP modules' copies of embedding and
head, FP8 blocks with their scales.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dualray.checkpoint import fp8_blocks
from dualray.checkpoint.attached_files import restore_files
from dualray.checkpoint.hf_files import CONFIG, INDEX, SINGLE, refuse_existing_out
from dualray.checkpoint.hf_import import TOKEN_IDS, TOKENIZER
from dualray.checkpoint.hf_names import HEAD, copies_of_shared, expected_shapes
from dualray.checkpoint.hf_rows import in_order
from dualray.checkpoint.manifest import most_common_dtype
from dualray.checkpoint.reader import Reader
from dualray.checkpoint.shard import Stream, batches, write_file, write_streams
from dualray.checkpoint.whole_model import stored_model
from dualray.checkpoint.writer import begin_at, fsync_dir, writing
from dualray.model.config import ModelConfig
from dualray.model.hugging_face import rotary_rows, to_hugging_face

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote."""

    num_tensors: int
    num_files: int
    """Safetensors files."""
    size_bytes: int
    """Of the tensors."""


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    max_shard_bytes: int,
    eos_id: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Exported:
    """Write the weights of a checkpoint into the new folder `out`; all of it or nothing.

    `eos_id` ends a text where the checkpoint came from no config.json that says so itself;
    `progress` is told bytes written. Raises ConfigError for an attention that has no Hugging
    Face form, CheckpointError when a tensor is missing, the disk refuses, or `out` exists.
    """
    refuse_existing_out(out)
    reader = Reader(checkpoint)
    model = stored_model(reader)
    streams = list(_streams(reader, model))
    config = _config(reader, model, streams, eos_id)
    temporary = begin_at(out)
    try:
        with writing(temporary):
            # First: what is written after them refuses to replace a file.
            if any(name.startswith(f"{TOKENIZER}/") for name in reader.names()):
                restore_files(reader, TOKENIZER, temporary)
            shards = _shards(streams, max_shard_bytes)
            for file, batch in shards.items():
                write_streams(temporary / file, batch, {"format": "pt"}, progress)
            size_bytes = sum(stream.nbytes for stream in streams)
            if list(shards) != [SINGLE]:
                files = {stream.key: file for file, batch in shards.items() for stream in batch}
                index = {"metadata": {"total_size": size_bytes}, "weight_map": files}
                _write_json(temporary / INDEX, index)
            _write_json(temporary / CONFIG, config)
            if not (temporary / GENERATION_CONFIG).exists():
                ids = {field: config[field] for field in TOKEN_IDS if config[field] is not None}
                _write_json(temporary / GENERATION_CONFIG, {"_from_model_config": True, **ids})
            fsync_dir(temporary)
            os.rename(temporary, out)
            fsync_dir(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Exported(num_tensors=len(streams), num_files=len(shards), size_bytes=size_bytes)


def _config(
    reader: Reader, model: ModelConfig, streams: list[Stream], eos_id: int | None
) -> dict[str, Any]:
    dtype = most_common_dtype((stream.dtype, stream.numel) for stream in streams)
    config = to_hugging_face(model, dtype)
    ids = {"bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": None}
    known = reader.meta.get("hugging_face", {})
    config |= ids | {field: known[field] for field in TOKEN_IDS if field in known}
    if reader.meta.get("quantization_config") is not None:
        config["quantization_config"] = reader.meta["quantization_config"]
    return config


def _streams(reader: Reader, model: ModelConfig) -> Iterator[Stream]:
    """Everything that a folder of the model holds, checked but not read."""
    block = (1, 1)
    if reader.meta.get("quantization_config") is not None:
        block = fp8_blocks.block_of(reader.meta["quantization_config"])

    def stream(key: str, name: str, rows: Tensor | None) -> Stream:
        return Stream(
            key=key,
            shape=reader.shape(name),
            dtype=reader.dtype(name),
            chunks=lambda: _chunks(reader, name, rows),
        )

    for name, shape in expected_shapes(model).items():
        reader.expect_shape(name, shape)
        ours = rotary_rows(model, name)
        yield stream(name, name, None if ours is None else ours.argsort())
        scales = fp8_blocks.scale_name(name)
        if scales in reader:
            reader.expect_shape(scales, fp8_blocks.scale_shape(shape, block))
            yield stream(scales, scales, None)
    copies = copies_of_shared(model)
    present = reader.meta.get("hugging_face", {}).get("copies")
    if present is None:  # trained here: as released, a tied head once and MTP's copies
        present = [name for name in copies if name != HEAD]
    for name in present:
        yield stream(name, copies[name], None)


def _chunks(reader: Reader, name: str, rows: Tensor | None) -> Iterator[Tensor]:
    """Stored values in the order of `rows` (row of ours for each of theirs)."""
    num_rows, *columns = reader.shape(name)
    width = math.prod(columns)

    def read(start: int, stop: int) -> Tensor:
        return reader.read(name, start * width, (stop - start) * width).view(-1, *columns)

    return (values for _, values in in_order(rows, num_rows, width, read))


def _shards(streams: list[Stream], max_shard_bytes: int) -> dict[str, list[Stream]]:
    """Streams by file name."""
    parts = list(batches(streams, max_shard_bytes))
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {
        f"model-{number:05d}-of-{len(parts):05d}.safetensors": part
        for number, part in enumerate(parts, start=1)
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_file(path, [(json.dumps(values, indent=2) + "\n").encode()])
