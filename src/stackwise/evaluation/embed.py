"""Texts as vectors: what the head of a run reads of them.

N texts, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stackwise.data.labelled import LabelledRows, encode_rows
from stackwise.data.tables import Row
from stackwise.errors import UserError
from stackwise.model.reading import Reading
from stackwise.ops.pooling import Pooling, pool
from stackwise.ops.precision import autocast, resolve_compute_dtype, resolve_device
from stackwise.runs.run import LoadedRun, load


def embed(run: LoadedRun | str | Path, texts: Sequence[str], *, pooling: Pooling = "mean") -> NDArray[np.float32]:
    """(N, C) fp32: of each text what the head of ``run`` reads, pooled over its tokens and its end token.

    Args:
        run: a run directory, or what ``stackwise.load`` gave.
        texts: longer ones than ``training.seq_len`` tokens are cut there.
        pooling: ``mean`` over the tokens, or the ``last`` one, which alone has seen all others where attention is
            causal.

    Raises:
        UserError: there is no text, an empty one, or no run.
    """
    if isinstance(texts, str):
        raise UserError("embed: texts is one text; give a list of texts")
    return embed_rows([Row(f"text {i}", (text,)) for i, text in enumerate(texts)], run, pooling)[0]


def embed_rows(
    rows: Sequence[Row],
    run: LoadedRun | str | Path,
    pooling: Pooling,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[NDArray[np.float32], int]:
    """The vectors of ``rows``, and how many of these were cut; as ``embed``."""
    loaded = run if isinstance(run, LoadedRun) else load(run)
    if not rows:
        raise UserError("embed: there is no text")
    empty = next((row for row in rows if not any(row.texts)), None)
    if empty is not None:
        raise UserError(f"{empty.where}: the text is empty")
    training = loaded.config.training
    device = resolve_device(training.device)
    rack = loaded.rack.to(device)
    encoded = encode_rows(rows, loaded.tokenizer, training.seq_len, None, labelled=False)
    found = np.empty((len(rows), rack.d_model), dtype=np.float32)
    done = 0
    for index, reading in _by_length(encoded, training.micro_batch_size or training.batch_size):
        with torch.no_grad(), autocast(device, resolve_compute_dtype(training, device)):
            hidden = rack(reading.to(device))
            found[index] = pool(hidden, reading.to(device).attention_mask, pooling).float().cpu().numpy()
        done += len(index)
        progress(done, len(rows))
    return found, encoded.truncated


def _by_length(rows: LabelledRows, batch_size: int) -> Iterator[tuple[NDArray[np.int64], Reading]]:
    """All rows, the shortest first, so that a batch has little padding: their numbers, and what the Rack reads."""
    lengths = rows.starts[1:] - rows.starts[:-1]
    order = np.argsort(lengths, kind="stable")
    for first in range(0, len(order), batch_size):
        index = order[first : first + batch_size]
        batch, longest = rows.batch(index, np.zeros_like(index)), int(lengths[index].max())
        assert batch.mask is not None
        ids, mask = torch.from_numpy(batch.tokens[:, :longest]), torch.from_numpy(batch.mask[:, :longest])
        yield index, Reading(ids, mask)
