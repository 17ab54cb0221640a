"""A checkpoint of another model, tokenizer or corpus is refused by its first differing field."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from dualray.checkpoint.reader import Reader, expect
from dualray.checkpoint.writer import Piece, begin, commit, step_dir, write_rank
from dualray.errors import CheckpointError
from dualray.model.config import ModelConfig, YarnConfig

MODEL = ModelConfig(
    vocab_size=259,
    hidden_size=256,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    rope_scaling=YarnConfig(factor=4.0, original_max_position_embeddings=128),
)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    temporary = begin(tmp_path, 1)
    files = write_rank(temporary, 0, [Piece.whole("w", torch.zeros(1))])
    meta = {"step": 1, "model": asdict(MODEL), "tokenizer_sha256": "t" * 64, "data_sha256": "d"}
    commit(temporary, step_dir(tmp_path, 1), [files], meta)
    return Reader(tmp_path / "step-1")


def test_the_same_run_is_accepted(reader: Reader) -> None:
    expect(reader, asdict(MODEL), "t" * 64, "d")
    expect(reader, asdict(MODEL))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": 128}, "model.hidden_size is 128 here but 256"),
        ({"q_lora_rank": 8}, "model.q_lora_rank is 8 here but None"),
        ({"rope_scaling": None}, "model.rope_scaling is None here but {"),
        (
            {"rope_scaling": YarnConfig(factor=8.0, original_max_position_embeddings=128)},
            "model.rope_scaling.factor is 8.0 here but 4.0",
        ),
    ],
)
def test_another_model(reader: Reader, change: dict, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        expect(reader, asdict(replace(MODEL, **change)))
    assert caught.value.sentence.startswith(sentence)
    assert caught.value.sentence.endswith(f" in checkpoint {reader.folder}")


def test_fields_that_only_one_side_knows(reader: Reader) -> None:
    fields = asdict(MODEL)
    with pytest.raises(CheckpointError, match=r"model\.new_field is 1 here but absent in checkp"):
        expect(reader, fields | {"new_field": 1})
    del fields["tie_word_embeddings"]
    with pytest.raises(CheckpointError, match=r"model\.tie_word_embeddings is absent here but Fal"):
        expect(reader, fields)


def test_another_tokenizer_and_other_data(reader: Reader) -> None:
    with pytest.raises(CheckpointError) as caught:
        expect(reader, asdict(MODEL), "u" * 64, "d")
    assert str(caught.value) == (
        f"tokenizer_sha256 is {'u' * 64} here but {'t' * 64} in checkpoint {reader.folder}; use "
        "what the checkpoint was written with, or start a run of another name."
    )
    with pytest.raises(CheckpointError, match="data_sha256 is e here but d in checkpoint"):
        expect(reader, asdict(MODEL), "t" * 64, "e")
