"""The section ``data``: the text and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stackwise.config.section import Section, Size, as_tuple, conflict
from stackwise.kinds import CORPORA

if TYPE_CHECKING:
    SourceName = str
else:
    SourceName = Literal[tuple(CORPORA)]


class TokenizerConfig(Section):
    kind: Literal["bytes", "characters", "bpe", "pretrained"] = Field(
        "bpe", description="bytes; characters; bpe (trained on the corpus); pretrained (read from path)"
    )
    vocab_size: Annotated[Size, Field(ge=260)] = Field(4096, description="bpe: size of the trained vocabulary")
    path: str | None = Field(
        None, description="pretrained: a tokenizer.json, a Hugging Face folder, or the tokenizer folder of a run"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "pretrained" and self.path is None:
            raise conflict("path", "must name a tokenizer.json or a folder when kind is pretrained")
        return self


class ColumnsConfig(Section):
    """Columns of labelled files. null: found by their names, such as those of the GLUE tasks."""

    text: str | None = Field(None, description="Column of the text, or of the first text of a pair")
    pair: str | None = Field(None, description="Column of the second text of a pair; only used when text is set")
    label: str | None = Field(None, description="Column of the class or the number")


class SourceConfig(Section):
    """Where text comes from."""

    source: SourceName = Field(
        "python-stdlib",
        description="python-stdlib: the library sources on this machine; files: local files (path); huggingface: a "
        "data set (path); labelled: files of rows with a label each (path), for classification and regression; "
        "loader: batches that a trainer is given in Python",
    )
    path: str | Annotated[tuple[str, ...], BeforeValidator(as_tuple)] | None = Field(
        None,
        description="files: a file, folder, glob or list (text, .jsonl, .parquet); labelled: the training rows, in "
        ".tsv, .csv, .jsonl or .parquet; huggingface: the name of the data set",
    )
    subset: str | None = Field(None, description="huggingface: configuration of the data set")
    split: str = Field("train", description="huggingface: split to read")
    text_field: str = Field("text", description="Field of .jsonl and .parquet records that holds the text")

    @model_validator(mode="after")
    def _has_its_path(self) -> Self:
        takes = CORPORA[self.source].path_takes
        if takes is not None and not self.path:
            raise conflict("path", f"must be set when source is {self.source}")
        if takes == "name" and not isinstance(self.path, str):
            raise conflict(
                "path", f"{list(self.path or ())!r} must be the name of one data set when source is {self.source}"
            )
        return self


class MixedSource(SourceConfig):
    """One source of a mixture."""

    weight: Annotated[int, Field(ge=1, le=10_000)] = Field(
        1, description="Its sequences in each round: 3 beside 1 is three quarters of all sequences"
    )


class DataConfig(SourceConfig):
    fixed = "the batch of each step follows from the text and how it is read"

    validation_path: str | Annotated[tuple[str, ...], BeforeValidator(as_tuple)] | None = Field(
        None, description="labelled: the validation rows; null: validation_fraction of the rows, chosen by content"
    )
    columns: ColumnsConfig = ColumnsConfig()
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="Share of the text kept for validation"
    )
    validation_split: Literal["auto", "documents", "tail"] = Field(
        "auto",
        description="documents: whole documents, chosen by content; tail: the end of each document; "
        "auto: documents where there are at least 20, else tail",
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    cache_dir: str | None = Field(
        None, description="Folder of token stores; null: $STACKWISE_CACHE, else ~/.cache/stackwise"
    )

    sources: Annotated[tuple[MixedSource, ...], BeforeValidator(as_tuple)] = Field(
        (),
        description="A mixture in place of source and path: a list of entries with source, path, subset, split, "
        "text_field and weight",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.columns.pair is not None and self.columns.text is None:
            raise conflict("columns.pair", f"{self.columns.pair!r} is only used when columns.text is set")
        if not self.sources:
            return self
        if self.path is not None or self.source != type(self).model_fields["source"].default:
            key = "source" if self.path is None else "path"
            raise conflict(key, f"{getattr(self, key)!r} cannot be combined with sources; move it into an entry")
        for i, entry in enumerate(self.sources):
            if entry.source in ("loader", "labelled"):
                raise conflict(
                    f"sources[{i}].source", f"{entry.source!r} has no text to mix; give files or another source"
                )
        return self
