"""A contiguous range of layers; the reference model is the stage that holds them all.

The first stage embeds. The last one has the final norm, the head and the MTP modules,
whose embedding it borrows from whoever holds it (under DualPipe the very tensor of the
first stage on the same worker).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from dualray.kernels.cross_entropy import linear_cross_entropy
from dualray.model.attention import GroupedQueryAttention, MultiHeadLatentAttention
from dualray.model.block import Block
from dualray.model.config import ModelConfig
from dualray.model.context import ForwardContext
from dualray.model.linear import Embedding, Linear, linear
from dualray.model.mtp import MtpModule
from dualray.model.norm import RMSNorm
from dualray.model.rope import Rope, softmax_scale

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Cross-entropy sums in nats over the valid targets, one scalar per prediction depth."""

    main: Tensor
    mtp: tuple[Tensor, ...]


class Stage(nn.Module):
    """Layers `layers` of the model `config`.

    `expert_ids(layer)` names the logical experts held in each slot of a MoE layer; by default
    all are held.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range | None = None,
        *,
        expert_ids: Callable[[int], tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        layers = range(config.num_hidden_layers) if layers is None else layers
        everything = tuple(range(config.n_routed_experts))

        def held(layer: int) -> tuple[int, ...]:
            if not config.is_moe(layer):
                return ()
            return everything if expert_ids is None else expert_ids(layer)

        self.config = config
        self.layer_range = layers
        self.is_first = layers.start == 0
        self.is_last = layers.stop == config.num_hidden_layers
        self.rope = Rope(config)
        self.layers = nn.ModuleDict({str(i): Block(config, i, held(i)) for i in layers})
        self._borrowed: list[Embedding] = []
        if self.is_first:
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        if self.is_last:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if not config.tie_word_embeddings:
                self.lm_head = Linear(config.hidden_size, config.vocab_size)
            for depth in range(config.num_nextn_predict_layers):
                layer = config.num_hidden_layers + depth
                self.layers[str(layer)] = MtpModule(config, layer, held(layer))

    def set_rope(self, config: ModelConfig) -> None:
        """Rotate and scale as `config` says, which has another context and is else the same."""
        scale = softmax_scale(config)
        self.config, self.rope = config, Rope(config)
        for module in self.modules():
            if isinstance(module, (MultiHeadLatentAttention, GroupedQueryAttention)):
                module.softmax_scale = scale

    @property
    def needs_embedding(self) -> bool:
        """Whether this stage uses the embedding behind the first layer (MTP, tied head)."""
        return self.is_last and self.config.embedding_is_used_last

    def borrow_embedding(self, embedding: Embedding) -> None:
        """Use `embedding` for MTP and a tied head without owning it."""
        self._borrowed = [embedding]

    def _embedding(self) -> Embedding:
        return self.embed_tokens if self.is_first else self._borrowed[0]

    def embed(self, ids_T: Tensor, ctx: ForwardContext) -> Tensor:
        """Token ids to (T, D)."""
        return self._embedding()(ids_T, ctx.weight_grads)

    def forward(self, x_TD: Tensor, ctx: ForwardContext) -> Tensor:
        """The stage's layers; (T, D) in and out, MTP modules and head excluded."""
        ctx.cos_sin = self.rope.cos_sin(ctx.positions_T, x_TD.dtype)
        for layer in self.layer_range:
            x_TD = self.layers[str(layer)](x_TD, ctx)
        return x_TD

    def head(self, normed_TD: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        """Logits (T, vocab) of normalised hidden states."""
        return linear(normed_TD, self._head_weight(), None if ctx is None else ctx.weight_grads)

    def logits(self, hidden_TD: Tensor, ctx: ForwardContext) -> Tensor:
        """Final norm and head."""
        return self.head(self.norm(hidden_TD), ctx)

    def mtp_modules(self) -> list[MtpModule]:
        first = self.config.num_hidden_layers
        depths = range(first, first + self.config.num_nextn_predict_layers)
        return [self.layers[str(i)] for i in depths]  # pyrefly: ignore[bad-return]

    def losses(
        self, hidden_TD: Tensor, labels_DT: Tensor, ctx: ForwardContext, *, with_mtp: bool = True
    ) -> Losses:
        """Cross-entropy sums of the main model and, if asked for, every MTP depth.

        `labels_DT` (1 + depths, T) int64: row d holds each position's token d + 1 ahead,
        `IGNORED_LABEL` (any negative value) where there is none.
        """
        hidden_TD = self.norm(hidden_TD)
        main = self._cross_entropy(hidden_TD, labels_DT[0], ctx)
        mtp = []
        for depth, module in enumerate(self.mtp_modules() if with_mtp else [], start=1):
            # An ignored label has no embedding; any id does, since its targets are ignored too.
            ahead = self.embed(labels_DT[depth - 1].clamp(min=0), ctx)
            hidden_TD = module.predict(ahead, hidden_TD, ctx)
            mtp.append(self._cross_entropy(hidden_TD, labels_DT[depth], ctx))
        return Losses(main=main, mtp=tuple(mtp))

    def _head_weight(self) -> Tensor:
        tied = self.config.tie_word_embeddings
        return self._embedding().weight if tied else self.lm_head.weight

    def _cross_entropy(self, normed_TD: Tensor, labels_T: Tensor, ctx: ForwardContext) -> Tensor:
        submit = None if ctx.weight_grads is None else ctx.weight_grads.submit
        return linear_cross_entropy(normed_TD, self._head_weight(), labels_T, submit)
