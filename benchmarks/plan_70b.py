"""``plan`` for the Llama 3 70B shape on one H200 against arithmetic by hand.

    python benchmarks/plan_70b.py [--json]

Nothing is trained: each mode is planned at 4096 tokens, one sequence a step, in bfloat16 autocast. By hand: bytes of
stored weights, 16 bytes for each parameter that AdamW trains, activations of flash attention in bfloat16, two FLOPs a
weight and token for a frozen Stack and six for one that trains. Then the same modes beside 131 GiB, 128 GiB of host
memory and 64 GiB of disk.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stackwise.config import StackWiseConfig
from stackwise.growth.curricula import build_phases
from stackwise.ops.boundary import bytes_per_row
from stackwise.planning.cost import PhaseCoster, preparation_flops
from stackwise.planning.devices import named_machine
from stackwise.planning.dry_step import PhaseCost
from stackwise.planning.plan import plan_run

CONFIG = Path(__file__).parents[1] / "configs/models/llama_70b.yaml"
V, BLOCKS, T = 128256, 80, 4096
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A figure by the planner and by hand. ``differs``: why, where that is more than 5 %."""

    what: str
    planned: float
    by_hand: float
    unit: str
    differs: str = ""

    @property
    def ratio(self) -> float:
        return self.planned / self.by_hand


def mode(blocks: int, *overrides: str, steps: int = 1) -> StackWiseConfig:
    """Append on a frozen trunk, Stacks of so many Blocks, ``steps`` a phase, one sequence of T a step."""
    settings = [
        f"model.architecture={{n_stacks: {BLOCKS // blocks}, blocks_per_stack: {blocks}}}",
        "training.batch_size=1",
        "training.progressive.trunk_strategy=frozen",
        f"training.max_steps={steps * BLOCKS // blocks}",
    ]
    return StackWiseConfig.from_yaml(CONFIG, [*settings, *overrides])


def costs_of(config: StackWiseConfig) -> tuple[list[PhaseCost], float]:
    """A step of the first, the second (the first one over a trunk) and the last phase, and the FLOPs of the run."""
    cost = PhaseCoster(config, V, torch.bfloat16, device="cuda")
    phases = build_phases(config)
    costs = [cost(phase) for phase in phases]
    before = preparation_flops(phases, costs)
    return costs, sum(first + phase.steps * c.flops for first, phase, c in zip(before, phases, costs))


def stored(precision: str) -> str:
    return f"training.progressive.trunk_precision={precision}"


def comparison() -> list[Row]:
    """Every figure, both ways."""
    rows = []
    full, _ = costs_of(mode(1))
    block = full[2].parameters - full[1].parameters
    rows.append(Row("parameters of a block", block, 855.65e6, ""))
    state = (full[1].gradients + full[1].gradients + full[1].optimizer) / full[1].trainable_parameters
    rows.append(Row("AdamW, of a block", state * block / GIB, 12.8, "GiB"))
    head = full[1].trainable_parameters - block
    rows.append(Row("AdamW, of the head", state * head / GIB, 15.6, "GiB"))
    for precision, trunk in (("bfloat16", 127.5), ("fp8", 65.8), ("nvfp4", 35.9), ("nf4", 35.9)):
        costs, _ = costs_of(mode(1, stored(precision)))
        one = costs[-1].weights - costs[-2].weights
        rows.append(Row(f"trunk in {precision}", BLOCKS * one / GIB, trunk, "GiB"))
    for format, by_hand in (("bfloat16", 16384), ("fp8", 8448)):
        rows.append(Row(f"cache in {format}, a token", bytes_per_row(format, 8192), by_hand, "B"))

    two, four = (costs_of(mode(n, stored("nf4")))[0][-1] for n in (2, 4))
    copies = 2 * block  # of the trained weights, in bfloat16, for the products
    rows.append(
        Row(
            "activations of a block, a token", ((four.activations - two.activations) / 2 - copies) / T, 274432, "B",
            "by hand: a bfloat16 residual; here it is fp32, twice 16 KiB more",
        )
    )  # fmt: skip
    cached = "training.progressive.cache_activations=true"
    for blocks, resident, fed in ((1, 68.0, 33.5), (4, 108.0, 74.5)):
        (*_, last), _ = costs_of(mode(blocks, stored("nf4")))
        rows.append(Row(f"nf4 trunk resident, {blocks}-block Stacks", last.peak / GIB, resident, "GiB"))
        (*_, last), _ = costs_of(mode(blocks, stored("nf4"), cached))
        why = (
            "by hand: AdamW, activations and 4.9 GiB of logits at once; here the loss never makes them all, and the "
            "gradients of later Blocks do not meet the activations of earlier ones"
        )
        rows.append(Row(f"cached, {blocks}-block Stacks", last.peak / GIB, fed, "GiB", why))

    # Relative to end to end at the same tokens a Block: 6 N T by hand, its own plan here; both hold attention or not.
    whole = mode(1, "training.strategy=end_to_end", "training.progressive.trunk_strategy=trainable")
    _, all_steps = costs_of(whole)
    for blocks, recomputed, fed in ((1, 14.9, 2.48), (4, 4.3, 1.59), (8, 2.6, 1.44)):
        for name, overrides, by_hand in (("recomputed", (), recomputed), ("cached", (cached,), fed)):
            _, flops = costs_of(mode(blocks, stored("nf4"), *overrides))
            steps = BLOCKS  # of the run that `whole` is: one for each of its Stacks
            rows.append(Row(f"FLOPs, {name}, {blocks}-block Stacks", flops / (all_steps / steps), by_hand, "×"))
    return rows


