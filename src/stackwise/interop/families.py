"""The families of transformers that a Rack can be exported to and imported from, by their ``model_type``."""

from __future__ import annotations

from stackwise.interop.family import Family
from stackwise.interop.gpt2 import GPT2
from stackwise.interop.llama import DeepseekV3, Llama, Qwen3
from stackwise.interop.modernbert import ModernBert
from stackwise.model.spec import RackSpec

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (Llama(), Qwen3(), DeepseekV3(), GPT2(), ModernBert())
}


def choose_family(spec: RackSpec, max_tokens: int) -> Family | None:
    """The family that computes exactly what the Rack computes, if there is one."""
    return next((family for family in FAMILIES.values() if family.fits(spec, max_tokens)), None)
