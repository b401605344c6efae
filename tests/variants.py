"""The variants of a Block that the tests go through: fields of a ``BlockSpec`` and of a ``RackSpec``."""

from stackwise.config import StackWiseConfig
from stackwise.model.architecture import BlockSpec, Rack, create_block_spec, create_rack_from_specs

C, F, H, G, V = 48, 34, 6, 2, 37


def of_preset(preset, **custom):
    """What a config with this preset builds, made causal."""
    model = {"attention_preset": preset, "d_model": C, "n_heads": H, "d_ff": F, "attention_custom": custom}
    objective = "mlm" if preset == "bert_style" else "clm"
    config = StackWiseConfig.from_dict({"model": model, "training": {"progressive": {"training_objective": objective}}})
    return {**BlockSpec(**config.block_fields()).to_dict(), "attention_mode": "causal"}


def spec(**fields):
    return create_block_spec(C, F, H, fields.pop("n_kv_heads", None), **fields)


BLOCKS = {
    "gpt_style": of_preset("gpt_style"),
    "bert_style": of_preset("bert_style"),
    "efficient_gqa": of_preset("efficient_gqa"),
    "mla_attention": of_preset("mla_attention"),
    "kernel_attention": of_preset("kernel_attention"),
    "mlgka": of_preset("mlgka"),
    "custom": of_preset("custom", attention_type="mla", mla_rkv=10, kernel_type="gaussian", kernel_dim=22),
    "grouped_mla": spec(n_kv_heads=G, r_q=14, r_kv=10, rope_dim=6, v_head_dim=5),
    "mla_full_queries": spec(r_kv=11, rope_dim=4),
    "laplacian": spec(kernel_type="laplacian", kernel_dim=26, n_kv_heads=G),
    "laplacian_l1": spec(kernel_type="laplacian", kernel_norm="l1", kernel_dim=26),
    "uniform": spec(kernel_type="uniform", kernel_dim=30),
    "gaussian_weight": spec(kernel_type="gaussian", kernel_meaning="weight", n_kv_heads=G),
    "laplacian_weight": spec(kernel_type="laplacian", kernel_meaning="weight", n_kv_heads=G),
    "learned_temperature": spec(kernel_type="gaussian", kernel_dim=34, learned_temperature=True),
    "qk_norm": spec(qk_norm=True, head_dim=10, n_kv_heads=G),
    "window": spec(window=4, n_kv_heads=G),
    "gelu_bias_layernorm": spec(ffn="gelu_tanh", bias=True, norm="layernorm", norm_bias=True),
    "geglu": spec(ffn="geglu", norm="layernorm", attention_norm=False),
}

PRESETS = ("gpt_style", "bert_style", "efficient_gqa", "mla_attention", "kernel_attention", "mlgka", "custom")


def rack_of(name: str, *, learned_positions: int | None = None, n_blocks: int = 2, **fields) -> Rack:
    """Two Stacks of ``n_blocks`` Blocks of the variant."""
    block = {**BLOCKS[name], **fields}
    stacks = [{"stack_id": k, "n_blocks": n_blocks, "block_spec": block} for k in (0, 1)]
    return create_rack_from_specs(V, C, stacks, learned_positions=learned_positions, seed=5)
