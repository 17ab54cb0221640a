"""What an imported model lacks to be served and trained like a run of our own, and how large the
files of an export may be."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import yaml

import dualray
from dualray.checkpoint.hf_plan import ImportPlan
from dualray.data.loader import DataConfig
from dualray.data.tokenizer import load_tokenizer
from dualray.errors import ConfigError
from dualray.inference.serve_config import DEFAULT_CONTEXT
from dualray.model.config import ModelConfig
from dualray.parallel.train_config import TrainConfig
from dualray.platform.run_file import RunFile, to_mapping

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def imported_run(plan: ImportPlan, source: Path, out: Path) -> dict[str, Any]:
    """`run` and `versions` of the manifest: a run file with which `dualray serve` can begin.

    It is named after the folder, computes in the weights' dtype (fp16 in fp32) and has trained
    nothing.
    Raises DataError for a tokenizer that cannot be read, ConfigError for one with too many ids.
    """
    if plan.tokenizer_sha256 is not None:
        tokenizer = load_tokenizer(source)
        if tokenizer.vocab_size > plan.model.vocab_size:
            raise ConfigError(
                f"the tokenizer of {source} has {tokenizer.vocab_size} ids and vocab_size of its "
                f"config.json is {plan.model.vocab_size}",
                hint="take tokenizer.json and config.json of one model",
            )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.absolute().name).lstrip("._-") or "imported"
    dtype = str(plan.dtype).removeprefix("torch.")
    run = RunFile(
        name=name,
        model=plan.model,
        data=DataConfig(path=f"weights imported from {source.absolute().name}"),
        train=TrainConfig(
            steps=1,
            seq_len=min(plan.model.max_position_embeddings, DEFAULT_CONTEXT),
            dtype="float32" if plan.dtype is torch.float16 else dtype,
            # zero1 keeps fp32 masters, which float64 does not fit into.
            optimizer="adamw" if plan.dtype is torch.float64 else "zero1",
        ),
    )
    return {
        "run": to_mapping(run),
        "model": asdict(plan.model),
        "versions": {"dualray": dualray.__version__},
    }


def model_section(model: ModelConfig) -> str:
    """Section `model` of a run file as YAML, without what the defaults say anyway."""
    values = asdict(model)
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    own = {key: value for key, value in values.items() if value != defaults[key]}
    return yaml.safe_dump({"model": own}, sort_keys=False)


def shard_bytes(text: str) -> int:
    """Bytes of `5GB`, `500MB` or a plain number. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip(), re.IGNORECASE)
    size = 0 if match is None else int(float(match[1]) * _UNITS.get((match[2] or "").upper(), 1))
    if size < 1:
        raise ConfigError(
            f"--max-shard-size is {text} and must be a number of bytes above 0, with KB, MB or GB",
            hint="write --max-shard-size 5GB",
        )
    return size
