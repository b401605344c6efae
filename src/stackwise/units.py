"""Quantities in words, and words as quantities."""

from __future__ import annotations

import re

from stackwise.errors import UserError

_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SECONDS = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "h": 3600, "hour": 3600, "d": 86400, "day": 86400}
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"


def size(n_bytes: float | None, decimal: bool = False) -> str:
    """Bytes for people: 12.3 MiB, or where ``decimal`` is true 12.9 MB."""
    if n_bytes is None:
        return "–"
    base, units = (1000, ("kB", "MB", "GB", "TB")) if decimal else (1024, ("KiB", "MiB", "GiB", "TiB"))
    if n_bytes < base:
        return f"{n_bytes:.0f} B"
    for unit in units:
        n_bytes /= base
        if n_bytes < base or unit == units[-1]:
            return f"{n_bytes:.1f} {unit}"
    raise AssertionError


def is_decimal(text: str) -> bool:
    """Whether a size is written in kB, MB, GB or TB, so that answers to it are too."""
    return re.search(r"[kmgt]b?\s*$", text.lower()) is not None


def parse_bytes(text: str, option: str = "--memory") -> int:
    """``24GiB``, ``16GB``, ``800M``, ``512B``: bytes. Raises ``UserError`` that names ``option``."""
    found = re.fullmatch(rf"\s*{_NUMBER}\s*([KMGT]I?)?(B?)\s*", text.upper())
    if not found:
        raise UserError(f"{option}: {text!r} is not a size; write for example 24GiB, 800MiB or 16GB")
    number, unit, ending = found[1], found[2] or "", found[3]
    if not unit and not ending:
        raise UserError(f"{option}: {text!r} has no unit; write {number}GB or {number}GiB")
    return int(float(number) * _BYTES[unit])


def parse_seconds(text: str, option: str = "--time") -> float:
    """``90s``, ``30min``, ``1h30m``, ``2 days``: seconds. Raises ``UserError`` that names ``option``."""
    parts = re.findall(rf"{_NUMBER}\s*([a-z]+)", text.lower())
    units = [unit if unit in _SECONDS else unit.removesuffix("s").removesuffix("ute") for _, unit in parts]
    if re.fullmatch(_NUMBER, text.strip()):
        raise UserError(f"{option}: {text!r} has no unit; write {text.strip()}h or {text.strip()}min")
    if not parts or re.sub(rf"{_NUMBER}\s*[a-z]+|\s", "", text.lower()) or not set(units) <= set(_SECONDS):
        raise UserError(f"{option}: {text!r} is not a time; write for example 90s, 30min, 8h or 2days")
    seconds = sum(float(number) * _SECONDS[unit] for (number, _), unit in zip(parts, units))
    if not seconds:
        raise UserError(f"{option}: {text!r} is no time at all; write for example 90s, 30min, 8h or 2days")
    return seconds


def duration(seconds: float | None) -> str:
    """Seconds for people: 0.4 s, 93 s, 12.5 min, 3.2 h, 2.5 days."""
    if seconds is None:
        return "–"
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def count(n: int, noun: str, plural: str | None = None) -> str:
    """``1 step``, ``3,000 steps``."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def size_unit(n_bytes: float) -> tuple[str, float]:
    """The unit that ``size`` writes ``n_bytes`` in, and its bytes."""
    scale = 1.0
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 * scale:
            return unit, scale
        scale *= 1024
    return "TiB", scale
