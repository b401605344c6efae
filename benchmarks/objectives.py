"""Objectives at equal FLOPs on one text: bits per byte, training memory, what sampling costs.

    python benchmarks/objectives.py TEXT [--seeds 0,1] [--flops 1.49e13] [--only NAME,…]
                                      [--out FILE] [--picture FILE] [--runs FOLDER]

One model for all: 8 Blocks of width 128, 1.6 M parameters, characters, products in bfloat16, Muon. clm is exact, the
others are bounds with their standard error, clustered by sequence; they train with weight_power 0.5, all but prefix,
which has no such choice. Depth as time has K Stacks of 8/K Blocks; "grown" trains one Stack after another, the rest
frozen. Each run is a process of its own on one thread. Sampling: Blocks run times positions they run on, for each
token of a text of 64; clm left to right, blocks one token a step (the sampler that the bound is of), prefix one pass,
the rest 32 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BLOCKS, WIDTH, T = 8, 128, 64
SAMPLER_STEPS = 32

RUNS: dict[str, dict[str, Any]] = {
    "clm": {"objective": "clm"},
    "diffusion": {},
    "block 4": {"diffusion": {"block_length": 4}},
    "block 16": {"diffusion": {"block_length": 16}},
    **{
        f"{variant} K={k}": {"variant": variant, "stacks": k}
        for k in (2, 4, 8)
        for variant in ("experts", "suffix", "prefix")
    },
    **{f"{variant} K=2 grown": {"variant": variant, "stacks": 2, "grown": True}
       for variant in ("experts", "suffix", "prefix")},
}  # fmt: skip


def configured(name: str, seed: int, flops: float, text: str, folder: Path) -> Any:
    from stackwise.config import StackWiseConfig

    run = RUNS[name]
    stacks, variant, grown = run.get("stacks", 1), run.get("variant"), run.get("grown", False)
    progressive: dict[str, Any] = {"training_objective": run.get("objective", "diffusion")}
    clm = run.get("objective") == "clm"
    diffusion = dict(run.get("diffusion", {}))
    if not clm and variant != "prefix":
        diffusion |= {"weighting": "exact_counts", "weight_power": 0.5}
    if variant is not None:
        progressive["time_interpretation"] = "depth"
        diffusion["depth_variant"] = variant
    if grown:
        progressive |= {
            "trunk_strategy": "frozen",
            "building_mode": "prepend" if variant == "suffix" else "append",
            "new_stack_init": "copy" if variant == "experts" else "identity",
        }
    training = {
        "strategy": "progressive" if grown else "end_to_end",
        "batch_size": 16,
        "seq_len": T,
        "max_flops": flops,
        "seed": seed,
        "device": "cpu",
        "cpu_allocator": "tight",
        "progressive": progressive,
        "diffusion": diffusion,
        "evaluation": {"max_tokens": 40_000, "draws": 1 if clm else 2},
        "checkpoint": {"keep_last": 1},
        "compute_dtype": "bfloat16",
        "optimizer": {"optimizer_type": "muon", "lr": 4e-3, "betas": [0.9, 0.99]},
        "schedule": {"kind": "wsd", "warmup_steps": 50, "decay_fraction": 0.3, "min_lr_ratio": 0.05},
    }
    model = {
        "d_model": WIDTH,
        "n_heads": 4,
        "rope_theta": 100.0,
        "architecture": {"n_stacks": stacks, "blocks_per_stack": BLOCKS // stacks},
    }
    data = {
        "source": "files",
        "path": text,
        "tokenizer": {"kind": "characters"},
        "cache_dir": str(folder / "store"),
    }
    return StackWiseConfig.from_dict({"model": model, "training": training, "data": data})


def sampling_cost(loaded: Any) -> float:
    """Blocks run times positions, for each of T tokens."""
    import torch

    from stackwise.generation.autoregressive import generate
    from stackwise.generation.denoisers import RackDenoiser, generate_blocks
    from stackwise.generation.diffusion import unmask
    from stackwise.objectives import create_objective
    from stackwise.objectives.depth import levels_of

    calls = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal calls
        calls += output.shape[0] * output.shape[1]

    for block in loaded.rack.blocks():
        block.register_forward_hook(count)
    training, mask_id = loaded.config.training, loaded.tokenizer.mask_id
    if training.objective == "clm":
        list(generate(loaded.rack, torch.full((1, 1), loaded.tokenizer.end_id), T))
        return calls / T
    gaps = torch.full((1, T), mask_id)
    if training.diffusion.block_length is not None:
        list(
            generate_blocks(loaded.rack, gaps, training.diffusion.block_length, mask_id=mask_id, order="first_hitting")
        )
        return calls / T
    denoise = RackDenoiser(loaded.rack, create_objective(loaded.config, loaded.tokenizer))
    prefix = training.depth_variant == "prefix"
    how: dict[str, Any] = {"levels": levels_of(loaded.config)} if prefix else {"steps": SAMPLER_STEPS}
    list(unmask(denoise, gaps, mask_id=mask_id, **how))
    return calls / T


def run(name: str, seed: int, flops: float, text: str, runs: Path | None) -> dict[str, Any]:
    import torch

    from stackwise.runs.run import load, train_run
    from stackwise.training.progress import SilentReporter

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run" if runs is None else runs / f"{name} seed {seed}"
        config = configured(name, seed, flops, text, Path(folder))
        summary = train_run(config, out, SilentReporter())
        loaded = load(out)
        return {
            "name": name,
            "seed": seed,
            "parameters": sum(p.numel() for p in loaded.rack.parameters()),
            "bits_per_byte": summary["validation"]["bits_per_byte"],
            "nats_per_token": summary["validation"]["loss"],
            "standard_error": summary.get("nelbo", {}).get("standard_error"),
            "tokens": summary["tokens"],
            "flops": summary["flops"],
            "peak_memory_bytes": summary["peak_memory_bytes"],
            "seconds": summary["wall_seconds"],
            "block_calls_per_token": sampling_cost(loaded),
        }


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("objective", "bits per byte", "FLOPs", "tokens", "peak MiB", "Blocks a token", "s")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        some = [row for row in rows if row["name"] == name]
        errors = [error for row in some if (error := row.get("standard_error")) is not None]
        shown = " / ".join(f"{row['bits_per_byte']:.3f}" for row in some)
        if errors:
            per_nat = some[0]["bits_per_byte"] / some[0]["nats_per_token"]
            shown = f"≤ {shown} ± {max(errors) * per_nat:.3f}"
        peak = statistics.mean(row["peak_memory_bytes"] for row in some) / 2**20
        seconds = statistics.mean(row["seconds"] for row in some)
        lines.append(
            f"| {name} | {shown} | {some[0]['flops']:.3g} | {some[0]['tokens']:,} | {peak:.0f} "
            f"| {some[0]['block_calls_per_token']:.0f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """What K costs: bits per byte against the number of Stacks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    means: dict[str, float] = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        means[name] = statistics.mean(row["bits_per_byte"] for row in rows if row["name"] == name)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for variant in ("experts", "suffix", "prefix"):
        points = [(k, means[f"{variant} K={k}"]) for k in (2, 4, 8) if f"{variant} K={k}" in means]
        axes.plot(*zip(*points), marker="o", label=f"{variant} (≤)")
    for name, style in (("clm", "-"), ("diffusion", "--"), ("block 4", ":"), ("block 16", "-.")):
        if name in means:
            axes.axhline(means[name], linestyle=style, color="black", linewidth=1, label=name)
    axes.set(xlabel="K: Stacks that share the noise levels", ylabel="bits per byte", xscale="log", xticks=(2, 4, 8))
    axes.minorticks_off()
    axes.set_xticklabels(("2", "4", "8"))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--flops", type=float, default=1.49e13)
    parser.add_argument("--only", help="names of runs, separated by commas (default: all)")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file, and keep those that it has")
    parser.add_argument("--picture", type=Path, help="draw bits per byte against K (needs matplotlib)")
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder (default: they are deleted)")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help="run one, in this process, and print JSON")
    options = parser.parse_args()
    text = str(Path(options.text).resolve())
    if options.one:
        print(json.dumps(run(options.one[0], int(options.one[1]), options.flops, text, options.runs)))
        return
    names = options.only.split(",") if options.only else list(RUNS)
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        parser.error(f"--only: there is no {unknown[0]!r}; there are {', '.join(RUNS)}")
    rows: list[dict[str, Any]] = []
    if options.out is not None and options.out.exists():
        rows = [
            row for row in json.loads(options.out.read_text())["runs"] if 0.97 < row["flops"] / options.flops < 1.01
        ]
    for seed in map(int, options.seeds.split(",")):
        for name in names:
            if any((row["name"], row["seed"]) == (name, seed) for row in rows):
                continue
            command = [sys.executable, __file__, text, "--flops", str(options.flops), "--one", name, str(seed)]
            command += [] if options.runs is None else ["--runs", str(options.runs)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            if done.returncode:
                raise SystemExit(f"{name}, seed {seed}: {done.stderr}")
            rows.append(json.loads(done.stdout))
            print(f"{name}, seed {seed}: {rows[-1]['bits_per_byte']:.4f} bits per byte", file=sys.stderr, flush=True)
            if options.out is not None:
                result = {
                    "command": "python benchmarks/objectives.py",
                    "machine": {"processor": platform.machine(), "threads": 1},
                    "versions": {"python": platform.python_version(), "torch": __import__("torch").__version__},
                    "runs": rows,
                }
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    if options.picture is not None:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
