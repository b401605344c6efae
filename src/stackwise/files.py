"""How files and folders are written: whole or not at all, and never through a link that lies where they go.

A temporary file or folder lies beside what it becomes, is named ``.NAME.<16 hex digits>.tmp`` by chance, and is made
exclusively: nothing that waits there under a guessed name is written through. Modes are those of the umask.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from stackwise.errors import RunError, UserError

TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of everything that is still being written."""

_OWNER, _CONTENT = "owner.lock", "content"
_LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{1,16}\.tmp", re.DOTALL)

_held_locks: set[int] = set()
"""Descriptors of the locks this process holds."""


def _forget_locks_in_child() -> None:
    # A forked child shares the parent's flock: a data worker that outlives a killed parent would keep it.
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_forget_locks_in_child)


FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on the size of a file is reached",
}
"""What is said where there is no room to write."""


def reason(error: OSError) -> str:
    """Why something cannot be written, in a few words."""
    if error.errno in FULL:
        return FULL[error.errno]
    if error.errno == errno.ELOOP:
        return "it is a symbolic link, and links are not followed when writing"
    return error.strerror or str(error)


def nearest_folder(path: Path) -> Path:
    """``path``, or the first folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def sync_directory(folder: Path) -> None:
    """Makes the names in ``folder`` durable (a rename or a deletion is not, until its directory is synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty temporary file to fill; it replaces ``path`` at the end of the block, or vanishes when that raises.

    ``path`` holds its old content or all of the new one, never a part; a link there is replaced, not followed. The
    rename itself is durable after ``sync_directory(path.parent)``.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield temporary
        _settle(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes ``chunks`` to ``path`` as ``replacing`` does. Raises OSError, leaving no temporary file."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for chunk in chunks:
            file.write(chunk)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, durably and never in part. RunError in one line when it cannot."""
    path = Path(path)
    try:
        write_atomic(path, [text.encode()])
        sync_directory(path.parent)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {reason(error)}") from error


def append(path: Path, data: bytes) -> None:
    """Adds ``data`` to a file, made when it is not there. Raises OSError, also where a link lies."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(descriptor, "ab") as file:
        file.write(data)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Holds the lock of the file ``path``, made when it is not there; the kernel lets go when the process ends.

    Yields its descriptor. BlockingIOError while another process holds it, its ``filename`` being what that process
    wrote there; another OSError when it cannot be had, as when ``path`` is a link.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                raise BlockingIOError(error.errno, error.strerror, holder) from None
            if _is(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder deleted it before letting go
    _held_locks.add(descriptor)
    owner = os.getpid()
    try:
        yield descriptor
    finally:
        if os.getpid() == owner:
            _held_locks.discard(descriptor)
            os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder in ``parent`` for what becomes ``name``, deleted at the end, and if we are killed by the next
    caller in the same ``parent``.

    Its owner holds a lock on a file in it, so that folders of dead processes are told from those of living ones.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for path in _leftovers(parent):
        if path.is_dir() and not path.is_symlink():
            _remove_abandoned(path)
    with contextlib.ExitStack() as stack:
        while True:
            folder = parent / f".{name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
            folder.mkdir()
            try:
                stack.enter_context(locked(folder / _OWNER))
                break
            except (FileNotFoundError, BlockingIOError):  # another process took it for abandoned in this moment
                continue
        try:
            inside = folder / _CONTENT
            inside.mkdir()
            yield inside
        finally:
            _remove(folder)


def publish(folder: Path, target: Path) -> bool:
    """Moves a finished folder to ``target``, whole; False, with nothing changed, when something is there already.

    Both must be on one file system; an empty folder counts as nothing. All that ``folder`` holds reaches the disk
    before its name does.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_directory(path)
        else:
            _settle(path, mode)
    sync_directory(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    sync_directory(target.parent)
    return True


def require_free(folder: Path) -> None:
    """UserError when something is at ``folder`` already; an empty folder counts as nothing."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise _taken(folder)


def _taken(folder: Path) -> UserError:
    return UserError(f"{folder}: already exists; give a new or an empty folder")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder to fill; it becomes ``folder`` at the end of the block, whole, or vanishes when that raises.

    Raises:
        UserError: something is at ``folder``. RunError: it cannot be written.
    """
    try:
        with scratch_folder(folder.parent, folder.name) as scratch:
            yield scratch
            if not publish(scratch, folder):
                raise _taken(folder)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {reason(error)}") from error


def remove_leftovers(folder: Path, names: str) -> None:
    """Deletes what killed processes left of files and folders whose names match the pattern ``names``.

    The caller knows that nobody writes them now. What has another name stays.
    """
    for path in _leftovers(folder):
        match = _LEFTOVER.fullmatch(path.name)
        if match and re.fullmatch(names, match[1]):
            if path.is_dir() and not path.is_symlink():
                _remove_abandoned(path)
            else:
                path.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Whether a name is that of a temporary file or folder."""
    return _LEFTOVER.fullmatch(name) is not None


def _leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if is_leftover(path.name)] if folder.is_dir() else []


def _settle(path: Path, mode: int) -> None:
    """Gives a file that a library may have made its mode, and brings it to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Deletes a scratch folder whose owner is dead: its lock can be had. Any other folder stays."""
    if not (folder / _OWNER).is_file():
        with contextlib.suppress(OSError):  # not empty: not ours, or its owner was just there
            folder.rmdir()
        return
    with contextlib.suppress(OSError), locked(folder / _OWNER):
        _remove(folder)


def _remove(folder: Path) -> None:
    """Deletes a scratch folder, its owner's lock last: killed in between, the rest is still known as abandoned."""
    shutil.rmtree(folder / _CONTENT, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
