"""What is kept of the tokens already read, for generation.

B batch, T tokens given, S tokens held, G heads and D size of what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def positions_of(mask: Tensor) -> Tensor:
    """(B, S) boolean, True where a token is real → (B, S) int64: its place among the real tokens of its row, from 0."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


class LayerCache:
    """What one attention layer keeps of earlier tokens: keys and values, or latents and rotary keys.

    Args:
        max_tokens: of the whole sequence.
        window: local attention: only that many tokens are held, whatever ``max_tokens`` is.
    """

    def __init__(self, max_tokens: int, window: int | None = None) -> None:
        self.max_tokens, self.window = max_tokens, window
        self.length = 0
        self._buffers: tuple[Tensor, ...] | None = None  # each (B, G, capacity, D)
        self._shown = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers or ())

    def append(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Stores tensors (B, G, T, D) after what is there; G and D may differ between them.

        Returns, for each, all tokens that the given ones may see: (B, G, S, D). The first call, with the prompt,
        returns the prompt whole; later ones, with one token each, what is held, in order.

        Raises:
            ValueError: more than ``max_tokens``; several tokens at once after the first call, where there is a window.
        """
        T = tensors[0].shape[2]
        end = self.length + T
        if self.window is not None and self.length and T > 1:
            raise ValueError(f"a cache with a window takes one token at a time after the prompt, not {T}")
        if end > self.max_tokens:
            raise ValueError(f"the cache holds {self.max_tokens} tokens; {end} do not fit")
        capacity = self.max_tokens if self.window is None else min(self.window, self.max_tokens)
        if self._buffers is None:
            self._buffers = tuple(t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in tensors)
        first = self.length == 0
        held = min(self.length, capacity)
        over = max(0, held + T - capacity)
        for buffer, tensor in zip(self._buffers, tensors):
            if over and not first:
                buffer[:, :, : held - over] = buffer[:, :, over:held].clone()
            kept = tensor[:, :, -capacity:]
            place = 0 if first else held - over
            buffer[:, :, place : place + kept.shape[2]] = kept
        self.length = end
        self._shown = T if first else min(end, capacity)
        return tensors if first else tuple(buffer[:, :, : self._shown] for buffer in self._buffers)

    def rewind(self, length: int) -> None:
        """Forgets all but the first ``length`` tokens.

        Raises:
            ValueError: there are fewer, or a window has dropped some.
        """
        if self.window is not None or not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens (window {self.window}) cannot go back to {length}")
        self.length = length

    def mask(self, key_mask: Tensor) -> Tensor:
        """The columns of ``key_mask`` (B, all tokens read) that belong to what ``append`` has just returned."""
        return key_mask[:, -self._shown :]


class KVCache:
    """One ``LayerCache`` for each attention layer of a Rack, and which of the tokens read are real.

    Args:
        windows: of each Block of the Rack, ``None`` where it sees all tokens.
        max_tokens: prompt and generated tokens together.
    """

    def __init__(self, windows: Sequence[int | None], max_tokens: int) -> None:
        self.layers = [LayerCache(max_tokens, window) for window in windows]
        self.key_mask: Tensor | None = None  # (B, S)

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold."""
        return sum(layer.nbytes for layer in self.layers)

    def rewind(self, length: int) -> None:
        """Forgets all but the first ``length`` tokens."""
        for layer in self.layers:
            layer.rewind(length)
        if self.key_mask is not None:
            self.key_mask = self.key_mask[:, :length]

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
