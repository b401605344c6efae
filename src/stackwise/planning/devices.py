"""Machines: how much they hold, and how fast they multiply matrices."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stackwise.config.run import TrainingConfig
from stackwise.errors import UserError, allowed
from stackwise.ops.precision import resolve_compute_dtype, resolve_device

# Dense bfloat16 FLOP/s of the data sheets, by the device's name without maker, series, socket and memory.
BF16_PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A100 PCIe": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}

DEVICES: dict[str, tuple[str, int]] = {
    "h200": ("H200", 141 * 10**9),
    "h100": ("H100", 80 * 10**9),
    "h100-pcie": ("H100 PCIe", 80 * 10**9),
    "a100": ("A100", 80 * 10**9),
    "a100-40gb": ("A100", 40 * 10**9),
    "l40s": ("L40S", 48 * 10**9),
    "l4": ("L4", 24 * 10**9),
    "a10g": ("A10G", 24 * 10**9),
    "4090": ("RTX 4090", 24 * 10**9),
    "3090": ("RTX 3090", 24 * 10**9),
}
"""Devices that need not be here: a key of ``BF16_PEAK``, and bytes of memory by the data sheet. All have bfloat16."""

CONTEXT_BYTES = 10**9
"""Of a GPU's memory that no tensor can have: the CUDA context with its loaded kernels (0.3 to 0.6 GiB as nvidia-smi
shows it) and workspaces of the matrix libraries. Assumed generously, not measured; ``make gpu`` measures it."""
FRAGMENTATION = 0.05
"""Share of a GPU's memory that the caching allocator holds in blocks too small or too large for what is asked. Assumed;
``make gpu`` measures it."""

UTILISATION = {"data sheet": 0.4, "measured here": 0.6, "given": 1.0}
"""Share of a rate that training is taken to reach. Published runs of large models reach 0.38 to 0.43 of the data sheet
in bfloat16 (Llama 3, 2407.21783, table 4); of what a plain product reaches, 0.6 is assumed; a rate that is given is one
that was reached."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for. Bytes and FLOP/s; ``None``: not known, and so no limit.

    Attributes:
        name: as people write it.
        device: the kind; it need not be here.
        compute_dtype: of matrix products under autocast; ``None``: plain fp32.
        memory: of the device.
        host_memory: of the host of an accelerator; a CPU has no other memory than its own.
        disk: room for checkpoints and caches.
        flops_per_second: of matrix products.
        rate: where that figure is from.
        here: whether it is this machine.
    """

    name: str
    device: torch.device
    compute_dtype: torch.dtype | None
    memory: int | None = None
    host_memory: int | None = None
    disk: int | None = None
    flops_per_second: float | None = None
    rate: Literal["data sheet", "measured here", "given"] = "data sheet"
    here: bool = True

    @property
    def usable_memory(self) -> int | None:
        """Bytes of the device that tensors can have."""
        if self.memory is None or self.device.type != "cuda":
            return self.memory
        return max(0, int(self.memory * (1 - FRAGMENTATION)) - CONTEXT_BYTES)

    @property
    def reached_flops(self) -> float | None:
        """FLOP/s that training is taken to reach."""
        return None if self.flops_per_second is None else self.flops_per_second * UTILISATION[self.rate]


def this_machine(training: TrainingConfig, folder: Path | None = None) -> Machine:
    """The device that ``training`` means, here; ``folder``: on the disk that the run will be written to."""
    device = resolve_device(training.device)
    return Machine(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        device=device,
        compute_dtype=resolve_compute_dtype(training, device),
        memory=available_memory(device),
        host_memory=None if device.type == "cpu" else available_memory(torch.device("cpu")),
        disk=None if folder is None else shutil.disk_usage(folder).free,
    )


def named_machine(name: str, training: TrainingConfig, folder: Path | None = None) -> Machine:
    """``cpu``, ``cuda`` or ``mps`` of this machine, or one of ``DEVICES``, whose host is not known. Raises
    ``UserError``.
    """
    wanted = name.lower().removeprefix("rtx").strip(" -")
    if wanted in ("cpu", "cuda", "mps"):
        try:
            return this_machine(training.model_copy(update={"device": wanted}), folder)
        except UserError:
            raise UserError(
                f"--device: {name} is not on this machine; allowed for another machine: {', '.join(DEVICES)}"
            ) from None
    if wanted not in DEVICES:
        raise UserError(f"--device: {name!r} is not known; {allowed(wanted, ('cpu', 'cuda', 'mps', *DEVICES))}")
    label, memory = DEVICES[wanted]
    dtype = None if training.compute_dtype == "float32" else torch.bfloat16
    rate = BF16_PEAK[label] if dtype is not None else None
    return Machine(label, torch.device("cuda"), dtype, memory, flops_per_second=rate, here=False)


def available_memory(device: torch.device) -> int | None:
    """Bytes that the device has in all, of which a container may give less; ``None`` where it cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu":
        there, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), group_limit()
        return there if limit is None else min(there, limit)
    return None


def free_memory(device: torch.device) -> float:
    """Bytes that a run could have now; infinite where that cannot be asked."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", info.read_text(), re.MULTILINE) if info.exists() else None
    return int(found[1]) * 1024 if found and device.type == "cpu" else math.inf


def group_limit() -> int | None:
    """Bytes that this process's control group may use, as in a container; ``None`` where there is no such limit."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(file)
        text = path.read_text().strip() if path.exists() else "max"
        if text.isdigit():
            return int(text)
    return None


def data_sheet_flops(device: torch.device, compute_dtype: torch.dtype | None) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU that is here, if it is known and computes in bfloat16."""
    if device.type == "cuda" and compute_dtype == torch.bfloat16:
        return sheet_of(torch.cuda.get_device_name(device))
    return None


def sheet_of(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of the GPU that a driver calls ``name``; ``None`` of one that is not listed.

    All words that tell models apart must agree: an L40 is no L4, an RTX A1000 no A100, a laptop's or a part of a GPU
    (MIG) not the whole one.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    beside = re.compile(r"nvidia|tesla|geforce|sxm\d*|hbm\d*e?|\d+gb")
    model = {word for word in words if not beside.fullmatch(word)}
    return next((peak for label, peak in BF16_PEAK.items() if set(label.lower().split()) == model), None)


def peak_flops(device: torch.device, compute_dtype: torch.dtype | None) -> float:
    """FLOP/s that MFU is measured against: the data sheet's for known GPUs in bfloat16, else what a product reaches."""
    return data_sheet_flops(device, compute_dtype) or measured_flops(device, compute_dtype or torch.float32)


def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """The best FLOP/s of products of two square matrices; each size is tried for ``seconds``.

    The best, since other work on the machine only slows a product down. An accelerator needs large matrices to fill it,
    and several products in a row to hide what starting one takes.
    """
    sizes, row = ((768,), 1) if device.type == "cpu" else ((2048, 4096), 16)
    best = 0.0
    for size in sizes:
        a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            for _ in range(row):
                b = a @ a
            float(b[0, 0])  # waits for the device
            best = max(best, row * 2 * size**3 / (time.perf_counter() - start))
    return best
