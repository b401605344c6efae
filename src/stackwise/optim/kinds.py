"""The kinds of optimizers, each with all that is known of it: how it is made, its bytes, and what it multiplies."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.config.optimization import OptimizerConfig
from stackwise.kinds import OPTIMIZERS
from stackwise.optim.stored_adamw import BLOCK, CHUNK, STEP_BYTES, StoredAdamW

Named = Mapping[str, nn.Parameter]
"""Parameters by their full name ``part/name``."""


class Optimizer(ABC):
    """A kind of optimizer with its settings. Matrices decay; vectors do not.

    Args:
        heights: of parameters by name, how often ``layer_decay`` lowers their rate; those that are not named have 0.
    """

    def __init__(self, settings: OptimizerConfig, heights: Mapping[str, int] | None = None) -> None:
        self.settings, self.heights = settings, heights or {}

    @abstractmethod
    def make(self, parameters: Named, seed: int) -> list[torch.optim.Optimizer]:
        """torch's optimizers of ``parameters``, each parameter in one of them.

        Args:
            seed: of the rounding of what is stored in fewer bits.
        """

    @abstractmethod
    def state_bytes(self, name: str, parameter: Tensor) -> int:
        """Bytes of the moments of the parameter ``name``; counters are left out."""

    @abstractmethod
    def step_bytes(self, name: str, parameter: Tensor) -> int:
        """Bytes that the update of the parameter ``name`` takes for its duration, at most."""

    def multiplies(self, name: str, parameter: Tensor) -> bool:
        """Whether the update of the parameter ``name`` runs matrix products, whose FLOPs the planner then counts."""
        return False

    def groups(self, parameters: Named) -> list[dict[str, Any]]:
        """Those that decay and those that do not, as torch's optimizers take them; of one rate each (``lr_share``)."""
        matrices = {name: p for name, p in parameters.items() if p.dim() >= 2}
        vectors = {name: p for name, p in parameters.items() if p.dim() < 2}
        decays = ((matrices, self.settings.weight_decay), (vectors, 0.0))
        return [{**group, "weight_decay": decay} for some, decay in decays for group in self.by_rate(some)]

    def by_rate(self, parameters: Named) -> list[dict[str, Any]]:
        """Groups of equal rates: ``lr_share`` is that of a group as a share of the run's."""
        shares: dict[float, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in parameters.items():
            share = self.settings.layer_decay ** self.heights.get(name, 0)
            shares.setdefault(share, []).append((name, parameter))
        return [{"params": named, "lr_share": share} for share, named in shares.items()]


class AdamW(Optimizer):
    """AdamW (1711.05101): torch's fused one where moments and parameters are fp32, else ``StoredAdamW``."""

    def make(self, parameters: Named, seed: int) -> list[torch.optim.Optimizer]:
        settings, groups = self.settings, self.groups(parameters)
        if settings.moments == "float32" and all(p.dtype == torch.float32 for p in parameters.values()):
            return [torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)]
        return [StoredAdamW(groups, settings.lr, settings.betas, settings.eps, moments=settings.moments, seed=seed)]

    def state_bytes(self, name: str, parameter: Tensor) -> int:
        n = parameter.numel()
        return {"float32": 8 * n, "bfloat16": 4 * n, "int8": 2 * n + 8 * math.ceil(n / BLOCK)}[self.settings.moments]

    def step_bytes(self, name: str, parameter: Tensor) -> int:
        key = self.settings.moments, parameter.dtype == torch.bfloat16
        return 0 if key == ("float32", False) else STEP_BYTES[key] * min(parameter.numel(), CHUNK)


class Muon(AdamW):
    """Muon (Jordan et al. 2024) on the matrices of Stacks, AdamW on the rest.

    Muon's updates are scaled to AdamW's (2502.16982 §2.2), so that one learning rate serves both. The momentum is 0.95
    where the settings give none.
    """

    def multiplies(self, name: str, parameter: Tensor) -> bool:
        """Newton-Schulz iterations on the matrices of Stacks: not on the embedding, the head or adapters."""
        return name.startswith("stack.") and parameter.dim() == 2

    def make(self, parameters: Named, seed: int) -> list[torch.optim.Optimizer]:
        matrices = {name: p for name, p in parameters.items() if self.multiplies(name, p)}
        others = {name: p for name, p in parameters.items() if name not in matrices}
        made: list[torch.optim.Optimizer] = super().make(others, seed) if others else []
        if matrices:
            momentum = self.settings.momentum
            muon = torch.optim.Muon(
                self.by_rate(matrices),
                lr=self.settings.lr,
                weight_decay=self.settings.weight_decay,
                momentum=0.95 if momentum is None else momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            made.insert(0, muon)
        return made

    def state_bytes(self, name: str, parameter: Tensor) -> int:
        if self.multiplies(name, parameter):
            return parameter.numel() * parameter.element_size()
        return super().state_bytes(name, parameter)

    def step_bytes(self, name: str, parameter: Tensor) -> int:
        return 12 * parameter.numel() if self.multiplies(name, parameter) else super().step_bytes(name, parameter)


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum: 0.9 where the settings give none."""

    @property
    def _momentum(self) -> float:
        return 0.9 if self.settings.momentum is None else self.settings.momentum

    def make(self, parameters: Named, seed: int) -> list[torch.optim.Optimizer]:
        # foreach, the default on an accelerator, would copy all gradients at once to add the decay
        groups = self.groups(parameters)
        return [torch.optim.SGD(groups, lr=self.settings.lr, momentum=self._momentum, foreach=False)]

    def state_bytes(self, name: str, parameter: Tensor) -> int:
        return parameter.numel() * parameter.element_size() if self._momentum else 0

    def step_bytes(self, name: str, parameter: Tensor) -> int:
        decays = self.settings.weight_decay and parameter.dim() >= 2
        return parameter.numel() * parameter.element_size() if decays else 0


def optimizer_of(settings: OptimizerConfig, heights: Mapping[str, int] | None = None) -> Optimizer:
    """The kind that ``settings`` name, with them and ``heights``."""
    kind: Optimizer = OPTIMIZERS[settings.optimizer_type].load()(settings, heights)
    return kind
