"""How fast a device multiplies matrices."""

from __future__ import annotations

import time

import torch

# Dense bfloat16 FLOP/s of the data sheets, by a part of the device's name.
BF16_PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, compute_dtype: torch.dtype | None) -> float:
    """FLOP/s that MFU is measured against: the data sheet's for known GPUs in bfloat16, else what a product reaches."""
    if device.type == "cuda" and compute_dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in BF16_PEAK.items():
            if part in name:
                return peak
    return measured_flops(device, compute_dtype or torch.float32)


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 768, seconds: float = 0.4) -> float:
    """The best FLOP/s of products of two ``size``² matrices, tried for so many ``seconds``.

    The best, since other work on the machine only slows a product down.
    """
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    best = float("inf")
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        b = a @ a
        float(b[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
