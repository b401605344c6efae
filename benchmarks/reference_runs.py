"""Tiny runs of every kind, and what each ended in: a change that is meant to change no number is checked against them.

    python benchmarks/reference_runs.py                    # run all and write benchmarks/results/reference_runs.json
    python benchmarks/reference_runs.py --check            # run all and compare with that file
    python benchmarks/reference_runs.py --check --against HEAD~3   # ... with the same runs of another commit
    python benchmarks/reference_runs.py --check --only nf4,muon

Every run goes through the command line (two through the trainers in Python), on one thread, and ends in the hash of
all weights, the validation loss, the FLOPs and the planned peak of memory. Weights are equal bit for bit on one kind of
processor with one version of torch only. Where the file was written on another one, ``--check`` says so and compares
FLOPs and planned memory exactly and losses to 2e-3; ``--against`` then makes the reference here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "reference_runs.json"
LOSS_TOLERANCE = 2e-3
"""Between processors, whose rounding differs; relative."""


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        covers: what it is there for.
        settings: ``key.path=value`` that differ from ``BASE``.
        recipe: a recipe, by name.
        start: the case whose run this one starts from (``train --from``).
        back_to: after the run has ended, it is resumed from the checkpoint of this step and must end the same.
    """

    covers: str
    settings: tuple[str, ...] = ()
    recipe: str | None = None
    start: str | None = None
    back_to: int | None = None


BASE: dict[str, Any] = {
    "model": {
        "d_model": 32, "n_heads": 4, "d_ff": 48, "architecture": {"n_stacks": 3, "blocks_per_stack": 2},
    },
    "training": {
        "batch_size": 6, "seq_len": 24, "max_steps": 18, "device": "cpu", "seed": 5,
        "optimizer": {"lr": 0.003}, "schedule": {"warmup_steps": 2, "rewarmup_steps": 2},
        "evaluation": {"max_tokens": 480}, "checkpoint": {"every_steps": 4, "keep_last": 9},
    },
    "data": {"source": "files", "tokenizer": {"kind": "bytes"}},
}  # fmt: skip

_OBJECTIVE = "training.progressive.training_objective="
_TIME = "training.progressive.time_interpretation="
_PRESET = "model.attention_preset="
_OPTIMIZER = "training.optimizer.optimizer_type="
_TRUNK = "training.progressive.trunk_precision="
_FROZEN = "training.progressive.trunk_strategy=frozen"
_QLORA = ("training.progressive.trunk_strategy=qlora", "training.qlora.enabled=true")
_DEPTH = (_OBJECTIVE + "diffusion", _TIME + "depth")
_ONE = ("training.strategy=end_to_end", "training.max_steps=8")

