"""The sources of Python's own library as a corpus: text that is on every machine."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from stackwise.config.data import SourceConfig
from stackwise.data.corpus import Document, split_text
from stackwise.data.files import FileCorpus, SourceFile
from stackwise.data.records import reading
from stackwise.errors import UserError

_LIBRARY_FOLDERS_LEFT_OUT = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))


def library_corpus(config: SourceConfig, memo: Path) -> FileCorpus:
    """The sources of Python's own library on this machine, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, below, names in os.walk(root):
        below[:] = set(below) - _LIBRARY_FOLDERS_LEFT_OUT
        files += [path for name in names if (path := Path(folder, name)).suffix == ".py" and path.is_file()]
    if not files:
        raise UserError(
            f"data.source: python-stdlib: no sources in {root}; give text with data.source=files data.path=…"
        )
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    sources = [SourceFile(path, "python", _python_source) for path in files]
    return FileCorpus(sources, f"library of Python {sys.version.split()[0]}", memo)


def _python_source(path: Path) -> Iterator[Document]:
    """A library file; none where it is in an encoding other than UTF-8."""
    with reading(path):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return
    if text:
        yield split_text(text)
