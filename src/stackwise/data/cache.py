"""Where token stores and trained tokenizers live, and how a folder appears there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_SCRATCH = ".building-"
_OWNER = "owner.lock"


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """``cache_dir``, else $STACKWISE_CACHE, else $XDG_CACHE_HOME/stackwise, else ~/.cache/stackwise."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("STACKWISE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "stackwise"


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in ``parent`` for work in progress, deleted at the end, and by the next caller if we are killed.

    Its owner holds a lock on a file in it, so that folders of dead processes are told from those of living ones.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with _lock(parent / ".lock"):
        _remove_abandoned(parent)
        folder = parent / f"{_SCRATCH}{os.getpid()}-{secrets.token_hex(4)}"
        folder.mkdir()
        owner = os.open(folder / _OWNER, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(owner, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        os.close(owner)
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Moves a finished folder to ``target``, unless another process has put the same there meanwhile.

    Both must be on one file system. Everything in ``folder`` reaches the disk before its name does.
    """
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(folder)


def write_atomic(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    """Deletes the scratch folders whose owner is dead: its lock can be had. Call under the parent's lock."""
    for folder in parent.glob(f"{_SCRATCH}*"):
        try:
            owner = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # killed before the file was there, or just being deleted by its owner
            shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(owner)
