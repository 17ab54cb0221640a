"""A checkpoint's weights in one stage."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import save_stage
from support.models import tiny_config, training_context, whole_model

from dualray.checkpoint.reader import Reader
from dualray.checkpoint.whole_model import load_stage, stored_model
from dualray.errors import CheckpointError
from dualray.model.config import YarnConfig
from dualray.model.init import stage_tensors
from dualray.model.norm import RMSNorm
from dualray.model.stage import Stage


def reader_of(stage: Stage, folder: Path) -> Reader:
    return Reader(save_stage(stage, folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_tensor_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    yarn = YarnConfig(factor=4, original_max_position_embeddings=16, mscale_all_dim=1.0)
    saved = whole_model(tiny_config(rope_scaling=yarn), dtype=dtype)
    reader = reader_of(saved, tmp_path)
    assert stored_model(reader) == saved.config
    loaded = load_stage(reader)
    expected = stage_tensors(saved)
    for name, tensor in stage_tensors(loaded).items():
        wanted = expected.pop(name)
        if name.endswith("e_score_correction_bias"):
            assert tensor.dtype == torch.promote_types(dtype, torch.float32)
        else:
            assert tensor.dtype == dtype
        assert torch.equal(tensor, wanted.to(tensor.dtype)), name
    assert not expected


def test_it_computes_what_the_saved_model_computes(tmp_path: Path) -> None:
    saved = whole_model(tiny_config(tie_word_embeddings=True))
    loaded = load_stage(reader_of(saved, tmp_path))
    ids = torch.arange(20)
    logits = []
    for stage in (saved, loaded):
        ctx = training_context(stage.config, (20,))
        logits.append(stage.logits(stage(stage.embed(ids, ctx), ctx), ctx))
    assert torch.equal(*logits)


def test_another_dtype(tmp_path: Path) -> None:
    saved = whole_model(tiny_config())
    loaded = load_stage(reader_of(saved, tmp_path), "cpu", torch.bfloat16)
    assert torch.equal(loaded.embed_tokens.weight, saved.embed_tokens.weight.bfloat16())


@pytest.mark.parametrize(
    ("weights", "norms"), [*itertools.permutations((torch.float32, torch.bfloat16))]
)
def test_norms_of_another_dtype(tmp_path: Path, weights: torch.dtype, norms: torch.dtype) -> None:
    saved = whole_model(tiny_config(), dtype=weights)
    for module in saved.modules():
        if isinstance(module, RMSNorm):
            module.to(norms)
    loaded = load_stage(reader_of(saved, tmp_path))
    assert torch.equal(loaded.embed_tokens.weight, saved.embed_tokens.weight)
    assert {parameter.dtype for parameter in loaded.parameters()} == {weights}


def test_a_checkpoint_of_another_shape(tmp_path: Path) -> None:
    saved = whole_model(tiny_config())
    saved.config = replace(saved.config, moe_intermediate_size=13)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight has shape \[13, 24\] here but"):
        load_stage(reader_of(saved, tmp_path))


def test_a_checkpoint_without_a_model(tmp_path: Path, save) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(CheckpointError) as refused:
        load_stage(Reader(folder))
    assert str(refused.value) == (
        f"checkpoint {folder} names no model of this dualray (model.vocab_size: Field required); "
        "use the dualray that wrote it."
    )
