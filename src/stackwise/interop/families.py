"""Architectures of transformers that a Rack can equal exactly: their settings and the names of their weights.

A family translates settings in both directions. A Rack belongs to it only if its spec comes back the same from the
family's settings, so that nothing is exported as a class that is nearly equal.
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
            whole = _reorder(whole, *self.rotary, to_pairs=True)
        return (whole.mT if self.transposed else whole).contiguous()

    def shape(self, shapes: Mapping[str, torch.Size]) -> tuple[int, ...]:
        """Of their tensor, from those of ours."""
        whole = (sum(shapes[name][0] for name in self.ours), *shapes[self.ours[0]][1:])
        return whole[::-1] if self.transposed else whole

    def split(self, tensor: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Our tensors, from theirs, which has the shape that ``shape`` says."""
        whole = tensor.mT if self.transposed else tensor
        if self.rotary is not None:
            whole = _reorder(whole, *self.rotary, to_pairs=False)
        return dict(zip(self.ours, whole.split([shapes[name][0] for name in self.ours])))


def _reorder(weight: Tensor, rows: int, rotary: int, *, to_pairs: bool) -> Tensor:
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
        n = _whole(settings, self.n_blocks_key)
        if n > MAX_BLOCKS:
            raise UserError(f"config.json: {self.n_blocks_key}: {n} is out of range; allowed: at most {MAX_BLOCKS}")
        return n

    def max_tokens(self, settings: Settings) -> int:
        return _whole(settings, *self.max_tokens_key)

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
        head = block.head_dim or block.d_model // block.n_heads
        shared = block.r_kv is not None and block.latents == "shared"
        changes: dict[str, Any] = {"dropout": 0.0, "freeze_up_proj": False, "head_dim": head}
        changes["v_head_dim"] = (block.v_head_dim or head) if shared else None
        changes["rope_dim"] = (block.rope_dim or head // 4 * 2) if shared and block.use_rope else None
        if not block.use_rope:
            changes["rope_theta"] = 0.0
        if block.r_kv is None:
            changes["latents"] = "shared"
        if block.kernel_type == "linear":
            changes |= {"kernel_dim": 0, "kernel_meaning": "logit", "kernel_norm": "l2", "kernel_bandwidth": None}
        if block.norm == "rmsnorm":
            changes["norm_bias"] = False
        if block.window is not None and block.attention_mode == "bidirectional":
            changes["window"] = block.window // 2 * 2
        blocks.append(replace(block, **changes))
    own: dict[str, Any] = {"dropout": 0.0, "freeze_embeddings": False}
    own |= {"embedding_dim": None, "adapter_hidden_dim": None}  # an adapted table is a table
    if not spec.mlm_head:
        own["bias"] = False
    return replace(spec, **own).with_stacks((tuple(blocks),), (0,))


def _whole(settings: Settings, key: str, default: int | None = None) -> int:
    """A positive whole number; ``default`` stands for a missing one and for null."""
    value = settings.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key}: {value!r} is not a positive whole number")
    return value


def _number(settings: Settings, key: str, default: float) -> float:
    """A positive number; ``default`` stands for a missing one."""
    value = settings.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"config.json: {key}: {value!r} is not a positive number")
    return float(value)


def _flag(settings: Settings, key: str, default: bool) -> bool:
    value = settings.get(key, default)
    if value not in (True, False):
        raise UserError(f"config.json: {key}: {value!r} is neither true nor false")
    return bool(value)


def _allow(settings: Settings, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses settings that would make another function of the same weights. A missing key has its first value."""
    for key, values in allowed.items():
        value = settings.get(key, values[0])
        if value not in values:
            options = ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)
            raise UserError(f"config.json: {key}: {value!r} cannot be expressed as a Rack; allowed: {options}")


def _theta(settings: Settings, key: str = "rope_theta", default: float = 10000.0) -> float:
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
    _allow(settings, {"partial_rotary_factor": (1, None)})
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if rope.get("rope_theta") is not None:
        return _number(rope, "rope_theta", default)
    return _number(settings, key, default)


def _rope_settings(theta: float) -> Settings:
    """For transformers 5, and as versions before it wrote it."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_theta": theta}


def _swiglu_entries(theirs: str, ours: str) -> Iterator[Entry]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield Entry(f"{theirs}mlp.{name}.weight", (f"{ours}ffn.{name}.weight",))


