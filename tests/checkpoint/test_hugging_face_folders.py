"""Checkpoints from and to Hugging Face's format: values, bits, and what a worker reads."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from support.checkpoints import save_stage
from support.hugging_face import (
    QUANTIZATION,
    dequantise,
    released_tensors,
    with_fp8,
    write_folder,
)
from support.models import tiny_config, training_context, whole_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from dualray.checkpoint import hf_rows, trainer_state
from dualray.checkpoint.hf_export import export_checkpoint
from dualray.checkpoint.hf_files import HfFolder
from dualray.checkpoint.hf_import import import_checkpoint
from dualray.checkpoint.hf_plan import plan_import
from dualray.checkpoint.reader import Reader
from dualray.checkpoint.store import verify
from dualray.checkpoint.whole_model import load_stage
from dualray.errors import CheckpointError
from dualray.model.config import ModelConfig, YarnConfig
from dualray.model.hugging_face import to_hugging_face
from dualray.model.stage import Stage
from dualray.parallel.held import HeldStages
from dualray.parallel.layout import Layout
from dualray.parallel.slots import contiguous_placement
from dualray.schedule.make import make_schedule

YARN = YarnConfig(factor=4.0, original_max_position_embeddings=16, mscale_all_dim=0.7)
BLOCKY = tiny_config(
    num_hidden_layers=2,
    hidden_size=160,  # two blocks wide, the second partial
    kv_lora_rank=128,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,  # rotary rows 128 to 143 of kv_a_proj_with_mqa: a block of their own
    n_routed_experts=4,
    n_group=2,
    num_nextn_predict_layers=1,
)
"""DeepSeek-V3's proportions where FP8 blocks are concerned."""


def imported(source: Path, out: Path, fp8: str = "dequantise") -> Reader:
    with HfFolder(source) as folder:
        import_checkpoint(folder, plan_import(folder, fp8=fp8), out, {"run": {}})
    verify(out)
    return Reader(out)


def exported(checkpoint: Path, out: Path, max_shard_bytes: int = 10**9) -> Path:
    export_checkpoint(checkpoint, out, max_shard_bytes=max_shard_bytes)
    return out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def stored(reader: Reader) -> dict[str, Tensor]:
    return {name: reader.read(name).view(reader.shape(name)) for name in reader.names()}


def logits_of(stage: Stage, ids_BS: Tensor) -> Tensor:
    ctx = training_context(stage.config, (ids_BS.shape[1],) * ids_BS.shape[0])
    with torch.no_grad():
        hidden = stage(stage.embed(ids_BS.flatten(), ctx), ctx)
        return stage.logits(hidden, ctx).view(*ids_BS.shape, -1)


