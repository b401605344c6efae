"""The parts of a Block beside attention."""

import torch.nn.functional as F
from torch import Tensor, nn

RMSNorm = nn.RMSNorm


class SwiGLUFFN(nn.Module):
    """down(silu(gate(x)) · up(x)) without biases (GLU variants, 2002.05202 §2).

    Args:
        d_model: width of input and output.
        d_ff: width between.
        freeze_up_proj: the up-projection keeps its initial values; ``gate`` and ``down`` train.
    """

    def __init__(self, d_model: int, d_ff: int, freeze_up_proj: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.never_trained = ("up_proj.weight",) if freeze_up_proj else ()

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_model) → (…, d_model)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TokenEmbedding(nn.Embedding):
    """(B, T) token ids → (B, T, d_model), with dropout.

    Args:
        vocab_size, d_model: shape of the table.
        dropout: probability, while training.
        frozen: the table keeps its initial values.
    """

    def __init__(self, vocab_size: int, d_model: int, dropout: float = 0.0, frozen: bool = False) -> None:
        super().__init__(vocab_size, d_model)
        self.dropout = dropout
        self.never_trained = ("weight",) if frozen else ()

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.dropout(super().forward(input_ids), self.dropout, self.training)


def never_trained(module: nn.Module) -> set[nn.Parameter]:
    """The parameters that no phase trains, as the modules inside ``module`` declare in ``never_trained``."""
    return {part.get_parameter(name) for part in module.modules() for name in getattr(part, "never_trained", ())}