class Llama(Family):
    """Also the frame of the other decoders with RMSNorm and SwiGLU."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    ignored = ("rotary_emb.inv_freq",)

    def settings(self, spec: RackSpec, max_tokens: int) -> Settings:
        block = spec.blocks[0]
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.d_model,
            "intermediate_size": block.d_ff,
            "num_hidden_layers": len(spec.blocks),
            "num_attention_heads": block.n_heads,
            "num_key_value_heads": block.n_kv_heads,
            "head_dim": block.head_dim or spec.d_model // block.n_heads,
            "hidden_act": "silu",
            "max_position_embeddings": max_tokens,
            "rms_norm_eps": spec.norm_eps,
            "tie_word_embeddings": spec.tie_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            **_rope_settings(block.rope_theta),
        }

    def model(self, settings: Settings) -> dict[str, Any]:
        _allow(
            settings,
            {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "sliding_window": (None,)},
        )
        heads = _whole(settings, "num_attention_heads")
        return {
            "vocab_size": _whole(settings, "vocab_size"),
            "d_model": _whole(settings, "hidden_size"),
            "n_heads": heads,
            "n_kv_heads": _whole(settings, "num_key_value_heads", heads),
            "head_dim": None if settings.get("head_dim") is None else _whole(settings, "head_dim"),
            "d_ff": _whole(settings, "intermediate_size"),
            "rope_theta": _theta(settings),
            "norm_eps": _number(settings, "rms_norm_eps", 1e-6),
            "tie_embeddings": _flag(settings, "tie_word_embeddings", False),
        }

    def entries(self, spec: RackSpec) -> Iterator[Entry]:
        yield Entry("model.embed_tokens.weight", ("embedding.weight",))
        for i, (ours, block) in enumerate(blocks_of(spec)):
            theirs = f"model.layers.{i}."
            yield Entry(f"{theirs}input_layernorm.weight", (f"{ours}attention_norm.weight",))
            yield Entry(f"{theirs}post_attention_layernorm.weight", (f"{ours}ffn_norm.weight",))
            yield from self.attention(theirs, ours, block)
            yield from _swiglu_entries(theirs, ours)
        yield Entry("model.norm.weight", ("norm.weight",))
        if not spec.tie_embeddings:
            yield Entry("lm_head.weight", ("head.weight",))

    def attention(self, theirs: str, ours: str, block: BlockSpec) -> Iterator[Entry]:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield Entry(f"{theirs}self_attn.{name}.weight", (f"{ours}attention.{name}.weight",))


class Qwen3(Llama):
    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"

    def settings(self, spec: RackSpec, max_tokens: int) -> Settings:
        settings = super().settings(spec, max_tokens)
        del settings["mlp_bias"]
        return {**settings, "use_sliding_window": False, "sliding_window": None}

    def model(self, settings: Settings) -> dict[str, Any]:
        _allow(settings, {"use_sliding_window": (False,)})
        types = settings.get("layer_types")
        if types is not None and types != ["full_attention"] * self.n_blocks(settings):
            raise UserError(f"config.json: layer_types: {types} cannot be expressed as a Rack; allowed: full_attention")
        # A window's size is written even where windows are off.
        plain = {**settings, "sliding_window": None}
        return {**super().model(plain), "head_dim": _whole(settings, "head_dim", 128), "qk_norm": True}

    def attention(self, theirs: str, ours: str, block: BlockSpec) -> Iterator[Entry]:
        yield from super().attention(theirs, ours, block)
        for name in ("q_norm", "k_norm"):
            yield Entry(f"{theirs}self_attn.{name}.weight", (f"{ours}attention.{name}.weight",))


class DeepseekV3(Llama):
    """Without experts: ``first_k_dense_replace`` as large as the depth."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"

    def settings(self, spec: RackSpec, max_tokens: int) -> Settings:
        block, settings = spec.blocks[0], super().settings(spec, max_tokens)
        del settings["mlp_bias"]
        head = settings.pop("head_dim")
        return {
            **settings,
            "q_lora_rank": block.r_q,
            "kv_lora_rank": block.r_kv,
            "qk_nope_head_dim": head,
            "qk_rope_head_dim": block.rope_dim or head // 4 * 2,
            "v_head_dim": block.v_head_dim or head,
            "rope_interleave": True,
            "first_k_dense_replace": len(spec.blocks),
            "num_mtp_layers": 0,
            "num_nextn_predict_layers": 0,
        }

    def model(self, settings: Settings) -> dict[str, Any]:
        rotary = _whole(settings, "qk_rope_head_dim")
        _allow(settings, {"rope_interleave": (True,), "head_dim": (rotary, None)})
        n, dense = self.n_blocks(settings), settings.get("first_k_dense_replace", 3)
        if not isinstance(dense, int):
            raise UserError(f"config.json: first_k_dense_replace: {dense!r} is not a whole number")
        if dense < n:
            raise UserError(
                f"config.json: first_k_dense_replace: {dense} leaves experts in {n - dense} of {n} layers; "
                "a Rack has none: it must be num_hidden_layers at least"
            )
        plain = {key: value for key, value in settings.items() if key != "head_dim"}
        model = super().model(plain)
        if model["n_kv_heads"] != model["n_heads"]:
            raise UserError(
                f"config.json: num_key_value_heads: {model['n_kv_heads']} must equal num_attention_heads "
                f"({model['n_heads']}) with latent attention"
            )
        return {
            **model,
            "attention_preset": "custom",
            "head_dim": _whole(settings, "qk_nope_head_dim"),
            "attention_custom": {
                "attention_type": "mla",
                "attention_mode": "causal",
                "mla_rq": None if settings.get("q_lora_rank", 1536) is None else _whole(settings, "q_lora_rank", 1536),
                "mla_rkv": _whole(settings, "kv_lora_rank"),
                "mla_rope_dim": rotary,
                "mla_v_head_dim": _whole(settings, "v_head_dim"),
            },
        }

    def attention(self, theirs: str, ours: str, block: BlockSpec) -> Iterator[Entry]:
        head = block.head_dim or block.d_model // block.n_heads
        rope = block.rope_dim or head // 4 * 2
        own, rotary = f"{ours}attention.", (head + rope, rope)
        if block.r_q is None:
            yield Entry(f"{theirs}self_attn.q_proj.weight", (f"{own}q_proj.weight",), rotary=rotary)
        else:
            yield Entry(f"{theirs}self_attn.q_a_proj.weight", (f"{own}q_a_proj.weight",))
            yield Entry(f"{theirs}self_attn.q_a_layernorm.weight", (f"{own}q_a_norm.weight",))
            yield Entry(f"{theirs}self_attn.q_b_proj.weight", (f"{own}q_b_proj.weight",), rotary=rotary)
        assert block.r_kv is not None
        down = (block.r_kv + rope, rope)
        yield Entry(f"{theirs}self_attn.kv_a_proj_with_mqa.weight", (f"{own}kv_a_proj.weight",), rotary=down)
        yield Entry(f"{theirs}self_attn.kv_a_layernorm.weight", (f"{own}kv_a_norm.weight",))
        yield Entry(f"{theirs}self_attn.kv_b_proj.weight", (f"{own}kv_b_proj.weight",))
        yield Entry(f"{theirs}self_attn.o_proj.weight", (f"{own}o_proj.weight",))


