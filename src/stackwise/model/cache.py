"""Keys and values of the tokens already read, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer, in a buffer that is allocated once."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.length = 0
        self._buffer: Tensor | None = None  # (2, B, G, max_tokens, D)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, G, T, D) after what is there; returns all keys and all values (B, G, S, D)."""
        B, G, T, D = k.shape
        if self._buffer is None:
            self._buffer = k.new_empty(2, B, G, self.max_tokens, D)
        end = self.length + T
        if end > self.max_tokens:
            raise ValueError(f"the cache holds {self.max_tokens} tokens; {end} do not fit")
        self._buffer[0, :, :, self.length : end] = k
        self._buffer[1, :, :, self.length : end] = v
        self.length = end
        return self._buffer[0, :, :, :end], self._buffer[1, :, :, :end]


class KVCache:
    """One ``LayerCache`` for each attention layer of a Rack, and which of the tokens read are real.

    Args:
        n_layers: Blocks of the Rack.
        max_tokens: prompt and generated tokens together.
    """

    def __init__(self, n_layers: int, max_tokens: int) -> None:
        self.layers = [LayerCache(max_tokens) for _ in range(n_layers)]
        self.key_mask: Tensor | None = None  # (B, S)

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length

    def extend_mask(self, mask: Tensor | None, batch: int, n_tokens: int, device: torch.device) -> Tensor | None:
        """The mask (B, S) of all keys once ``n_tokens`` more are read; ``None`` while nothing is padded."""
        if mask is None and self.key_mask is None:
            return None
        old = (
            self.key_mask
            if self.key_mask is not None
            else torch.ones(batch, self.length, dtype=torch.bool, device=device)
        )
        new = mask if mask is not None else torch.ones(batch, n_tokens, dtype=torch.bool, device=device)
        self.key_mask = torch.cat((old, new), dim=1)
        return self.key_mask
