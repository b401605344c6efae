"""Everything that a config chooses by name, and where it lies: one dictionary for each kind of thing.

Something new of a kind is a file of its own and one line here. A line says in which module the thing is, and what must
be known of it before that module is imported; so reading a config imports neither torch nor what it does not choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Kind:
    """Where one thing lies: ``module:attribute``, the module below ``stackwise``."""

    path: str

    def load(self) -> Any:
        module, _, attribute = self.path.partition(":")
        return getattr(import_module(f"stackwise.{module}"), attribute)


@dataclass(frozen=True)
class CorpusKind(Kind):
    """``data.source``: a function of (``DataConfig``, memo folder) that gives a ``data.corpus.Corpus``.

    Attributes:
        path_takes: what ``data.path`` is for it: nothing, the name of one data set, or one path or several.
    """

    path_takes: str | None = None


@dataclass(frozen=True)
class OptimizerKind(Kind):
    """``training.optimizer.optimizer_type``: a class of ``optim.kinds.Optimizer``.

    Attributes:
        uses: the settings of ``training.optimizer`` that not all optimizers use, and this one does.
        rounds_at_random: whether it can update weights in bfloat16, most of whose steps are below a rounding.
    """

    uses: tuple[str, ...] = ()
    rounds_at_random: bool = False


@dataclass(frozen=True)
class StorageKind(Kind):
    """``training.progressive.trunk_precision`` and its like: a class of ``ops.storage.Storage``.

    Attributes:
        trains: whether an optimizer can move what is stored. fp16 would need loss scaling, and codes have no gradient.
    """

    trains: bool = False


CORPORA: dict[str, CorpusKind] = {
    "python-stdlib": CorpusKind("data.library:library_corpus"),
    "files": CorpusKind("data.files:files_of", path_takes="paths"),
    "huggingface": CorpusKind("data.huggingface:dataset_of", path_takes="name"),
    "loader": CorpusKind("data.loader:no_text"),
}

CURRICULA: dict[str, Kind] = {
    "progressive": Kind("growth.curricula:grow"),
    "end_to_end": Kind("growth.curricula:end_to_end"),
    "phases": Kind("growth.curricula:free"),
}
"""``training.strategy``: functions of (``StackWiseConfig``, Stacks that are there) that give drafts of phases."""

OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind("optim.kinds:AdamW", uses=("betas", "eps", "moments"), rounds_at_random=True),
    "muon": OptimizerKind("optim.kinds:Muon", uses=("betas", "eps", "moments", "momentum")),
    "sgd": OptimizerKind("optim.kinds:Sgd", uses=("momentum",)),
}

STORAGES: dict[str, StorageKind] = {
    "full": StorageKind("ops.storage:Full", trains=True),
    "half": StorageKind("ops.storage:Half"),
    "bfloat16": StorageKind("ops.storage:BFloat16", trains=True),
    "fp8": StorageKind("ops.storage:Fp8"),
    "int8": StorageKind("ops.storage:Int8"),
    "nf4": StorageKind("ops.storage:Nf4"),
    "nvfp4": StorageKind("ops.storage:Nvfp4"),
}
