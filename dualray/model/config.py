"""The architecture's numbers, in Hugging Face's words (`DeepseekV3Config`)."""

from __future__ import annotations

from dataclasses import dataclass

from dualray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension of the decoupled rotary part (arXiv 2309.00071)."""

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
                f"model.rope_scaling.factor is {self.factor} and must be finite and at least 1",
                hint="remove rope_scaling to keep the original context",
            )
        for field in "original_max_position_embeddings beta_fast beta_slow".split():
            if not 0 < getattr(self, field) < float("inf"):
                raise ConfigError(
                    f"model.rope_scaling.{field} is {getattr(self, field)} and must be finite and "
                    "above 0",
                    hint=f"set model.rope_scaling.{field} as the model's config.json has it",
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
    q_lora_rank: int | None = None
    """Rank of the query compression; None projects queries directly."""
    kv_lora_rank: int
    """Rank C of the key/value latent, which is what the cache stores."""
    qk_nope_head_dim: int
    """Per-head query/key width without rotation."""
    qk_rope_head_dim: int
    """Width R of the decoupled rotary part, shared by all heads on the key side; even."""
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
            "num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
            "n_routed_experts num_experts_per_tok n_group topk_group max_position_embeddings"
        ).split():
            if getattr(self, field) < 1:
                raise ConfigError(
                    f"model.{field} is {getattr(self, field)} and must be at least 1",
                    hint=f"set model.{field} to 1 or more",
                )
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ConfigError(
                f"model.q_lora_rank is {self.q_lora_rank} and must be at least 1",
                hint="set model.q_lora_rank to 1 or more, or to null for uncompressed queries",
            )
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

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

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
