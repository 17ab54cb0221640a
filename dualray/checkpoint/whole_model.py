"""A checkpoint's whole model in one process, for what needs no cluster: scoring, export, tests."""

from __future__ import annotations

import torch
from pydantic import TypeAdapter, ValidationError

from dualray.checkpoint.manifest import most_common_dtype
from dualray.checkpoint.reader import Reader
from dualray.errors import CheckpointError
from dualray.model.config import ModelConfig
from dualray.model.init import logical_tensors
from dualray.model.rope import Rope
from dualray.model.router import Router
from dualray.model.stage import Stage


def stored_model(reader: Reader) -> ModelConfig:
    """The architecture that the checkpoint's weights belong to."""
    try:
        return TypeAdapter(ModelConfig).validate_python(reader.meta.get("model"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(["model", *map(str, first["loc"])])
        raise CheckpointError(
            f"checkpoint {reader.folder} names no model of this dualray ({field}: {first['msg']})",
            hint="use the dualray that wrote it",
        ) from None


@torch.no_grad()
def load_stage(
    reader: Reader, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Stage:
    """The stage that holds every layer, MTP modules included, filled from the checkpoint.

    `dtype` is that of weights and activations, by default the one that most of them are stored
    in (FP8 blocks are scaled, to bfloat16). Router biases stay fp32 at
    least. Memory is the model's own. Raises CheckpointError if a tensor is missing or has
    another shape.
    """
    config = stored_model(reader)
    with torch.device("meta"):
        stage = Stage(config)
        if dtype is None:
            dtype = most_common_dtype(
                (reader.dtype(name), view.numel()) for name, view in logical_tensors(stage).items()
            )
        stage = stage.to(dtype)
        for router in (module for module in stage.modules() if isinstance(module, Router)):
            bias = router.e_score_correction_bias
            router.e_score_correction_bias = bias.to(torch.promote_types(dtype, torch.float32))
    stage.to_empty(device=device)
    stage.rope = Rope(config)  # the one on the meta device has no frequencies
    for name, view in logical_tensors(stage).items():
        reader.expect_shape(name, tuple(view.shape))
        reader.read_into(name, view)
    return stage.eval()