CASES: dict[str, Case] = {
    # curricula and trunks
    "end-to-end": Case("one phase", recipe="end-to-end", back_to=8),
    "grown": Case("append, trunk trains, copied Stacks", recipe="grown", back_to=8),
    "append-frozen": Case("append, frozen trunk", recipe="append-frozen"),
    "append-joint": Case("a joint phase after frozen ones", recipe="append-frozen-joint"),
    "append-cached": Case("bfloat16 cache on disk", recipe="append-cached", back_to=8),
    "cached-fp8": Case(
        "fp8 cache in memory", ("training.cache.dtype=fp8", "training.cache.in_memory=true"), recipe="append-cached"
    ),
    "append-qlora": Case(
        "two adapters a Stack, with dropout", ("training.qlora.dropout=0.1", *_QLORA), recipe="append-qlora", back_to=8
    ),
    "prepend-frozen": Case("prepend", recipe="prepend-frozen"),
    "middle-insertion": Case("Stacks that join in the middle", recipe="middle-insertion"),
    "late-expansion": Case("two Stacks at once", recipe="late-expansion"),
    "stackwise": Case("end to end, scope stackwise", recipe="stackwise"),
    "blockwise": Case("end to end, scope blockwise", recipe="blockwise"),
    "block-coordinate": Case("sweeps over Blocks", recipe="block-coordinate", back_to=8),
    "fusion": Case("pairs, then all", recipe="fusion"),
    "gradual-unfreezing": Case("unfreezing", recipe="gradual-unfreezing"),
    # storage, and where Stacks wait
    "nf4-disk": Case(
        "nf4 trunk, streamed from disk", ("training.offload=disk", _FROZEN), recipe="append-frozen-nf4", back_to=8
    ),
    "int8-host": Case(
        "int8 trunk in host memory", ("training.offload=host", _TRUNK + "int8", _FROZEN), recipe="append-frozen"
    ),
    "nvfp4": Case("nvfp4 trunk", (_TRUNK + "nvfp4", _FROZEN), recipe="append-frozen"),
    "fp8-prepend": Case("fp8 trunk above the Stack that trains", (_TRUNK + "fp8", _FROZEN), recipe="prepend-frozen"),
    "bfloat16": Case(
        "bfloat16 weights that train", ("training.progressive.new_stack_precision=bfloat16",), recipe="append-frozen"
    ),
    # optimizers and the step
    "muon": Case("Muon, cosine", (_OPTIMIZER + "muon", "training.schedule.kind=cosine"), recipe="grown", back_to=8),
    "sgd": Case("SGD", (_OPTIMIZER + "sgd", "training.optimizer.lr=0.1"), recipe="grown"),
    "int8-in-backward": Case(
        "int8 moments, updates in the backward pass, micro-batches",
        (
            "training.optimizer.moments=int8",
            "training.optimizer.in_backward=true",
            "training.grad_clip=null",
            "training.micro_batch_size=2",
        ),
        recipe="grown",
        back_to=8,
    ),
    "bfloat16-moments": Case("bfloat16 moments", ("training.optimizer.moments=bfloat16",), recipe="append-frozen"),
    "accumulated": Case(
        "micro-batches, recomputed activations, dropout",
        ("training.micro_batch_size=2", "model.dropout=0.1"),
        recipe="grown-checkpointed",
    ),
    "chunked-loss": Case("a vocabulary whose logits come in chunks", ("model.vocab_size=31013", *_ONE)),
    # objectives and time
    "mlm": Case("masked spans", (_OBJECTIVE + "mlm", "training.masking.unit=span"), back_to=8),
    "diffusion": Case("stratified rates", (_OBJECTIVE + "diffusion",), back_to=8),
    "diffusion-exact": Case(
        "exact counts, flatter weights",
        (
            _OBJECTIVE + "diffusion",
            "training.diffusion.weighting=exact_counts",
            "training.diffusion.weight_power=0.5",
        ),
    ),
    "block-diffusion": Case(
        "blocks from left to right", (_OBJECTIVE + "diffusion", "training.diffusion.block_length=6")
    ),
    "time-input": Case("the noise level as an input", (_OBJECTIVE + "diffusion", _TIME + "input")),
    "depth-experts": Case("depth as time, experts", (*_DEPTH, "training.diffusion.depth_variant=experts"), back_to=8),
    "depth-suffix": Case(
        "depth as time, suffix",
        (*_DEPTH, "training.diffusion.depth_variant=suffix", "training.progressive.building_mode=prepend"),
    ),
    "depth-prefix": Case("depth as time, one pass", (*_DEPTH, "training.diffusion.depth_variant=prefix")),
    "two-objectives": Case(
        "masked phases, then a causal one",
        (
            "training.strategy=phases",
            "training.phases=[{add: rest, share: 0.6, objective: mlm}, {trains: all, objective: clm}]",
        ),
    ),
    # attention and the parts of a Block
    "bert_style": Case("preset", (_PRESET + "bert_style", _OBJECTIVE + "mlm", *_ONE)),
    "efficient_gqa": Case("preset", (_PRESET + "efficient_gqa", "model.n_kv_heads=2", *_ONE)),
    "mla_attention": Case("preset", (_PRESET + "mla_attention", *_ONE)),
    "kernel_attention": Case("preset", (_PRESET + "kernel_attention", *_ONE)),
    "mlgka": Case("preset", (_PRESET + "mlgka", *_ONE)),
    "custom": Case(
        "MLA with a kernel, learned positions, LayerNorm, GELU, tied head",
        (
            _PRESET + "custom",
            "model.attention_custom.attention_type=mla",
            "model.attention_custom.kernel_type=gaussian",
            "model.use_rope=false",
            "model.learned_positions=24",
            "model.norm=layernorm",
            "model.ffn=gelu",
            "model.tie_embeddings=true",
            *_ONE,
        ),
    ),
    "window": Case("local attention, QK-norm", ("model.window=7", "model.qk_norm=true", *_ONE)),
    # from another run
    "from-run": Case(
        "a Stack on the model of another run",
        ("training.progressive.target_stacks=4",),
        recipe="append-frozen",
        start="end-to-end",
    ),
}

