"""A data set of the Hugging Face hub as a corpus."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from stackwise.config.data import SourceConfig
from stackwise.data.corpus import Corpus, Document, Progress, split_text
from stackwise.data.records import no_field, text_of
from stackwise.errors import UserError


def dataset_of(config: SourceConfig, memo: Path) -> HuggingFaceCorpus:
    """The data set that ``data.path`` names."""
    assert isinstance(config.path, str)
    return HuggingFaceCorpus(config.path, config.subset, config.split, config.text_field)


class HuggingFaceCorpus(Corpus):
    """A data set of the Hugging Face hub, at the revision that it has when it is opened. Each pass streams it again.

    Args:
        name: of the data set, or ``name@revision``: a branch, a tag or a full commit hash. With a hash, a token store
            that was built before is found without the network.
        subset: its configuration, or ``None``.
        split: train, validation…
        text_field: the column that holds the text.
    """

    size = None

    def __init__(self, name: str, subset: str | None, split: str, text_field: str) -> None:
        try:
            import datasets
            import huggingface_hub
        except ImportError:
            raise UserError(
                f"data.path: {name!r}: reading Hugging Face data sets needs datasets: pip install 'stackwise[datasets]'"
            ) from None
        if Path(name).exists():
            raise UserError(f"data.path: {name!r} is on this machine; set data.source: files to read it")
        self._name, _, revision = name.partition("@")
        self._subset, self._split, self._text_field = subset, split, text_field
        self._datasets = datasets
        if re.fullmatch("[0-9a-f]{40}", revision):
            self._revision = revision
        else:
            try:
                self._revision = str(huggingface_hub.HfApi().dataset_info(self._name, revision=revision or None).sha)
            except _network_errors() as error:
                raise self._unreadable(error) from None
        self.description = f"{self._name} at {self._revision[:8]}, {split}"

    def documents(self) -> Iterator[Document]:
        where = f"data.path: {self._name!r}, {self._split}"
        try:
            records = self._datasets.load_dataset(
                self._name, self._subset, split=self._split, revision=self._revision, streaming=True
            )
            if records.column_names is not None:
                if self._text_field not in records.column_names:
                    raise UserError(no_field(self._text_field, records.column_names, where))
                records = records.select_columns([self._text_field])
            for number, record in enumerate(records, 1):
                if text := text_of(record, self._text_field, f"{where}, record {number:,}"):
                    yield split_text(text)
        except UserError:
            raise
        except _network_errors() as error:
            raise self._unreadable(error) from None

    def fingerprint(self, progress: Progress | None = None) -> str:
        parts = ["huggingface", self._name, self._subset, self._split, self._revision, self._text_field]
        return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()

    def check_unchanged(self) -> None:
        """A revision does not change."""

    def _unreadable(self, error: BaseException) -> UserError:
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        return UserError(
            f"data.path: {self._name!r}: cannot be read from the Hugging Face hub ({type(error).__name__}: {problem}); "
            "check the name, data.subset, data.split and the network"
        )


def _network_errors() -> tuple[type[BaseException], ...]:
    """What reading from the hub can raise; the transport library depends on the version of the hub's client."""
    errors: list[type[BaseException]] = [OSError, ValueError]
    transports = (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("aiohttp", "ClientError"))
    for module, name in (*transports, ("datasets.exceptions", "DatasetsError")):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)
