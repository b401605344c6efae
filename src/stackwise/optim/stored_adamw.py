"""AdamW whose moments, and whose weights, may be stored in fewer bits than it computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise.randomness import generator

Moments = Literal["float32", "bfloat16", "int8"]
BLOCK = 256
"""Values of a moment that share a scale, as in 8-bit optimizers (2110.02861 §2.1)."""
CHUNK = 1 << 21
"""Values updated at a time, whole blocks: bounds what the arithmetic in fp32 takes, ``STEP_BYTES`` a value."""
STEP_BYTES = {
    ("bfloat16", False): 24, ("int8", False): 32, ("float32", True): 24, ("bfloat16", True): 32, ("int8", True): 40,
}  # fmt: skip
"""Of (moments, whether the weights are bfloat16): bytes that the arithmetic takes for a value, as measured."""


class StoredAdamW(torch.optim.Optimizer):
    """AdamW (1711.05101 algorithm 2), computed in fp32 for ``CHUNK`` values of a parameter at a time.

    Moments are kept as fp32, bfloat16, or int8: 127 √(|m| / s) with m's sign and 255 (v / s)^¼, s the largest of 256.
    These codes are fine near zero, so that a small second moment does not become none. What is stored in fewer bits,
    bfloat16 parameters too, is rounded up or down at random with the nearer value likelier, so that changes below half
    a unit are kept on average; the draw depends on (seed, step, name) alone, so that a resumed run repeats it and two
    parameters do not share it.

    Args:
        params: parameters, (name, parameter) or groups; float32 or bfloat16.
        lr, betas, eps, weight_decay: as in AdamW.
        moments: float32, bfloat16 or int8.
        seed: of the rounding.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: Moments = "float32",
        seed: int = 0,
    ) -> None:
        self.moments, self.seed = moments, seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            names = group.get("param_names", [""] * len(group["params"]))
            for name, p in zip(names, group["params"]):
                if p.grad is not None:
                    self._update(name, p, group)

    def _update(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for moment in ("exp_avg", "exp_avg_sq"):
                state.update(_zeros(moment, p, self.moments))
        state["step"] += 1
        step = int(state["step"])
        draw = generator(self.seed, step, name, device=p.device)
        beta1, beta2 = group["betas"]
        weights, grads = p.view(-1), p.grad.reshape(-1)  # type: ignore[union-attr]
        for start in range(0, p.numel(), CHUNK):
            end = min(start + CHUNK, p.numel())
            grad = grads[start:end].float()
            m = _read("exp_avg", state, start, end).lerp_(grad, 1 - beta1)
            v = _read("exp_avg_sq", state, start, end).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            weight = weights[start:end].float()  # of fp32 the weights themselves
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            root = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
            weight.addcdiv_(m, root, value=-group["lr"] / (1 - beta1**step))
            if p.dtype != torch.float32:
                weights[start:end] = round_at_random(weight, draw)
            _write("exp_avg", state, start, m, draw)
            _write("exp_avg_sq", state, start, v, draw)


def round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 → bfloat16, up with the probability of how far ``x`` is on the way up."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _zeros(name: str, p: Tensor, kind: Moments) -> dict[str, Tensor]:
    """A moment of ``p`` as it is kept, before the first step."""
    if kind != "int8":
        return {name: torch.zeros_like(p, dtype=getattr(torch, kind))}
    codes = torch.zeros(p.numel(), dtype=torch.int8 if name == "exp_avg" else torch.uint8, device=p.device)
    return {f"{name}_codes": codes, f"{name}_scales": torch.zeros(-(-p.numel() // BLOCK), device=p.device)}


def _write(name: str, state: dict[str, Tensor], start: int, value: Tensor, generator: torch.Generator) -> None:
    """Keeps the values of a moment from ``start`` on, in whole blocks, rounded at random."""
    end = start + len(value)
    if name in state:
        if state[name].dtype == torch.bfloat16:
            state[name].view(-1)[start:end] = round_at_random(value, generator)
        return  # fp32 moments were changed in place
    rows = F.pad(value, (0, -len(value) % BLOCK)).view(-1, BLOCK)
    scales = rows.abs().amax(dim=1)
    share = rows / torch.where(scales == 0, 1.0, scales)[:, None]
    signed = name == "exp_avg"
    codes = share.abs().sqrt_().mul_(127).copysign_(share) if signed else share.sqrt_().sqrt_().mul_(255)
    codes = (codes + torch.rand(codes.shape, device=codes.device, generator=generator)).floor_()
    codes = codes.clamp_(-127, 127) if signed else torch.where(rows > 0, codes.clamp_(1, 255), 0.0)
    state[f"{name}_codes"][start:end] = codes.flatten()[: len(value)]
    state[f"{name}_scales"][start // BLOCK : -(-end // BLOCK)] = scales


def _read(name: str, state: dict[str, Tensor], start: int, end: int) -> Tensor:
    """The values ``start`` to ``end`` of a moment in fp32; of fp32 ones the stored tensor itself."""
    if name in state:
        return state[name].view(-1)[start:end].float()
    codes = state[f"{name}_codes"][start:end].float()
    x = codes / (127 if name == "exp_avg" else 255)
    share = x.abs() * x if name == "exp_avg" else x.square().square()
    scales = state[f"{name}_scales"][start // BLOCK : -(-end // BLOCK)].repeat_interleave(BLOCK)[: len(codes)]
    return share * scales