def on_one_h200() -> list[dict[str, object]]:
    """Which modes fit 131 GiB, 128 GiB of host memory and 64 GiB of disk, a thousand steps a phase."""
    found = []
    lean = ["training.checkpoint.keep_last=1"]
    cached = [stored("nf4"), "training.progressive.cache_activations=true", "training.cache.max_bytes=8000000000"]
    modes: dict[str, tuple[int, list[str]]] = {
        "bfloat16 trunk resident, 1 block": (1, [stored("bfloat16")]),
        "fp8 trunk resident, 1 block": (1, [stored("fp8")]),
        "nf4 trunk resident, 1 block": (1, [stored("nf4")]),
        "nf4 trunk resident, 4 blocks": (4, [stored("nf4")]),
        "nf4 trunk on the host, 4 blocks": (4, [stored("nf4"), "training.offload=host"]),
        "nf4, cached, 1 block": (1, cached),
        "nf4, cached, 4 blocks": (4, cached),
        "nf4, cached, 8 blocks": (8, cached),
    }
    for name, (blocks, overrides) in modes.items():
        config = mode(blocks, *overrides, *lean, steps=1000)
        machine = replace(named_machine("h200", config.training), host_memory=128 * 2**30, disk=64 * 2**30)
        plan = plan_run(config, Path.cwd(), machine=machine)
        found.append({"mode": name, **plan.totals(), "missing": plan.missing})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    start = time.perf_counter()
    rows, fits = comparison(), on_one_h200()
    seconds = time.perf_counter() - start
    if options.json:
        compared = [{**vars(row), "ratio": row.ratio} for row in rows]
        print(json.dumps({"compared": compared, "one_h200": fits, "seconds": seconds}, indent=2))
        return
    print(f"{'':40}{'planned':>14}{'by hand':>14}{'ratio':>9}")
    for row in rows:
        digits = 0 if row.by_hand > 1000 else 2
        print(f"{row.what:40}{row.planned:14,.{digits}f}{row.by_hand:14,.{digits}f}{row.ratio:9.3f}  {row.unit}")
        if abs(row.ratio - 1) > 0.05:
            print(f"    {row.differs}")
    print(f"\n{'on one H200':40}{'peak GiB':>10}{'host GiB':>10}{'disk GiB':>10}  fits")
    for found in fits:
        sizes = "".join(f"{found[k] / GIB:10.1f}" for k in ("peak_memory_bytes", "host_memory_bytes", "disk_bytes"))  # type: ignore[operator]
        missing = found["missing"]
        assert isinstance(missing, list)
        print(f"{found['mode']:40}{sizes}  {'no: ' + ', '.join(missing) if missing else 'yes'}")
    print(f"all of it planned in {seconds:.0f} s")


if __name__ == "__main__":
    main()
