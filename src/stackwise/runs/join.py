"""Experts that were trained by separate processes, as one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackwise.config.base import StackWiseConfig
from stackwise.errors import UserError
from stackwise.files import require_free
from stackwise.runs.run import LoadedRun, load, write_untrained_run
from stackwise.store.objects import weights_sha256
from stackwise.store.origin import origin_of
from stackwise.store.rundir import RunDir


def join_runs(runs: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Writes the new run ``out`` with the Stacks of all ``runs``, which share everything else.

    One run is that of expert 0, the others were trained from it (``training.diffusion.expert``), one for each other
    Stack, in any order.

    Returns: {"stacks", "parameters"}.

    Raises:
        RunError: ``out`` cannot be written.
        UserError: ``out`` exists and is not empty, a run is not of an expert, Stacks are missing or there twice, or
            the runs do not share their embedding, norm, head and Stack 0.
    """
    out = Path(out)
    require_free(out)
    loaded = {str(path): load(path) for path in runs}
    if len(loaded) < 2:
        raise UserError("join needs at least two runs: one of expert 0, and one for each other Stack")
    experts: dict[int, str] = {}
    for path, run in loaded.items():
        expert = run.config.training.diffusion.expert
        if expert is None:
            raise UserError(f"{path}: it is not the run of one expert (training.diffusion.expert is null)")
        if expert in experts:
            raise UserError(f"{path}: a run of expert {expert} is given already: {experts[expert]}")
        experts[expert] = path
    first = next(iter(loaded.values()))
    wanted = set(range(first.config.target_stacks))
    if set(experts) != wanted:
        lacking = sorted(wanted - set(experts))
        raise UserError(f"join: the run of expert {lacking[0]} is missing; each of the {len(wanted)} Stacks needs one")
    shared = _shared(loaded[experts[0]])
    for path, run in loaded.items():
        different = [part for part, digest in _shared(run).items() if shared.get(part) != digest]
        if different:
            raise UserError(
                f"{path}: its {different[0]} differs from that of {experts[0]}; train it with --from {experts[0]}"
            )
    tensors = {part: dict(named) for part, named in loaded[experts[0]].rack.tensors_by_part().items()}
    for k in sorted(wanted - {0}):
        tensors[f"stack.{k}"] = loaded[experts[k]].rack.tensors_by_part()[f"stack.{k}"]
    settings = loaded[experts[0]].config.to_dict()
    settings["training"]["diffusion"]["expert"] = None
    config = StackWiseConfig.from_dict(settings)
    of_first = loaded[experts[0]]
    data = of_first.checkpoint.state.get("data")
    write_untrained_run(out, config, of_first.tokenizer, tensors, sorted(wanted), data, origin_of(RunDir(experts[0])))
    return {"stacks": len(wanted), "parameters": sum(t.numel() for named in tensors.values() for t in named.values())}


def _shared(run: LoadedRun) -> dict[str, str]:
    """The hash of each part that all experts have."""
    return {
        part: weights_sha256(named.items())
        for part, named in run.rack.tensors_by_part().items()
        if part in ("embedding", "norm", "head", "stack.0")
    }
