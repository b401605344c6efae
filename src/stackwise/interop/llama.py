"""Llama, and Qwen 3 and DeepSeek V3, which differ from it in their attention."""

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
    rope_settings,
    swiglu_entries,
    theta,
    whole,
)
from stackwise.model.spec import BlockSpec, RackSpec


class Llama(Family):
    """Also the frame of the other decoders with RMSNorm and SwiGLU."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    classifier = "LlamaForSequenceClassification"
    ignored = ("rotary_emb.inv_freq",)

    def settings(self, spec: RackSpec, max_tokens: int) -> Settings:
        block = spec.blocks[0]
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.d_model,
            "intermediate_size": block.d_ff,
            "num_hidden_layers": len(spec.blocks),
            "num_attention_heads": block.attention.n_heads,
            "num_key_value_heads": block.attention.n_kv_heads,
            "head_dim": block.attention.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": max_tokens,
            "rms_norm_eps": spec.norm_eps,
            "tie_word_embeddings": spec.tie_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            **rope_settings(block.attention.rope_theta),
        }

    def model(self, settings: Settings) -> dict[str, Any]:
        allow(
            settings,
            {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "sliding_window": (None,)},
        )
        heads = whole(settings, "num_attention_heads")
        return {
            "vocab_size": whole(settings, "vocab_size"),
            "d_model": whole(settings, "hidden_size"),
            "n_heads": heads,
            "n_kv_heads": whole(settings, "num_key_value_heads", heads),
            "head_dim": None if settings.get("head_dim") is None else whole(settings, "head_dim"),
            "d_ff": whole(settings, "intermediate_size"),
            "rope_theta": theta(settings),
            "norm_eps": number(settings, "rms_norm_eps", 1e-6),
            "tie_embeddings": flag(settings, "tie_word_embeddings", False),
        }

    def entries(self, spec: RackSpec) -> Iterator[Entry]:
        yield Entry("model.embed_tokens.weight", ("embedding.weight",))
        for i, (ours, block) in enumerate(blocks_of(spec)):
            theirs = f"model.layers.{i}."
            yield Entry(f"{theirs}input_layernorm.weight", (f"{ours}attention_norm.weight",))
            yield Entry(f"{theirs}post_attention_layernorm.weight", (f"{ours}ffn_norm.weight",))
            yield from self.attention(theirs, ours, block)
            yield from swiglu_entries(theirs, ours)
        yield Entry("model.norm.weight", ("norm.weight",))
        if not spec.tie_embeddings:
            yield Entry("lm_head.weight", ("head.weight",))

    def attention(self, theirs: str, ours: str, block: BlockSpec) -> Iterator[Entry]:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield Entry(f"{theirs}self_attn.{name}.weight", (f"{ours}attention.{name}.weight",))


class Qwen3(Llama):
    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    classifier = "Qwen3ForSequenceClassification"

    def settings(self, spec: RackSpec, max_tokens: int) -> Settings:
        settings = super().settings(spec, max_tokens)
        del settings["mlp_bias"]
        return {**settings, "use_sliding_window": False, "sliding_window": None}

    def model(self, settings: Settings) -> dict[str, Any]:
        allow(settings, {"use_sliding_window": (False,)})
        types = settings.get("layer_types")
        if types is not None and types != ["full_attention"] * self.n_blocks(settings):
            raise UserError(f"config.json: layer_types: {types} cannot be expressed as a Rack; allowed: full_attention")
        # A window's size is written even where windows are off.
        plain = {**settings, "sliding_window": None}
        return {**super().model(plain), "head_dim": whole(settings, "head_dim", 128), "qk_norm": True}

    def attention(self, theirs: str, ours: str, block: BlockSpec) -> Iterator[Entry]:
        yield from super().attention(theirs, ours, block)
        for name in ("q_norm", "k_norm"):
            yield Entry(f"{theirs}self_attn.{name}.weight", (f"{ours}attention.{name}.weight",))


class DeepseekV3(Llama):
    """Without experts: ``first_k_dense_replace`` as large as the depth."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    classifier = "DeepseekV3ForSequenceClassification"

    def settings(self, spec: RackSpec, max_tokens: int) -> Settings:
        block, settings = spec.blocks[0], super().settings(spec, max_tokens)
        del settings["mlp_bias"]
        head = settings.pop("head_dim")
        return {
            **settings,
            "q_lora_rank": block.attention.r_q,
            "kv_lora_rank": block.attention.r_kv,
            "qk_nope_head_dim": head,
            "qk_rope_head_dim": block.attention.rope_dim or head // 4 * 2,
            "v_head_dim": block.attention.v_head_dim or head,
            "rope_interleave": True,
            "first_k_dense_replace": len(spec.blocks),
            "num_mtp_layers": 0,
            "num_nextn_predict_layers": 0,
        }

    def model(self, settings: Settings) -> dict[str, Any]:
        rotary = whole(settings, "qk_rope_head_dim")
        allow(settings, {"rope_interleave": (True,), "head_dim": (rotary, None)})
        n, dense = self.n_blocks(settings), settings.get("first_k_dense_replace", 3)
        if not isinstance(dense, int):
            raise UserError(f"config.json: first_k_dense_replace: {dense!r} is not a whole number")
        if dense < n:
            raise UserError(
                f"config.json: first_k_dense_replace: {dense} leaves experts in {n - dense} of {n} layers, "
                "but a Rack has no experts; it must be at least num_hidden_layers"
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
            "head_dim": whole(settings, "qk_nope_head_dim"),
            "attention_custom": {
                "attention_type": "mla",
                "attention_mode": "causal",
                "mla_rq": None if settings.get("q_lora_rank", 1536) is None else whole(settings, "q_lora_rank", 1536),
                "mla_rkv": whole(settings, "kv_lora_rank"),
                "mla_rope_dim": rotary,
                "mla_v_head_dim": whole(settings, "v_head_dim"),
            },
        }

    def attention(self, theirs: str, ours: str, block: BlockSpec) -> Iterator[Entry]:
        head = block.attention.head_size
        rope = block.attention.rope_dim or head // 4 * 2
        own, rotary = f"{ours}attention.", (head + rope, rope)
        if block.attention.r_q is None:
            yield Entry(f"{theirs}self_attn.q_proj.weight", (f"{own}q_proj.weight",), rotary=rotary)
        else:
            yield Entry(f"{theirs}self_attn.q_a_proj.weight", (f"{own}q_a_proj.weight",))
            yield Entry(f"{theirs}self_attn.q_a_layernorm.weight", (f"{own}q_a_norm.weight",))
            yield Entry(f"{theirs}self_attn.q_b_proj.weight", (f"{own}q_b_proj.weight",), rotary=rotary)
        assert block.attention.r_kv is not None
        down = (block.attention.r_kv + rope, rope)
        yield Entry(f"{theirs}self_attn.kv_a_proj_with_mqa.weight", (f"{own}kv_a_proj.weight",), rotary=down)
        yield Entry(f"{theirs}self_attn.kv_a_layernorm.weight", (f"{own}kv_a_norm.weight",))
        yield Entry(f"{theirs}self_attn.kv_b_proj.weight", (f"{own}kv_b_proj.weight",))
        yield Entry(f"{theirs}self_attn.o_proj.weight", (f"{own}o_proj.weight",))