@pytest.fixture(params=[1 << 22, 100], ids=["whole", "few rows at a time"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_rows, "_CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {"attention_bias": True, "rope_scaling": YARN}),
        (torch.float32, {"q_lora_rank": None, "tie_word_embeddings": True}),
        (torch.float32, {"rope_interleave": False, "rope_scaling": YARN}),
        (torch.bfloat16, {"n_shared_experts": 2, "moe_intermediate_size": 16}),
    ],
)
def test_the_same_logits_as_transformers_on_both_ways(
    tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    only_theirs = {"num_mtp_layers": 1, "rope_interleave": changes.get("rope_interleave", True)}
    config = tiny_config(
        num_nextn_predict_layers=0, **{k: v for k, v in changes.items() if k not in only_theirs}
    )
    theirs = DeepseekV3ForCausalLM(
        DeepseekV3Config.from_dict(to_hugging_face(config, dtype) | only_theirs)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if "norm" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    # `.to(bfloat16)` would take the correction biases along.
    for name, parameter in theirs.named_parameters():
        parameter.data = parameter.data.to(dtype)
        assert "correction" not in name
    theirs.eval().save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    ids = torch.randint(0, config.vocab_size, (2, 13), generator=generator)
    expected = theirs(ids).logits.detach()

    reader = imported(tmp_path / "theirs", tmp_path / "ours")
    assert reader.meta["model"]["num_nextn_predict_layers"] == 0
    # In fp32 also for bfloat16 weights: the two sides round activations at different places,
    # which flips a near-tie in routing.
    logits = logits_of(load_stage(reader, dtype=torch.float32), ids)
    exact = deepcopy(theirs).float()(ids).logits.detach()
    torch.testing.assert_close(logits, exact, rtol=1e-5, atol=1e-5)

    again = AutoModelForCausalLM.from_pretrained(exported(tmp_path / "ours", tmp_path / "back"))
    assert again.dtype == dtype
    assert torch.equal(again(ids).logits, expected)
    gates = [m.e_score_correction_bias for n, m in again.named_modules() if n.endswith("gate")]
    assert {gate.dtype for gate in gates} == {torch.float32}


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_round_trips_change_no_bit(tmp_path: Path, fp8: bool) -> None:
    config = BLOCKY if fp8 else tiny_config(attention_bias=True)
    tensors = released_tensors(config, dtype=torch.bfloat16)
    extra = {"quantization_config": QUANTIZATION, "eos_token_id": 1} if fp8 else {}
    tensors = with_fp8(tensors) if fp8 else tensors
    source = write_folder(tmp_path / "source", config, tensors, files=3, **extra)
    first = imported(source, tmp_path / "first", "keep")
    assert first.meta["model"] == json.loads(json.dumps(vars(config) | {"rope_scaling": None}))

    back = exported(tmp_path / "first", tmp_path / "back", max_shard_bytes=50_000)
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 3
    assert_same_bits(tensors_of(back), tensors)
    written = json.loads((back / "config.json").read_text())
    assert written == json.loads((source / "config.json").read_text()) | {
        "bos_token_id": None,
        "eos_token_id": 1 if fp8 else None,
        "pad_token_id": None,
    }

    second = imported(back, tmp_path / "second", "keep")
    ours = stored(first)
    generation = ours.pop("tokenizer/generation_config.json", None)
    assert generation is None
    again = stored(second)
    del again["tokenizer/generation_config.json"]
    assert_same_bits(again, ours)
    third = exported(tmp_path / "second", tmp_path / "third", max_shard_bytes=10**9)
    assert [path.name for path in third.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_bits(tensors_of(third), tensors)


@pytest.mark.usefixtures("_chunks")
def test_fp8_kept_and_dequantised_mean_the_same(tmp_path: Path) -> None:
    tensors = with_fp8(released_tensors(BLOCKY, dtype=torch.bfloat16))
    source = write_folder(tmp_path / "hf", BLOCKY, tensors, quantization_config=QUANTIZATION)
    kept = imported(source, tmp_path / "kept", "keep")
    plain = imported(source, tmp_path / "plain")
    scaled = [name for name in kept.names() if name.endswith("_scale_inv")]
    assert len(scaled) == sum(name.endswith("_scale_inv") for name in tensors) > 20
    assert not [name for name in plain.names() if name.endswith("_scale_inv")]
    assert "quantization_config" not in json.loads(
        (exported(tmp_path / "plain", tmp_path / "back") / "config.json").read_text()
    )
    for scales in scaled:
        name = scales.removesuffix("_scale_inv")
        expected = dequantise(tensors[name], tensors[scales])
        if name.endswith("kv_a_proj_with_mqa.weight"):
            rope = torch.arange(128, 144)
            expected = expected[torch.cat((torch.arange(128), rope[::2], rope[1::2]))]
        if not name.endswith("q_b_proj.weight"):
            assert torch.equal(plain.read(name).view(expected.shape), expected.bfloat16()), name
        whole = torch.empty(expected.shape, dtype=torch.bfloat16)
        kept.read_into(name, whole)
        assert torch.equal(bits(whole), bits(plain.read(name))), name
        part = torch.empty(expected.numel() // 2)
        kept.read_into(name, part, start=7)
        assert torch.equal(part.bfloat16(), whole.view(-1)[7 : 7 + len(part)]), name


def test_kept_blocks_must_not_hold_rotary_rows_of_another(tmp_path: Path) -> None:
    config = tiny_config(
        num_hidden_layers=1, kv_lora_rank=120, qk_rope_head_dim=16, num_nextn_predict_layers=0
    )
    tensors = with_fp8(released_tensors(config, dtype=torch.bfloat16))
    source = write_folder(tmp_path / "hf", config, tensors, quantization_config=QUANTIZATION)
    with HfFolder(source) as folder, pytest.raises(CheckpointError) as caught:
        plan_import(folder, fp8="keep")
    assert str(caught.value) == (
        "tensor model.layers.0.self_attn.kv_a_proj_with_mqa.weight has rotary rows on both sides "
        "of a block's edge (row 124 comes from row 128, blocks have 128 rows), so its FP8 blocks "
        "cannot be kept; write --fp8 dequantise."
    )
    reader = imported(source, tmp_path / "ours")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    expected = dequantise(tensors[name], tensors[f"{name}_scale_inv"]).bfloat16()
    rows = [*range(120), *range(120, 136, 2), *range(121, 136, 2)]
    assert torch.equal(reader.read(name).view(expected.shape), expected[rows])


def test_a_worker_reads_only_its_stages_and_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = with_fp8(released_tensors(BLOCKY, dtype=torch.bfloat16))
    source = write_folder(tmp_path / "hf", BLOCKY, tensors, quantization_config=QUANTIZATION)
    imported(source, tmp_path / "kept", "keep")
    layout = Layout(pipeline=2, experts=2, schedule="1f1b")
    schedule = make_schedule("1f1b", 2, 4)
    read: set[str] = set()
    original = Reader._parts

    def counting(self: Reader, entry: Any, start: int, stop: int) -> Any:
        read.update(piece.key for piece in entry.pieces)
        return original(self, entry, start, stop)

    monkeypatch.setattr(Reader, "_parts", counting)
    seen: list[set[str]] = []
    for rank in range(layout.world_size):
        held = HeldStages(
            BLOCKY, schedule, layout.coordinate(rank), contiguous_placement(BLOCKY, 2),
            seed=1, dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        read.clear()
        trainer: Any = SimpleNamespace(held=held, weights_were_written=lambda: None)
        reader = Reader(tmp_path / "kept")
        trainer_state.restore_weights(trainer, reader)
        mine = {part.name for parts in held.slices().values() for part in parts}
        mine |= {"model.embed_tokens.weight"} if held.embedding_copy is not None else set()
        scales = {f"{name}_scale_inv" for name in mine} & set(reader.names())
        assert read == mine | scales, rank
        layers = range(1) if rank < 2 else range(1, 3)
        experts = range(2) if rank % 2 == 0 else range(2, 4)
        for name in read:
            parts = name.split(".")
            if parts[1] == "layers":
                assert int(parts[2]) in layers, name
            if "experts" in parts:
                assert int(parts[parts.index("experts") + 1]) in experts, name
        seen.append(set(read))
        name = "model.layers.1.self_attn.o_proj.weight"
        if name in mine:
            weight = held.stages[1].layers["1"].self_attn.o_proj.weight
            expected = dequantise(tensors[name], tensors[f"{name}_scale_inv"])
            assert torch.equal(weight, expected)
    assert set().union(*seen) == set(Reader(tmp_path / "kept").names())


def test_tokenizer_files_come_back_byte_for_byte(tmp_path: Path) -> None:
    config = tiny_config(num_nextn_predict_layers=0)
    source = write_folder(tmp_path / "hf", config, released_tensors(config))
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<eos>": 2}, "a"))
    inner.save(str(source / "tokenizer.json"))
    texts = {
        "tokenizer_config.json": b'{"eos_token": "<eos>"}  ',
        "special_tokens_map.json": b"{}",
        "generation_config.json": b'{"eos_token_id": [1, 2]}',
        "chat_template.jinja": b"{{ x }}",
        "merges.txt": b"",
    }
    for name, content in texts.items():
        (source / name).write_bytes(content)
    (source / "README.md").write_text("not a part of the tokenizer")
    imported(source, tmp_path / "ours")
    back = exported(tmp_path / "ours", tmp_path / "back")
    expected = {*texts, "tokenizer.json", "config.json", "model.safetensors"}
    assert {path.name for path in back.iterdir()} == expected
    for name in {*texts, "tokenizer.json"}:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


def test_an_attached_file_takes_no_place_of_the_models(tmp_path: Path) -> None:
    stage = whole_model(tiny_config(num_nextn_predict_layers=0))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "config.json").write_text("{}")
    folder = save_stage(stage, tmp_path, tokenizer=tmp_path / "texts")
    with pytest.raises(CheckpointError, match=r"cannot write .*File exists"):
        exported(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_mtp_modules_without_copies_stay_without(tmp_path: Path) -> None:
    config: ModelConfig = tiny_config(num_nextn_predict_layers=1)
    tensors = released_tensors(config)
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.layers.4.embed_tokens")
    }
    source = write_folder(tmp_path / "hf", config, tensors, num_nextn_predict_layers=0)
    reader = imported(source, tmp_path / "ours")
    assert reader.meta["model"]["num_nextn_predict_layers"] == 1
    assert_same_bits(tensors_of(exported(tmp_path / "ours", tmp_path / "back")), tensors)


def test_no_more_than_a_chunk_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_rows, "_CHUNK_ELEMENTS", 3 * BLOCKY.hidden_size)
    tensors = with_fp8(released_tensors(BLOCKY, dtype=torch.bfloat16))
    source = write_folder(tmp_path / "hf", BLOCKY, tensors, quantization_config=QUANTIZATION)
    sizes: list[int] = []
    rows, flat = HfFolder.read, Reader.read

    def read_rows(self: HfFolder, name: str, *range_: int) -> Tensor:
        sizes.append((values := rows(self, name, *range_)).numel())
        return values

    def read_flat(self: Reader, name: str, *range_: int) -> Tensor:
        sizes.append((values := flat(self, name, *range_)).numel())
        return values

    monkeypatch.setattr(HfFolder, "read", read_rows)
    monkeypatch.setattr(Reader, "read", read_flat)
    imported(source, tmp_path / "ours", "keep")
    exported(tmp_path / "ours", tmp_path / "back")
    assert len(sizes) > 500
    # Rows that rotary permutation brings together lie within one head's rotary part.
    assert max(sizes) <= (3 + BLOCKY.qk_rope_head_dim) * BLOCKY.hidden_size
