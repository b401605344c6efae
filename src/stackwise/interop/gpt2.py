"""GPT-2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stackwise.interop.family import (
    Entry,
    Family,
    Settings,
    allow,
    blocks_of,
    flag,
    number,
    whole,
)
from stackwise.model.spec import RackSpec


class GPT2(Family):
    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    classifier = "GPT2ForSequenceClassification"
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
            "n_head": block.attention.n_heads,
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
        allow(
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
        allow(settings, {alias: (settings.get(name), None) for name, alias in names})
        width = whole(settings, "n_embd")
        return {
            "vocab_size": whole(settings, "vocab_size"),
            "d_model": width,
            "n_heads": whole(settings, "n_head"),
            "d_ff": whole(settings, "n_inner", 4 * width),
            "use_rope": False,
            "learned_positions": whole(settings, "n_positions"),
            "norm": "layernorm",
            "norm_eps": number(settings, "layer_norm_epsilon", 1e-5),
            "bias": True,
            "ffn": "gelu_tanh",
            "tie_embeddings": flag(settings, "tie_word_embeddings", True),
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
