"""Where token stores and trained tokenizers live."""

from __future__ import annotations

import os
from pathlib import Path

from stackwise.reading import from_home


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """``cache_dir``, else $STACKWISE_CACHE, else $XDG_CACHE_HOME/stackwise, else ~/.cache/stackwise."""
    if cache_dir is not None:
        return from_home(cache_dir, "data.cache_dir")
    if own := os.environ.get("STACKWISE_CACHE"):
        return from_home(own, "$STACKWISE_CACHE")
    return from_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "$XDG_CACHE_HOME") / "stackwise"
