"""Scores of a trained run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from stackwise.config.base import StackWiseConfig
from stackwise.data.labelled import LabelledCorpus, LabelledData, encode_rows, validation_rows
from stackwise.data.store import PreparedData, encode_files
from stackwise.errors import UserError
from stackwise.evaluation.entropy import ngram_entropies
from stackwise.evaluation.pseudo import pseudo_perplexity
from stackwise.evaluation.sliding import SlidingContext
from stackwise.evaluation.tasks import class_scores, number_scores, outputs_of, with_texts
from stackwise.kinds import OBJECTIVES
from stackwise.objectives import create_objective
from stackwise.objectives.scoring import bits_per_byte, predicted_share, validate, validate_samples
from stackwise.objectives.sequences import SequenceObjective
from stackwise.ops.precision import resolve_compute_dtype, resolve_device
from stackwise.runs.run import TEXT, LoadedRun, load, run_data
from stackwise.store.origin import check_origin
from stackwise.store.rundir import RunDir
from stackwise.store.state import StepName
from stackwise.training.progress import Reporter, SilentReporter


def evaluate(
    run: str | Path, data: str | Path | Sequence[str | Path] | None = None, *, reporter: Reporter | None = None
) -> dict[str, Any]:
    """``evaluate_run`` of the newest checkpoint: on the validation text of ``run``, or on the files ``data``."""
    files = [data] if isinstance(data, str | Path) else data
    paths = None if files is None else [Path(file) for file in files]
    return evaluate_run(run, paths, None, reporter or SilentReporter())


def evaluate_run(
    path: str | Path,
    data: Sequence[Path] | None,
    step: StepName | None,
    reporter: Reporter,
    *,
    trust_paths: bool = False,
    context_stride: int | None = None,
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of the run in ``path``, and the entropies of the same tokens.

    ``given`` says what of the text the objective does not predict and has for free. Of an objective of sequences, the
    scores of ``evaluation.tasks``.

    Args:
        data: files to score, labelled ones where the objective needs labels; default the run's validation side.
        step: of the checkpoint, or ``best``; default the newest.
        trust_paths: what the config of a run that was not begun here names outside its folder may be used.
        context_stride: of left to right alone: windows overlap and move by so many tokens, so that each token is
            predicted from the longest context; default: they follow each other.
    """
    loaded = load(path, step)
    objective = loaded.config.training.objective
    if context_stride is not None and objective != "clm":
        raise UserError(f"--context-stride: {context_stride} is for left to right (clm), but RUN is {objective}")
    if OBJECTIVES[objective].of_sequences:
        scores = _evaluate_rows(Path(path), loaded, data, reporter, trust_paths)
    elif data:
        tokens, n_bytes = encode_files([str(p) for p in data], loaded.tokenizer, loaded.config.data.text_field)
        if not n_bytes:
            raise UserError(f"--data: {', '.join(map(str, data))}: contains no text")
        scores = _evaluate_text(loaded, tokens, n_bytes / len(tokens), reporter, context_stride)
    else:
        own = _own_text(Path(path), loaded, reporter, trust_paths)
        parts = _by_source(own, loaded.config)
        scores = _evaluate_text(loaded, own.validation, own.bytes_per_token, reporter, context_stride, parts)
    return {"step": loaded.step, "objective": objective, **scores}


def _evaluate_text(
    loaded: LoadedRun,
    tokens: np.ndarray,
    bytes_per_token: float,
    reporter: Reporter,
    context_stride: int | None,
    parts: Mapping[str, tuple[np.ndarray, float]] = MappingProxyType({}),
) -> dict[str, Any]:
    """The scores of a text, and its entropies; of ``parts`` (tokens, bytes of one), by name, the scores alone."""
    config, tokenizer, training = loaded.config, loaded.tokenizer, loaded.config.training
    device = resolve_device(training.device)
    objective, seq_len = create_objective(config, tokenizer), min(training.seq_len, len(tokens) - 1)
    rack, batch_size = loaded.rack.to(device), training.micro_batch_size or training.batch_size
    compute_dtype = resolve_compute_dtype(training, device)

    def progress(done: int, total: int) -> None:
        reporter.work("scoring", done, total)

    def scored(text: np.ndarray, per_token: float, stride: int | None) -> dict[str, Any]:
        length = min(seq_len, len(text) - 1)
        if stride is None:
            return validate(
                rack, objective, text, seq_len=length, batch_size=batch_size, bytes_per_token=per_token,
                draws=training.evaluation.draws, compute_dtype=compute_dtype, progress=progress,
            ).to_dict()  # fmt: skip
        sliding = SlidingContext(text, length, stride)
        return validate_samples(
            rack, sliding, np.arange(len(sliding.starts)), sliding.windows, batch_size=batch_size,
            bytes_per_predicted=per_token, compute_dtype=compute_dtype, progress=progress,
        ).to_dict()  # fmt: skip

    scores = scored(tokens, bytes_per_token, context_stride)
    if parts:
        # A source that is shorter than a window has one window, of which the stride is the whole.
        scores["sources"] = {
            name: scored(text, per_token, context_stride and min(context_stride, len(text) - 1))
            for name, (text, per_token) in parts.items()
        }
    if OBJECTIVES[training.objective].scores_alone:
        assert tokenizer.mask_id is not None  # the objective asked for it
        special = objective.special_ids
        scores |= pseudo_perplexity(loaded.rack, tokenizer.mask_id, special, tokens, seq_len, training.batch_size)
    entropies = ngram_entropies(tokens, objective.special_ids)
    bytes_per_predicted = bytes_per_token / predicted_share(tokens, objective.special_ids)
    return {
        **scores,
        "given": _given(tokens, objective.special_ids, tokenizer.end_id),
        "unigram_bits_per_byte": bits_per_byte(entropies.unigram, bytes_per_predicted),
        "bigram_bits_per_byte": bits_per_byte(entropies.bigram, bytes_per_predicted),
    }


