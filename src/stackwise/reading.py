"""The one reader of JSON, for files that anybody may have written, and of paths that anybody may have named.

What it returns is small enough to walk, print and write again: no deeper than ``MAX_DEPTH``, no whole number beyond 64
bits, finite numbers, text that UTF-8 can hold. Whatever is wrong is a ``JSONError``, a ``ValueError`` of one line that
says what and where; callers say in which file, and what follows from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from stackwise.errors import UserError

MAX_BYTES = 1 << 26
"""Of a file that ``read_json`` reads."""
MAX_DEPTH = 64
"""Lists and objects inside each other."""
_MAX_NUMBER = 1 << 64


class JSONError(ValueError):
    """The text is not JSON, or beyond what is read here; one line without the file's name."""


def parse_json(text: str | bytes, *, foreign_fields: bool = False) -> Any:
    """The value that ``text`` (bytes: UTF-8) holds.

    Args:
        foreign_fields: the text is a record of which the caller takes one field of text and checks that: ``NaN``,
            ``Infinity`` and large numbers, which other programs write beside it, do not matter.

    Raises:
        JSONError: it is not JSON, or it is nested deeper or holds larger numbers than anything that is read here.
    """
    try:
        content = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(content, parse_constant=None if foreign_fields else _refuse_constant)
    except UnicodeDecodeError as error:
        byte, at = error.object[error.start], error.start
        raise JSONError(f"not UTF-8 text: the byte 0x{byte:02x} at offset {at:,}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in error.doc.rstrip() else ""
        raise JSONError(f"not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise JSONError(f"nested too deeply (more than {MAX_DEPTH} lists and objects inside each other)") from None
    except JSONError:
        raise
    except ValueError:  # of int(): more digits than Python converts
        raise JSONError("a number in it has too many digits") from None
    _check(value, foreign_fields)
    if not foreign_fields and "\\ud" in content.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JSONError("text in it holds half of a surrogate pair") from None
    return value


def read_json(path: str | Path) -> Any:
    """The value that the file holds.

    Raises:
        JSONError: as ``parse_json`` does, or the file is too large. OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise JSONError(f"larger than {MAX_BYTES:,} bytes")
    return parse_json(content)


def read_object(path: str | Path) -> dict[str, Any]:
    """``read_json`` of a file that holds an object; ``JSONError`` where it holds something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise JSONError(f"not an object but {json_type(value)}")
    return value


def from_home(path: str | Path, key: str) -> Path:
    """``path`` with the home folder that ``~`` or ``~user`` at its start means. UserError that names ``key``."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{key}: {str(path)!r}: there is no such user here, or none with a home folder") from None


def json_type(value: object) -> str:
    """What JSON calls a value of this type, with its article."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _refuse_constant(name: str) -> NoReturn:
    raise JSONError(f"{name} is not a JSON number")


def _check(value: Any, foreign_fields: bool) -> None:
    """Raises ``JSONError`` for what is too deep and, unless the fields are foreign, for numbers out of range."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
            elif not foreign_fields and isinstance(item, int | float):
                if isinstance(item, int) and abs(item) >= _MAX_NUMBER:
                    raise JSONError("a whole number in it is out of range: its size must be below 2**64")
                if isinstance(item, float) and item - item != 0.0:  # 1e999 is read as infinity
                    raise JSONError("a number in it is out of range")
        if not deeper:
            return
        level = deeper
    raise JSONError(f"nested too deeply (more than {MAX_DEPTH} lists and objects inside each other)")
