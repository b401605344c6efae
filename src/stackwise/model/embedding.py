"""From token ids to the hidden state, and from the hidden state to what the logits are read from.

B batch, T tokens, C width, V vocabulary, E width of the token table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.model.norms import create_norm
from stackwise.model.spec import NormKind, TimeEmbeddingKind


class TimeEmbedding(nn.Module):
    """(B,) noise levels in [0, 1] → (B, D): what conditions the Blocks.

    sinusoidal: sines and cosines of 1000 t at D/2 frequencies, then time_out(silu(time_in(·))) (DiT, 2212.09748 §3.2).
    learned: a table of ``LEVELS`` rows, between which it is linear.
    """

    LEVELS = 65

    def __init__(self, kind: TimeEmbeddingKind, dim: int) -> None:
        super().__init__()
        if kind not in ("sinusoidal", "learned"):
            raise ValueError(f"time_embedding is {kind!r}; allowed: sinusoidal, learned")
        if dim < 2 or dim % 2:
            raise ValueError(f"time_dim is {dim}; it must be even, at least 2")
        self.dim = dim
        self.table = nn.Parameter(torch.zeros(self.LEVELS, dim)) if kind == "learned" else None
        self.time_in = nn.Linear(dim, dim) if kind == "sinusoidal" else None
        self.time_out = nn.Linear(dim, dim) if kind == "sinusoidal" else None

    def forward(self, time: Tensor) -> Tensor:
        """(B,) → (B, D)."""
        if self.table is not None:
            place = time.to(self.table.dtype) * (self.LEVELS - 1)
            low = place.long().clamp(0, self.LEVELS - 2)
            share = (place - low)[:, None]
            return self.table[low] * (1 - share) + self.table[low + 1] * share
        assert self.time_in is not None and self.time_out is not None
        half = torch.arange(self.dim // 2, device=time.device, dtype=torch.float32)
        angle = 1000.0 * time.float()[:, None] * 10000.0 ** (-half / (self.dim // 2))
        features = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.time_in.weight.dtype)
        out: Tensor = self.time_out(F.silu(self.time_in(features)))
        return out


class TokenEmbedding(nn.Embedding):
    """(B, T) token ids → (B, T, C): the token's row, plus its position's, then a norm and dropout, where asked for.

    A table of another width than C goes through an adapter, adapter_out(gelu(adapter_in(row))), two linear layers with
    biases; so does one of width C when ``adapter_hidden_dim`` asks for it.

    Args:
        vocab_size, d_model: V and C.
        dropout: probability, while training.
        frozen: the token table keeps its initial values; positions, norm and adapter train.
        learned_positions: rows of a learned table of positions; ``None``: none.
        norm: after the sum; ``None``: none.
        embedding_dim: E; ``None``: C.
        adapter_hidden_dim: hidden width of the adapter; ``None``: C, and no adapter where E is C.
        time: embeds noise levels; ``None``: they are no input.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        dropout: float = 0.0,
        frozen: bool = False,
        learned_positions: int | None = None,
        norm: nn.Module | None = None,
        embedding_dim: int | None = None,
        adapter_hidden_dim: int | None = None,
        time: TimeEmbedding | None = None,
    ) -> None:
        width = d_model if embedding_dim is None else embedding_dim
        super().__init__(vocab_size, width)
        self.dropout = dropout
        self.never_trained = ("weight",) if frozen else ()
        self.weight.requires_grad_(not frozen)
        self.positions = None if learned_positions is None else nn.Parameter(torch.zeros(learned_positions, d_model))
        self.norm = norm
        adapted = width != d_model or adapter_hidden_dim is not None
        hidden = d_model if adapter_hidden_dim is None else adapter_hidden_dim
        self.adapter_in = nn.Linear(width, hidden) if adapted else None
        self.adapter_out = nn.Linear(hidden, d_model) if adapted else None
        self.time = time
        self._kept: tuple[object, Tensor] | None = None

    @property
    def frozen(self) -> bool:
        """Whether the token table never trains."""
        return "weight" in self.never_trained

    def _adapt(self, rows: Tensor) -> Tensor:
        """(…, E) → (…, C)."""
        if self.adapter_in is None or self.adapter_out is None:
            return rows
        return self.adapter_out(F.gelu(self.adapter_in(rows)))

    def table(self) -> Tensor:
        """(V, C): what a tied head reads.

        An adapted table is kept between calls where nothing can train (no gradients wanted, frozen parameters), since
        generation would adapt all of V again for every token.
        """
        if self.adapter_in is None or torch.compiler.is_compiling():
            return self._adapt(self.weight)
        state = self._unchanging_state()
        if state is None:
            self._kept = None
            return self._adapt(self.weight)
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self._adapt(self.weight))
        return self._kept[1]

    def _unchanging_state(self) -> object | None:
        """What tells the adapted table of one moment from that of another; ``None`` where that cannot be told."""
        assert self.adapter_in is not None and self.adapter_out is not None
        parts = (self.weight, *self.adapter_in.parameters(), *self.adapter_out.parameters())
        # A fused optimizer changes parameters without counting it in their version.
        if torch.is_grad_enabled() or any(p.requires_grad or p.is_inference() for p in parts):
            return None
        device = self.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return dtype, tuple((p.data_ptr(), p._version) for p in parts)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}

    def tokens(self, input_ids: Tensor) -> Tensor:
        """(B, T, C): the rows of the tokens alone, gathered and then adapted."""
        return self._adapt(super().forward(input_ids))

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, start: int = 0) -> Tensor:
        """Args: ``positions`` (B, T) of the tokens in their rows; default ``start`` … ``start + T − 1``."""
        x = self.tokens(input_ids)
        if self.positions is not None:
            end = start + input_ids.shape[1]
            if end > len(self.positions):
                raise ValueError(f"the model has {len(self.positions)} learned positions; {end} tokens do not fit")
            x = x + (self.positions[start:end] if positions is None else F.embedding(positions, self.positions))
        if self.norm is not None:
            x = self.norm(x)
        return F.dropout(x, self.dropout, self.training)


class Head(nn.Module):
    """What belongs to the head alone: the matrix, unless it is the embedding's, and BERT's transformation before it.

    Args:
        tied: the matrix is the embedding's table; ``weight`` is then ``None``.
        transform: norm(gelu(dense(x))) before the matrix and a bias on the logits (BERT's masked-language head).
        norm, norm_eps, norm_bias: of the transformation; ``bias`` of its ``dense``.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        tied: bool = False,
        transform: bool = False,
        norm: NormKind = "rmsnorm",
        norm_eps: float = 1e-5,
        norm_bias: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.zeros(vocab_size, d_model))
        self.dense = nn.Linear(d_model, d_model, bias=bias) if transform else None
        self.norm = create_norm(norm, d_model, norm_eps, norm_bias) if transform else None
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if transform else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C): what the matrix is applied to."""
        if self.dense is None or self.norm is None:
            return x
        return self.norm(F.gelu(self.dense(x)))
