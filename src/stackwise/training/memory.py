"""Peak memory of a run: the allocator's on an accelerator, resident memory on CPU."""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


LARGE_ALLOCATION = 128 << 10
"""Bytes from which glibc, told to, takes an allocation from the system and gives it back at once: its own first value,
which it would raise as it goes."""


def return_freed_memory() -> None:
    """Makes freed tensors leave the process: on glibc, allocations of 128 KiB or more are mapped one by one.

    By default glibc raises that threshold up to 32 MiB as it goes and keeps what is freed below it, so resident memory
    drifts a third above what lives. Mapping costs page faults, the more the narrower the model (docs/log.md has both).
    """
    if platform.libc_ver()[0] == "glibc":
        m_mmap_threshold = -3  # malloc.h
        ctypes.CDLL(None).mallopt(m_mmap_threshold, LARGE_ALLOCATION)


def _trim() -> None:
    """Gives the freed memory that the allocator holds back to the system, where that is glibc's."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None, f"{_STATUS} has no {field}"
    return int(found[1]) * 1024


class PeakMemory:
    """Bytes in use at most since ``reset``, above what the process held when this was made.

    On cuda it is what the allocator held. On a CPU under Linux it is resident memory. Elsewhere there is no such
    measure, and ``peak`` is ``None``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.measurable = device.type == "cuda" or (device.type == "cpu" and _can_reset_peak())
        self._base = 0
        if self.measurable:
            if device.type == "cpu":
                _trim()  # else what was freed before would be used again, and not be seen
            self._base = _resident("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated(device)
        self.reset()

    def reset(self) -> None:
        """Starts a new interval."""
        if not self.measurable:
            return
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _CLEAR.write_text("5")  # resets the peak of resident memory, proc(5)

    def peak(self) -> int | None:
        """Bytes, since the last ``reset``."""
        if not self.measurable:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._base
        return max(0, _resident("VmHWM") - self._base)


def _can_reset_peak() -> bool:
    if not _CLEAR.exists():
        return False
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
