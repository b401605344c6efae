"""Quantities in words."""

from __future__ import annotations


def size(n_bytes: float | None) -> str:
    """Bytes for people: 12.3 MiB."""
    if n_bytes is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n_bytes < 1024 or unit == "TiB":
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError
