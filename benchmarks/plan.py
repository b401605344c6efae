"""What ``plan`` says of memory and FLOPs against what training takes: every recipe at two sizes, and other shapes.

    python benchmarks/plan.py [--recipes A,B,…] [--shapes A,B,…] [--out benchmarks/results/plan_cpu.json]

Each run is a process of its own, in fp32 on one thread, a few steps in every phase. Measured memory is the resident
peak of each phase above what the process held before the model was built; FLOPs are those of ``FlopCounterMode`` on
one real step of each phase, of shorter batches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

SIZES: dict[str, dict[str, Any]] = {
    "512 × 3 Stacks of 1": {
        "d_model": 512, "n_heads": 8, "architecture": {"n_stacks": 3, "blocks_per_stack": 1},
    },
    "640 × 2 Stacks of 2": {
        "d_model": 640, "n_heads": 10, "architecture": {"n_stacks": 2, "blocks_per_stack": 2},
    },
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "vocabulary of 32000": {"model": {"d_model": 64, "n_heads": 2, "vocab_size": 32000}},
    "tied vocabulary of 8000": {"model": {"d_model": 256, "n_heads": 4, "vocab_size": 8000, "tie_embeddings": True}},
    "masked with a vocabulary of 16000": {
        "model": {"d_model": 256, "n_heads": 4, "vocab_size": 16000},
        "training": {"progressive": {"training_objective": "mlm"}},
    },
    "diffusion with a vocabulary of 16000": {
        "model": {"d_model": 256, "n_heads": 4, "vocab_size": 16000},
        "training": {"progressive": {"training_objective": "diffusion"}},
    },
    "context of 4096": {"model": {"d_model": 256, "n_heads": 4}, "batch": (1, 4096)},
    "context of 1024 with dropout": {"model": {"d_model": 256, "n_heads": 4, "dropout": 0.1}, "batch": (1, 1024)},
    "activations below 1 MiB": {"model": {"d_model": 512, "n_heads": 8, "n_stacks": 8}, "batch": (3, 128)},
    "4 micro-batches": {
        "model": {"d_model": 512, "n_heads": 8}, "training": {"micro_batch_size": 2}, "batch": (8, 256),
    },
    "4 micro-batches on a frozen trunk": {
        "recipe": "append-frozen", "model": {"d_model": 512, "n_heads": 8},
        "training": {"micro_batch_size": 2}, "batch": (8, 256),
    },
    "compiled": {"model": {"d_model": 512, "n_heads": 8}, "training": {"compile": True}},
    "odd widths": {"model": {"d_model": 518, "n_heads": 7, "d_ff": 1381, "n_stacks": 5}, "batch": (3, 251)},
    "int8 moments and updates in the backward pass": {
        "model": {"d_model": 512, "n_heads": 8},
        "training": {"optimizer": {"moments": "int8", "in_backward": True}, "grad_clip": None},
    },
    "bfloat16 products": {"model": {"d_model": 512, "n_heads": 8}, "training": {"compute_dtype": "bfloat16"}},
    "muon": {"model": {"d_model": 512, "n_heads": 8}, "training": {"optimizer": {"optimizer_type": "muon"}}},
}  # fmt: skip
"""Cases beside the recipes: end to end unless a recipe is named, 3 Stacks of 1 Block, batches of 4 × 256 tokens."""
STEPS = 2
"""In every phase at least: the moments are there from the second step on."""


def cases(recipes: str, shapes: str) -> list[tuple[str, str]]:
    """(recipe, size or shape) of every row."""
    from stackwise.growth.recipes import recipe_names

    wanted = SHAPES if shapes == "all" else [name for name in shapes.split(",") if name]
    rows = [(recipe, size) for size in SIZES for recipe in (recipe_names(recipes) if recipes else ())]
    return rows + [(SHAPES[shape].get("recipe", "end-to-end"), shape) for shape in wanted]


def configured(recipe: str, size: str, folder: Path, short: bool) -> Any:
    """The config of a recipe, with as many steps as give each phase ``STEPS``, or ``short`` ones, 1."""
    from stackwise.config import StackWiseConfig
    from stackwise.growth.curricula import build_phases
    from stackwise.growth.recipes import apply_recipe

    shape = SHAPES.get(size) or {"model": SIZES[size]}
    batch_size, seq_len = (1, 64) if short else shape.get("batch", (4, 256))
    model = {"architecture": {"n_stacks": shape["model"].get("n_stacks", 3), "blocks_per_stack": 1}, **shape["model"]}
    model.pop("n_stacks", None)
    given = {key: value for key, value in shape.get("training", {}).items() if not short or key != "micro_batch_size"}
    training = {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "device": "cpu",
        "cpu_allocator": "tight",
        "evaluation": {"max_tokens": seq_len},
        "checkpoint": {"keep_last": 1},
        "schedule": {"kind": "constant", "warmup_steps": 0, "rewarmup_steps": 0},
        **given,
    }
    data = {
        "source": "files",
        "path": str(folder / "text.txt"),
        "tokenizer": {"kind": "bytes"},
        "cache_dir": str(folder / "store"),
    }
    base = StackWiseConfig.from_dict({"model": model, "training": training, "data": data})
    config = apply_recipe(base, recipe)
    total = 1000
    shares = [phase.steps / total for phase in build_phases(config.changed({"training.max_steps": total}))]
    total = round((1 if short else STEPS) / min(shares) + len(shares))
    return config.changed({"training.max_steps": total})


def counted_flops(config: Any, out: Path) -> list[int]:
    """FLOPs of the first step of each phase, by torch's counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    from stackwise.runs.run import train_run
    from stackwise.store.state import RunState
    from stackwise.training.progress import SilentReporter
    from stackwise.training.stage import Stage
    from stackwise.training.step import Step, take_step

    def forward(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    kernels = {  # torch knows those of accelerators only
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    counts: list[int] = []

    def counting(stage: Stage, state: RunState) -> Step:
        if state.phase_step:
            return take_step(stage, state)
        with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
            result = take_step(stage, state)
        counts.append(counter.get_total_flops())
        return result

    with mock.patch("stackwise.training.loop.take_step", counting):
        train_run(config, out, SilentReporter())
    return counts


def run(recipe: str, size: str) -> dict[str, Any]:
    """Trains in this process; what was planned and what was measured, by phase."""
    import torch

    from stackwise.planning.plan import plan_run
    from stackwise.runs.run import train_run
    from stackwise.training.progress import SilentReporter

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh \n", k=300_000)))
        start = time.perf_counter()
        config = configured(recipe, size, folder, False)
        plan = plan_run(config, folder)
        summary = train_run(config, folder / "run", SilentReporter())
        short = configured(recipe, size, folder, True)
        flops = [cost.flops for cost in plan_run(short, folder).costs]
        counted = counted_flops(short, folder / "counted")
    assert len(counted) == len(flops) and len(summary["phases"]) == len(plan.phases)
    return {
        "recipe": recipe,
        "size": size,
        "phases": [
            {
                "name": phase["name"],
                "planned_bytes": cost.peak,
                "measured_bytes": phase["peak_memory_bytes"],
                "planned_step_flops": planned,
                "counted_step_flops": real,
            }
            for phase, cost, planned, real in zip(summary["phases"], plan.costs, flops, counted)
        ],
        "seconds": round(time.perf_counter() - start, 1),
    }


def summed(row: dict[str, Any]) -> dict[str, float]:
    """Of a run: its peak, planned and measured, and the ratios that are furthest from 1 in any phase."""
    phases = row["phases"]
    memory = [phase["planned_bytes"] / phase["measured_bytes"] for phase in phases]
    flops = [phase["planned_step_flops"] / phase["counted_step_flops"] for phase in phases]
    planned, measured = (max(phase[key] for phase in phases) for key in ("planned_bytes", "measured_bytes"))
    return {
        "planned_bytes": planned,
        "measured_bytes": measured,
        "memory_ratio": planned / measured,
        "worst_phase_memory_ratio": max(memory, key=lambda ratio: abs(ratio - 1)),
        "worst_phase_flops_ratio": max(flops, key=lambda ratio: abs(ratio - 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="all", help="or names, or an empty string for none")
    parser.add_argument("--shapes", default="all", help="or names, or an empty string for none")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--one", nargs=2, metavar=("RECIPE", "SIZE"), help="run one, in this process, and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(*options.one)))
        return
    rows = []
    print(
        f"{'recipe':26}{'size':44}{'measured MiB':>13}{'planned MiB':>13}{'ratio':>8}{'phase':>8}{'FLOPs':>8}{'s':>6}"
    )
    for recipe, size in cases(options.recipes, options.shapes):
        command = [sys.executable, __file__, "--one", recipe, size]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            raise SystemExit(f"{recipe}, {size}: {done.stderr}")
        row = json.loads(done.stdout)
        row |= summed(row)
        rows.append(row)
        print(
            f"{recipe:26}{size:44}{row['measured_bytes'] / 2**20:13.0f}{row['planned_bytes'] / 2**20:13.0f}"
            f"{row['memory_ratio']:8.3f}{row['worst_phase_memory_ratio']:8.3f}"
            f"{row['worst_phase_flops_ratio']:8.4f}{row['seconds']:6.0f}",
            flush=True,
        )
    furthest = {
        key: max((row[key] for row in rows), key=lambda ratio: abs(ratio - 1))
        for key in ("memory_ratio", "worst_phase_memory_ratio", "worst_phase_flops_ratio")
    }
    if options.out is not None:
        import torch

        result = {
            "command": "python benchmarks/plan.py",
            "machine": {"processor": platform.processor() or platform.machine(), "threads": 1},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "furthest_from_1": furthest,
            "runs": rows,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(furthest))


if __name__ == "__main__":
    main()