PYTHON_CASES = ("classification", "custom-targets")
"""Runs of the trainers, with labels from a data loader."""

_PYTHON = """
import json, sys
import torch
from torch.utils.data import DataLoader
from stackwise.config import StackWiseConfig
from stackwise.training import ProgressiveRackBuilder, ProgressiveTrainer

name = sys.argv[1]
objective = "custom" if name == "custom-targets" else "classification"
training = {"max_steps": 12, "batch_size": 8, "seq_len": 12, "device": "cpu",
            "progressive": {"training_objective": objective, "target_stacks": 2}}
if objective == "classification":
    training["classification"] = {"classes": 3}
config = StackWiseConfig.from_dict({"model": {"vocab_size": 50, "d_model": 32, "n_heads": 2}, "training": training})
draw = torch.Generator().manual_seed(3)
rows = []
for i in range(96):
    ids = torch.randint(0, 50, (12,), generator=draw)
    rows.append({"input_ids": ids, "labels": torch.tensor(i % 3) if objective == "classification" else (ids * 7) % 50})
builder = ProgressiveRackBuilder(config)
results = ProgressiveTrainer(config).train_rack(builder, DataLoader(rows, batch_size=8))
digest = __import__("hashlib").sha256()
for key, value in sorted(builder.rack.state_dict().items()):
    digest.update(key.encode() + value.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(json.dumps({"weights": digest.hexdigest(), "loss": results["final_loss"], "flops": results["flops"]}))
"""


def write_text(path: Path) -> None:
    """Words whose letters follow one another by a fixed rule, so that there is something to learn."""
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(60)]
    path.write_text(" ".join(draw.choices(words, weights=range(1, 61), k=4000)))


@dataclass
class Bench:
    """Where runs of one source tree are made."""

    tree: Path
    folder: Path
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "text.txt")
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.tree / "src")}

    def _command(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], env=self.environment, cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(arguments)[:300]}\nended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def run(self, name: str) -> dict[str, Any]:
        """What the case ends in."""
        if name in PYTHON_CASES:
            return json.loads(self._command("-c", _PYTHON, name).splitlines()[-1])
        case, out = CASES[name], self.folder / "runs" / name
        config = self.folder / f"{name}.yaml"
        config.write_text(json.dumps(BASE))  # JSON is YAML
        given = (f"data.path={self.folder / 'text.txt'}", f"data.cache_dir={self.folder / 'store'}", *case.settings)
        recipe = ("--recipe", case.recipe) if case.recipe else ()
        start = ("--from", str(self.folder / "runs" / case.start)) if case.start else ()
        self._command("-m", "stackwise", "train", str(config), *given, *recipe, *start, "--out", str(out))
        summary = json.loads((out / "summary.json").read_text())
        plan = json.loads(self._command("-m", "stackwise", "plan", str(out / "config.yaml"), "--json"))
        result = {
            "weights": summary["weights_sha256"],
            "loss": summary["validation"]["loss"],
            "flops": summary["flops"],
            "planned_peak_bytes": plan["peak_memory_bytes"],
        }
        if case.back_to is not None:
            (out / "summary.json").unlink()
            self._command("-m", "stackwise", "resume", str(out), "--step", str(case.back_to))
            again = json.loads((out / "summary.json").read_text())["weights_sha256"]
            if again != result["weights"]:
                raise SystemExit(f"{name}: resumed from step {case.back_to} it ends in other weights ({again})")
        return result

    def run_all(self, names: list[str], jobs: int) -> dict[str, dict[str, Any]]:
        """Of each case; those that start from another run come last."""

        def one(name: str) -> dict[str, Any]:
            result = self.run(name)
            print(
                f"{name:20} {result['weights'][:16]}  loss {result['loss']:.6f}  {result['flops']:.6g} FLOPs",
                flush=True,
            )
            return result

        needed = {CASES[name].start for name in names if name in CASES} - {None} - set(names)
        first = [name for name in (*names, *sorted(filter(None, needed))) if name not in CASES or not CASES[name].start]
        results: dict[str, dict[str, Any]] = {}
        with ThreadPoolExecutor(jobs) as pool:
            for group in (first, [name for name in names if name not in first]):
                results.update(zip(group, pool.map(one, group)))
        return {name: results[name] for name in names}


