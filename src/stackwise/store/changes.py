"""Settings that were changed in mid-run: ``RUN/changes.json`` says after which step which values changed.

``config.yaml`` has the settings that hold for the next step. The record is written first, whole or not at all, so that
a process that dies between the two leaves a record from which ``config.yaml`` is set right. A checkpoint names the
settings that its last step was taken with: a config is compared with it as it was then.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from stackwise.config.base import StackWiseConfig, dotted
from stackwise.errors import RunError
from stackwise.files import write_text_atomic
from stackwise.reading import read_object
from stackwise.store.rundir import RunDir

_STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Change(BaseModel):
    """What changed after ``step``.

    Attributes:
        settings: by dotted key, the values before and after.
        phase_steps: of every phase, from here on, where the budget changed; else empty.
    """

    model_config = _STRICT

    step: NonNegativeInt
    settings: dict[str, tuple[Any, Any]]
    phase_steps: tuple[PositiveInt, ...] = ()


class _Record(BaseModel):
    model_config = _STRICT

    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Changes:
    """Those of a run, in the order in which they were made."""

    entries: tuple[Change, ...] = ()

    @classmethod
    def of(cls, run: RunDir) -> Changes:
        """RunError when the record is damaged."""
        try:
            return cls(_Record.model_validate_json(json.dumps(read_object(run.changes))).changes)
        except FileNotFoundError:
            return cls()
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
        except (OSError, ValueError) as error:
            problem = str(error)
        raise RunError(f"{run.changes}: not a record of changed settings: {problem}")

    def write(self, run: RunDir) -> None:
        """Instead of the record that ``run`` has."""
        text = json.dumps(_Record(changes=self.entries).model_dump(mode="json"), allow_nan=False, indent=1)
        write_text_atomic(run.changes, f"{text}\n")

    def until(self, step: int) -> Changes:
        """Those that hold for the step after ``step``."""
        return Changes(tuple(change for change in self.entries if change.step <= step))

    def config_of(self, step: int, config: StackWiseConfig) -> StackWiseConfig:
        """The settings that ``step`` was taken with, or would be, where ``config`` are those that hold now.

        A value in ``config`` that the record does not know is left as it is.
        """
        values: dict[str, Any] = {}
        known: dict[str, list[Any]] = {}
        for change in self.entries:
            for key, (before, after) in change.settings.items():
                known.setdefault(key, []).extend((before, after))
                if change.step < step:
                    values[key] = after
                else:
                    values.setdefault(key, before)
        if not values:
            return config
        here = dotted(config.to_dict())
        return config.changed({key: value for key, value in values.items() if here.get(key) in known[key]})

    @property
    def phase_steps(self) -> tuple[int, ...]:
        """Of every phase, as the last change of the budget has them; empty where there was none."""
        return next((change.phase_steps for change in reversed(self.entries) if change.phase_steps), ())


def difference(before: StackWiseConfig, after: StackWiseConfig) -> dict[str, tuple[Any, Any]]:
    """By dotted key, the values before and after of the settings that differ."""
    old, new = dotted(before.to_dict()), dotted(after.to_dict())
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
