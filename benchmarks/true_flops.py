"""What the runs of ``objectives*.json`` took, the optimizer's products included: by the plan of the same config.

    python benchmarks/true_flops.py [FILE …] [--write]

A row whose ``flops`` leave Muon's iterations out gets those of the same number of steps, and keeps the others as
``flops_without_optimizer`` (--write puts both into the file). A row's vocabulary is found from its number of
parameters.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

from objectives import WIDTH, T, configured

RESULTS = Path(__file__).parent / "results"
BATCH = 16


@cache
def step_flops(name: str, parameters: int) -> tuple[float, float]:
    """Of one step of an end-to-end run: without and with the optimizer's products."""
    from stackwise.model.architecture import create_rack_from_config
    from stackwise.planning.plan import plan_phases

    config = configured(name, 0, 1e13, "text", Path("."))
    shared = create_rack_from_config(config, vocab_size=1)
    vocab_size = 1 + (parameters - sum(p.numel() for p in shared.parameters())) // (2 * WIDTH)
    (cost,) = plan_phases(config, vocab_size).costs
    return cost.flops - cost.kinds.optimizer, cost.flops


def corrected(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what its steps took; as it is, where it has that already. SystemExit where it has neither."""
    steps = row["tokens"] / (BATCH * T)
    without, whole = (steps * flops for flops in step_flops(row["name"], row["parameters"]))
    if abs(row["flops"] / whole - 1) < 1e-3:
        return row
    if abs(row["flops"] / without - 1) > 1e-3:
        raise SystemExit(f"{row['name']}: {row['flops']:.4g} FLOPs are not those of {steps:.0f} steps: {without:.4g}")
    return {**row, "flops": whole, "flops_without_optimizer": row["flops"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(RESULTS.glob("objectives*.json")))
    parser.add_argument("--write", action="store_true", help="keep them in the files")
    options = parser.parse_args()
    for file in options.files:
        found = json.loads(file.read_text())
        found["runs"] = [corrected(row) for row in found["runs"]]
        print(f"{file.name}\n| objective | seed | FLOPs | without the optimizer's products |\n|---|---|---|---|")
        for row in found["runs"]:
            without = row.get("flops_without_optimizer")
            shown = "" if without is None else f"{without:.3g}"
            print(f"| {row['name']} | {row['seed']} | {row['flops']:.3g} | {shown} |")
        if options.write:
            file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
