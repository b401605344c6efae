"""Everything that a config chooses by name, and where it lies: one dictionary for each kind of thing.

Something new of a kind is a file of its own and one line here. A line says in which module the thing is, and what must
be known of it before that module is imported; so reading a config imports neither torch nor what it does not choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Labels = Literal["inputs", "positions", "classes", "numbers"]
"""What the labels of a batch are: the tokens themselves, the target of each position, or of each sequence its class or
a number.
"""


_HERE = __name__.removesuffix("kinds")
"""``stackwise.``; in an exported folder, which has a copy of this file, what the names of its modules begin with."""


@dataclass(frozen=True)
class Kind:
    """Where one thing lies: ``module:attribute``, the module below ``stackwise``."""

    path: str

    def load(self) -> Any:
        """Imports the module, and gives the thing."""
        module, _, attribute = self.path.partition(":")
        return getattr(import_module(_HERE + module), attribute)


@dataclass(frozen=True)
class AttentionKind(Kind):
    """``model.attention_custom.attention_type``: what makes a ``model.attention.projections.Projections``.

    Attributes:
        latent: whether keys and values come from a latent, so that the settings ``mla_…`` are used.
    """

    latent: bool = False


@dataclass(frozen=True)
class CorpusKind(Kind):
    """``data.source``: a function of (``DataConfig``, memo folder) that gives a ``data.corpus.Corpus``.

    Attributes:
        path_takes: what ``data.path`` is for it: nothing, the name of one data set, or one path or several.
        labelled: whether it has rows with a label each, which the objectives of sequences learn from.
    """

    path_takes: str | None = None
    labelled: bool = False


@dataclass(frozen=True)
class ObjectiveKind(Kind):
    """``training.progressive.training_objective``: a class of ``objectives.base.CrossEntropyObjective``.

    Attributes:
        attention: the direction of attention where the model's settings leave it open.
        either: whether the other direction is allowed as well.
        needs_mask: whether the tokenizer must have a mask token.
        labels: what it learns from. Those of sequences come from labelled files, or as those of positions do: from a
            data loader, in Python.
        sampler: how a trained run makes text: it goes on from a prompt, or fills gaps; None: it makes none.
        masks: whether its phases have the rates of ``training.masking``.
        scores_alone: whether the evaluation also masks each token alone (pseudo-perplexity).
    """

    attention: Literal["causal", "bidirectional"] = "bidirectional"
    either: bool = False
    needs_mask: bool = False
    labels: Labels = "inputs"
    sampler: Literal["continuation", "filling"] | None = None
    masks: bool = False
    scores_alone: bool = False

    @property
    def of_sequences(self) -> bool:
        """Whether it has one target for each sequence."""
        return self.labels in ("classes", "numbers")


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


@dataclass(frozen=True)
class TrackerKind(Kind):
    """``training.logging.trackers``: a class of ``training.tracking.Tracker``.

    Attributes:
        extra: what to install it with.
    """

    extra: str = "track"


ATTENTION_TYPES: dict[str, AttentionKind] = {
    "mha": AttentionKind("model.attention.projections:FullProjections"),
    "mla": AttentionKind("model.attention.projections:latent", latent=True),
}

CORPORA: dict[str, CorpusKind] = {
    "python-stdlib": CorpusKind("data.library:library_corpus"),
    "files": CorpusKind("data.files:files_of", path_takes="paths"),
    "huggingface": CorpusKind("data.huggingface:dataset_of", path_takes="name"),
    "labelled": CorpusKind("data.labelled:labelled_of", path_takes="paths", labelled=True),
    "loader": CorpusKind("data.loader:no_text"),
}

CURRICULA: dict[str, Kind] = {
    "progressive": Kind("growth.curricula:grow"),
    "end_to_end": Kind("growth.curricula:end_to_end"),
    "phases": Kind("growth.curricula:free"),
}
"""``training.strategy``: functions of (``StackWiseConfig``, Stacks that are there) that give drafts of phases."""

OBJECTIVES: dict[str, ObjectiveKind] = {
    "clm": ObjectiveKind("objectives.causal:CausalObjective", attention="causal", sampler="continuation"),
    "mlm": ObjectiveKind(
        "objectives.masked:MaskedObjective", needs_mask=True, sampler="filling", masks=True, scores_alone=True
    ),
    "diffusion": ObjectiveKind("objectives.diffusion:DiffusionObjective", needs_mask=True, sampler="filling"),
    "custom": ObjectiveKind("objectives.custom:CustomObjective", attention="causal", either=True, labels="positions"),
    "classification": ObjectiveKind("objectives.classification:ClassificationObjective", either=True, labels="classes"),
    "regression": ObjectiveKind("objectives.regression:RegressionObjective", either=True, labels="numbers"),
}


def text_objectives() -> tuple[str, ...]:
    """The names of the objectives that learn from text alone."""
    return tuple(name for name, kind in OBJECTIVES.items() if kind.labels == "inputs")


def sequence_objectives() -> tuple[str, ...]:
    """The names of the objectives that learn from one label for each sequence."""
    return tuple(name for name, kind in OBJECTIVES.items() if kind.of_sequences)


def samplers(sampler: str) -> list[str]:
    """The names of the objectives whose runs make text in this way."""
    return [name for name, kind in OBJECTIVES.items() if kind.sampler == sampler]


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

TRACKERS: dict[str, TrackerKind] = {
    "tensorboard": TrackerKind("training.tracking:TensorBoard"),
    "wandb": TrackerKind("training.tracking:WandB", extra="wandb"),
    "trackio": TrackerKind("training.tracking:Trackio", extra="trackio"),
}
