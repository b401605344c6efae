"""Configs of StackWise's first public versions, rewritten: what each old key means today, and what nothing stands for.

Nothing is guessed: a setting is carried over where today's meaning is the same, and else the report says what differs,
or what was left out. What contradicts itself, and keys that never were, are refused. ``old_keys`` is the table of
single keys; what several settings say together stands in ``migration_rules``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from stackwise.config import commented
from stackwise.config.base import StackWiseConfig
from stackwise.config.commented import Document, Gone, Path
from stackwise.config.messages import section_of, show, unknown_key
from stackwise.config.old_keys import OLD_KEYS
from stackwise.errors import ConfigError

TABLE = {old.key: old for old in OLD_KEYS}


@dataclass
class Migrated:
    """A rewritten config.

    Attributes:
        text: the file; what was read, where that is a config of today.
        moved: ``old → new`` of each setting that has another key or another spelling of its value.
        differs: a sentence for each setting that could not be carried over as it was.
        left_out: the old keys on which nothing depends, and why.
    """

    text: str
    moved: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


class Refused(ConfigError):
    """What cannot be migrated; ``problems`` has a line for each reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


Rule = Callable[["Work"], None]


def migrate_text(text: str, where: str, before: Iterable[Rule], after: Iterable[Rule]) -> Migrated:
    """The config ``text`` in today's keys, by the table, with the rules that come ``before`` and ``after`` it.

    ``Refused``, or another ``ConfigError``, names the file as ``where``.
    """
    document = commented.read(text, where)
    if not document.repeated and _is_of_today(document):
        return Migrated(text)
    work = Work(document)
    for rule in before:
        rule(work)
    work.follow_the_table()
    for rule in () if work.problems else after:
        rule(work)
    if work.problems:
        raise Refused([f"{where}: {problem}" for problem in work.problems])
    result = work.result
    try:
        StackWiseConfig.from_dict(_nested(work.new))
    except ConfigError as error:
        raise Refused([f"{where}: {error}"]) from None
    values = {tuple(key.split(".")): value for key, value in work.new.items()}
    origins = {tuple(key.split(".")): path for key, path in work.origins.items()}
    result.text = commented.write(document, values, origins, work.gone)
    return result


def _is_of_today(document: Document) -> bool:
    try:
        StackWiseConfig.model_validate(document.data())
    except ValidationError:
        return False
    return True


class Work:
    """A migration in progress: what is ``left`` of the old settings, and the ``new`` ones, by dotted key."""

    def __init__(self, document: Document) -> None:
        self._keys = {".".join(key.path): key for key in document.keys if not key.is_section}
        self.left = {key: entry.value for key, entry in self._keys.items()}
        self.new: dict[str, Any] = {}
        self.origins: dict[str, Path] = {}
        self.gone: list[Gone] = []
        self.problems: list[str] = []
        self.result = Migrated("")
        for again, _ in document.repeated:
            self.result.differs.append(f"{'.'.join(again.path)} is written twice: the last counts, as it did")
        for key in [key for key, value in self.left.items() if value is None and key in TABLE]:
            self.drop(key, "it is null")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a setting, wherever it is by now."""
        return self.left.get(key, self.new.get(key, default))

    def move(self, old: str, new: str, value: Any = ...) -> None:
        """Old key ``old`` becomes ``new``, with its own value or ``value``."""
        was = self.left.pop(old)
        value = was if value is ... else value
        if new in self.new and self.new[new] != value:
            first = ".".join(self.origins.get(new, (new,)))
            self.problems.append(f"{old}: {show(was)} contradicts {first} ({show(self.new[new])}); keep one")
            return
        if new in self.new:
            self.drop_key(old, f"{new} says the same")
            return
        self.new[new] = value
        self.origins[new] = self._keys[old].path
        if old != new or was != value:
            before = f"{old}: {show(was)}" if old == new else old
            after = show(value) if old == new else f"{new}: {show(value)}" if was != value else new
            self.result.moved.append(f"{before} → {after}")

    def drop(self, old: str, why: str, *, differs: bool = False) -> None:
        """Leaves ``old`` out; ``differs`` where that changes what the run does."""
        was = self.left.pop(old)
        self.drop_key(old, why)
        if differs:
            self.result.differs.append(f"{old}: {show(was)} is left out: {why}")
            del self.result.left_out[old]

    def drop_key(self, old: str, why: str) -> None:
        self.gone.append(Gone(self._keys[old], why))
        self.result.left_out[old] = why

    def set(self, new: str, value: Any, why: str) -> None:
        """A setting that is not in the file, or that has another value there."""
        self.left.pop(new, None)
        self.new[new] = value
        if new in self._keys:
            self.origins[new] = self._keys[new].path
        self.result.differs.append(f"{new}: {show(value)} is written: {why}")

    def follow_the_table(self) -> None:
        """What stands in ``old_keys``, then what is a key today; the rest never was one."""
        for key in list(self.left):
            old, value = TABLE.get(key), self.left[key]
            if old is not None and old.to:
                known = isinstance(value, str | bool) and value in old.values
                self.move(key, old.to, old.values[value] if known else value)
            elif old is not None:
                self.drop(key, old.why, differs=old.asks(value))
        for key in list(self.left):
            path = tuple(key.split("."))
            section = section_of(StackWiseConfig, path[:-1])
            if section is not None and path[-1] in section.model_fields:
                self.move(key, key)
            else:
                self.problems.append(unknown_key(StackWiseConfig, path))


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in flat.items():
        *names, last = key.split(".")
        section = data
        for name in names:
            section = section.setdefault(name, {})
        section[last] = value
    return data
