"""The arrays of a token store, compared with their hashes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stackwise.errors import RunError

_VERIFICATION_CHUNK = 1 << 20
ARRAYS = ("train.bin", "validation.bin")


class Verification:
    """Compares the arrays of a store with their hashes, and their ids with the vocabulary, in a thread of its own.

    The files are read and not mapped, since mapped pages would count as memory of the run.
    """

    def __init__(self, folder: Path, hashes: Sequence[str], dtype: np.dtype[Any], vocab_size: int) -> None:
        self._folder, self._hashes, self._dtype, self._vocab_size = folder, hashes, dtype, vocab_size
        self._problem: str | None = None
        # A daemon: a command that fails meanwhile does not wait for it.
        self._thread = threading.Thread(target=self._run, name="verify tokens", daemon=True)
        self._thread.start()

    def result(self) -> None:
        self._thread.join()
        if self._problem is not None:
            raise RunError(f"{self._folder} is damaged: {self._problem}; delete this folder and start again")

    def _run(self) -> None:
        for name, expected in zip(ARRAYS, self._hashes):
            self._problem = self._problem or self._check(name, expected)

    def _check(self, name: str, expected: str) -> str | None:
        """What is wrong with one array."""
        hasher, largest = hashlib.sha256(), 0
        try:
            with open(self._folder / name, "rb", buffering=0) as file:
                buffer = bytearray(_VERIFICATION_CHUNK)
                view, ids = memoryview(buffer), np.frombuffer(buffer, dtype=self._dtype)
                while got := file.readinto(view):
                    hasher.update(view[:got])
                    largest = max(largest, int(ids[: got // self._dtype.itemsize].max(initial=0)))
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        if hasher.hexdigest() != expected:
            return f"the content of {name} does not match its sha256"
        if largest >= self._vocab_size:
            return f"{name} holds the id {largest:,}, and the vocabulary has {self._vocab_size:,}"
        return None
