"""Which tensors a model has on both sides, and which Hugging Face stores twice."""

from __future__ import annotations

import torch

from dualray.model.config import ModelConfig
from dualray.model.init import logical_slices
from dualray.model.stage import Stage

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Logical tensors of a whole model, layer by layer, and their shapes."""
    with torch.device("meta"):
        stage = Stage(model)
    slices = logical_slices(stage).values()
    return {part.name: part.shape for parts in slices for part in parts}


def copies_of_shared(model: ModelConfig) -> dict[str, str]:
    """Names under which Hugging Face has a tensor again, and the logical tensor each is.

    An MTP module has the embedding and the head beside it; a tied head may be there too.
    """
    head = EMBEDDING if model.tie_word_embeddings else HEAD
    copies = {HEAD: EMBEDDING} if model.tie_word_embeddings else {}
    for depth in range(model.num_nextn_predict_layers):
        prefix = f"model.layers.{model.num_hidden_layers + depth}"
        copies[f"{prefix}.embed_tokens.weight"] = EMBEDDING
        copies[f"{prefix}.shared_head.head.weight"] = head
    return copies
