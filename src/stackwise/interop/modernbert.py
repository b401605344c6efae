"""ModernBERT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stackwise.errors import UserError
from stackwise.interop.family import (
    Entry,
    Family,
    Settings,
    allow,
    blocks_of,
    flag,
    number,
    theta,
    whole,
)
from stackwise.model.spec import RackSpec


class ModernBert(Family):
    model_type = "modernbert"
    architecture = "ModernBertForMaskedLM"
    objective = "mlm"
    max_tokens_key = ("max_position_embeddings", 8192)

    def settings(self, spec: RackSpec, max_tokens: int) -> Settings:
        blocks, layers = spec.blocks, [block.attention for block in spec.blocks]
        local = [attention for attention in layers if attention.window is not None]
        full = [attention for attention in layers if attention.window is None]
        thetas = {
            "full_attention": (full or local)[0].rope_theta,
            "sliding_attention": (local or full)[0].rope_theta,
        }
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.d_model,
            "intermediate_size": blocks[0].d_ff,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": layers[0].n_heads,
            "hidden_activation": "gelu",
            "classifier_activation": "gelu",
            "max_position_embeddings": max_tokens,
            "norm_eps": spec.norm_eps,
            "norm_bias": spec.norm_bias,
            "attention_bias": layers[0].bias,
            "mlp_bias": layers[0].bias,
            "classifier_bias": spec.bias,
            "decoder_bias": True,
            "layer_types": ["full_attention" if layer.window is None else "sliding_attention" for layer in layers],
            "local_attention": local[0].window // 2 * 2 if local and local[0].window else 128,
            "global_attn_every_n_layers": _every([layer.window is None for layer in layers]) or 3,
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": t} for kind, t in thetas.items()},
            "global_rope_theta": thetas["full_attention"],
            "local_rope_theta": thetas["sliding_attention"],
            "tie_word_embeddings": spec.tie_embeddings,
            "attention_dropout": 0.0,
            "embedding_dropout": 0.0,
            "mlp_dropout": 0.0,
        }

    def model(self, settings: Settings) -> dict[str, Any]:
        allow(
            settings,
            {
                "hidden_activation": ("gelu",),
                "classifier_activation": ("gelu",),
                "decoder_bias": (True,),
                "sparse_prediction": (False, True),
                "sliding_window": (whole(settings, "local_attention", 128) // 2, None),
            },
        )
        bias = flag(settings, "attention_bias", False)
        for key in ("mlp_bias", "classifier_bias"):
            if flag(settings, key, False) != bias:
                raise UserError(
                    f"config.json: {key}: {not bias} differs from attention_bias ({bias}); in a Rack all linear "
                    "layers have biases, or none"
                )
        model = {
            "vocab_size": whole(settings, "vocab_size"),
            "d_model": whole(settings, "hidden_size"),
            "n_heads": whole(settings, "num_attention_heads"),
            "d_ff": whole(settings, "intermediate_size"),
            "attention_preset": "bert_style",
            "norm": "layernorm",
            "norm_eps": number(settings, "norm_eps", 1e-5),
            "norm_bias": flag(settings, "norm_bias", False),
            "bias": bias,
            "embedding_norm": True,
            "first_attention_norm": False,
            "ffn": "geglu",
            "tie_embeddings": flag(settings, "tie_word_embeddings", True),
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
                f"config.json: layer_types: {types} cannot be expressed as a Rack; allowed: "
                "full_attention in the first layer and at regular intervals after it"
            )
        return {
            **model,
            "window": whole(settings, "local_attention", 128),
            "global_every": repeat,
            "rope_theta": thetas["full_attention"],
            "local_rope_theta": thetas["sliding_attention"],
        }

    def fits(self, spec: RackSpec, max_tokens: int) -> bool:
        # Versions before 5 know global_attn_every_n_layers alone, where the first layer sees all tokens.
        return super().fits(spec, max_tokens) and spec.blocks[0].attention.window is None

    def layer_types(self, settings: Settings) -> list[str]:
        """``full_attention`` or ``sliding_attention``, of each layer."""
        n, types = self.n_blocks(settings), settings.get("layer_types")
        if types is None:
            every = whole(settings, "global_attn_every_n_layers", 3)
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
            kind: theta({**settings, "rope_parameters": rope.get(kind)}, old, default)
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
