"""The initial values of every parameter, as one table.

| parameter | values |
|---|---|
| embedding, untied head | N(0, 0.02²) |
| q, k, v, gate, up projections (fan-in n) | N(0, 1/n) |
| o and down projections (fan-in n) | N(0, 1/(n · 2 · Blocks of the Rack)) |
| norms | 1 |

The residual branches so add up to the same variance at any depth (GPT-2 §2.3).

A tied head reads a normalised hidden state, so its logits start at standard deviation 0.02·√C.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

EMBEDDING_STD = 0.02
RESIDUAL_OUTPUTS = ("o_proj", "down_proj")
INNER = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def generator(seed: int, *stream: int | str) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and the names of what is drawn, and on nothing else."""
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def init_weights(module: nn.Module, *, n_blocks: int, seed: int, stream: int) -> None:
    """Sets every parameter of ``module``, which belongs to a Rack of ``n_blocks`` Blocks.

    Values depend on (seed, stream, name) alone, so that a Stack is the same whenever it is made.
    """
    for name, parameter in module.named_parameters():
        kind = name.split(".")[-2] if "." in name else ""
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        if kind in RESIDUAL_OUTPUTS:
            std = (parameter.shape[1] * 2 * n_blocks) ** -0.5
        elif kind in INNER:
            std = parameter.shape[1] ** -0.5
        elif name == "weight":  # embedding or head
            std = EMBEDDING_STD
        else:
            raise ValueError(f"no initialisation is defined for the parameter {name}")
        values = torch.empty(parameter.shape, dtype=torch.float32)
        values.normal_(0.0, std, generator=generator(seed, stream, type(module).__name__, name))
        parameter.copy_(values)
