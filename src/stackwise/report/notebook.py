"""``stackwise.load``: a trained run that can be looked at, asked and scored, in a notebook or a script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stackwise.evaluation.evaluate import evaluate_run
from stackwise.report.html import element
from stackwise.report.picture import Picture, draw
from stackwise.runs.functions import generate
from stackwise.runs.run import LoadedRun
from stackwise.runs.run import load as load_run
from stackwise.store.state import StepName
from stackwise.training.progress import Reporter, SilentReporter


@dataclass(frozen=True, repr=False)
class Run(LoadedRun):
    """A trained Rack with all that is known of it; ``path`` is its folder."""

    path: Path

    def __repr__(self) -> str:
        return f"<run {', '.join(self._words())}>"

    def _repr_html_(self) -> str:
        name, *words = self._words()
        return element("div", element("b", name), f" · {' · '.join(words)}")

    def _words(self) -> list[str]:
        parameters = sum(parameter.numel() for parameter in self.rack.parameters())
        return [
            str(self.path), f"{len(self.rack.stacks)} Stacks", f"{parameters:,} parameters",
            self.config.training.objective, f"step {self.step:,}",
        ]  # fmt: skip

    def generate(self, prompt: str = "", tokens: int = 200, *, seed: int = 0, **options: Any) -> str:
        """As ``stackwise.generate``."""
        return generate(self, prompt, tokens, seed=seed, **options)

    def evaluate(
        self, data: str | Path | Sequence[str | Path] | None = None, *, reporter: Reporter | None = None
    ) -> dict[str, Any]:
        """As ``stackwise.evaluate``, of the checkpoint that is loaded."""
        files = [data] if isinstance(data, str | Path) else data
        paths = None if files is None else [Path(file) for file in files]
        return evaluate_run(self.path, paths, self.step, reporter or SilentReporter())

    def plot(self) -> Picture:
        """Losses over FLOPs, phase by phase, and the Rack as it grew."""
        return draw(self.path)


def load(path: str | Path, step: StepName | None = None, device: str | torch.device = "cpu") -> Run:
    """The newest checkpoint of the run in ``path``, or that of ``step``: a number, or ``best``.

    Raises:
        UserError: no run is there, or it has no checkpoint yet, or its config or tokenizer is not the checkpoint's.
        RunError: the checkpoint is damaged.
    """
    loaded = load_run(path, step, device)
    return Run(loaded.rack, loaded.known_tokenizer, loaded.config, loaded.checkpoint, Path(path))