def _by_source(prepared: PreparedData, config: StackWiseConfig) -> dict[str, tuple[np.ndarray, float]]:
    """Of each source of a mixture, its validation tokens and the bytes that one of them stands for."""
    found: dict[str, tuple[np.ndarray, float]] = {}
    if not config.data.sources:
        return found
    start = 0
    for i, (entry, (_, tokens, n_bytes)) in enumerate(zip(config.data.sources, prepared.sources, strict=True)):
        name = str(entry.path if isinstance(entry.path, str) else entry.source)
        found[name if name not in found else f"{name} ({i})"] = (
            prepared.validation[start : start + tokens], n_bytes / tokens,
        )  # fmt: skip
        start += tokens
    return found


def _evaluate_rows(
    path: Path, loaded: LoadedRun, data: Sequence[Path] | None, reporter: Reporter, trust_paths: bool
) -> dict[str, Any]:
    """The scores of labelled rows: of the files ``data``, or of the validation side."""
    config, training = loaded.config, loaded.config.training
    names = None
    if OBJECTIVES[training.objective].labels == "classes":
        # Where there are no names, the run is one from Python, whose labels are ids.
        names = training.classification.names or tuple(map(str, range(training.classification.classes)))
    if data:
        corpus = LabelledCorpus([str(p) for p in data], config.data.columns, None, key="--data")
        rows, found = encode_rows(corpus.rows(), loaded.tokenizer, training.seq_len, names), corpus.rows()
    else:
        prepared = _own(path, loaded, reporter, trust_paths)
        assert isinstance(prepared, LabelledData)
        rows, found = prepared.validation, validation_rows(config.data)
    device = resolve_device(training.device)
    objective = create_objective(config, loaded.known_tokenizer)
    assert isinstance(objective, SequenceObjective)
    outputs = outputs_of(
        loaded.rack.to(device),
        objective,
        rows,
        training.micro_batch_size or training.batch_size,
        resolve_compute_dtype(training, device),
        lambda done, total: reporter.work("scoring", done, total),
    )
    scores = number_scores(rows.labels, outputs) if names is None else class_scores(rows.labels, outputs, names)
    return {"rows": len(rows), "truncated": rows.truncated, **with_texts(scores, found)}


def _own_text(path: Path, loaded: LoadedRun, reporter: Reporter, trust_paths: bool) -> PreparedData:
    """The text that the run is validated on."""
    prepared = _own(path, loaded, reporter, trust_paths)
    assert isinstance(prepared, PreparedData)
    return prepared


def _own(path: Path, loaded: LoadedRun, reporter: Reporter, trust_paths: bool) -> PreparedData | LabelledData:
    """What the run was trained and validated on."""
    if loaded.checkpoint.state.get("data", ...) is None:
        raise UserError(f"{path}: this run was imported, so it has no validation text; name a text with --data F")
    run_dir = RunDir.open(path)
    if not trust_paths:
        check_origin(run_dir, loaded.config, TEXT, ", --data F scores other text")
    try:
        prepared = run_data(run_dir, loaded.config, loaded.checkpoint, reporter).prepared
    except UserError as error:
        raise UserError(f"{error}; --data F scores other text") from None
    prepared.verify()
    return prepared


def _given(tokens: np.ndarray, given: frozenset[int], end_id: int) -> dict[str, int]:
    """How many tokens of the text are not predicted: where nothing else is, the first, which has none before it."""
    if not given:
        return {"first_token": 1}
    ends = int((tokens == end_id).sum()) if end_id in given else 0
    return {"end_tokens": ends, "other_special_tokens": int(np.isin(tokens, sorted(given)).sum()) - ends}
