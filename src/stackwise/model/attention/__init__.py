from stackwise.model.attention.builder import AttentionBuilder, AttentionPresets, set_attention_mode
from stackwise.model.attention.core import CoreAttention

__all__ = ["AttentionBuilder", "AttentionPresets", "CoreAttention", "set_attention_mode"]
