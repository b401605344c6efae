"""The parts of a model under the names that users import."""

from __future__ import annotations

from torch import nn

from stackwise.config.attention import AttentionMode, AttentionSpec, KernelType
from stackwise.model.block import Block
from stackwise.model.embedding import TokenEmbedding
from stackwise.model.feed_forward import GeGLUFFN, PlainFFN, SwiGLUFFN
from stackwise.model.initialisation import init_weights
from stackwise.model.lexical import LexicalKernelManager
from stackwise.model.spec import BlockSpec

__all__ = [
    "GeGLUFFN",
    "LexicalKernelManager",
    "MLGKALayer",
    "PlainFFN",
    "SwiGLUFFN",
    "TokenEmbedding",
    "never_trained",
]


class MLGKALayer(Block):
    """A Block whose attention is latent, grouped and a kernel at once, with LayerNorms that have biases.

    q, k and v each pass through a factor of rank ``r_q``, ``r_kv``, ``r_kv``; queries share key/value heads in groups;
    the logit is a kernel of query and key, approximated by random features.

    Args:
        d_model, n_heads, n_kv_heads, kernel_type, kernel_dim: as in ``AttentionSpec``.
        d_ff: width of the feed-forward.
        r_q, r_kv: ranks of the factors.
        dropout: of attention weights and after both residual branches, while training.
        attention_mode: ``bidirectional`` or ``causal``.
        freeze_up_proj: the feed-forward's up-projection keeps its initial values.
        use_rope: rotary positions before the features.
        seed: of the initial values.
        n_blocks: Blocks of the whole model, for the scale of the residual branches.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_heads: int,
        n_kv_heads: int,
        r_q: int = 64,
        r_kv: int = 64,
        *,
        kernel_type: KernelType = "laplacian",
        kernel_dim: int = 64,
        dropout: float = 0.0,
        attention_mode: AttentionMode = "bidirectional",
        freeze_up_proj: bool = True,
        use_rope: bool = True,
        seed: int = 0,
        n_blocks: int = 1,
    ) -> None:
        super().__init__(
            BlockSpec(
                AttentionSpec(
                    d_model,
                    n_heads,
                    n_kv_heads,
                    attention_mode,
                    dropout,
                    use_rope,
                    latents="separate",
                    r_q=r_q,
                    r_kv=r_kv,
                    kernel_type=kernel_type,
                    kernel_dim=kernel_dim,
                ),
                d_ff,
                freeze_up_proj,
                norm="layernorm",
                norm_bias=True,
            )
        )
        init_weights(self, n_blocks=n_blocks, seed=seed, stream=0)


def never_trained(module: nn.Module) -> set[nn.Parameter]:
    """The parameters that no phase trains, as the modules inside ``module`` declare in ``never_trained``."""
    named = (
        getattr(part.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for part in module.modules()
        for name in getattr(part, "never_trained", ())
    )
    return {parameter for parameter in named if parameter is not None}
