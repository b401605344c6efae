"""The loss of a linear head: ours in chunks against torch's own (``F.linear_cross_entropy``, since 2.13).

    python benchmarks/linear_cross_entropy.py [--tokens 2048] [--rounds 3] [--device cuda] [--dtype bfloat16] [--out F]

Forward and backward, over vocabulary and width, with the full logits as a third form. Torch's runs with its default
options of chunking. The hidden state has ``--dtype``, the head fp32, as under autocast; torch's form needs one dtype,
so its cast of the head is a part of its step. Time is taken interleaved in one process (median of the rounds). On a CPU
each memory is measured in a process of its own: the resident peak above what inputs and a small run hold; on cuda it is
the allocator's. ``same_bits``: loss and both gradients equal ours bit by bit; ``error``: the largest difference of a
gradient to that of the full logits in float64, relative to the largest element. Needs torch ≥ 2.13. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise.ops.losses import linear_cross_entropy
from stackwise.training.memory import PeakMemory, return_freed_memory

VOCABULARIES = (1024, 8192, 32768)
WIDTHS = (128, 512, 1024)
FORMS = ("ours", "torch", "full")


def loss(form: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy by one of ``FORMS``."""
    if form == "ours":
        return linear_cross_entropy(hidden, weight, targets, 1 / len(targets))
    matrix = weight.to(hidden.dtype)
    if form == "full":
        return F.cross_entropy(F.linear(hidden, matrix).float(), targets)
    return F.linear_cross_entropy(hidden, matrix, targets, options=torch.nn.LinearCrossEntropyOptions())


def inputs(tokens: int, vocab: int, width: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=draw).to(device, dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=draw).mul_(width**-0.5).to(device).requires_grad_()
    return hidden, weight, torch.randint(vocab, (tokens,), generator=draw).to(device)


def step(form: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients of hidden state and head."""
    value = loss(form, hidden, weight, targets)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def seconds(form: str, data: tuple[Tensor, Tensor, Tensor]) -> float:
    start = time.perf_counter()
    step(form, *data)
    if data[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(form: str, tokens: int, vocab: int, width: int, device: str, dtype: torch.dtype) -> int:
    """Peak bytes of one step above the inputs."""
    if device == "cuda":
        data = inputs(tokens, vocab, width, device, dtype)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(form, *data)
        return torch.cuda.max_memory_allocated() - before
    return_freed_memory()
    step(form, *inputs(64, 128, 64, device, dtype))  # code and buffers that any first step loads
    data = inputs(tokens, vocab, width, device, dtype)
    measure = PeakMemory(torch.device("cpu"))
    step(form, *data)
    peak = measure.peak()
    if peak is None:
        raise SystemExit("peak memory cannot be measured on this system")
    return peak


def error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found[1:], exact[1:]))


def compare(tokens: int, vocab: int, width: int, device: str, dtype_name: str, rounds: int) -> dict[str, Any]:
    """One row: seconds, bytes and errors of the three forms."""
    dtype = getattr(torch, dtype_name)
    data = inputs(tokens, vocab, width, device, dtype)
    hidden, weight, targets = data
    found = {form: step(form, *data) for form in FORMS}
    row: dict[str, Any] = {"vocab_size": vocab, "width": width}
    row["same_bits"] = all(torch.equal(a, b) for a, b in zip(found["ours"], found["torch"]))
    if tokens * vocab <= 1 << 26:  # float64 logits of 0.5 GiB
        double = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
        value = F.cross_entropy(F.linear(*double), targets)
        exact = (value, *torch.autograd.grad(value, double))
        row["error"] = {form: error(found[form], exact) for form in FORMS}
    del found
    times = [[seconds(form, data) for form in FORMS] for _ in range(rounds)]
    del data, hidden, weight, targets
    for form, spent in zip(FORMS, zip(*times)):
        if device == "cuda":
            peak = memory(form, tokens, vocab, width, device, dtype)
        else:
            command = [sys.executable, __file__, "--memory-of", form, str(vocab), str(width), "--tokens", str(tokens)]
            command += ["--device", device, "--dtype", dtype_name]
            peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row[form] = {"seconds": statistics.median(spent), "peak_bytes": peak}
    for form in ("torch", "full"):
        row[f"time_ours_over_{form}"] = row["ours"]["seconds"] / row[form]["seconds"]
        row[f"memory_ours_over_{form}"] = row["ours"]["peak_bytes"] / row[form]["peak_bytes"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    parser.add_argument("--memory-of", nargs=3, metavar=("FORM", "VOCABULARY", "WIDTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not hasattr(F, "linear_cross_entropy"):
        print("benchmarks/linear_cross_entropy.py: skipped, torch has no F.linear_cross_entropy before 2.13")
        return
    if options.memory_of:
        form, vocab, width = options.memory_of
        dtype = getattr(torch, options.dtype)
        print(memory(form, options.tokens, int(vocab), int(width), options.device, dtype))
        return
    print(f"{'vocabulary':>10}{'width':>7}{'seconds':>10}{'of torch':>10}{'MiB':>8}{'of torch':>10}  same bits")
    rows = []
    for vocab in VOCABULARIES:
        for width in WIDTHS:
            row = compare(options.tokens, vocab, width, options.device, options.dtype, options.rounds)
            rows.append(row)
            print(
                f"{vocab:10}{width:7}{row['ours']['seconds']:10.4f}{row['time_ours_over_torch']:10.3f}"
                f"{row['ours']['peak_bytes'] / 2**20:8.0f}{row['memory_ours_over_torch']:10.3f}  {row['same_bits']}",
                flush=True,
            )
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokens": options.tokens,
        "dtype": options.dtype,
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
