from stackwise.model.attention.core import CoreAttention

__all__ = ["CoreAttention"]
