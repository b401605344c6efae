"""Runs under lm-evaluation-harness, without an export (extra: eval).

In Python, ``lm_eval.simple_evaluate(model=StackWiseLM("runs/mine"), tasks=["hellaswag"])``. On the command line,
``python -m stackwise.interop.lm_eval run --model stackwise --model_args run=runs/mine --tasks hellaswag``, with the
harness's own options.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401 (registered only while no other model is)
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from stackwise.errors import UserError
from stackwise.generation.text import stream_after
from stackwise.kinds import OBJECTIVES
from stackwise.model.reading import Reading
from stackwise.ops.precision import resolve_device
from stackwise.runs.run import load

Pair = tuple[tuple[str, str], list[int], list[int]]
"""(texts, tokens) of a context and what continues it."""


@register_model("stackwise")
class StackWiseLM(TemplateLM):
    """A run as the harness's model. Text begins after the end token, as it does in training and in exported folders.

    Args:
        run: directory of a run whose objective goes on from a prompt, which has a tokenizer.
        step: checkpoint; default the newest.
        batch_size: sequences that are read at once.
        max_length: most tokens that are read at once, the oldest dropped; default the learned positions, else
            ``training.seq_len``: what an exported folder declares.
        max_gen_toks: tokens that are generated where a task does not say.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: the run cannot be used so.
    """

    def __init__(
        self,
        run: str | Path,
        step: int | None = None,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        loaded = load(run, step, resolve_device(device or "auto"))
        objective = loaded.config.training.objective
        if OBJECTIVES[objective].sampler != "continuation":
            raise UserError(f"{run}: its objective {objective} gives continuations no probabilities; clm does")
        self.rack, self.words = loaded.rack, loaded.tokenizer
        positions = self.rack.spec.learned_positions
        self.max_length = max_length or positions or loaded.config.training.seq_len
        if positions is not None and self.max_length > positions:
            raise UserError(f"max_length: {max_length} is above the {positions} positions that {run} has learned")
        self.batch_size = 16 if batch_size == "auto" else int(batch_size)
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return self.words.end_id

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        return self.words.encode(string).tolist()

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation in nats, and whether each of its tokens is the likeliest."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for places in tqdm(list(_chunks(longest_first, self.batch_size)), disable=disable_tqdm):
            rows = [requests[i][1:] for i in places]
            for i, scores, right in zip(places, *self._scores(rows)):
                found[i] = (float(scores), bool(right))
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return found

    def _scores(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[list[Tensor], list[Tensor]]:
        """Sum of log p over each row's continuation, and whether greedy decoding gives it."""
        for _, continuation in rows:
            if len(continuation) > self.max_length:
                raise UserError(f"a continuation of {len(continuation)} tokens is longer than {self.max_length}")
        whole = [(context + continuation)[-(self.max_length + 1) :] for context, continuation in rows]
        # Padding on the right changes nothing: attention is causal.
        T = max(len(ids) for ids in whole) - 1
        ids = torch.tensor([row[:-1] + [self.eot_token_id] * (T + 1 - len(row)) for row in whole])
        hidden = self.rack(Reading(ids.to(self.rack.device)))
        sums, right = [], []
        for states, row, (_, continuation) in zip(hidden, whole, rows):
            n = len(continuation)
            logits = self.rack.logits(states[len(row) - 1 - n : len(row) - 1]).float()
            targets = torch.tensor(continuation, device=logits.device)
            sums.append(logits.log_softmax(-1).gather(-1, targets[:, None]).double().sum().cpu())
            right.append((logits.argmax(-1) == targets).all().cpu())
        return sums, right

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in nats, each token read after as many others as fit."""
        results = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm):
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, 1)
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            results.append(sum(score for score, _ in self._loglikelihood_tokens(pairs, True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the run writes after each context, up to the first stop text."""
        results = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[repr(request.args[1])].append(i)
        chunks = [chunk for places in alike.values() for chunk in _chunks(places, self.batch_size)]
        for places in tqdm(chunks, disable=disable_tqdm):
            settings = dict(requests[places[0]].args[1])
            stop = settings.pop("until", None) or []
            stop = [stop] if isinstance(stop, str) else list(stop)
            n_tokens = int(settings.pop("max_gen_toks", self.max_gen_toks))
            room = self.max_length - n_tokens
            if room < 1:
                raise UserError(f"max_gen_toks: {n_tokens} leaves no room for a context in {self.max_length} tokens")
            draw = {key: settings[key] for key in ("temperature", "top_k", "top_p", "min_p") if key in settings}
            if not settings.get("do_sample", bool(draw.get("temperature"))):
                draw = {"temperature": 0.0}
            starts = [self.tok_encode(requests[i].args[0])[-room:] or [self.eot_token_id] for i in places]
            texts = [""] * len(places)
            for pieces in stream_after(self.rack, self.words, starts, n_tokens, stop=stop, **draw):
                texts = [text + piece for text, piece in zip(texts, pieces)]
            for i, text in zip(places, texts):
                results[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return results


def _chunks(items: Sequence[int], n: int) -> Iterator[Sequence[int]]:
    return (items[i : i + n] for i in range(0, len(items), n))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
