"""Cross-entropy of a linear head without the full logits.

N positions, C width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stackwise.ops.repeats import chunk_starts

IGNORE = -100
"""Target of a position that does not count."""

CHUNK_ELEMENTS = 1 << 22
"""Logits computed at a time: 16 MiB in fp32."""

MIN_ROWS = 256
"""Positions in a chunk even where the vocabulary is huge: thinner matrix products waste the processor."""

WIDE_ROWS = 16384
"""Rows of the head's gradient made at a time where they are summed in a wider dtype than the products have."""


def chunk_rows(n_rows: int, vocab_size: int) -> int:
    """Positions in one chunk of logits."""
    return max(1, min(n_rows, max(MIN_ROWS, CHUNK_ELEMENTS // vocab_size)))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients chunk by chunk during the forward pass, while a chunk's logits exist.

    The logits are made once and never kept: no more FLOPs than the plain loss, and memory for one chunk of logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scales: Tensor,
        excluded: int | None,
        rows: int,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None
        matrix = weight.to(hidden.dtype)
        for start in chunk_starts(hidden, rows):
            part, target = hidden[start : start + rows], targets[start : start + rows]
            # Logits, then softmax · z, then the gradient, all in place: logsumexp would make a second chunk inside.
            chunk = _logits(part, matrix, bias, excluded)
            counts = (target != IGNORE)[:, None]
            scale = counts * scales[start : start + rows, None]
            index = target.clamp(min=0)[:, None]
            own, top = chunk.gather(-1, index), chunk.amax(-1, keepdim=True)
            z = chunk.sub_(top).exp_().sum(-1, keepdim=True)
            # Where nothing counts, the logit of token 0 stands in; it is −∞ if that token is excluded.
            total += ((z.log() + top - own).masked_fill(~counts, 0.0) * scale).sum()
            if any(ctx.needs_input_grad):
                # d loss / d logits = (softmax − onehot) · scale at the positions that count
                chunk.mul_(scale / z).scatter_add_(-1, index, -scale)
                if grad_bias is not None:
                    grad_bias += chunk.sum(0)
                chunk = chunk.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(chunk, matrix, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                if grad_weight.dtype == chunk.dtype:
                    grad_weight.addmm_(chunk.T, part)
                else:  # a slice of the vocabulary at a time: no second matrix of the head's size
                    for some, columns in zip(grad_weight.split(WIDE_ROWS), chunk.split(WIDE_ROWS, dim=1)):
                        some += columns.T @ part
            del chunk  # before the next one is made
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since the head's gradient is as large as the head; a second backward pass is refused by autograd.
        grads = (None if grad is None else grad.mul_(grad_output) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None


def _logits(hidden: Tensor, matrix: Tensor, bias: Tensor | None, excluded: int | None) -> Tensor:
    """hidden matrixᵀ + bias in fp32, for the softmax: bf16 has 8 bits of mantissa; −∞ at ``excluded``."""
    logits = F.linear(hidden, matrix, None if bias is None else bias.to(hidden.dtype)).float()
    if excluded is not None:
        logits[:, excluded] = float("-inf")
    return logits


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    chunk: int | None = None,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    excluded: int | None = None,
) -> Tensor:
    """scale · Σ w · cross-entropy(hidden weightᵀ + bias, targets) over the positions whose target is not ``IGNORE``.

    Args:
        hidden: (N, C); weight: (V, C); targets: (N,) int64.
        scale: 1 / (positions that count in the whole accumulated batch) gives the mean.
        chunk: positions whose logits exist at a time; default: as many as ``CHUNK_ELEMENTS`` allows.
        bias: (V,), added to the logits; default none.
        weights: (N,) fp32, w of each position; default 1.
        excluded: a token that is never predicted: its logit is −∞.

    Returns: scalar fp32. Differentiable once, with respect to ``hidden``, ``weight`` and ``bias``. Under autocast the
    products run in the autocast dtype, the softmax in fp32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    rows = chunk or chunk_rows(hidden.shape[0], weight.shape[0])
    with torch.autocast(device, enabled=False):
        if rows >= hidden.shape[0]:  # one chunk: the plain loss, whose few kernels are quicker on small logits
            logits = _logits(hidden, weight.to(hidden.dtype), bias, excluded)
            if weights is None:
                return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") * scale
            terms = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
            return (terms * weights).sum() * scale
        scales = hidden.new_full((1,), scale, dtype=torch.float32).expand(len(targets))
        if weights is not None:
            scales = weights * scale
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, scales, excluded, rows)


def linear_cross_entropy_terms(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    *,
    bias: Tensor | None = None,
    excluded: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each position, (N,): the cross-entropy, fp32, and whether the target is the likeliest token.

    0 and ``False`` where the target is ``IGNORE``. No gradient; for evaluation.
    """
    rows = chunk or chunk_rows(hidden.shape[0], weight.shape[0])
    with torch.no_grad():
        matrix = weight.to(hidden.dtype)
        terms, right = [], []
        for h, t in zip(hidden.split(rows), targets.split(rows)):
            logits = _logits(h, matrix, bias, excluded)
            terms.append(F.cross_entropy(logits, t, ignore_index=IGNORE, reduction="none"))
            right.append(logits.argmax(-1) == t)
    return torch.cat(terms), torch.cat(right)
