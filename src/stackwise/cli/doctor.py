"""``stackwise doctor``: what this machine has, as far as training is concerned."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise import __version__
from stackwise.data.cache import cache_root
from stackwise.files import nearest_folder
from stackwise.units import size

if TYPE_CHECKING:
    import torch

_FASTER = 1.2
"""A dtype counts as faster from this ratio on; below it the timing says nothing."""
_FEWEST_TURNS, _MOST_TURNS, _SECONDS = 3, 9, 1.0
"""A timing takes as many turns as fit in the seconds, after one that only warms up."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show what this machine has, and how fast it computes."""
    from stackwise.cli.results import print_json

    facts = examine()
    if as_json:
        print_json(facts, "Doctor")
        return
    print(describe(facts))


def examine() -> dict[str, Any]:
    """Everything ``doctor`` knows: sizes in bytes, speeds in FLOP/s, ``None`` where this system does not tell."""
    import torch

    from stackwise.config.run import TrainingConfig
    from stackwise.ops.precision import resolve_compute_dtype, resolve_device
    from stackwise.training.memory import PeakMemory

    device = resolve_device("auto")
    speeds = linear_speeds(device, compared_dtypes(device))
    automatic = "float32" if resolve_compute_dtype(TrainingConfig(), device) is None else "bfloat16"
    cache = cache_root()
    return {
        "stackwise": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "threads": torch.get_num_threads(),
        },
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "simd": torch.backends.cpu.get_cpu_capability(),
        },
        "memory": _memory(),
        "resident_peak_measurable": PeakMemory(torch.device("cpu")).measurable,
        "disk": {"here_free": _free(Path.cwd()), "cache_free": _free(cache)},
        "cache": {"path": str(cache), "bytes": _size(cache)},
        "accelerators": _accelerators(),
        "compute": {
            "device": device.type,
            "flops_per_second": speeds,
            "auto_dtype": automatic,
            "advice": advice(speeds, automatic),
        },
        "extras": _extras(),
    }


def compared_dtypes(device: torch.device) -> dict[str, torch.dtype]:
    """The choices of ``training.compute_dtype`` that ``device`` can multiply in."""
    import torch

    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return {"float32": torch.float32}
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}


def linear_speeds(device: torch.device, dtypes: dict[str, torch.dtype]) -> dict[str, float]:
    """FLOP/s of a linear layer's forward and both backward products in each dtype: the median of a few runs.

    The backward products are part of it because some CPUs are fast at one and twenty times slower at the other.
    The dtypes take turns, so that whatever else the machine does meanwhile slows them alike.
    """
    import torch

    rows, width = (512, 1024) if device.type == "cpu" else (4096, 4096)
    operands = {
        name: [torch.randn(n, width, device=device).to(dtype) for n in (rows, rows, width)]
        for name, dtype in dtypes.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in dtypes}
    begun = time.perf_counter()
    for turn in range(1 + _MOST_TURNS):
        if turn > _FEWEST_TURNS and time.perf_counter() - begun > _SECONDS:
            break
        for name, (x, gradient, weight) in operands.items():
            start = time.perf_counter()
            for product in (x @ weight.T, gradient @ weight, gradient.T @ x):
                product[0, 0].item()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    flops = 3 * 2 * rows * width * width
    return {name: flops / statistics.median(times[1:]) for name, times in seconds.items()}


def advice(speeds: dict[str, float], automatic: str) -> str:
    """One sentence: the compute dtype that is best here, and how to get it."""
    if len(speeds) == 1:
        return "float32 is the only compute dtype here; training.compute_dtype: auto picks it."
    ratio = speeds["bfloat16"] / speeds["float32"]
    best = "bfloat16" if ratio >= _FASTER else "float32"
    if ratio >= _FASTER:
        why = f"bfloat16 is {ratio:.1f} times as fast as float32"
    elif ratio > 1 / _FASTER:
        why = "bfloat16 is no faster"
    else:
        why = f"bfloat16 is {1 / ratio:.1f} times slower"
    how = "auto picks it" if best == automatic else f"set it, since auto picks {automatic}"
    return f"Best compute dtype here: {best} ({why}); training.compute_dtype: {how}."


