"""Tokens per second of our loop against a plain, well-written PyTorch loop over the same model.

    python benchmarks/step_time.py [--d-model 128 --stacks 4 --blocks 1 --seq-len 64 --batch-size 12 --vocab 68]

Both train copies of one Rack on the same batches, and take turns within one process: a block of steps of one, then the
same block of the other, so that whatever else the machine does slows them alike. Ours is the loop as
``stackwise train`` drives it, with its data order, checks, clipping, and metrics written every 10 steps (or more often,
so that each block has some); what is timed is everything between two of its requests for an example. The plain loop has
its batches sliced beforehand and does nothing but train.

Without options two settings are run: nanoGPT's for a CPU, and a larger one. The last line is JSON; ``ratio`` is ours
over the plain loop's, of the medians (of the setting where it is smallest). ``ratio_of_cpu_time`` is the
same of processor time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stackwise.config import StackWiseConfig
from stackwise.model.architecture import Rack, create_rack_from_config
from stackwise.objectives import CausalObjective, Objective
from stackwise.objectives.base import Example
from stackwise.ops.precision import autocast
from stackwise.planning.plan import plan_phases
from stackwise.runs.build import create_loop
from stackwise.store.rundir import RunDir
from stackwise.training.memory import PeakMemory
from stackwise.training.progress import SilentReporter
from stackwise.training.sources import ProgressiveDataLoader, TokenSource

NANOGPT = {"d_model": 128, "heads": 4, "stacks": 4, "blocks": 1, "seq_len": 64, "batch_size": 12, "vocab": 68}
LARGER = {"d_model": 256, "heads": 4, "stacks": 3, "blocks": 2, "seq_len": 256, "batch_size": 8, "vocab": 4096}
WARMUP_ROUNDS = 2


class PlainLoop:
    """The same training, written for nothing else: AdamW (fused), clipping, warm-up and cosine."""

    def __init__(
        self, rack: Rack, batches: list[torch.Tensor], config: StackWiseConfig, dtype: torch.dtype | None
    ) -> None:
        self.rack, self.batches, self.dtype = rack, batches, dtype
        self.training, self.done, self.loss = config.training, 0, torch.zeros(())
        settings = config.training.optimizer
        matrices = [p for p in rack.parameters() if p.dim() >= 2]
        vectors = [p for p in rack.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)

    def run(self, steps: int) -> None:
        rack, optimizer, training = self.rack, self.optimizer, self.training
        device, warmup = rack.device, training.schedule.warmup_steps
        for step in range(self.done, self.done + steps):
            fall = max(0.0, (step + 1 - warmup) / (len(self.batches) - warmup))
            low = training.schedule.min_lr_ratio
            lr = training.optimizer.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * fall)))
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / warmup)
            batch = self.batches[step].to(device, non_blocking=True)
            with autocast(device, self.dtype):
                logits = rack(batch[:, :-1])
                self.loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            self.loss.backward()
            assert training.grad_clip is not None
            torch.nn.utils.clip_grad_norm_(rack.parameters(), training.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.done += steps


class Turns:
    """The loop's source of examples; every ``block`` steps it lets the plain loop take as many, and reads the clock."""

    def __init__(self, source: TokenSource, plain: PlainLoop, block: int, device: torch.device) -> None:
        self.source, self.plain, self.block, self.device = source, plain, block, device
        self.ours: list[np.ndarray] = []
        self.plains: list[np.ndarray] = []
        self._resumed = np.zeros(2)

    def during(self, objective: Objective) -> Turns:
        """One objective, in all phases."""
        return self

    def example(self, step: int) -> Example:
        if step % self.block == 0:
            if step:
                self.ours.append(self._now() - self._resumed)
            if self.plain.done < len(self.plain.batches):
                start = self._now()
                self.plain.run(self.block)
                self.plains.append(self._now() - start)
            self._resumed = self._now()
        return self.source.example(step)

    def _now(self) -> np.ndarray:
        """Seconds of the clock and of this process' processor time, (2,)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return np.array([time.perf_counter(), time.process_time()])


def measure(shape: dict[str, int], rounds: int, block: int, device: str, folder: Path) -> dict[str, Any]:
    """Seconds of each block, ours and plain, and what follows from their medians."""
    steps = (WARMUP_ROUNDS + rounds) * block
    config = StackWiseConfig.from_dict(
        {
            "model": {
                "d_model": shape["d_model"],
                "n_heads": shape["heads"],
                "vocab_size": shape["vocab"],
                "architecture": {"n_stacks": shape["stacks"], "blocks_per_stack": shape["blocks"]},
            },
            "training": {
                "strategy": "end_to_end",
                "batch_size": shape["batch_size"],
                "seq_len": shape["seq_len"],
                "max_steps": steps + 1,  # one more: the loop's last step also saves, which the plain loop does not
                "schedule": {"kind": "cosine", "warmup_steps": 10},
                "checkpoint": {"every_steps": 10**9},
                "logging": {"every_steps": min(10, block)},  # some in every block
                "device": device,
            },
        }
    )
    tokens = np.random.default_rng(0).integers(0, shape["vocab"], 500_000, dtype=np.uint16)
    loader = ProgressiveDataLoader(tokens, config)
    batches = [torch.from_numpy(loader.batch(step).tokens) for step in range(steps)]
    planned = plan_phases(config, shape["vocab"])
    rack = create_rack_from_config(config).to(planned.device)
    if planned.device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    plain = PlainLoop(copy.deepcopy(rack), batches, config, planned.compute_dtype)
    objective = CausalObjective()
    turns = Turns(TokenSource(loader, objective), plain, block, planned.device)
    run = RunDir.create(folder, config.to_yaml())
    create_loop(
        config, rack, planned, turns, {"clm": objective}, SilentReporter(), PeakMemory(planned.device), run=run
    ).train()
    ours, ours_cpu = np.array(turns.ours[WARMUP_ROUNDS:]).T
    plains, plains_cpu = np.array(turns.plains[WARMUP_ROUNDS:]).T
    last = next(line["loss"] for line in reversed(run.read_metrics()) if line["step"] <= steps)
    block_tokens = block * config.training.batch_size * config.training.seq_len
    return {
        **shape,
        "device": str(planned.device),
        "rounds": rounds,
        "steps_a_round": block,
        "tokens_per_second": round(block_tokens / statistics.median(ours), 1),
        "plain_tokens_per_second": round(block_tokens / statistics.median(plains), 1),
        "ratio": round(statistics.median(plains) / statistics.median(ours), 4),
        "median_of_round_ratios": round(statistics.median(p / o for p, o in zip(plains, ours)), 4),
        "ratio_of_cpu_time": round(statistics.median(plains_cpu) / statistics.median(ours_cpu), 4),
        "ours_ms": round(1000 * statistics.median(ours) / block, 3),
        "plain_ms": round(1000 * statistics.median(plains) / block, 3),
        "loss": last,
        "plain_loss": float(plain.loss.detach()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in NANOGPT.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default {value}, or both settings")
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each loop")
    parser.add_argument("--steps", type=int, help="steps in a block; default 2 to 10, about 8,000 tokens")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    options = parser.parse_args()
    given = {name: value for name in NANOGPT if (value := getattr(options, name)) is not None}
    results = []
    for shape in [{**NANOGPT, **given}] if given else [NANOGPT, LARGER]:
        block = options.steps or min(10, max(2, 8_000 // (shape["batch_size"] * shape["seq_len"])))
        with tempfile.TemporaryDirectory() as folder:
            result = measure(shape, options.rounds, block, options.device, Path(folder) / "run")
        print(
            f"width {shape['d_model']}, {shape['stacks'] * shape['blocks']} blocks, context {shape['seq_len']}, "
            f"batch {shape['batch_size']}, vocabulary {shape['vocab']}: ours {result['ours_ms']:.2f} ms, "
            f"plain {result['plain_ms']:.2f} ms a step, ratio {result['ratio']:.3f}"
        )
        results.append(result)
    print(
        json.dumps(
            {
                "benchmark": "step_time",
                "ratio": min(result["ratio"] for result in results),
                "settings": results,
                "hardware": {
                    "machine": platform.machine(),
                    "cpu": _cpu(),
                    "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(),
                    "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                },
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
            }
        )
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
