"""The architecture's numbers, in Hugging Face's words (`DeepseekV3Config`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dualray.errors import ConfigError

ATTENTIONS = ("mla", "mha", "gqa", "mqa")


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension of the decoupled rotary part (arXiv 2309.00071).

    A section `rope_scaling`, of `model` or of `extend`.
    """

    factor: float
    """Extension factor s over the original context."""
    original_max_position_embeddings: int
    """Context length in tokens before the extension."""
    beta_fast: float = 32.0
    """Rotations above which a frequency is left alone."""
    beta_slow: float = 1.0
    """Rotations below which a frequency is fully interpolated."""
    mscale: float = 1.0
    """Coefficient of ln(factor) in the cos/sin factor."""
    mscale_all_dim: float = 0.0
    """Coefficient of ln(factor) in the softmax scale; 0 leaves the scale alone."""

    def __post_init__(self) -> None:
        if not 1.0 <= self.factor < float("inf"):
            raise ConfigError(
                f"rope_scaling.factor is {self.factor} and must be finite and at least 1",
                hint="set it to how many times longer the context becomes",
            )
        for field in "original_max_position_embeddings beta_fast beta_slow".split():
            if not 0 < getattr(self, field) < float("inf"):
                raise ConfigError(
                    f"rope_scaling.{field} is {getattr(self, field)} and must be finite and above "
                    "0",
                    hint=f"set rope_scaling.{field} as the model's config.json has it",
                )
        for field in "mscale mscale_all_dim".split():
            if not math.isfinite(getattr(self, field)):
                raise ConfigError(
                    f"rope_scaling.{field} is {getattr(self, field)} and must be finite",
                    hint=f"set rope_scaling.{field} to 1, or leave it out",
                )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-V3-shaped model (arXiv 2412.19437, section 2)."""

    vocab_size: int
    """Number of token ids."""
    hidden_size: int
    """Width D of the residual stream."""
    intermediate_size: int
    """Width of the dense layers' FFN."""
    moe_intermediate_size: int
    """Width F of one routed expert; shared experts have n_shared_experts times that."""
    num_hidden_layers: int
    """Transformer layers, MTP modules not counted."""
    num_attention_heads: int
    """Attention heads H."""
    attention: str = "mla"
    """`mla` (Multi-head Latent Attention), or what it is compared with: `mha` (a key/value head
    per query head), `gqa` (num_key_value_heads of them) or `mqa` (one)."""
    num_key_value_heads: int | None = None
    """Key/value heads of `gqa`, a divisor of num_attention_heads; None for the others."""
    attention_bias: bool = False
    """Biases on the projections of the residual stream, in and out of the attention."""
    q_lora_rank: int | None = None
    """Rank of `mla`'s query compression; None projects queries directly."""
    kv_lora_rank: int | None = None
    """Rank C of `mla`'s key/value latent, which is what the cache stores; None for the others."""
    qk_nope_head_dim: int
    """Per-head query/key width without rotation; may be 0 except in `mla`."""
    qk_rope_head_dim: int
    """Width R of the rotary part of queries and keys, even; `mla` shares one rotary key over
    the heads."""
    v_head_dim: int
    """Per-head value width."""
    n_routed_experts: int
    """Routed experts E per MoE layer."""
    n_shared_experts: int = 1
    """Shared experts per MoE layer; 0 for none."""
    num_experts_per_tok: int
    """Routed experts K a token visits."""
    n_group: int = 1
    """Groups the routed experts are divided into."""
    topk_group: int = 1
    """Groups a token may choose experts from."""
    routed_scaling_factor: float = 1.0
    """Multiplies the gate values of the routed experts."""
    norm_topk_prob: bool = True
    """Normalise the chosen experts' scores to sum to one."""
    first_k_dense_replace: int = 1
    """The first layers that have a dense FFN instead of experts."""
    num_nextn_predict_layers: int = 0
    """Sequential multi-token-prediction modules D."""
    max_position_embeddings: int = 4096
    """Longest sequence in tokens."""
    rms_norm_eps: float = 1e-6
    """Epsilon of the layers' RMSNorms (the latents' own norms use 1e-6)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: YarnConfig | None = None
    """YaRN parameters; None for plain RoPE."""
    tie_word_embeddings: bool = False
    """Use the embedding as the head."""
    initializer_range: float = 0.006
    """Standard deviation of the weights at initialisation."""

    def __post_init__(self) -> None:
        for field in (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
            "num_attention_heads qk_rope_head_dim v_head_dim "
            "n_routed_experts num_experts_per_tok n_group topk_group max_position_embeddings"
        ).split():
            if getattr(self, field) < 1:
                raise ConfigError(
                    f"model.{field} is {getattr(self, field)} and must be at least 1",
                    hint=f"set model.{field} to 1 or more",
                )
        self._check_attention()
        for field in "n_shared_experts first_k_dense_replace num_nextn_predict_layers".split():
            if getattr(self, field) < 0:
                raise ConfigError(
                    f"model.{field} is {getattr(self, field)} and must not be negative",
                    hint=f"set model.{field} to 0 or more",
                )
        for field in "rms_norm_eps rope_theta initializer_range routed_scaling_factor".split():
            if not 0 < getattr(self, field) < float("inf"):
                raise ConfigError(
                    f"model.{field} is {getattr(self, field)} and must be finite and above 0",
                    hint=f"set model.{field} to its usual value",
                )
        if self.rope_scaling is not None and self.rope_theta <= 1:
            raise ConfigError(
                f"model.rope_theta is {self.rope_theta} and must be above 1 under rope_scaling, "
                "which tells slow rotations from fast ones",
                hint="set model.rope_theta to its usual value",
            )
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"model.qk_rope_head_dim is {self.qk_rope_head_dim} and must be even, since "
                "rotary embedding turns pairs",
                hint=f"set it to {self.qk_rope_head_dim + 1}",
            )
        if self.n_routed_experts % self.n_group:
            raise ConfigError(
                f"model.n_routed_experts {self.n_routed_experts} is not divisible by "
                f"model.n_group {self.n_group}",
                hint="choose a number of groups that divides the experts",
            )
        if self.topk_group > self.n_group:
            raise ConfigError(
                f"model.topk_group {self.topk_group} exceeds model.n_group {self.n_group}",
                hint="lower topk_group or raise n_group",
            )
        experts_per_group = self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > self.topk_group * experts_per_group:
            raise ConfigError(
                f"model.num_experts_per_tok {self.num_experts_per_tok} exceeds "
                f"topk_group {self.topk_group} x {experts_per_group} experts per group",
                hint="lower num_experts_per_tok or raise topk_group",
            )
        if self.n_group > 1 and experts_per_group < 2:
            raise ConfigError(
                f"model.n_group {self.n_group} leaves {experts_per_group} expert per group, but "
                "a group's score is the sum of its top two",
                hint="lower n_group or raise n_routed_experts",
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ConfigError(
                f"model.first_k_dense_replace {self.first_k_dense_replace} exceeds "
                f"model.num_hidden_layers {self.num_hidden_layers}",
                hint="lower first_k_dense_replace",
            )

    def _check_attention(self) -> None:
        if self.attention not in ATTENTIONS:
            raise ConfigError(
                f"model.attention is {self.attention!r} and must be one of {', '.join(ATTENTIONS)}",
                hint="set model.attention to mla",
            )
        is_mla = self.attention == "mla"
        if is_mla and self.kv_lora_rank is None:
            raise ConfigError(
                "model.kv_lora_rank is missing, and model.attention mla compresses keys and values",
                hint="set model.kv_lora_rank, in DeepSeek-V3 four times qk_nope_head_dim",
            )
        for field in "q_lora_rank kv_lora_rank".split():
            rank = getattr(self, field)
            if rank is not None and not is_mla:
                raise ConfigError(
                    f"model.{field} is {rank} and model.attention {self.attention} has no latent",
                    hint=f"set model.{field} to null, or model.attention to mla",
                )
            if rank is not None and rank < 1:
                raise ConfigError(
                    f"model.{field} is {rank} and must be at least 1",
                    hint=f"set model.{field} to 1 or more"
                    + (", or to null for uncompressed queries" if field[0] == "q" else ""),
                )
        if self.qk_nope_head_dim < is_mla:
            raise ConfigError(
                f"model.qk_nope_head_dim is {self.qk_nope_head_dim} and must be at least "
                f"{int(is_mla)}",
                hint=f"set model.qk_nope_head_dim to {int(is_mla)} or more",
            )
        heads = self.num_key_value_heads
        if self.attention == "gqa" and heads is None:
            raise ConfigError(
                "model.num_key_value_heads is missing, and model.attention gqa shares keys among "
                "heads",
                hint="set model.num_key_value_heads to a divisor of model.num_attention_heads",
            )
        if self.attention != "gqa" and heads is not None:
            raise ConfigError(
                f"model.num_key_value_heads is {heads} and model.attention is {self.attention}, "
                "but only gqa has a choice of them",
                hint="set model.num_key_value_heads to null, or model.attention to gqa",
            )
        if heads is not None and (heads < 1 or self.num_attention_heads % heads):
            raise ConfigError(
                f"model.num_attention_heads {self.num_attention_heads} is not divisible by "
                f"model.num_key_value_heads {heads}",
                hint="choose a number of key/value heads that divides the heads",
            )

    @property
    def key_value_heads(self) -> int:
        """Heads G of keys and values once expanded."""
        if self.attention == "mqa":
            return 1
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def latent_rank(self) -> int:
        """`kv_lora_rank` of an `mla` model."""
        assert self.kv_lora_rank is not None, f"{self.attention} has no latent"
        return self.kv_lora_rank

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """Values cached per token and layer: latent and shared rotary key, or keys and values."""
        if self.attention == "mla":
            return self.latent_rank + self.qk_rope_head_dim
        return self.key_value_heads * (self.qk_head_dim + self.v_head_dim)

    @property
    def embedding_is_used_last(self) -> bool:
        """Whether the last stage needs the embedding: for MTP or as a tied head."""
        return self.tie_word_embeddings or self.num_nextn_predict_layers > 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with routed experts, the MTP modules' included."""
        layers = range(self.num_hidden_layers + self.num_nextn_predict_layers)
        return tuple(layer for layer in layers if self.is_moe(layer))

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` has routed experts; MTP blocks (layer >= num_hidden_layers) do."""
        return layer >= self.first_k_dense_replace
