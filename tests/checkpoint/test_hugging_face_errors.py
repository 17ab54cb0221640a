"""What can be wrong with a Hugging Face folder: one sentence each, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hugging_face import QUANTIZATION, released_tensors, with_fp8, write_folder
from support.models import tiny_config
from torch import Tensor

from dualray.checkpoint import hf_export, hf_files, hf_import
from dualray.checkpoint.hf_export import export_checkpoint
from dualray.checkpoint.hf_files import HfFolder
from dualray.checkpoint.hf_import import import_checkpoint
from dualray.checkpoint.hf_plan import plan_import
from dualray.errors import CheckpointError, ConfigError, DualrayError

CONFIG = tiny_config(num_hidden_layers=1, n_routed_experts=4, n_group=2, num_nextn_predict_layers=1)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM, HEAD = "model.norm.weight", "lm_head.weight"
ONE_VERSION = "take files and config.json of one version of the model."
ONE_INDEX = "take files and index of one version of the model."


@pytest.fixture(scope="module")
def _sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "hf"
    return write_folder(folder, CONFIG, released_tensors(CONFIG), files=2)


@pytest.fixture
def source(_sound: Path, tmp_path: Path) -> Path:
    """A folder of two files to be damaged, and nothing beside it."""
    return Path(shutil.copytree(_sound, tmp_path / "hf"))


def run_import(source: Path, **options: Any) -> None:
    with HfFolder(source) as folder:
        import_checkpoint(folder, plan_import(folder, **options), source.parent / "out", {})


def refusal(source: Path, **options: Any) -> str:
    """What import says; nothing may be left beside `source`."""
    with pytest.raises(DualrayError) as caught:
        run_import(source, **options)
    assert [path.name for path in source.parent.iterdir()] == ["hf"]
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(source), "HF")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(source: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """The tensors of both files, changed, in a single file."""
    tensors = load_file(source / FIRST) | load_file(source / SECOND)
    change(tensors)
    for name in (FIRST, SECOND, INDEX):
        (source / name).unlink()
    save_file(tensors, source / "model.safetensors")


def put_header(path: Path, header: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_files_that_are_absent(source: Path, tmp_path: Path) -> None:
    (source / SECOND).unlink()
    assert refusal(source) == f"{INDEX} names {SECOND}, which is not in HF; download it too."
    (source / INDEX).unlink()
    assert refusal(source) == (
        f"HF has neither model.safetensors nor {INDEX}; take the model's safetensors files; "
        "other formats are not read."
    )
    (source / "config.json").unlink()
    assert refusal(source) == "HF/config.json is missing; download it too."
    shutil.rmtree(source)
    with pytest.raises(CheckpointError, match="hf is not a folder; name a Hugging Face model's"):
        run_import(source)


def test_files_that_are_damaged(source: Path) -> None:
    whole = (source / FIRST).read_bytes()
    for content in (b"", b"1234", whole[:40], struct.pack("<Q", 1 << 60) + whole[8:]):
        (source / FIRST).write_bytes(content)
        assert refusal(source) == (
            f"HF/{FIRST} has no readable safetensors header; download it again."
        )
    (source / FIRST).write_bytes(whole[:-5])
    assert refusal(source) == (
        f"HF/{FIRST} has {len(whole) - 5} bytes and its header says {len(whole)}; download it "
        "again."
    )
    (source / FIRST).write_bytes(whole + b"x")
    assert "bytes and its header says" in refusal(source)
    for header in (
        b"[]",
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',  # a hole before it
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',  # too short for it
    ):
        put_header(source / FIRST, header)
        assert refusal(source).startswith(f"HF/{FIRST} has no readable safetensors header")
    for name, text in ((INDEX, "{"), ("config.json", "[]")):
        (source / name).write_text(text)
        assert refusal(source) == f"HF/{name} is not a JSON object; download it again."


def test_two_versions_of_the_weights(source: Path) -> None:
    """transformers would take the single file."""
    shutil.copy(source / FIRST, source / "model.safetensors")
    assert refusal(source) == (
        f"HF has both model.safetensors and {INDEX}; remove what is not of this version of the "
        "model."
    )


@pytest.mark.parametrize("name", ["config.json", SECOND])
def test_a_disk_that_cannot_be_read(source: Path, name: str) -> None:
    (source / name).unlink()
    (source / name).symlink_to("/proc/self/mem")  # its first byte cannot be read
    assert refusal(source).startswith(f"cannot read HF/{name} (Input/output error); check")


def test_a_disk_that_fails_later(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hf_files.os, "preadv", fail)
    assert re.fullmatch(
        r"cannot read HF/model-0000[12]-of-00002\.safetensors \(Input/output error\); check the "
        r"path, the disk and the permissions there\.",
        refusal(source),
    )


def test_an_index_of_other_files(source: Path) -> None:
    index = json.loads((source / INDEX).read_text())["weight_map"]
    file = index[NORM]
    other = SECOND if file == FIRST else FIRST
    edit(source / INDEX, lambda values: values["weight_map"].update({NORM: other}))
    assert f" holds tensor {NORM}, and {INDEX} has it in {other}; {ONE_INDEX}" in refusal(source)
    edit(source / INDEX, lambda values: values["weight_map"].pop(NORM))
    assert refusal(source) == (f"HF/{file} holds tensor {NORM}, and {INDEX} does not; {ONE_INDEX}")
    edit(source / INDEX, lambda values: values["weight_map"].update({NORM: file, "more": file}))
    assert refusal(source) == (
        f"{INDEX} has tensor more in {file}, which does not hold it; {ONE_INDEX}"
    )
    edit(source / INDEX, lambda values: values["weight_map"].update({"more": "../config.json"}))
    assert refusal(source) == (
        f"HF/{INDEX} has no weight_map from tensors to files in its folder; download it again."
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda tensors: tensors.pop(HEAD),
            f"HF has no tensor {HEAD}, which the model of its config.json has; {ONE_VERSION}",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in (NORM, HEAD)],
            f"HF has no tensor {NORM} and lacks 1 more, which the model of its config.json has; "
            f"{ONE_VERSION}",
        ),
        (
            lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(1)}),
            "HF has tensor model.layers.9.mlp.up_proj.weight that the model of its config.json "
            f"does not have; {ONE_VERSION}",
        ),
        (
            lambda tensors: tensors.update({NORM: torch.ones(25)}),
            f"tensor {NORM} has shape [25] in HF/model.safetensors and [24] by its config.json; "
            f"{ONE_VERSION}",
        ),
        (
            lambda tensors: tensors.update({NORM: torch.ones(24, dtype=torch.int8)}),
            f"tensor {NORM} is I8 in HF/model.safetensors and must be BF16 or F16 or F32 or F64; "
            "take the weights in bfloat16.",
        ),
        (
            lambda tensors: tensors.update({HEAD: tensors[HEAD].to(torch.float8_e4m3fn)}),
            f"tensor {HEAD} is F8_E4M3 in HF/model.safetensors and must be BF16 or F16 or F32 or "
            "F64; F8_E4M3 weights need their _scale_inv tensors beside them.",
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.1.shared_head.head.weight": tensors[HEAD] + 1}
            ),
            "tensor model.layers.1.shared_head.head.weight differs from lm_head.weight, and the "
            "MTP modules here share it; import the model without its MTP modules, or share the "
            "tensor.",
        ),
    ],
)
def test_tensors_of_another_model(
    source: Path, change: Callable[[dict[str, Tensor]], Any], sentence: str
) -> None:
    edit_tensors(source, change)
    assert refusal(source) == sentence


def test_configurations_of_another_model(source: Path) -> None:
    edit(source / "config.json", lambda values: values.update(model_type="deepseek_v2"))
    with pytest.raises(ConfigError, match=r"model_type of config\.json is deepseek_v2 and dualray"):
        run_import(source)
    assert refusal(source, fp8="drop") == (
        "--fp8 is drop and must be one of dequantise, keep; write --fp8 dequantise."
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"quant_method": "gptq"},
            "quantization_config.quant_method of config.json is gptq and dualray reads only fp8; "
            "take the weights in bfloat16.",
        ),
        (
            {"weight_block_size": [128, True]},
            "quantization_config.weight_block_size of config.json",
        ),
        ({"fmt": "e5m2"}, "quantization_config.fmt of config.json is e5m2 and dualray reads only"),
        (
            {"weight_block_size": None},
            "quantization_config.weight_block_size of config.json is None and must be two whole "
            "numbers above 0; take the config.json of the model, or the weights in bfloat16.",
        ),
        (
            {"weight_block_size": [64, 16]},
            "tensor model.layers.0.self_attn.q_a_proj.weight_scale_inv has shape [1, 1] in "
            f"HF/model.safetensors and [1, 2] by its config.json; {ONE_VERSION}",
        ),
    ],
)
def test_fp8_of_another_kind(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    tensors = with_fp8(released_tensors(CONFIG, dtype=torch.bfloat16))
    quantization = QUANTIZATION | change
    source = write_folder(tmp_path / "hf", CONFIG, tensors, quantization_config=quantization)
    assert refusal(source, fp8="keep").startswith(sentence)


def test_fp8_that_config_json_says_nothing_of(tmp_path: Path) -> None:
    tensors = with_fp8(released_tensors(CONFIG, dtype=torch.bfloat16))
    for odd in (None, "fp8"):
        source = write_folder(tmp_path / "hf", CONFIG, tensors, quantization_config=odd)
        assert refusal(source) == (
            f"quantization_config of config.json is {odd} and must say what the blocks of FP8 "
            "weights are; take the config.json of the model, or the weights in bfloat16."
        )
        shutil.rmtree(source)


def test_scales_of_what_is_no_matrix(tmp_path: Path) -> None:
    tensors = released_tensors(CONFIG) | {f"{NORM}_scale_inv": torch.ones(1)}
    source = write_folder(tmp_path / "hf", CONFIG, tensors, quantization_config=QUANTIZATION)
    assert f"HF has tensor {NORM}_scale_inv that the model of its" in refusal(source)


def test_weights_that_something_else_quantised(source: Path) -> None:
    """They have other names, which must not be what is complained about."""
    edit_tensors(source, lambda tensors: tensors.update({"lm_head.qweight": tensors.pop(HEAD)}))
    edit(source / "config.json", lambda v: v.update(quantization_config={"quant_method": "awq"}))
    assert refusal(source) == (
        "quantization_config.quant_method of config.json is awq and dualray reads only fp8; take "
        "the weights in bfloat16."
    )


def test_a_tied_head_that_differs(source: Path) -> None:
    edit(source / "config.json", lambda values: values.update(tie_word_embeddings=True))
    assert refusal(source) == (
        f"tensor {HEAD} differs from model.embed_tokens.weight, and tie_word_embeddings of "
        "config.json is true; set it to false if the model has a head of its own."
    )


def test_out_exists(source: Path, tmp_path: Path) -> None:
    run_import(source)
    with pytest.raises(CheckpointError) as caught:
        run_import(source)
    assert str(caught.value) == f"--out is {tmp_path / 'out'}, which exists; name a new folder."
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(tmp_path / "out", source, max_shard_bytes=1000)
    assert str(caught.value) == f"--out is {source}, which exists; name a new folder."


def import_again(source: Path, folder: Path) -> None:
    with HfFolder(source) as files:
        import_checkpoint(files, plan_import(files), folder / "new", {})


def export_again(_: Path, folder: Path) -> None:
    export_checkpoint(folder / "out", folder / "new", max_shard_bytes=1000)


@pytest.mark.parametrize(
    ("module", "again"), [(hf_import, import_again), (hf_export, export_again)]
)
def test_a_full_disk_leaves_nothing(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    again: Callable[[Path, Path], None],
) -> None:
    run_import(source)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_streams", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write .*\(No space left on device\)"):
        again(source, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


def test_a_checkpoint_without_a_tensor_is_not_exported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_import(source)
    shapes = hf_export.expected_shapes(CONFIG) | {"model.more.weight": (1,)}
    monkeypatch.setattr(hf_export, "expected_shapes", lambda _: shapes)
    with pytest.raises(CheckpointError, match=r"out has no tensor model\.more\.weight; use the"):
        export_checkpoint(tmp_path / "out", tmp_path / "new", max_shard_bytes=1000)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}