def machine() -> dict[str, str]:
    import torch

    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "processor": model.partition(":")[2].strip() or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def differences(name: str, expected: dict[str, Any], found: dict[str, Any], exact: bool) -> list[str]:
    """What of ``found`` is not as expected."""
    if exact:
        wrong = [key for key in expected if expected[key] != found.get(key)]
    else:
        wrong = [key for key in ("flops", "planned_peak_bytes") if expected.get(key) != found.get(key)]
        if not math.isclose(expected["loss"], found["loss"], rel_tol=LOSS_TOLERANCE):
            wrong.append("loss")
    return [f"{name}: {key} is {found.get(key)}, expected {expected[key]}" for key in wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing the file")
    parser.add_argument(
        "--against", metavar="COMMIT", help="with --check: compare with the runs of this commit, made here"
    )
    parser.add_argument("--only", metavar="A,B,…", help="these cases (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [*CASES, *PYTHON_CASES]
    unknown = [name for name in names if name not in CASES and name not in PYTHON_CASES]
    if unknown:
        parser.error(f"--only: no case {unknown[0]!r}; there are {', '.join([*CASES, *PYTHON_CASES])}")
    if options.against and not options.check:
        parser.error("--against goes with --check")

    with tempfile.TemporaryDirectory() as scratch:
        here = machine()
        if options.against:
            tree = Path(scratch) / "tree"
            subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, options.against], check=True)
            try:
                expected = Bench(tree, Path(scratch) / "before").run_all(names, options.jobs)
            finally:
                subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
            exact = True
        elif options.check:
            stored = json.loads(RESULTS.read_text())
            expected = {name: stored["runs"][name] for name in names}
            keys = ("processor", "capability", "torch")
            exact = all(stored["machine"][key] == here[key] for key in keys)
            if not exact:
                print(
                    f"the file was written on {[stored['machine'][k] for k in keys]}, not {[here[k] for k in keys]}: "
                    f"hashes are not compared, losses to {LOSS_TOLERANCE:g} (--against COMMIT makes the reference here)"
                )
        found = Bench(ROOT, Path(scratch) / "runs").run_all(names, options.jobs)
    if not options.check:
        command = f"python {' '.join(['benchmarks/reference_runs.py', *sys.argv[1:]])}"
        RESULTS.write_text(json.dumps({"command": command, "machine": here, "runs": found}, indent=1) + "\n")
        print(f"{len(found)} runs written to {RESULTS.relative_to(ROOT)}")
        return
    wrong = [line for name in names for line in differences(name, expected[name], found[name], exact)]
    print("\n".join(wrong) or f"{len(names)} runs are {'bit-identical' if exact else 'as expected'}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
