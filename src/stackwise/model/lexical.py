"""The token table and the tokenizer of a pretrained model, for a Rack of ours.

V rows of the table, E its width, C ``d_model``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import Tokenizer, open_pretrained
from stackwise.errors import ConfigError, UserError, allowed
from stackwise.model.embedding import TokenEmbedding
from stackwise.model.initialisation import init_weights
from stackwise.model.rack import Rack
from stackwise.reading import from_home, read_object

EmbeddingOption = Literal["embed_tokens", "lm_head"]

_NAMES: Mapping[EmbeddingOption, tuple[str, ...]] = {
    "embed_tokens": (
        "model.embed_tokens.weight",  # Llama, Mistral, Qwen, Gemma, DeepSeek
        "embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "transformer.wte.weight",  # GPT-2
        "wte.weight",
        "model.embeddings.tok_embeddings.weight",  # ModernBERT
        "embeddings.tok_embeddings.weight",
        "bert.embeddings.word_embeddings.weight",
        "roberta.embeddings.word_embeddings.weight",
        "distilbert.embeddings.word_embeddings.weight",
        "embeddings.word_embeddings.weight",
        "gpt_neox.embed_in.weight",
        "embed_in.weight",
    ),
    "lm_head": (
        "lm_head.weight",  # Llama, GPT-2 and most others
        "decoder.weight",  # ModernBERT
        "cls.predictions.decoder.weight",  # BERT
        "lm_head.decoder.weight",  # RoBERTa
        "vocab_projector.weight",  # DistilBERT
        "embed_out.weight",  # GPT-NeoX
    ),
}
"""What the usual families call their tables. Where a file has several of one kind, they are copies of one table."""

_TIED_BY_DEFAULT = frozenset(
    {"bert", "distilbert", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "modernbert", "roberta"}
)
"""Model types whose config.json, when it does not say ``tie_word_embeddings``, means true."""

_SMALL_FILES = (
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER = "tokenizer.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FLOATS = ("F64", "F32", "F16", "BF16")


class LexicalKernelManager:
    """The token table and the tokenizer of a Hugging Face model.

    The table is read as it is stored (Gemma's is scaled by √E where it is used, which a Rack does not do). Of a model
    on the hub, only the files that hold the table and the tokenizer are fetched.

    Args:
        family: a folder with ``config.json``, safetensors weights (one file, or shards and their index) and
            ``tokenizer.json``; or a name on the hub, which needs the extra ``hf``.
        embedding_option: ``embed_tokens``: the input's table; ``lm_head``: the head's, which is the input's in a model
            that ties them.
        freeze_embeddings: the table never trains; the adapter does.
        adapter_hidden_dim: hidden width of the adapter E → C; ``None``: C, and no adapter where E is C.

    Attributes:
        folder: where the files are. embedding_dim: E. vocab_size: V, which may exceed the tokenizer's.

    Raises:
        UserError: there is no such folder or model, it has no safetensors weights, or no such table in them.
    """

    def __init__(
        self,
        family: str | Path,
        embedding_option: EmbeddingOption = "embed_tokens",
        freeze_embeddings: bool = True,
        adapter_hidden_dim: int | None = None,
    ) -> None:
        if embedding_option not in _NAMES:
            raise ValueError(f"embedding_option is {embedding_option!r}; {allowed(embedding_option, _NAMES)}")
        self.family, self.embedding_option = str(family), embedding_option
        self.freeze_embeddings, self.adapter_hidden_dim = freeze_embeddings, adapter_hidden_dim
        self._key = f"model.tokenizer_embedding.family: {self.family!r}"
        self.folder, self._revision = self._find_folder()
        self._file, self._name = self._find_table()
        self.vocab_size, self.embedding_dim = self._shape()

    @classmethod
    def from_config(cls, config: StackWiseConfig) -> Self:
        """As ``model.tokenizer_embedding`` says, whose ``family`` must be set."""
        settings = config.model.tokenizer_embedding
        if settings.family is None:
            raise ValueError("model.tokenizer_embedding.family is null")
        return cls(
            settings.family,
            settings.embedding_option or "embed_tokens",
            settings.freeze_embeddings,
            settings.adapter_hidden_dim,
        )

    @cached_property
    def weight(self) -> Tensor:
        """(V, E) fp32, on the CPU."""
        with self._open(self._file) as file:
            tensor: Tensor = file.get_tensor(self._name)
        return tensor.to(torch.float32)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The family's.

        Raises:
            UserError: it has none, or one that cannot be read.
        """
        if not self.has_tokenizer:
            raise UserError(
                f"{self._key}: no {_TOKENIZER} in it; give its tokenizer as data.tokenizer.kind: pretrained and "
                "data.tokenizer.path"
            )
        return open_pretrained(self.folder)

    @property
    def has_tokenizer(self) -> bool:
        return (self.folder / _TOKENIZER).is_file()

    def embedding(self, d_model: int, dropout: float = 0.0, *, seed: int = 0) -> TokenEmbedding:
        """(B, T) ids → (B, T, ``d_model``), with the family's table; ``seed`` draws the adapter, if there is one."""
        module = TokenEmbedding(
            self.vocab_size,
            d_model,
            dropout,
            self.freeze_embeddings,
            embedding_dim=self.embedding_dim,
            adapter_hidden_dim=self.adapter_hidden_dim,
        )
        init_weights(module, n_blocks=1, seed=seed, stream=0)
        self._copy_into(module)
        return module

    def load_into(self, rack: Rack) -> None:
        """Gives ``rack`` the family's table. Its shape, and whether it trains, are those of the Rack's ``RackSpec``.

        Raises:
            ValueError: they are not the family's.
        """
        table = rack.embedding
        if tuple(table.weight.shape) != (self.vocab_size, self.embedding_dim):
            raise ValueError(
                f"the table of {self.family!r} is {self.vocab_size} by {self.embedding_dim}, that of the Rack "
                f"{' by '.join(map(str, table.weight.shape))}; set its vocab_size and embedding_dim"
            )
        if table.frozen != self.freeze_embeddings:
            raise ValueError(
                f"freeze_embeddings is {self.freeze_embeddings} here and {table.frozen} in the Rack's RackSpec"
            )
        self._copy_into(table)

    @torch.no_grad()
    def _copy_into(self, module: TokenEmbedding) -> None:
        module.weight.copy_(self.weight)

    def _find_folder(self) -> tuple[Path, str | None]:
        """The folder and, of a model on the hub, its revision."""
        path = from_home(self.family, self._key)
        if path.is_dir():
            return path, None
        if path.exists():
            raise UserError(f"{self._key}: it is a file; give the folder that holds the model, or a name on the hub")
        if not _HUB_NAME.fullmatch(self.family):
            raise UserError(f"{self._key}: no such folder, and no name on the Hugging Face hub either")
        folder = self._fetch(_SMALL_FILES, None)
        return folder, folder.name

    def _fetch(self, patterns: tuple[str, ...], revision: str | None) -> Path:
        """The folder of the local copy of the hub's files that ``patterns`` names."""
        try:
            from huggingface_hub import errors, snapshot_download
        except ImportError:
            raise UserError(
                f"{self._key}: no such folder; to look on the Hugging Face hub: pip install 'stackwise[hf]'"
            ) from None
        try:
            return Path(snapshot_download(self.family, allow_patterns=list(patterns), revision=revision))
        except errors.GatedRepoError:
            problem = "on the Hugging Face hub it is only for those who asked for access; log in as one of them"
        except errors.RepositoryNotFoundError:
            problem = "no such folder, and no such model on the Hugging Face hub"
        except (errors.HFValidationError, errors.HfHubHTTPError, errors.EntryNotFoundError, OSError):
            problem = "no such folder, and the Hugging Face hub cannot be reached to look there"
        raise UserError(f"{self._key}: {problem}")

    def _find_table(self) -> tuple[Path, str]:
        """The file that holds the table, and the table's name in it."""
        files = self._tensor_files()
        names = list(_NAMES[self.embedding_option])
        if self.embedding_option == "lm_head" and self._is_tied():
            names += _NAMES["embed_tokens"]
        name = next((name for name in names if name in files), None)
        if name is None:
            tied = "" if self.embedding_option == "embed_tokens" else ", and config.json does not tie it to the input's"
            raise UserError(
                f"{self._key}: no {self.embedding_option} table in its weights{tied}; they hold {_some(sorted(files))}"
            )
        file = files[name]
        if self._revision is not None:
            self._fetch((file.name,), self._revision)
        if not file.is_file():
            raise UserError(f"{self._key}: {file.name}, which holds {name}, is not there")
        return file, name

    def _tensor_files(self) -> dict[str, Path]:
        """Every tensor's name and the file that holds it."""
        index = self.folder / _INDEX
        if index.is_file() and not (self.folder / _WEIGHTS).is_file():
            shards = self._read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(
                isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file
                for file in shards.values()
            ):
                raise UserError(f"{self._key}: {_INDEX} does not say which .safetensors file beside it holds what")
            return {name: self.folder / file for name, file in shards.items()}
        file = self.folder / _WEIGHTS
        if self._revision is not None:
            self._fetch((_WEIGHTS,), self._revision)
        if not file.is_file():
            pickles = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
            raise UserError(
                f"{self._key}: no {_WEIGHTS} in it"
                + (f", only {_some(pickles)}, and pickle files are never opened; convert it first" if pickles else "")
            )
        with self._open(file) as opened:
            return dict.fromkeys(opened.keys(), file)

    def _is_tied(self) -> bool:
        settings = self._read_json(self.folder / "config.json")
        return bool(settings.get("tie_word_embeddings", settings.get("model_type") in _TIED_BY_DEFAULT))

    def _shape(self) -> tuple[int, int]:
        with self._open(self._file) as file:
            if self._name not in file.keys():  # noqa: SIM118
                raise UserError(f"{self._key}: {self._file.name} does not hold {self._name}, as {_INDEX} says")
            table = file.get_slice(self._name)
            shape, dtype = table.get_shape(), table.get_dtype()
        if len(shape) != 2 or dtype not in _FLOATS:
            raise UserError(
                f"{self._key}: {self._name} is no token table but {dtype} of shape {tuple(shape)}; it must be "
                f"two-dimensional {', '.join(_FLOATS)}"
            )
        return shape[0], shape[1]

    def _open(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._key}: {file.name} is not a readable safetensors file ({error})") from None

    def _read_json(self, file: Path) -> dict[str, Any]:
        try:
            return read_object(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._key}: {file.name} cannot be read ({error})") from None


def _some(names: list[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return (", ".join(names[:6]) or "nothing") + more


def resolve_family(config: StackWiseConfig) -> StackWiseConfig:
    """``config`` with what it leaves to ``model.tokenizer_embedding.family`` written out.

    These are the width and the rows of the table (``embedding_dim``, ``model.vocab_size``) and the tokenizer. A config
    without a family, or whose Rack comes from another run (``model.initial``), is returned as it is.

    Raises:
        ConfigError: a setting contradicts the family. UserError: the family cannot be read.
    """
    settings = config.model.tokenizer_embedding
    if settings.family is None or config.model.initial is not None:
        return config
    family = LexicalKernelManager.from_config(config)
    if settings.embedding_dim not in (None, family.embedding_dim):
        raise ConfigError(
            f"model.tokenizer_embedding.embedding_dim: {settings.embedding_dim} differs from the width of the "
            f"embedding of {family.family!r} ({family.embedding_dim}); leave it out"
        )
    if config.model.vocab_size not in (None, family.vocab_size):
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} differs from the number of tokens in the embedding of "
            f"{family.family!r} ({family.vocab_size}); leave it out"
        )
    tokenizer = config.data.tokenizer
    path = tokenizer.path if tokenizer.kind == "pretrained" else None
    if path is None:
        known, path = family.tokenizer, str(family.folder)
    else:
        known = open_pretrained(path)
        if family.has_tokenizer and known.fingerprint != family.tokenizer.fingerprint:
            raise ConfigError(
                f"data.tokenizer.path: {path!r} is not the tokenizer of {family.family!r} "
                "(model.tokenizer_embedding.family); leave data.tokenizer out"
            )
    if known.vocab_size > family.vocab_size:
        raise ConfigError(
            f"model.tokenizer_embedding.family: the embedding of {family.family!r} has {family.vocab_size} "
            f"rows, fewer than the {known.vocab_size} tokens of its tokenizer"
        )
    data = config.to_dict()
    data["model"]["vocab_size"] = family.vocab_size
    data["model"]["tokenizer_embedding"]["embedding_dim"] = family.embedding_dim
    data["data"]["tokenizer"] |= {"kind": "pretrained", "path": path}
    return type(config).from_dict(data)