class GPT2(Family):
    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    prefix = "transformer."
    n_blocks_key = "n_layer"
    max_tokens_key = ("n_positions", 1024)
    ignored = (".attn.bias", ".attn.masked_bias")

    def settings(self, spec: RackSpec, max_tokens: int) -> Settings:
        block = spec.blocks[0]
        return {
            "vocab_size": spec.vocab_size,
            "n_positions": spec.learned_positions,
            "n_embd": spec.d_model,
            "n_layer": len(spec.blocks),
            "n_head": block.n_heads,
            "n_inner": block.d_ff,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": spec.norm_eps,
            "tie_word_embeddings": spec.tie_embeddings,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        }

    def model(self, settings: Settings) -> dict[str, Any]:
        _allow(
            settings,
            {
                "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,),
            },
        )
        # transformers knows these settings by two names, and the second overrides the first.
        names = ("n_embd", "hidden_size"), ("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads")
        _allow(settings, {alias: (settings.get(name), None) for name, alias in names})
        width = _whole(settings, "n_embd")
        return {
            "vocab_size": _whole(settings, "vocab_size"),
            "d_model": width,
            "n_heads": _whole(settings, "n_head"),
            "d_ff": _whole(settings, "n_inner", 4 * width),
            "use_rope": False,
            "learned_positions": _whole(settings, "n_positions"),
            "norm": "layernorm",
            "norm_eps": _number(settings, "layer_norm_epsilon", 1e-5),
            "bias": True,
            "ffn": "gelu_tanh",
            "tie_embeddings": _flag(settings, "tie_word_embeddings", True),
        }

    def entries(self, spec: RackSpec) -> Iterator[Entry]:
        yield Entry("transformer.wte.weight", ("embedding.weight",))
        yield Entry("transformer.wpe.weight", ("embedding.positions",))
        for i, (ours, _) in enumerate(blocks_of(spec)):
            theirs = f"transformer.h.{i}."
            for kind in ("weight", "bias"):
                matrix = kind == "weight"
                yield Entry(f"{theirs}ln_1.{kind}", (f"{ours}attention_norm.{kind}",))
                yield Entry(f"{theirs}ln_2.{kind}", (f"{ours}ffn_norm.{kind}",))
                qkv = tuple(f"{ours}attention.{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj"))
                yield Entry(f"{theirs}attn.c_attn.{kind}", qkv, transposed=matrix)
                yield Entry(f"{theirs}attn.c_proj.{kind}", (f"{ours}attention.o_proj.{kind}",), transposed=matrix)
                yield Entry(f"{theirs}mlp.c_fc.{kind}", (f"{ours}ffn.up_proj.{kind}",), transposed=matrix)
                yield Entry(f"{theirs}mlp.c_proj.{kind}", (f"{ours}ffn.down_proj.{kind}",), transposed=matrix)
        for kind in ("weight", "bias"):
            yield Entry(f"transformer.ln_f.{kind}", (f"norm.{kind}",))
        if not spec.tie_embeddings:
            yield Entry("lm_head.weight", ("head.weight",))


