"""Time and peak memory of each attention preset against its explicit T×T form, forward and backward.

    python benchmarks/attention.py [--tokens 4096 --d-model 512 --heads 8] [--rounds 3] [--out FILE]

The explicit form has the same projections, rotation, features and weights, but writes out the matrix of scores, masks
it, takes the softmax and multiplies. Both forms must agree. Each measurement has a process of its own for the memory
(the resident peak above what the layer, its input and one small run of it hold), and time is taken interleaved in one
process: median of the rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackwise.model.attention import AttentionPresets, CoreAttention
from stackwise.training.memory import PeakMemory, return_freed_memory

# Name in the table: preset, its settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert_style": ("bert_style", {}),
    "gpt_style": ("gpt_style", {}),
    "efficient_gqa": ("efficient_gqa", {"attention_mode": "causal"}),
    "mla_attention": ("mla_attention", {"attention_mode": "causal"}),
    "kernel_attention": ("kernel_attention", {"attention_mode": "causal"}),
    "mlgka": ("mlgka", {"attention_mode": "causal"}),
    "mlgka, bidirectional": ("mlgka", {}),
    "custom: window 256": ("custom", {"attention_mode": "causal", "window": 256}),
    "custom: gaussian weight": (
        "custom", {"attention_mode": "causal", "kernel_type": "gaussian", "kernel_meaning": "weight"}
    ),
    "custom: laplacian weight": (
        "custom", {"attention_mode": "causal", "kernel_type": "laplacian", "kernel_meaning": "weight"}
    ),
}  # fmt: skip


class Explicit(CoreAttention):
    """The same layer with the matrix of scores written out."""

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, seen: Tensor | None, *, decoding: bool
    ) -> Tensor:
        k, v = (x.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for x in (k, v))
        if self.spec.kernel_meaning == "weight" and self.spec.kernel_type == "gaussian":
            scores = q @ k.mT - k.square().sum(-1)[:, :, None] / 2
            scores = scores / self.bandwidth**2
        elif self.spec.kernel_meaning == "weight" and self.spec.kernel_type == "laplacian":
            square = q.square().sum(-1)[..., None] + k.square().sum(-1)[:, :, None] - 2 * q @ k.mT
            scores = -(square.clamp(min=1e-12)).sqrt() / self.bandwidth
        else:
            scores = (q @ k.mT) * (self.qk_dim**-0.5 if self.kernel is None else self.temperature)
        T = q.shape[2]
        i, j = torch.arange(T)[:, None], torch.arange(T)[None]
        if self.attention_mode == "causal":
            scores = scores.masked_fill(j > i, float("-inf"))
        if self.window is not None:
            scores = scores.masked_fill(j <= i - self.window, float("-inf"))
        return scores.softmax(-1) @ v


def layers(case: str, d_model: int, heads: int) -> tuple[CoreAttention, CoreAttention]:
    """The fused layer and the explicit one, with the same weights."""
    preset, settings = CASES[case]
    torch.manual_seed(0)
    fused = AttentionPresets.get(preset)(d_model, heads, **settings)
    explicit = AttentionPresets.get(preset)(d_model, heads, **settings)
    explicit.load_state_dict(fused.state_dict())
    explicit.__class__ = Explicit
    return fused, explicit


def step(layer: CoreAttention, x: Tensor) -> None:
    """Forward and backward."""
    layer(x).square().mean().backward()
    layer.zero_grad(set_to_none=True)
    x.grad = None


def memory(case: str, form: str, tokens: int, d_model: int, heads: int) -> int:
    """Peak bytes of one step, in this process."""
    return_freed_memory()
    layer = layers(case, d_model, heads)[form == "explicit"]
    step(layer, torch.randn(1, 32, d_model).requires_grad_())  # code and thread buffers that any first step loads
    x = torch.randn(1, tokens, d_model).requires_grad_()
    measure = PeakMemory(torch.device("cpu"))
    step(layer, x)
    peak = measure.peak()
    if peak is None:
        raise SystemExit("peak memory cannot be measured on this system")
    return peak


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(case: str, tokens: int, d_model: int, heads: int, rounds: int) -> dict[str, Any]:
    """One row: seconds and bytes of both forms."""
    fused, explicit = layers(case, d_model, heads)
    x = torch.randn(1, 129, d_model)
    torch.testing.assert_close(fused(x), explicit(x), atol=1e-4, rtol=1e-4)
    x = torch.randn(1, tokens, d_model).requires_grad_()
    times = [(timed(lambda: step(fused, x)), timed(lambda: step(explicit, x))) for _ in range(rounds + 1)][1:]
    row: dict[str, Any] = {"case": case}
    for form, seconds in zip(("fused", "explicit"), zip(*times)):
        command = [sys.executable, __file__, "--memory-of", case, form, "--tokens", str(tokens)]
        command += ["--d-model", str(d_model), "--heads", str(heads)]
        peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row[form] = {"seconds": statistics.median(seconds), "peak_bytes": peak}
    row["memory_ratio"] = row["fused"]["peak_bytes"] / row["explicit"]["peak_bytes"]
    row["time_ratio"] = row["fused"]["seconds"] / row["explicit"]["seconds"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "FORM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.tokens, options.d_model, options.heads)
    if options.memory_of:
        print(memory(*options.memory_of, *sizes))
        return
    print(f"{'attention':26}{'MiB':>8}{'explicit':>10}{'ratio':>8}{'seconds':>10}{'explicit':>10}{'ratio':>8}")
    rows = []
    for case in CASES:
        row = compare(case, *sizes, options.rounds)
        rows.append(row)
        fused, explicit = row["fused"], row["explicit"]
        print(
            f"{case:26}{fused['peak_bytes'] / 2**20:8.0f}{explicit['peak_bytes'] / 2**20:10.0f}"
            f"{row['memory_ratio']:8.3f}{fused['seconds']:10.3f}{explicit['seconds']:10.3f}{row['time_ratio']:8.3f}",
            flush=True,
        )
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokens": options.tokens,
        "d_model": options.d_model,
        "heads": options.heads,
        "rows": rows,
        "worst_memory_ratio": max(row["memory_ratio"] for row in rows),
        "worst_time_ratio": max(row["time_ratio"] for row in rows),
    }
    text = json.dumps(result)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
