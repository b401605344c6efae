"""One vector for each sequence.

B sequences, T tokens, C width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["last", "mean"]
"""The last real token of a sequence, or the mean over all real tokens."""


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """(B, T, C) hidden states, and a boolean (B, T), True where a token is real → (B, C)."""
    if pooling == "mean":
        if mask is None:
            return hidden.mean(dim=1)
        real = mask[..., None].to(hidden.dtype)
        return (hidden * real).sum(dim=1) / real.sum(dim=1).clamp(min=1.0)
    if mask is None:
        return hidden[:, -1]
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
    return hidden[torch.arange(len(last), device=mask.device), last]
