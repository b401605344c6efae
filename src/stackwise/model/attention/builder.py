"""Attention by steps, and by the names of the presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, get_args

from torch import nn

from stackwise.config.attention import AttentionMode, AttentionPreset, AttentionSpec, KernelType
from stackwise.config.base import StackWiseConfig
from stackwise.errors import allowed
from stackwise.model.attention.core import CoreAttention


class AttentionBuilder:
    """Collects the parts of a ``CoreAttention``: ``AttentionBuilder(512, 8).with_gqa(2).with_mla(64, 64).build()``.

    Args:
        d_model, n_heads: as in ``AttentionSpec``.
        settings: its other fields. Attention is full and bidirectional unless they say otherwise.
    """

    def __init__(self, d_model: int, n_heads: int, **settings: Any) -> None:
        self._settings: dict[str, Any] = {
            "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_heads, "attention_mode": "bidirectional", **settings
        }  # fmt: skip

    def _with(self, **settings: Any) -> Self:
        self._settings |= settings
        return self

    def with_gqa(self, n_kv_heads: int) -> Self:
        """Groups of query heads share ``n_kv_heads`` key/value heads."""
        return self._with(n_kv_heads=n_kv_heads)

    def with_mla(self, r_q: int | None, r_kv: int, **settings: Any) -> Self:
        """Latent queries (``None``: full) and keys/values; ``settings``: latents, rope_dim, v_head_dim."""
        return self._with(r_q=r_q, r_kv=r_kv, **settings)

    def with_kernel(self, kernel_type: KernelType, kernel_dim: int = 64, **settings: Any) -> Self:
        """A kernel of queries and keys; ``settings``: kernel_meaning, kernel_norm, kernel_bandwidth …"""
        return self._with(kernel_type=kernel_type, kernel_dim=kernel_dim, **settings)

    def build(self) -> CoreAttention:
        """The attention. ValueError where parts do not go together."""
        return CoreAttention(AttentionSpec(**self._settings))


class AttentionPresets:
    """The presets of ``model.attention_preset`` as layers: ``AttentionPresets.mlgka(512, 8)``.

    Each takes (d_model, n_heads) and further fields of ``AttentionSpec``, which win over the preset's own. Those that
    leave the direction open are bidirectional unless ``attention_mode`` says otherwise.
    """

    @staticmethod
    def bert_style(d_model: int, n_heads: int, **settings: Any) -> CoreAttention:
        """Every token sees every token."""
        return _preset("bert_style", d_model, n_heads, settings)

    @staticmethod
    def gpt_style(d_model: int, n_heads: int, **settings: Any) -> CoreAttention:
        """A token sees itself and what is before it."""
        return _preset("gpt_style", d_model, n_heads, settings)

    @staticmethod
    def efficient_gqa(d_model: int, n_heads: int, **settings: Any) -> CoreAttention:
        """Groups of query heads share a key/value head."""
        return _preset("efficient_gqa", d_model, n_heads, settings)

    @staticmethod
    def mla_attention(d_model: int, n_heads: int, **settings: Any) -> CoreAttention:
        """DeepSeek-V3's latent attention."""
        return _preset("mla_attention", d_model, n_heads, settings)

    @staticmethod
    def kernel_attention(d_model: int, n_heads: int, **settings: Any) -> CoreAttention:
        """A gaussian kernel as logit."""
        return _preset("kernel_attention", d_model, n_heads, settings)

    @staticmethod
    def mlgka(d_model: int, n_heads: int, **settings: Any) -> CoreAttention:
        """Latent, grouped, with a laplacian kernel as logit."""
        return _preset("mlgka", d_model, n_heads, settings)

    @staticmethod
    def custom(d_model: int, n_heads: int, **settings: Any) -> CoreAttention:
        """Full bidirectional attention, but for what ``settings`` say."""
        return _preset("custom", d_model, n_heads, settings)

    @staticmethod
    def get(name: str) -> Callable[..., CoreAttention]:
        """The preset called ``name``. ValueError lists the ones there are."""
        if name not in PRESET_NAMES:
            raise ValueError(f"{name!r} is not an attention preset; {allowed(name, PRESET_NAMES)}")
        return getattr(AttentionPresets, name)


PRESET_NAMES: tuple[str, ...] = get_args(AttentionPreset)


def _preset(name: str, d_model: int, n_heads: int, settings: dict[str, Any]) -> CoreAttention:
    """What a config with this preset builds, with ``settings`` in place of its own."""
    model = {"attention_preset": name, "d_model": d_model, "n_heads": n_heads}
    objective = "clm" if name == "gpt_style" else "mlm"
    config = StackWiseConfig.from_dict({"model": model, "training": {"progressive": {"training_objective": objective}}})
    return CoreAttention(replace(config.block_fields()["attention"], **settings))


def set_attention_mode(model: nn.Module, mode: AttentionMode) -> None:
    """Makes every attention inside ``model`` ``causal`` or ``bidirectional``. ValueError when there is none."""
    layers = [part for part in model.modules() if isinstance(part, CoreAttention)]
    if not layers:
        raise ValueError(f"a {type(model).__name__} holds no CoreAttention")
    for layer in layers:
        layer.set_attention_mode(mode)
