"""A classifier of sequences made of Blocks.

B batch, T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from stackwise.model.block import Block, Blocks, Context
from stackwise.model.cache import positions_of
from stackwise.model.embedding import TokenEmbedding
from stackwise.model.initialisation import init_weights


class SequenceClassifier(nn.Module):
    """Embedding → Blocks → mean over real tokens → linear.

    Args:
        vocab_size: of the tokens; d_model: width C of the Blocks.
        blocks: first to last; they keep the values that they have.
        n_classes: classes.
        max_positions: rows of a learned table of positions; default none.
        dropout: after the embedding, while training.
        seed: of the initial values of the embedding and the linear layer.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        blocks: Sequence[Block],
        n_classes: int,
        *,
        max_positions: int | None = None,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(vocab_size, d_model, dropout, learned_positions=max_positions)
        self.blocks = Blocks(blocks)
        self.head = nn.Linear(d_model, n_classes)
        for stream, part in enumerate((self.embedding, self.head)):
            init_weights(part, n_blocks=max(1, len(blocks)), seed=seed, stream=stream)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) ids and a boolean (B, T), True where a token is real → (B, n_classes) logits."""
        x = self.embedding(input_ids, positions_of(attention_mask))
        context = Context(attention_mask)
        for block in self.blocks:
            x = block(x, context)
        real = attention_mask[..., None].to(x.dtype)
        return self.head((x * real).sum(dim=1) / real.sum(dim=1).clamp(min=1.0))
