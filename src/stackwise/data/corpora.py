"""The corpus that a config chooses."""

from __future__ import annotations

from pathlib import Path

from stackwise.config.data import DataConfig
from stackwise.data.cache import cache_root
from stackwise.data.corpus import Corpus
from stackwise.data.mixture import Mixture
from stackwise.kinds import CORPORA


def open_corpus(config: DataConfig, cache_dir: str | Path | None = None) -> Corpus:
    """The corpus that ``data.source`` and ``data.path`` name, or ``data.sources`` as one.

    Args:
        cache_dir: where hashes of files are remembered; default ``config.cache_dir`` and what ``cache_root`` says.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    memo = cache_root(cache_dir if cache_dir is not None else config.cache_dir) / "hashes"
    corpora: list[Corpus] = [CORPORA[entry.source].load()(entry, memo) for entry in config.sources or (config,)]
    return Mixture(corpora, [entry.weight for entry in config.sources]) if len(corpora) > 1 else corpora[0]
