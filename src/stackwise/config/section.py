"""What every section of a config is made of: its base class, its types, and how it refuses.

The sections are frozen: a config is data. ``None`` means "derived", and the description says from what. The description
of a field is its documentation: ``stackwise init`` writes it as the comment beside the key.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1, le=1 << 53)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]
"""Of a tensor along one dimension."""
Stacks = Annotated[int, Field(ge=1, le=256)]
MAX_BLOCKS = 10_000
"""More layers than any model has."""
Blocks = Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def as_tuple(value: Any) -> Any:
    """YAML has lists only; frozen configs hold tuples."""
    return tuple(value) if isinstance(value, list) else value


def as_tuples(value: Any) -> Any:
    """The same, one level down too."""
    return tuple(as_tuple(part) for part in value) if isinstance(value, list) else value


class Section(BaseModel):
    """Base of every config section: typed strictly, frozen, closed to unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    alternatives: ClassVar[tuple[str, ...]] = ()
    """Keys of which at most one is set; overriding one clears the others."""
    steerable: ClassVar[tuple[str, ...]] = ()
    """Keys, sections whole, that ``stackwise resume RUN key=value`` may change in mid-run."""
    fixed: ClassVar[str] = ""
    """Why the others may not; empty: as of the section around it."""

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """A section whose keys are all commented out is null in YAML: every key takes its default."""
        return {} if value is None else value


def conflict(key: str, message: str) -> PydanticCustomError:
    """An impossible combination, reported at ``key`` (dotted, relative to the section that raises)."""
    return PydanticCustomError("conflict", "{problem}", {"key": key, "problem": message})
