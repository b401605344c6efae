"""Low-rank adapters on every linear layer of Stacks: made, merged, and kept in peft's folder format.

Each Stack has up to two: the *stack* adapter from when it is made, the *progressive* one from when it first is trunk.
Both add to the same layers: W x + (α_s/r_s) B_s A_s x + (α_p/r_p) B_p A_p x.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.errors import UserError
from stackwise.files import write_text_atomic
from stackwise.growth.phases import Adapter, AdapterKind
from stackwise.model.linear import LowRank, linears
from stackwise.model.rack import Rack
from stackwise.model.stack import Stack
from stackwise.model.weights import load_weights, save_weights
from stackwise.randomness import generator
from stackwise.reading import read_object

_PREFIX = "base_model.model."


def add_adapter(stack: Stack, adapter: Adapter, seed: int) -> bool:
    """Puts ``adapter`` on every linear layer of ``stack``, unless it is there; whether it was added.

    Values depend on (seed, Stack, kind, layer) alone; the output is the same as before (B is zero).

    Raises:
        ValueError: there is one of this kind with another rank, alpha or dropout.
    """
    assert stack.stack_id == adapter.stack
    added = False
    for name, layer in linears(stack):
        there = layer.low_rank().get(adapter.kind)
        if there is not None:
            if (there.rank, there.alpha, there.dropout) != (adapter.rank, adapter.alpha, adapter.dropout):
                raise ValueError(f"Stack {stack.stack_id} has another {adapter.kind} adapter: {there}")
            continue
        made = LowRank(layer.in_features, layer.out_features, adapter.rank, adapter.alpha, adapter.dropout)
        made.draw(generator(seed, "adapter", stack.stack_id, adapter.kind, name))
        device = next(stack.parameters()).device
        layer.adapters[adapter.kind] = made if device.type == "meta" else made.to(device)
        added = True
    return added


def adapters_of(rack: Rack) -> list[Adapter]:
    """The adapters that ``rack`` has; ``trains`` is whether they require gradients."""
    found = []
    for stack in rack.stacks:
        first = next((layer for _, layer in linears(stack)), None)
        for kind, low in () if first is None else first.low_rank().items():
            trains = low.A.requires_grad
            found.append(Adapter(stack.stack_id, kind, low.rank, low.alpha, low.dropout, trains))  # type: ignore[arg-type]
    return found


@torch.no_grad()
def merge_adapters(rack: Rack) -> None:
    """Adds every adapter to its matrix, W + Σ (α/r) B A in fp32, and removes it."""
    for stack in rack.stacks:
        for _, layer in linears(stack):
            if layer.adapters:
                merged = layer.merged()
                layer.adapters = nn.ModuleDict()
                layer.store("full")
                layer.weight.copy_(merged)


def plain_rack(rack: Rack) -> Rack:
    """``rack`` itself, with its adapters merged and all its matrices in fp32: what other programs can read."""
    merge_adapters(rack)
    for stack in rack.stacks:
        for _, layer in linears(stack):
            layer.store("full")
    return rack


@torch.no_grad()
def plain_state(stack: Stack) -> dict[str, Tensor]:
    """The tensors that ``stack`` would have in fp32 with its adapters merged; it is left as it is."""
    layers = dict(linears(stack))
    state = {
        name: tensor
        for name, tensor in stack.state_dict().items()
        if not any(name.startswith(f"{layer}.") for layer in layers)
    }
    for name, layer in layers.items():
        state[f"{name}.weight"] = layer.merged()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.detach()
    return state


def described(rack: Rack) -> list[dict[str, Any]]:
    """The adapters of ``rack`` as JSON, for ``restore``."""
    return [
        {"stack": a.stack, "kind": a.kind, "rank": a.rank, "alpha": a.alpha, "dropout": a.dropout}
        for a in adapters_of(rack)
    ]


def restore(rack: Rack, adapters: Iterable[Mapping[str, Any]]) -> None:
    """Gives ``rack`` the adapters that ``described`` told of; their values come from elsewhere."""
    stacks = {stack.stack_id: stack for stack in rack.stacks}
    for adapter in adapters:
        add_adapter(stacks[adapter["stack"]], Adapter(**adapter), 0)


def save_adapters(rack: Rack, folder: str | Path, kind: AdapterKind = "stack") -> None:
    """Writes the adapters of one kind as ``peft`` does: adapter_config.json and adapter_model.safetensors.

    ``peft`` loads the folder onto a Rack without adapters (``PeftModel.from_pretrained(rack, folder)``).

    Raises:
        UserError: the Rack has none of this kind.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    dropouts: set[float] = set()
    for name, layer in linears(rack):
        low = layer.low_rank().get(kind)
        if low is not None:
            ranks[name], alphas[name] = low.rank, low.alpha
            dropouts.add(low.dropout)
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = low.A.detach()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = low.B.detach()
    if not ranks:
        raise UserError(f"the Rack has no {kind} adapter to save")
    rank, alpha = max(ranks.values()), max(alphas.values())
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(dropouts),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        # Anchored: peft reads these names as the ends of patterns.
        "rank_pattern": {f"^{name}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{name}": a for name, a in alphas.items() if a != alpha},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_text_atomic(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")


@torch.no_grad()
def load_adapters(rack: Rack, folder: str | Path, kind: AdapterKind = "stack") -> None:
    """Reads a folder in ``peft``'s format onto ``rack``, whose layers it must name.

    Raises:
        UserError: a file is missing or is no LoRA, or names a layer that the Rack lacks or another shape.
    """
    folder = Path(folder)
    try:
        settings = read_object(folder / "adapter_config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'adapter_config.json'}: cannot be read: {error}") from None
    if settings.get("peft_type") != "LORA" or settings.get("use_dora") or settings.get("use_rslora"):
        raise UserError(f"{folder}: not a plain LoRA; peft_type is {settings.get('peft_type')!r}")
    tensors, _ = load_weights(folder / "adapter_model.safetensors")
    layers = dict(linears(rack))
    names = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors})
    for name in names:
        if name not in layers:
            raise UserError(f"{folder}: it adapts the layer {name}, which the Rack does not have")
        layer = layers[name]
        a, b = (tensors.get(f"{_PREFIX}{name}.lora_{factor}.weight") for factor in "AB")
        if a is None or b is None or a.shape[1] != layer.in_features or b.shape != (layer.out_features, a.shape[0]):
            raise UserError(f"{folder}: the factors of {name} do not fit a layer of shape {tuple(layer.shape)}")
        alpha = _of_pattern(settings.get("alpha_pattern") or {}, name, settings["lora_alpha"])
        low = LowRank(layer.in_features, layer.out_features, a.shape[0], alpha, settings.get("lora_dropout", 0.0))
        low.A.copy_(a)
        low.B.copy_(b)
        layer.adapters[kind] = low.to(rack.device)


def _of_pattern(pattern: Mapping[str, float], name: str, default: float) -> float:
    """The entry of a pattern whose key ends ``name``, as peft matches them for plain names."""
    for key, value in pattern.items():
        plain = key.removeprefix("^")
        if name == plain or (not key.startswith("^") and name.endswith(f".{plain}")):
            return value
    return default
