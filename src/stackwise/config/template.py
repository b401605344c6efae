"""The config of a preset, and a commented YAML file of a config: each key, its value, and its description beside it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection
from typing import Any

from pydantic.fields import FieldInfo

from stackwise.config import yaml_io
from stackwise.config.base import StackWiseConfig
from stackwise.config.messages import options_of
from stackwise.config.presets import PRESETS
from stackwise.config.section import Section
from stackwise.errors import ConfigError, allowed

_COLUMN = 38  # where the comments start
_WIDTH = 120


def preset_config(name: str) -> StackWiseConfig:
    """The config of the preset called ``name``; ``ConfigError`` names the ones there are."""
    if name not in PRESETS:
        raise ConfigError(f"{name!r} is not a preset; {allowed(name, PRESETS)}")
    return StackWiseConfig.from_dict(PRESETS[name])


USUAL = (
    "model.d_model", "model.n_heads", "model.architecture.n_stacks", "model.architecture.blocks_per_stack",
    "training.strategy", "training.batch_size", "training.micro_batch_size", "training.seq_len", "training.seed",
    "training.optimizer.lr", "training.schedule.warmup_steps", "training.progressive.trunk_strategy",
    "training.progressive.training_objective", "data.source", "data.path", "data.tokenizer.kind",
    "data.tokenizer.vocab_size",
)  # fmt: skip
"""Settings that people change, in every config that ``init`` writes."""


def template(config: StackWiseConfig, about: str, full: bool = True) -> str:
    """YAML text that loads as ``config``, headed by the sentence ``about``.

    Args:
        full: with every key; else those in ``USUAL``, the budget, and what is not at its default.
    """
    budget = f"training.max_{config.training.budget[0]}"
    keys = None if full else {*USUAL, budget}
    head = [
        *textwrap.wrap(f"StackWise: {about}.", _WIDTH - 2),
        "Every key is here." if full else "The settings that are changed most; stackwise init --full writes all.",
        "What you delete takes its default. null means: as the comment says.",
        "For one run: stackwise train THIS_FILE training.seed=1 --out RUN",
    ]
    return "".join(f"# {line}\n" for line in head) + _sections(config, "", keys)


def _sections(section: Section, path: str, keys: Collection[str] | None) -> str:
    lines: list[str] = []
    indent = "  " * path.count(".")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            about = (type(value).__doc__ or "").split("\n")[0].replace("``", "")
            within = _sections(value, f"{path}{name}.", keys)
            if within:
                lines += [*([] if indent else [""]), *_commented(f"{indent}{name}:", about), within]
        elif keys is None or f"{path}{name}" in keys or value != field.default:
            lines += _commented(f"{indent}{name}: {yaml_io.inline(_data(value))}", _about(field, value))
    return "\n".join(lines) + ("" if indent else "\n")


def _about(field: FieldInfo, value: Any) -> str:
    """The description, the choices that it leaves out, and the default where ``value`` is another."""
    about = field.description or ""
    options = [str(option) for option in options_of(field.annotation) if isinstance(option, str)]
    if len(options) > 1 and not set(options) <= set(re.findall(r"\w[\w-]*", about)):
        about += f" (one of {', '.join(options)})"
    if value != field.default:
        about += f" [default: {yaml_io.inline(_data(field.default))}]"
    return about


def _commented(text: str, about: str) -> list[str]:
    """``text`` with ``about`` as a comment to its right, or above it where ``text`` is long."""
    if not about:
        return [text]
    if len(text) > _COLUMN - 2:
        indent = text[: len(text) - len(text.lstrip())]
        return [*(f"{indent}# {line}" for line in textwrap.wrap(about, _WIDTH - len(indent) - 2)), text]
    first, *rest = textwrap.wrap(about, _WIDTH - _COLUMN - 2)
    return [f"{text:<{_COLUMN}}# {first}", *(" " * _COLUMN + f"# {line}" for line in rest)]


def _data(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
