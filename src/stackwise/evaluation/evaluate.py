"""Scores of a trained run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackwise.data.store import encode_files, prepare
from stackwise.errors import UserError
from stackwise.evaluation.entropy import ngram_entropies
from stackwise.evaluation.pseudo import pseudo_perplexity
from stackwise.objectives import MaskedObjective, create_objective
from stackwise.objectives.scoring import bits_per_byte, validate
from stackwise.ops.precision import resolve_compute_dtype, resolve_device
from stackwise.training.progress import Reporter
from stackwise.training.run import load, own_data
from stackwise.training.rundir import RunDir


def evaluate_run(path: str | Path, data: Sequence[Path] | None, step: int | None, reporter: Reporter) -> dict[str, Any]:
    """Loss, perplexity and bits a byte of the run in ``path``, and the entropies of the same tokens.

    Args:
        data: files to score; default the run's validation text.
        step: checkpoint; default the newest.
    """
    loaded = load(path, step)
    config, tokenizer = loaded.config, loaded.tokenizer
    training = config.training
    if data:
        tokens, n_bytes = encode_files([str(p) for p in data], tokenizer, config.data.text_field)
        bytes_per_token = n_bytes / len(tokens)
    else:
        prepared = prepare(own_data(RunDir.open(path), config), need_mask=training.needs_mask, progress=reporter.work)
        if prepared.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(f"{path}: the text behind data.path has changed since the run; give the text with --data")
        tokens, bytes_per_token = prepared.validation, prepared.bytes_per_token
    if len(tokens) < 2:
        raise UserError(f"there are {len(tokens)} tokens to score; at least 2 are needed")
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
    if isinstance(objective, MaskedObjective):
        scores |= pseudo_perplexity(loaded.rack, objective, tokens, seq_len, training.batch_size)
    entropies = ngram_entropies(tokens)
    return {
        "step": loaded.step,
        "objective": training.objective,
        **scores,
        "unigram_bits_per_byte": bits_per_byte(entropies.unigram, bytes_per_token),
        "bigram_bits_per_byte": bits_per_byte(entropies.bigram, bytes_per_token),
    }
