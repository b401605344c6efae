"""Devices and the dtype of matrix products."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from stackwise.config.run import TrainingConfig
from stackwise.errors import UserError


def resolve_device(name: str) -> torch.device:
    """``auto`` is cuda, else mps, else cpu. Raises ``UserError`` for a device this machine lacks.

    On cuda, fp32 products run in TF32 from here on: fp32's range, 10 bits of mantissa, several times as fast. That is
    above bfloat16's 7 bits, which training stands; softmax, norms and losses stay in fp32.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        there = ", ".join(device for device, is_there in available.items() if is_there)
        raise UserError(f"training.device: {name} is not on this machine; there is: {there}")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
    return torch.device(name)


def resolve_compute_dtype(training: TrainingConfig, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or ``None`` for plain fp32.

    ``auto`` takes bfloat16 on cuda devices that have it; elsewhere it is often slower than fp32.
    """
    if training.compute_dtype == "auto":
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            else None
        )
    if training.compute_dtype == "bfloat16":
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("training.compute_dtype: this cuda device has no bfloat16; set float32")
        return torch.bfloat16
    return None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Runs matrix products in ``dtype``; does nothing for ``None``."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
