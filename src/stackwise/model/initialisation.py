"""The initial values of every parameter, as one table.

| parameter | values |
|---|---|
| embedding, positions, untied head, classification head | N(0, 0.02²) |
| projections that read the residual stream or a latent (fan-in n) | N(0, 1/n) |
| o and down projections (fan-in n) | N(0, 1/(n · 2 · Blocks of the Rack)) |
| norms | 1 |
| biases, and what the noise level adds to Blocks (modulation) | 0 |
| learned embedding of noise levels | N(0, 1) |
| temperature of a kernel | that of dot products (ops.kernels.Kernel.temperature) |
| frequencies of a kernel's features (not trained) | its spectral density |

The residual branches so add up to the same variance at any depth (GPT-2 §2.3).

A tied head reads a normalised hidden state, so its logits start at standard deviation 0.02·√C.
"""

from __future__ import annotations

import torch
from torch import nn

from stackwise.model.attention.core import CoreAttention
from stackwise.randomness import generator

EMBEDDING_STD = 0.02
RESIDUAL_OUTPUTS = ("o_proj", "down_proj")
INNER = (
    "q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "k_a_proj", "k_b_proj", "v_a_proj", "v_b_proj",
    "kv_a_proj", "kv_b_proj", "gate_proj", "up_proj", "dense", "adapter_in", "adapter_out", "time_in", "time_out",
)  # fmt: skip


@torch.no_grad()
def init_weights(module: nn.Module, *, n_blocks: int, seed: int, stream: int) -> None:
    """Sets every parameter of ``module``, which belongs to a Rack of ``n_blocks`` Blocks.

    Values depend on (seed, stream, name) alone, so that a Stack is the same whenever it is made.
    """
    own = type(module).__name__
    for name, parameter in module.named_parameters():
        *path, leaf = name.split(".")
        kind = path[-1] if path else ""
        if leaf == "bias" or kind == "modulation":
            parameter.zero_()
            continue
        if leaf == "weight" and parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        if leaf == "log_temperature":
            attention = module.get_submodule(".".join(path))
            assert isinstance(attention, CoreAttention)
            attention.set_temperature()
            continue
        if kind in RESIDUAL_OUTPUTS:
            std = (parameter.shape[1] * 2 * n_blocks) ** -0.5
        elif kind in INNER:
            std = parameter.shape[1] ** -0.5
        elif name == "time.table":
            std = 1.0
        elif name in ("weight", "positions") or kind in ("embedding", "head"):
            std = EMBEDDING_STD
        else:
            raise ValueError(f"no initialisation is defined for the parameter {name}")
        values = torch.empty(parameter.shape, dtype=torch.float32)
        values.normal_(0.0, std, generator=generator(seed, stream, own, name))
        parameter.copy_(values)
    for name, part in module.named_modules():
        if isinstance(part, CoreAttention):
            part.draw_frequencies(generator(seed, stream, own, name, "frequencies"))
