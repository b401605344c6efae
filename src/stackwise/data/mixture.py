"""Several corpora as one: their documents one after another. How they are mixed is the business of the batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from stackwise.data.corpus import Corpus, Document, Progress


class Mixture(Corpus):
    """The documents of ``corpora``; ``weights`` belong to what it is, and so to every key made of it."""

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[int]) -> None:
        self._corpora, self._weights = list(corpora), list(weights)
        self.description = " + ".join(f"{w} × {corpus.description}" for w, corpus in zip(weights, corpora))
        sizes = [corpus.size for corpus in corpora]
        self.size = None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def sources(self) -> Sequence[Corpus]:
        return self._corpora

    def documents(self) -> Iterator[Document]:
        for corpus in self._corpora:
            yield from corpus.documents()

    def fingerprint(self, progress: Progress | None = None) -> str:
        parts = [[w, corpus.fingerprint(progress)] for w, corpus in zip(self._weights, self._corpora)]
        return hashlib.sha256(json.dumps(["mixture", parts]).encode()).hexdigest()

    def check_unchanged(self) -> None:
        for corpus in self._corpora:
            corpus.check_unchanged()
