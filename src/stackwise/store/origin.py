"""Whether a run was begun by this user, and what the config of a run that was not names outside its folder.

A run received from somebody else names files of this machine in its ``config.yaml``: the text to read, the folder to
write token stores to. They are touched only when the user says so. A run begun here carries a signature of those
settings (``RUN/.origin``, HMAC-SHA256) by a key that never leaves the user's home ($XDG_CONFIG_HOME/stackwise/key, else
~/.config/stackwise/key), so that it goes on without asking, wherever it is moved to; a setting that is changed
afterwards, by whomever, is asked for again.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

from stackwise.config.base import StackWiseConfig
from stackwise.errors import UserError
from stackwise.store.rundir import RunDir

_KEY_BYTES = 32


def signature(config: StackWiseConfig) -> str | None:
    """What ``RUN/.origin`` holds; None where this user's key cannot be read or made."""
    key = _key()
    if key is None:
        return None
    named = json.dumps(_named(config), sort_keys=True)
    return hmac.new(key, named.encode(), hashlib.sha256).hexdigest()


def check_origin(run: RunDir, config: StackWiseConfig, keys: tuple[str, ...], advice: str) -> None:
    """UserError when a run that was not begun here names something outside its folder under one of ``keys``."""
    outside = [
        (key, value)
        for key, values in _named(config).items()
        for value in values
        if key in keys and not _is_inside(run.path, value)
    ]
    if not outside or _is_own(run, config):
        return
    key, value = outside[0]
    raise UserError(
        f"{run.path}: its {key} names {value!r}, which is outside the run, and nothing shows that you set it; "
        f"--trust-paths uses it all the same{advice}"
    )


def _named(config: StackWiseConfig) -> dict[str, list[str]]:
    """Everything that a config names on this machine, by key."""
    data, embedding = config.data, config.model.tokenizer_embedding
    paths = [data.path] if isinstance(data.path, str) else list(data.path or ())
    one = {
        "data.cache_dir": data.cache_dir,
        "data.tokenizer.path": data.tokenizer.path,
        "model.initial": config.model.initial,
        "model.tokenizer_embedding.family": embedding.family,
    }
    named = {"data.path": paths, **{key: [] if value is None else [value] for key, value in one.items()}}
    # What is not set is not named, as in runs that were signed before there was such a setting.
    if (more := data.validation_path) is not None:
        named["data.validation_path"] = [more] if isinstance(more, str) else list(more)
    if mixed := [entry.path for entry in data.sources if entry.path is not None]:
        named["data.sources"] = [p for path in mixed for p in ([path] if isinstance(path, str) else path)]
    return named


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a path, links followed, lies in ``folder``; a glob is where its folder is, and may not lead up."""
    if "\0" in name or ".." in Path(name).parts:
        return False
    return Path(os.path.realpath(os.path.expanduser(name))).is_relative_to(os.path.realpath(folder))


def origin_of(run: RunDir) -> str | None:
    """The signature that ``run`` carries, whether it is this user's or not."""
    try:
        return run.origin.read_text(encoding="ascii", errors="replace").strip()[: 2 * hashlib.sha256().digest_size]
    except OSError:
        return None


def _is_own(run: RunDir, config: StackWiseConfig) -> bool:
    found, own = origin_of(run), signature(config)
    return found is not None and own is not None and hmac.compare_digest(found.encode(), own.encode())


def _key() -> bytes | None:
    """This user's key, made when there is none; None where it cannot be written: runs are then asked about."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    path = Path(home) / "stackwise" / "key"
    with contextlib.suppress(OSError):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".key.{secrets.token_hex(8)}.tmp")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                with open(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(_KEY_BYTES))
                with contextlib.suppress(FileExistsError):  # another process was faster
                    os.link(temporary, path)
            finally:
                temporary.unlink()
        key = path.read_bytes()
        if len(key) == _KEY_BYTES:
            return key
    return None