class ModernBert(Family):
    model_type = "modernbert"
    architecture = "ModernBertForMaskedLM"
    objective = "mlm"
    max_tokens_key = ("max_position_embeddings", 8192)

    def settings(self, spec: RackSpec, max_tokens: int) -> Settings:
        blocks = spec.blocks
        local = [block for block in blocks if block.window is not None]
        full = [block for block in blocks if block.window is None]
        thetas = {
            "full_attention": (full or local)[0].rope_theta,
            "sliding_attention": (local or full)[0].rope_theta,
        }
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.d_model,
            "intermediate_size": blocks[0].d_ff,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": blocks[0].n_heads,
            "hidden_activation": "gelu",
            "classifier_activation": "gelu",
            "max_position_embeddings": max_tokens,
            "norm_eps": spec.norm_eps,
            "norm_bias": spec.norm_bias,
            "attention_bias": blocks[0].bias,
            "mlp_bias": blocks[0].bias,
            "classifier_bias": spec.bias,
            "decoder_bias": True,
            "layer_types": ["full_attention" if block.window is None else "sliding_attention" for block in blocks],
            "local_attention": local[0].window // 2 * 2 if local and local[0].window else 128,
            "global_attn_every_n_layers": _every([block.window is None for block in blocks]) or 3,
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": t} for kind, t in thetas.items()},
            "global_rope_theta": thetas["full_attention"],
            "local_rope_theta": thetas["sliding_attention"],
            "tie_word_embeddings": spec.tie_embeddings,
            "attention_dropout": 0.0,
            "embedding_dropout": 0.0,
            "mlp_dropout": 0.0,
        }

    def model(self, settings: Settings) -> dict[str, Any]:
        _allow(
            settings,
            {
                "hidden_activation": ("gelu",),
                "classifier_activation": ("gelu",),
                "decoder_bias": (True,),
                "sparse_prediction": (False, True),
                "sliding_window": (_whole(settings, "local_attention", 128) // 2, None),
            },
        )
        bias = _flag(settings, "attention_bias", False)
        for key in ("mlp_bias", "classifier_bias"):
            if _flag(settings, key, False) != bias:
                raise UserError(
                    f"config.json: {key}: {not bias} differs from attention_bias ({bias}); in a Rack all linear "
                    "layers have biases, or none"
                )
        model = {
            "vocab_size": _whole(settings, "vocab_size"),
            "d_model": _whole(settings, "hidden_size"),
            "n_heads": _whole(settings, "num_attention_heads"),
            "d_ff": _whole(settings, "intermediate_size"),
            "attention_preset": "bert_style",
            "norm": "layernorm",
            "norm_eps": _number(settings, "norm_eps", 1e-5),
            "norm_bias": _flag(settings, "norm_bias", False),
            "bias": bias,
            "embedding_norm": True,
            "first_attention_norm": False,
            "ffn": "geglu",
            "tie_embeddings": _flag(settings, "tie_word_embeddings", True),
            "mlm_head": True,
        }
        types = self.layer_types(settings)
        thetas = self.thetas(settings)
        full = [kind == "full_attention" for kind in types]
        if all(full):
            return {**model, "rope_theta": thetas["full_attention"]}
        repeat = _every(full)
        if repeat is None and any(full):
            raise UserError(
                f"config.json: layer_types: {types} cannot be expressed as a Rack; allowed: every so many layers, from "
                "the first on, full_attention"
            )
        return {
            **model,
            "window": _whole(settings, "local_attention", 128),
            "global_every": repeat,
            "rope_theta": thetas["full_attention"],
            "local_rope_theta": thetas["sliding_attention"],
        }

    def fits(self, spec: RackSpec, max_tokens: int) -> bool:
        # Versions before 5 know global_attn_every_n_layers alone, where the first layer sees all tokens.
        return super().fits(spec, max_tokens) and spec.blocks[0].window is None

    def layer_types(self, settings: Settings) -> list[str]:
        """``full_attention`` or ``sliding_attention``, of each layer."""
        n, types = self.n_blocks(settings), settings.get("layer_types")
        if types is None:
            every = _whole(settings, "global_attn_every_n_layers", 3)
            return ["sliding_attention" if i % every else "full_attention" for i in range(n)]
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != n or any(kind not in known for kind in types):
            raise UserError(f"config.json: layer_types: {types!r} must name one of {', '.join(known)} for each layer")
        return types

    def thetas(self, settings: Settings) -> dict[str, float]:
        """The base of the rotary positions of each kind of layer."""
        rope = settings.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise UserError(f"config.json: rope_parameters: {rope!r} is not a section of keys")
        return {
            kind: _theta({**settings, "rope_parameters": rope.get(kind)}, old, default)
            for kind, old, default in (
                ("full_attention", "global_rope_theta", 160000.0),
                ("sliding_attention", "local_rope_theta", 10000.0),
            )
        }

    def entries(self, spec: RackSpec) -> Iterator[Entry]:
        norms = ("weight", "bias") if spec.norm_bias else ("weight",)
        linears = ("weight", "bias") if spec.bias else ("weight",)

        def both(theirs: str, *ours: str, kinds: tuple[str, ...] = norms) -> Iterator[Entry]:
            for kind in kinds:
                yield Entry(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours))

        yield Entry("model.embeddings.tok_embeddings.weight", ("embedding.weight",))
        yield from both("model.embeddings.norm", "embedding.norm")
        for i, (ours, block) in enumerate(blocks_of(spec)):
            theirs = f"model.layers.{i}."
            if block.attention_norm:
                yield from both(f"{theirs}attn_norm", f"{ours}attention_norm")
            yield from both(f"{theirs}mlp_norm", f"{ours}ffn_norm")
            qkv = [f"{ours}attention.{name}" for name in ("q_proj", "k_proj", "v_proj")]
            yield from both(f"{theirs}attn.Wqkv", *qkv, kinds=linears)
            yield from both(f"{theirs}attn.Wo", f"{ours}attention.o_proj", kinds=linears)
            yield from both(f"{theirs}mlp.Wi", f"{ours}ffn.gate_proj", f"{ours}ffn.up_proj", kinds=linears)
            yield from both(f"{theirs}mlp.Wo", f"{ours}ffn.down_proj", kinds=linears)
        yield from both("model.final_norm", "norm")
        yield from both("head.dense", "head.dense", kinds=linears)
        yield from both("head.norm", "head.norm")
        if not spec.tie_embeddings:
            yield Entry("decoder.weight", ("head.weight",))
        yield Entry("decoder.bias", ("head.bias",))


def _every(full: list[bool]) -> int | None:
    """n, where every n-th layer, from the first on, is full and no other; ``None`` where there is no such n."""
    for n in range(1, len(full) + 1):
        if full == [i % n == 0 for i in range(len(full))]:
            return n
    return None


FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (Llama(), Qwen3(), DeepseekV3(), GPT2(), ModernBert())
}


def choose_family(spec: RackSpec, max_tokens: int) -> Family | None:
    """The family that computes exactly what the Rack computes, if there is one."""
    return next((family for family in FAMILIES.values() if family.fits(spec, max_tokens)), None)
