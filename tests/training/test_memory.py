import subprocess
import sys

import pytest
import torch

from stackwise.training import memory
from stackwise.training.memory import PeakMemory

MIB = 1 << 20

needs_linux = pytest.mark.skipif(
    not memory._can_reset_peak(), reason="needs a writable /proc/self/clear_refs to measure the peak"
)


def in_a_process_of_its_own(script: str) -> None:
    """Runs ``script``: what other tests have freed must not be taken for memory at hand."""
    head = "import torch\nfrom stackwise.training.memory import PeakMemory\nCPU, MIB = torch.device('cpu'), 1 << 20\n"
    subprocess.run([sys.executable, "-c", head + script], check=True)


@needs_linux
def test_the_peak_sees_an_allocation_that_is_gone_and_a_reset_forgets_it():
    in_a_process_of_its_own("""
peak = PeakMemory(CPU)
at_rest = peak.peak()
block = torch.ones(61 * MIB, dtype=torch.uint8)
del block
assert 60 * MIB <= peak.peak() <= 61 * MIB + at_rest + 4 * MIB  # the kernel counts pages to within some dozens
peak.reset()
assert peak.peak() <= at_rest + 4 * MIB
""")


@needs_linux
def test_what_was_held_before_does_not_count_and_what_is_held_since_counts_after_a_reset():
    in_a_process_of_its_own("""
held = torch.ones(53 * MIB, dtype=torch.uint8)
peak = PeakMemory(CPU)
assert peak.peak() <= 4 * MIB
more = torch.ones(31 * MIB, dtype=torch.uint8)
peak.reset()
assert 30 * MIB <= peak.peak() <= 35 * MIB
""")


@needs_linux
def test_memory_that_was_freed_before_is_seen_when_it_is_used_again():
    in_a_process_of_its_own("""
blocks = [torch.ones(10 * MIB, dtype=torch.uint8) for _ in range(30)]
last = blocks[-1]
del blocks
peak = PeakMemory(CPU)
block = torch.ones(61 * MIB, dtype=torch.uint8)
assert peak.peak() >= 60 * MIB
""")


@needs_linux
@pytest.mark.parametrize(("size", "count"), [(3 * MIB, 31), (700 * 1024, 131), (131 * 1024, 701)])
def test_freed_tensors_leave_the_process(size, count):
    """In a process of its own, whose allocator has not been told yet."""
    script = f"""
import torch
from stackwise.training.memory import _resident, return_freed_memory
return_freed_memory()
torch.ones(16 << 20, dtype=torch.uint8)  # by default the allocator would keep what is smaller from here on
before = _resident("VmRSS")
tensors = [torch.ones({size}, dtype=torch.uint8) for _ in range({count})]
between = _resident("VmRSS")
keep = tensors[-1]
del tensors
print(between - before, _resident("VmRSS") - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    held, left = map(int, out.split())
    assert held >= (count - 1) * size
    assert left <= 8 * MIB


def test_where_memory_cannot_be_measured_the_peak_is_none(monkeypatch):
    monkeypatch.setattr(memory, "_can_reset_peak", lambda: False)
    peak = PeakMemory(torch.device("cpu"))
    peak.reset()
    assert peak.peak() is None
    assert PeakMemory(torch.device("meta")).peak() is None
