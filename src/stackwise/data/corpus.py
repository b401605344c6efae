"""What a corpus is: documents of text in a fixed order, read piece by piece so that none need fit in memory.

Text is kept exactly: no newline is translated, no byte order mark removed. Empty documents are left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much is done and how much there is (``None``: not known), in bytes of text."""
Document = Iterator[str]
"""The text of a document in pieces of at most ``PIECE`` bytes; read it before going on to the next document."""
PIECE = 1 << 18
"""Bytes in a piece, at most; pieces end at line ends where there are any."""


class Corpus(ABC):
    """Documents in a fixed order. ``description`` is for people; ``size`` about the bytes to read, where known."""

    description: str
    size: int | None

    @property
    def sources(self) -> Sequence[Corpus]:
        """What ``documents`` consists of, one after another."""
        return (self,)

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, from the first, each time it is called."""

    @abstractmethod
    def fingerprint(self, progress: Progress | None = None) -> str:
        """SHA-256 (hex) of what ``documents`` gives, or of what determines it."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raises ``RunError`` when the corpus is no longer the one that ``fingerprint`` saw."""


def split_text(text: str) -> Document:
    """``text`` in pieces, split at line ends."""
    length = PIECE // 4  # of characters, each four bytes at most
    start = 0
    while start < len(text):
        end = start + length
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
