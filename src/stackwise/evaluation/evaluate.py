"""Scores of a trained run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stackwise.data.store import encode_files
from stackwise.errors import UserError
from stackwise.evaluation.entropy import ngram_entropies
from stackwise.evaluation.pseudo import pseudo_perplexity
from stackwise.kinds import OBJECTIVES
from stackwise.objectives import create_objective
from stackwise.objectives.scoring import bits_per_byte, predicted_share, validate
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
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of the run in ``path``, and the entropies of the same tokens.

    ``given`` says what of the text the objective does not predict and has for free.

    Args:
        data: files to score; default the run's validation text.
        step: of the checkpoint, or ``best``; default the newest.
        trust_paths: what the config of a run that was not begun here names outside its folder may be used.
    """
    loaded = load(path, step)
    config, tokenizer = loaded.config, loaded.tokenizer
    training = config.training
    if data:
        tokens, n_bytes = encode_files([str(p) for p in data], tokenizer, config.data.text_field)
        if not n_bytes:
            raise UserError(f"--data: {', '.join(map(str, data))}: contains no text")
        bytes_per_token = n_bytes / len(tokens)
    else:
        tokens, bytes_per_token = _own_text(Path(path), loaded, reporter, trust_paths)
    device = resolve_device(training.device)
    objective, seq_len = create_objective(config, tokenizer), min(training.seq_len, len(tokens) - 1)
    result = validate(
        loaded.rack.to(device),
        objective,
        tokens,
        seq_len=seq_len,
        batch_size=training.micro_batch_size or training.batch_size,
        bytes_per_token=bytes_per_token,
        draws=training.evaluation.draws,
        compute_dtype=resolve_compute_dtype(training, device),
        progress=lambda done, total: reporter.work("scoring", done, total),
    )
    scores = result.to_dict()
    if OBJECTIVES[training.objective].scores_alone:
        assert tokenizer.mask_id is not None  # the objective asked for it
        special = objective.special_ids
        scores |= pseudo_perplexity(loaded.rack, tokenizer.mask_id, special, tokens, seq_len, training.batch_size)
    entropies = ngram_entropies(tokens, objective.special_ids)
    bytes_per_predicted = bytes_per_token / predicted_share(tokens, objective.special_ids)
    return {
        "step": loaded.step,
        "objective": training.objective,
        **scores,
        "given": _given(tokens, objective.special_ids, tokenizer.end_id),
        "unigram_bits_per_byte": bits_per_byte(entropies.unigram, bytes_per_predicted),
        "bigram_bits_per_byte": bits_per_byte(entropies.bigram, bytes_per_predicted),
    }


def _own_text(path: Path, loaded: LoadedRun, reporter: Reporter, trust_paths: bool) -> tuple[np.ndarray, float]:
    """The tokens of the run's validation text, and the bytes that one of them stands for."""
    if loaded.checkpoint.state.get("data", ...) is None:
        raise UserError(f"{path}: this run was imported, so it has no validation text; name a text with --data F")
    run_dir = RunDir.open(path)
    if not trust_paths:
        check_origin(run_dir, loaded.config, TEXT, ", --data F scores other text")
    try:
        prepared = run_data(run_dir, loaded.config, loaded.checkpoint, reporter)
    except UserError as error:
        raise UserError(f"{error}; --data F scores other text") from None
    prepared.verify()
    return prepared.validation, prepared.bytes_per_token


def _given(tokens: np.ndarray, given: frozenset[int], end_id: int) -> dict[str, int]:
    """How many tokens of the text are not predicted: where nothing else is, the first, which has none before it."""
    if not given:
        return {"first_token": 1}
    ends = int((tokens == end_id).sum()) if end_id in given else 0
    return {"end_tokens": ends, "other_special_tokens": int(np.isin(tokens, sorted(given)).sum()) - ends}
