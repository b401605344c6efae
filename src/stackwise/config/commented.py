"""YAML with its comments: what a file says, where each comment belongs, and a rewritten file that keeps them.

Only configs are meant: sections of keys, and values that fit on a line. A rewritten file has one key on each line; a
comment stays with the key below it or beside it, and where that key goes, the comment goes too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from stackwise.config import yaml_io
from stackwise.errors import ConfigError

Path = tuple[str, ...]


@dataclass
class Key:
    """One key of a file.

    Attributes:
        value: None for a section.
        text: the value as it is written, on one line; empty for a section.
        above: the comments above the key, and an empty string for each blank line among them.
        beside: the comment on its line.
        line, column: where it stands, from 0.
    """

    path: Path
    value: Any
    text: str
    line: int
    column: int
    is_section: bool
    above: list[str] = field(default_factory=list)
    beside: str = ""

    @property
    def at(self) -> float:
        """Its place in the order of the file."""
        return self.line + self.column / yaml_io.MAX_BYTES


@dataclass
class Document:
    """A file.

    Attributes:
        keys: in order.
        loose: comments that belong to no key, as (line, section, text).
        repeated: keys that are written again further down, which counts, with the line after their value.
    """

    keys: list[Key]
    loose: list[tuple[int, Path, str]]
    repeated: list[tuple[Key, int]]

    def data(self) -> dict[str, Any]:
        """The mapping that the file describes; of a key that is written twice, the second."""
        whole: dict[str, Any] = {}
        for key in self.keys:
            section = whole
            for name in key.path[:-1]:
                section = section[name]
            section[key.path[-1]] = {} if key.is_section else key.value
        return whole


def read(text: str, where: str) -> Document:
    """The document ``text``; tags that name classes of Python are passed over. Errors begin with ``where``."""
    if len(text) > yaml_io.MAX_BYTES:
        raise ConfigError(f"{where}: larger than {yaml_io.MAX_BYTES:,} bytes, the limit for a config")
    try:
        root = yaml.compose(text, yaml_io.Loader)
        comments = _comments(text)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{where}: not valid YAML at line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    document = Document([], [], [])
    if root is None:
        return document
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{where}: a config is a mapping with the sections model, training and data")
    try:
        _collect(root, (), text, document)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    _attach(document, comments, text)
    return document


def _collect(section: yaml.MappingNode, path: Path, text: str, document: Document) -> None:
    """Adds the keys below ``section``; the last of equal ones counts, as PyYAML has it."""
    last: dict[str, int] = {}
    for i, (key, _) in enumerate(section.value):
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"line {key.start_mark.line + 1}: a key must be a name")
        last[key.value] = i
    for i, (key, node) in enumerate(section.value):
        is_section = isinstance(node, yaml.MappingNode) and _is_section(node)
        value, written = (None, "") if is_section else _value(node, text)
        mark = key.start_mark
        found = Key((*path, key.value), value, written, mark.line, mark.column, is_section)
        if last[key.value] != i:
            document.repeated.append((found, node.end_mark.line + (not is_section)))
            continue
        document.keys.append(found)
        if is_section:
            _collect(node, found.path, text, document)


def _is_section(node: yaml.MappingNode) -> bool:
    return bool(node.value) and all(key.tag == "tag:yaml.org,2002:str" for key, _ in node.value)


def _value(node: yaml.Node, text: str) -> tuple[Any, str]:
    """The value of ``node``, and how it is written on one line."""
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
        return node.value, yaml_io.inline(node.value)
    written = text[node.start_mark.index : node.end_mark.index].rstrip().removeprefix("!!python/tuple")
    if written.startswith("!!python/"):
        raise ConfigError(
            f"line {node.start_mark.line + 1}: {written.split()[0]} makes an object of Python, not a value"
        )
    value = yaml_io.parse(" " * node.start_mark.column + written, f"line {node.start_mark.line + 1}")
    if "\n" in written or not isinstance(node, yaml.ScalarNode):
        written = yaml_io.inline(value)
    return value, written


def _comments(text: str) -> list[tuple[int, int, str, bool]]:
    """(line, column, text, whether it is alone on its line) of each comment."""
    lines, found, end = text.splitlines(), [], 0
    tokens = [*yaml.scan(text, yaml_io.Loader)]
    for token in tokens:
        gap = text[end : token.start_mark.index]
        line = text.count("\n", 0, end)
        for offset, part in enumerate(gap.split("\n")):
            at = part.find("#")
            if at >= 0:
                whole = lines[line + offset]
                column = whole.index(part[at:].rstrip()) if part[at:].rstrip() in whole else whole.index("#")
                found.append((line + offset, column, part[at:].rstrip(), not whole[:column].strip()))
        end = max(end, token.end_mark.index)
    return found


def _attach(document: Document, comments: Iterable[tuple[int, int, str, bool]], text: str) -> None:
    """Gives each comment to its key: the one on its line, or the next one that is not further left."""
    keys = document.keys
    on_line: dict[int, Key] = {}
    for key in keys:
        on_line.setdefault(key.line, key)
    blank = {i for i, line in enumerate(text.splitlines()) if not line.strip()}
    head = _end_of_head(keys, blank)
    for line, column, comment, alone in comments:
        passed = next((key for key, end in document.repeated if key.line <= line < end), None)
        if passed is not None:
            document.loose.append((line, passed.path[:-1], comment))
            continue
        before = [key for key in keys if key.line <= line]
        after = next((key for key in keys if key.line > line), None)
        if not alone and line in on_line:
            on_line[line].beside = comment
        elif not alone and before:  # inside a value of several lines
            before[-1].above.append(comment)
        elif line < head:
            document.loose.append((line - len(text), (), comment))
        elif after is not None and (column <= after.column or not before):
            if line - 1 in blank and (after.above or line > head):
                after.above.append("")
            after.above.append(comment)
        else:
            owner = next((key for key in reversed(before) if key.column <= column), before[-1] if before else None)
            section = () if owner is None else owner.path if owner.is_section else owner.path[:-1]
            document.loose.append((line, section, comment))
    for key in keys:
        if not key.above and key.line - 1 in blank and key.line > head:
            key.above = [""]


def _end_of_head(keys: list[Key], blank: set[int]) -> int:
    """The line where the comments end that are about the whole file: a blank line separates them from the first key."""
    first = keys[0].line if keys else 0
    return max((line for line in blank if line < first), default=0)


@dataclass(frozen=True)
class Gone:
    """A key that is kept as a comment."""

    key: Key
    because: str


def write(document: Document, values: Mapping[Path, Any], origins: Mapping[Path, Path], gone: Iterable[Gone]) -> str:
    """The text of a document with these values, laid out and commented as ``document``.

    Args:
        values: by path, in the order of keys that ``document`` does not have.
        origins: of a path, the path in ``document`` whose place in the order and whose comments it takes.
        gone: keys of ``document`` without a successor; each becomes a comment where it stood.
    """
    old = {key.path: key for key in document.keys}
    sections = {path[:depth] for path in values for depth in range(len(path))}
    items: dict[Path, list[tuple[float, list[str]]]] = {section: [] for section in sections | {()}}

    def place(section: Path) -> Path:
        while section not in items:
            section = section[:-1]
        return section

    def add(section: Path, at: float, lines: list[str]) -> None:
        items[section].append((at, lines))

    for line, section, comment in document.loose:
        add(place(section), line, [comment])
    for key in document.keys:
        if key.is_section and key.path not in items:
            add(place(key.path), key.at, [*key.above, *filter(None, [key.beside])])
    for one in gone:
        kept = f"# left out: {one.key.path[-1]}: {one.key.text}" + (f"  {one.key.beside}" if one.key.beside else "")
        add(place(one.key.path[:-1]), one.key.at, [*one.key.above, kept.rstrip()])
    first: dict[Path, float] = {}
    for number, (path, value) in enumerate(values.items()):
        source = old.get(origins.get(path, ()))
        at = source.at if source else len(values) * 1e6 + number
        text = source.text if source and _same(source.value, value) else yaml_io.inline(value)
        lines = [*(source.above if source else []), f"{path[-1]}: {text}".rstrip()]
        lines[-1] += f"  {source.beside}" if source and source.beside else ""
        add(path[:-1], at, lines)
        for depth in range(1, len(path)):
            first[path[:depth]] = min(at, first.get(path[:depth], at))
    return _lines((), items, old, first)


def _lines(
    section: Path,
    items: Mapping[Path, list[tuple[float, list[str]]]],
    old: Mapping[Path, Key],
    first: Mapping[Path, float],
) -> str:
    """The text of a section's keys, comments and subsections, in order."""
    parts = [(at, "".join(f"{line}\n" for line in lines)) for at, lines in items[section]]
    for inner in items:
        if inner and inner[:-1] == section:
            key = old.get(inner)
            head = [*(key.above if key else []), f"{inner[-1]}:" + (f"  {key.beside}" if key and key.beside else "")]
            body = "".join(f"  {line}".rstrip() + "\n" for line in _lines(inner, items, old, first).splitlines())
            at = key.at if key and key.is_section else first[inner]
            parts.append((at, "".join(f"{line}\n" for line in head) + body))
    return "".join(text for _, text in sorted(parts, key=lambda part: part[0]))


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b
