"""Hugging Face folders written by hand: names and shapes as the released weights have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dualray.model.config import ModelConfig
from dualray.model.hugging_face import to_hugging_face

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def released_tensors(
    config: ModelConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Random tensors of a model as it is published, MTP modules and their copies included."""
    generator = torch.Generator().manual_seed(seed)
    D, H, C = config.hidden_size, config.num_attention_heads, config.latent_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, D)}

    def ffn(prefix: str, width: int) -> None:
        for name in ("gate_proj", "up_proj"):
            shapes[f"{prefix}.{name}.weight"] = (width, D)
        shapes[f"{prefix}.down_proj.weight"] = (D, width)

    num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    for layer in range(num_layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = (D,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (D,)
        attention = {
            "kv_a_proj_with_mqa.weight": (C + rope, D),
            "kv_a_layernorm.weight": (C,),
            "kv_b_proj.weight": (H * (nope + value), C),
            "o_proj.weight": (D, H * value),
        }
        rank = config.q_lora_rank
        if rank is None:
            attention["q_proj.weight"] = (H * (nope + rope), D)
        else:
            attention["q_a_proj.weight"] = (rank, D)
            attention["q_a_layernorm.weight"] = (rank,)
            attention["q_b_proj.weight"] = (H * (nope + rope), rank)
        if config.attention_bias:
            attention |= {"kv_a_proj_with_mqa.bias": (C + rope,), "o_proj.bias": (D,)}
            if rank is not None:
                attention["q_a_proj.bias"] = (rank,)
        shapes |= {f"{at}.self_attn.{name}": shape for name, shape in attention.items()}
        if layer < config.first_k_dense_replace:
            ffn(f"{at}.mlp", config.intermediate_size)
        else:
            shapes[f"{at}.mlp.gate.weight"] = (config.n_routed_experts, D)
            shapes[f"{at}.mlp.gate.e_score_correction_bias"] = (config.n_routed_experts,)
            for expert in range(config.n_routed_experts):
                ffn(f"{at}.mlp.experts.{expert}", config.moe_intermediate_size)
            if config.n_shared_experts:
                width = config.n_shared_experts * config.moe_intermediate_size
                ffn(f"{at}.mlp.shared_experts", width)
        if layer >= config.num_hidden_layers:
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                shapes[f"{at}.{norm}.weight"] = (D,)
            shapes[f"{at}.eh_proj.weight"] = (D, 2 * D)
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    tensors = {
        name: torch.randn(shape, generator=generator).to(
            torch.float32 if name.endswith("e_score_correction_bias") else dtype
        )
        for name, shape in shapes.items()
    }
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    for layer in range(config.num_hidden_layers, num_layers):
        at = f"model.layers.{layer}"
        tensors[f"{at}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{at}.shared_head.head.weight"] = tensors[head].clone()
    return tensors


def with_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projections in FP8 blocks, as in the released weights; the rest as it was."""
    kept = ("embed_tokens", "head", "gate.weight", "eh_proj", "norm")
    result = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 1 or any(part in name for part in kept):
            result[name] = tensor
        else:
            result[name], result[f"{name}_scale_inv"] = quantise(tensor)
    return result


def quantise(weight: Tensor, side: int = 128) -> tuple[Tensor, Tensor]:
    """Block by block: largest magnitude to 448, the largest of float8_e4m3fn."""
    m, n = weight.shape
    scales = torch.empty(-(-m // side), -(-n // side))
    values = torch.empty(m, n, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows, columns = slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side)
            block = weight[rows, columns].float()
            scales[i, j] = block.abs().max() / 448
            values[rows, columns] = (block / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def dequantise(values: Tensor, scales: Tensor, side: int = 128) -> Tensor:
    """fp32, block by block: the slow twin."""
    result = values.float()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            result[i * side : (i + 1) * side, j * side : (j + 1) * side] *= scales[i, j]
    return result


def write_folder(
    folder: Path, config: ModelConfig, tensors: dict[str, Tensor], *, files: int = 1, **changes: Any
) -> Path:
    """config.json (with `changes`) and `files` safetensors files, with an index if several."""
    folder.mkdir(parents=True)
    values = to_hugging_face(config, torch.bfloat16) | changes
    (folder / "config.json").write_text(json.dumps(values))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    index: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[number::files])
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder
