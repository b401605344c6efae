"""Where token stores and trained tokenizers live."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """``cache_dir``, else $STACKWISE_CACHE, else $XDG_CACHE_HOME/stackwise, else ~/.cache/stackwise."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("STACKWISE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "stackwise"