def describe(facts: dict[str, Any]) -> str:
    """The facts as lines for people."""
    cpu, memory, compute, torch_facts = facts["cpu"], facts["memory"], facts["compute"], facts["torch"]
    build = f"CUDA {torch_facts['cuda']}" if torch_facts["cuda"] else torch_facts["hip"] or "CPU build"
    rows = [
        ("stackwise", facts["stackwise"]),
        ("python", f"{facts['python']['version']} ({facts['python']['executable']})"),
        ("platform", facts["platform"]),
        ("torch", f"{torch_facts['version']} ({build}), {torch_facts['threads']} threads"),
        ("cpu", f"{cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores, {cpu['simd']}"),
        ("memory", f"{size(memory['total'])}, {size(memory['available'])} available"),
        ("peak memory", "measured on the CPU" if facts["resident_peak_measurable"] else "not measurable on the CPU"),
        ("disk", f"{size(facts['disk']['here_free'])} free here"),
        (
            "cache",
            f"{facts['cache']['path']}: {size(facts['cache']['bytes'])}, {size(facts['disk']['cache_free'])} free",
        ),
    ]
    if memory["limit"] is not None:
        rows.insert(6, ("", f"limited to {size(memory['limit'])} for this process's group"))
    for accelerator in facts["accelerators"] or [None]:
        rows.append(("accelerator", "none" if accelerator is None else _accelerator_line(accelerator)))
    speeds = ", ".join(f"{name} {speed / 1e9:,.0f} GFLOP/s" for name, speed in compute["flops_per_second"].items())
    rows.append(("speed", f"{speeds} ({compute['device']}, linear layer, forward and backward)"))
    for extra, packages in facts["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        have = ", ".join(f"{name} {version}" for name, version in packages.items())
        rows.append((f"extra {extra}", f"missing: pip install 'stackwise[{extra}]'" if missing else have))
    return "\n".join(f"{name:<16}{text}" for name, text in rows) + f"\n\n{compute['advice']}"


def _accelerator_line(accelerator: dict[str, Any]) -> str:
    bfloat16 = "bfloat16" if accelerator["bfloat16"] else "no bfloat16"
    capability = f", compute capability {accelerator['capability']}" if accelerator["capability"] else ""
    free = f" ({size(accelerator['memory_free'])} free)" if accelerator["memory_free"] is not None else ""
    return f"{accelerator['name']}, {size(accelerator['memory_total'])}{free}{capability}, {bfloat16}"


def _accelerators() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            with torch.cuda.device(index):
                bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            found.append(
                {
                    "type": "cuda",
                    "name": properties.name,
                    "memory_total": total,
                    "memory_free": free,
                    "capability": f"{properties.major}.{properties.minor}",
                    "bfloat16": bfloat16,
                }
            )
    elif torch.backends.mps.is_available():
        found.append(
            {
                "type": "mps",
                "name": _cpu_model(),
                "memory_total": torch.mps.recommended_max_memory(),
                "memory_free": None,
                "capability": None,
                "bfloat16": True,
            }
        )
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def _memory() -> dict[str, int | None]:
    """Bytes; ``limit`` is the control group's, where it is below what the machine has."""
    info = Path("/proc/meminfo")
    if not info.exists():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
        return {"total": total, "available": None, "limit": None}
    fields = {key: int(kb) * 1024 for key, kb in re.findall(r"^(\w+):\s+(\d+) kB$", info.read_text(), re.MULTILINE)}
    from stackwise.planning.devices import group_limit

    limit = group_limit()
    limited = limit if limit is not None and limit < fields["MemTotal"] else None
    return {"total": fields["MemTotal"], "available": fields["MemAvailable"], "limit": limited}


def _free(folder: Path) -> int:
    """Free bytes where ``folder`` is or would be made."""
    return shutil.disk_usage(nearest_folder(folder)).free


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _extras() -> dict[str, dict[str, str | None]]:
    """For each optional extra of the package, what it installs and the version that is here (or ``None``)."""
    found: dict[str, dict[str, str | None]] = {}
    for requirement in importlib.metadata.requires("stackwise") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if name and extra and extra[1] not in ("test", "lint", "docs"):
            found.setdefault(extra[1], {})[name[0]] = _version(name[0])
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
