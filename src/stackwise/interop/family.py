"""A family of transformers that a Rack can equal exactly: its settings and its weights' names, in both directions.

A Rack belongs to a family only if its spec comes back the same from the family's settings, so that nothing is exported
as a class that is nearly equal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.config.section import MAX_BLOCKS
from stackwise.errors import UserError
from stackwise.model.architecture import rack_spec_from_config
from stackwise.model.spec import BlockSpec, RackSpec

Settings = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs and what it is made of here.

    Args:
        theirs: its name.
        ours: names in the Rack's ``state_dict``; several are stacked along their first dimension.
        transposed: stored (in, out), as GPT-2's ``Conv1D`` does.
        rotary: (rows of a head, rotary rows at its end): the rotary rows are stored as pairs x₀ y₀ x₁ y₁ …, here they
            are halves x₀ x₁ … y₀ y₁ ….
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    rotary: tuple[int, int] | None = None

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Their tensor, from ours."""
        whole = torch.cat([tensors[name] for name in self.ours]) if len(self.ours) > 1 else tensors[self.ours[0]]
        if self.rotary is not None:
            whole = reorder(whole, *self.rotary, to_pairs=True)
        return (whole.mT if self.transposed else whole).contiguous()

    def shape(self, shapes: Mapping[str, torch.Size]) -> tuple[int, ...]:
        """Of their tensor, from those of ours."""
        whole = (sum(shapes[name][0] for name in self.ours), *shapes[self.ours[0]][1:])
        return whole[::-1] if self.transposed else whole

    def split(self, tensor: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Our tensors, from theirs, which has the shape that ``shape`` says."""
        whole = tensor.mT if self.transposed else tensor
        if self.rotary is not None:
            whole = reorder(whole, *self.rotary, to_pairs=False)
        return dict(zip(self.ours, whole.split([shapes[name][0] for name in self.ours])))


def reorder(weight: Tensor, rows: int, rotary: int, *, to_pairs: bool) -> Tensor:
    heads = weight.view(-1, rows, *weight.shape[1:])
    fixed, turned = heads[:, : rows - rotary], heads[:, rows - rotary :]
    halves = (2, rotary // 2) if to_pairs else (rotary // 2, 2)
    turned = turned.unflatten(1, halves).transpose(1, 2).flatten(1, 2)
    return torch.cat((fixed, turned), dim=1).reshape(weight.shape)


def blocks_of(spec: RackSpec) -> Iterator[tuple[str, BlockSpec]]:
    """(prefix of its names in the Rack's ``state_dict``, spec) of each Block, left to right."""
    for s, stack in enumerate(spec.stacks):
        for b, block in enumerate(stack):
            yield f"stacks.{s}.blocks.{b}.", block


class Family(ABC):
    """One architecture. ``model_type`` and ``architecture`` are transformers' names; ``objective`` is ours."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    objective: ClassVar[str] = "clm"
    classifier: ClassVar[str | None] = None
    """Transformers' class whose head is one matrix that reads each sequence's last token."""
    prefix: ClassVar[str] = "model."
    """Of the names of all tensors but the head's; checkpoints of the model without its head leave it out."""
    n_blocks_key: ClassVar[str] = "num_hidden_layers"
    max_tokens_key: ClassVar[tuple[str, int]] = ("max_position_embeddings", 2048)
    """Where the longest sequence stands, and what it is where nothing stands there."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Ends of the names of stored tensors that hold no weights."""

    @abstractmethod
    def settings(self, spec: RackSpec, max_tokens: int) -> Settings:
        """What ``config.json`` says of the Rack's shape; exact only if ``fits`` says so."""

    @abstractmethod
    def model(self, settings: Settings) -> dict[str, Any]:
        """The ``model`` section of our config, without its architecture. UserError for what we cannot express."""

    @abstractmethod
    def entries(self, spec: RackSpec) -> Iterator[Entry]:
        """All tensors."""

    def n_blocks(self, settings: Settings) -> int:
        n = whole(settings, self.n_blocks_key)
        if n > MAX_BLOCKS:
            raise UserError(f"config.json: {self.n_blocks_key}: {n} is out of range; allowed: at most {MAX_BLOCKS}")
        return n

    def max_tokens(self, settings: Settings) -> int:
        return whole(settings, *self.max_tokens_key)

    def config(self, settings: Settings, n_stacks: int, extra: dict[str, Any] | None = None) -> StackWiseConfig:
        """Our config of the model in ``n_stacks`` Stacks; ``extra`` sections are added."""
        n = self.n_blocks(settings)
        sizes = [n // n_stacks + (k < n % n_stacks) for k in range(n_stacks)]
        blocks = sizes[0] if len(set(sizes)) == 1 else sizes
        model = {**self.model(settings), "architecture": {"n_stacks": n_stacks, "blocks_per_stack": blocks}}
        length = min(1024, self.max_tokens(settings))
        training = {
            "strategy": "end_to_end",
            "batch_size": 4,
            "seq_len": length,
            "progressive": {"training_objective": self.objective},
        }
        return StackWiseConfig.from_dict({"model": model, "training": training, **(extra or {})})

    def fits(self, spec: RackSpec, max_tokens: int) -> bool:
        """Whether the family can express the Rack exactly."""
        if not spec.blocks:
            return False
        try:
            config = self.config(self.settings(spec, max_tokens), 1)
        except UserError:
            return False
        return canonical(rack_spec_from_config(config, (0,), spec.vocab_size)) == canonical(spec)


def canonical(spec: RackSpec) -> RackSpec:
    """The spec of the function that a Rack computes: without what only training reads, and with every null resolved."""
    blocks = []
    for block in spec.blocks:
        attention = block.attention
        shared = attention.projections == "mla" and attention.latents == "shared"
        changes: dict[str, Any] = {"dropout": 0.0, "head_dim": attention.head_size}
        changes["v_head_dim"] = (attention.v_head_dim or attention.head_size) if shared else None
        rotary = shared and attention.use_rope
        changes["rope_dim"] = (attention.rope_dim or attention.head_size // 4 * 2) if rotary else None
        if not attention.use_rope:
            changes["rope_theta"] = 0.0
        if attention.r_kv is None:
            changes["latents"] = "shared"
        if attention.kernel_type == "linear":
            changes |= {"kernel_dim": 0, "kernel_meaning": "logit", "kernel_norm": "l2", "kernel_bandwidth": None}
        if attention.window is not None and attention.attention_mode == "bidirectional":
            changes["window"] = attention.window // 2 * 2
        norm_bias = block.norm_bias and block.norm != "rmsnorm"
        attention = replace(attention, **changes)
        blocks.append(replace(block, attention=attention, freeze_up_proj=False, norm_bias=norm_bias))
    own: dict[str, Any] = {"dropout": 0.0, "freeze_embeddings": False}
    own |= {"embedding_dim": None, "adapter_hidden_dim": None}  # an adapted table is a table
    if not spec.mlm_head:
        own["bias"] = False
    return replace(spec, **own).with_stacks((tuple(blocks),), (0,))


def whole(settings: Settings, key: str, default: int | None = None) -> int:
    """A positive whole number; ``default`` stands for a missing one and for null."""
    value = settings.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key}: {value!r} is not a positive whole number")
    return value


def number(settings: Settings, key: str, default: float) -> float:
    """A positive number; ``default`` stands for a missing one."""
    value = settings.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"config.json: {key}: {value!r} is not a positive number")
    return float(value)


def flag(settings: Settings, key: str, default: bool) -> bool:
    value = settings.get(key, default)
    if value not in (True, False):
        raise UserError(f"config.json: {key}: {value!r} is neither true nor false")
    return bool(value)


def allow(settings: Settings, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses settings that would make another function of the same weights. A missing key has its first value."""
    for key, values in allowed.items():
        value = settings.get(key, values[0])
        if value not in values:
            options = ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)
            raise UserError(f"config.json: {key}: {value!r} cannot be expressed as a Rack; allowed: {options}")


def theta(settings: Settings, key: str = "rope_theta", default: float = 10000.0) -> float:
    """The base of plain rotary positions; ``key``: where it stood before transformers 5. UserError for scaled ones."""
    for section in ("rope_parameters", "rope_scaling"):
        rope = settings.get(section)
        if rope is not None and not isinstance(rope, dict):
            raise UserError(f"config.json: {section}: {rope!r} is not a section of keys")
        for name, value in (rope or {}).items():
            plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}.get(name, value)
            if value != plain or isinstance(value, dict):
                allowed = f"; allowed: {plain}" if value != plain else ""
                raise UserError(f"config.json: {section}.{name}: {value!r} cannot be expressed as a Rack{allowed}")
    allow(settings, {"partial_rotary_factor": (1, None)})
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if rope.get("rope_theta") is not None:
        return number(rope, "rope_theta", default)
    return number(settings, key, default)


def rope_settings(theta: float) -> Settings:
    """For transformers 5, and as versions before it wrote it."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_theta": theta}


def swiglu_entries(theirs: str, ours: str) -> Iterator[Entry]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield Entry(f"{theirs}mlp.{name}.weight", (f"{ours}ffn.{name}.weight",))
