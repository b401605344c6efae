"""Masked diffusion: tokens hidden at every rate, weighted so that the loss bounds −log p.

With c(r) the mean cross-entropy of a token masked at rate r, −log p(x) ≤ L ∫₀¹ c(r) dr whatever the schedule (MDLM
2406.07524 §3; RADD 2406.03736 §4). Both forms of the loss estimate it, in nats a token, where ``weight_power`` is 1.

B sequences, T tokens, S tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.config.objectives import DiffusionConfig
from stackwise.data.batches import Batch
from stackwise.data.masking import count_mask, mask_uniforms, protected, rate_mask
from stackwise.data.tokenizers import Tokenizer
from stackwise.model.architecture import Rack
from stackwise.model.reading import Reading, Route
from stackwise.objectives.base import CrossEntropyObjective, Example, Score, scored
from stackwise.objectives.depth import Interval, Variant, intervals_of, levels_of
from stackwise.ops.losses import IGNORE
from stackwise.randomness import uniform

RATE, BLOCK_RATE = 11, 12
"""Streams of random numbers, beside those of ``data.masking``."""

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, fill the unit interval evenly."""


class DiffusionObjective(CrossEntropyObjective):
    """Predicts every masked token, at rates that are spread evenly over the batch.

    Args:
        settings: ``training.diffusion``.
        seed: masks are a function of (seed, epoch, sample, position); a row's rate also of its place in the batch.
        mask_id: the mask token, which is never predicted: its logit is −∞.
        special_ids: tokens that are never masked, and do not count.
        vocab_size: of the tokenizer.
        variant, levels: of depth as time; ``None``: all Stacks denoise all levels.
        conditioned: what a conditioned Rack is told; ``None``: nothing.
    """

    name = "diffusion"
    is_bound = True

    def __init__(
        self,
        settings: DiffusionConfig,
        *,
        seed: int,
        mask_id: int,
        special_ids: frozenset[int],
        vocab_size: int,
        variant: Variant | None = None,
        levels: tuple[float, ...] = (1.0, 0.0),
        conditioned: Literal["rate", "masked"] | None = None,
    ) -> None:
        self.settings, self.seed = settings, seed
        self.mask_id, self.special_ids, self.vocab_size = mask_id, special_ids, vocab_size
        self.variant, self.levels, self.conditioned = variant, levels, conditioned
        self.excluded = mask_id
        self.predicts_every_token = True
        self.noise: tuple[Interval, ...] = ()

    @classmethod
    def from_config(cls, config: StackWiseConfig, tokenizer: Tokenizer | None) -> Self:
        assert tokenizer is not None and tokenizer.mask_id is not None
        return cls._of(config, tokenizer.mask_id, tokenizer.special_ids, tokenizer.vocab_size)

    @classmethod
    def planned(cls, config: StackWiseConfig, vocab_size: int) -> Self | None:
        training = config.training
        plain = training.depth_variant is None and training.progressive.time_interpretation is None
        if plain and training.diffusion.block_length is None:
            return None
        return cls._of(config, 0, frozenset(), vocab_size)

    @classmethod
    def _of(cls, config: StackWiseConfig, mask_id: int, special_ids: frozenset[int], vocab_size: int) -> Self:
        training = config.training
        told = training.progressive.time_interpretation == "input"
        return cls(
            training.diffusion,
            seed=training.seed,
            mask_id=mask_id,
            special_ids=special_ids,
            vocab_size=vocab_size,
            variant=training.depth_variant,
            levels=(1.0, 0.0) if training.depth_variant is None else levels_of(config),
            conditioned=training.diffusion.condition if told else None,
        )

    def during(self, noise: tuple[Interval, ...]) -> Self:
        if not noise and self.variant is not None:
            noise = intervals_of(self.variant, self.levels, range(len(self.levels) - 1))
        chosen = copy(self)
        chosen.noise = noise
        chosen.predicts_every_token = not noise or (all(i.trains for i in noise) and _covers(noise))
        return chosen

    def of(self, rack: Rack) -> Self:
        """The objective of all intervals that the Stacks of ``rack`` denoise: one that still grows has not all."""
        if self.variant is None:
            return self
        return self.during(intervals_of(self.variant, self.levels, [stack.stack_id for stack in rack.stacks]))

    def corrupt(self, batch: Batch) -> Example:
        if self.variant == "prefix":
            return self._by_stages(batch)
        return self._noised(batch, self.settings.weighting == "exact_counts", self.settings.weight_power)

    def evaluated(self, batch: Batch) -> Example:
        if self.variant == "prefix":
            # A Rack that still grows never reveals the tokens of the Stacks to come, which count nowhere.
            return self._by_stages(batch, self.noise[-1].low)
        # Each draw (an epoch here) moves the rates on by rows: the draws of a sequence are spread over all rates.
        turn = int(batch.epoch[0] * GOLDEN % 1.0 * len(batch.tokens))
        return self._noised(batch, exact=True, power=1.0, turn=turn)

    def _noised(self, batch: Batch, exact: bool, power: float, turn: int = 0) -> Example:
        """The example whose loss is a mean over rates of density (2 − power) · rate^(1 − power); power 1: the bound."""
        tokens, fixed, u = self._drawn(batch)
        rows = self.settings.block_length or tokens.shape[1]
        B, n_blocks = len(tokens), tokens.shape[1] // rows
        if n_blocks == 1:
            rates = np.roll(self._rates(batch, B), turn)[:, None]
        else:  # a rate for each block, spread evenly over all of the batch
            offset = uniform(self.seed, batch.epoch[0], batch.sample[0], 0, stream=BLOCK_RATE)
            rates = 1.0 - ((offset + np.arange(B * n_blocks) * GOLDEN) % 1.0).reshape(B, n_blocks)
        blocks, loose = u.reshape(-1, rows), ~fixed.reshape(-1, rows)  # (B · blocks, S)
        level, there = rates.reshape(-1), loose.sum(axis=1)
        if exact:
            counts = np.minimum(np.maximum(np.ceil(level * there), 1), there).astype(np.int64)
            hidden = count_mask(blocks, counts, ~loose)
            weight = (2.0 - power) * (there / np.maximum(counts, 1)) ** power
            level = counts / np.maximum(there, 1)
        else:
            level = np.maximum(level, self.settings.min_rate)
            hidden = rate_mask(blocks, level[:, None], ~loose)
            weight = (2.0 - power) / level**power
        hidden = hidden.reshape(tokens.shape)
        inputs = torch.from_numpy(np.where(hidden, self.mask_id, tokens))
        time = None
        if self.conditioned is not None:
            drawn = torch.from_numpy(level[::n_blocks]).float()
            time = self.masked_share(inputs) if self.conditioned == "masked" else drawn
        reading = Reading(inputs, time=time, routes=self._routes_of(level) if self.variant is not None else ())
        if n_blocks > 1:
            reading = replace(reading, block_length=rows, clean=torch.from_numpy(tokens))
        return Example(
            reading,
            torch.from_numpy(np.where(hidden, tokens, IGNORE)),
            weights=torch.from_numpy(np.repeat(weight.reshape(B, n_blocks), rows, axis=1)).float(),
            counted=torch.from_numpy((~fixed).sum(axis=1)),
        )

    def _drawn(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]:
        """(B, T) each: the tokens, those that are never masked, and a uniform number for each."""
        tokens = batch.tokens[:, :-1]
        u = mask_uniforms(tokens, batch.epoch, batch.sample, seed=self.seed)
        return tokens, protected(tokens, self.special_ids, self.vocab_size), u

    def masked_share(self, inputs: Tensor) -> Tensor:
        """(…, T) tokens → (…) fp32: mask tokens as a share of all that are masked or could be."""
        fixed = torch.tensor(sorted(self.special_ids - {self.mask_id}), dtype=inputs.dtype, device=inputs.device)
        could_be = ~torch.isin(inputs, fixed)
        return (inputs == self.mask_id).sum(dim=-1) / could_be.sum(dim=-1).clamp(min=1)

    def _rates(self, batch: Batch, n: int) -> NDArray[np.float64]:
        """(B,) rates in (0, 1], one in each of B equal parts of the levels in use, the highest first."""
        offset = uniform(self.seed, batch.epoch[0], batch.sample[0], 0, stream=RATE)
        place = (np.arange(n) + offset) / n  # in [0, 1), from the highest level down
        trained = [interval for interval in self.noise if interval.trains]
        if not trained:
            return np.asarray(1.0 - place)
        ends = np.cumsum([0.0, *(interval.width for interval in trained)])
        which = np.minimum(np.searchsorted(ends, place * ends[-1], side="right") - 1, len(trained) - 1)
        highs = np.array([interval.high for interval in trained])
        lows = np.array([interval.low for interval in trained])
        rates = highs[which] - (place * ends[-1] - ends[which])
        return np.asarray(np.clip(rates, np.nextafter(lows[which], 1.0), highs[which]))

    def _routes_of(self, rates: NDArray[np.float64]) -> tuple[Route, ...]:
        """The Stacks that denoise each row, by its rate: those of the last interval whose upper end is not below."""
        trained = [self.noise[k] for k in self._trained]
        highs = np.array([interval.high for interval in trained])
        return _routes(trained, np.maximum((rates[:, None] <= highs).sum(axis=1) - 1, 0))

    @property
    def _trained(self) -> tuple[int, ...]:
        """The places of the intervals whose loss is taken."""
        return tuple(k for k, interval in enumerate(self.noise) if interval.trains)

    def _by_stages(self, batch: Batch, low: float = 0.0) -> Example:
        """Of one pass: z_k of each stage, in which the tokens of that stage and of later ones are masked.

        A token belongs to the last stage whose upper end is above its uniform number; it has no target below ``low``.
        """
        tokens, fixed, u = self._drawn(batch)
        highs = np.array([interval.high for interval in self.noise])
        stage = np.where(fixed, -1, (u[..., None] < highs).sum(axis=-1) - 1)
        hidden = stage[:, None] >= np.arange(len(highs))[:, None]  # (B, K, T)
        inputs = torch.from_numpy(np.where(hidden, self.mask_id, tokens[:, None]))
        time = None
        if self.conditioned is not None:
            rates = torch.from_numpy(highs).float().expand(len(tokens), -1)
            time = self.masked_share(inputs) if self.conditioned == "masked" else rates
        return Example(
            Reading(inputs, time=time, stages=self._trained),
            torch.from_numpy(np.where(~fixed & (u >= low), tokens, IGNORE)),
            counted=torch.from_numpy((~fixed).sum(axis=1)),
        )

    def typical(self, inputs: Tensor) -> Example:
        """An example of the shapes that a step of sequences (B, T) has; the Stacks share rows by their intervals."""
        B, T = inputs.shape
        ones = torch.ones(B, T)
        if self.variant == "prefix":
            K = len(self.noise)
            time = None if self.conditioned is None else torch.ones(B, K)
            return Example(Reading(inputs[:, None].repeat(1, K, 1), time=time, stages=self._trained), inputs)
        reading = Reading(inputs, time=None if self.conditioned is None else ones[:, 0])
        if self.settings.block_length not in (None, T):
            reading = replace(reading, block_length=self.settings.block_length, clean=inputs)
        if trained := [self.noise[k] for k in self._trained]:
            ends = np.cumsum([interval.width for interval in trained])
            which = np.searchsorted(ends, (np.arange(B) + 0.5) / B * ends[-1])
            reading = replace(reading, routes=_routes(trained, which))
        return Example(reading, inputs, weights=ones)

    def loss(self, rack: Rack, example: Example, scale: float) -> Tensor:
        if self.variant != "prefix":
            return super().loss(rack, example, scale)
        hidden, stages = rack(example.reading), example.reading.stages
        width = sum(self.noise[k].width for k in stages)
        total = torch.zeros((), device=rack.device)
        for k in stages:  # (r_k − r_{k+1}) / r_k of all that is masked, as a mean over the levels that train
            interval, masked = self.noise[k], self._masked(example)[:, k]
            total = total + rack.cross_entropy(
                hidden.pop(0),  # one stage after another goes, once its loss is known
                torch.where(masked, example.targets, IGNORE),
                scale * interval.width / interval.high / width,
                excluded=self.excluded,
            )
        return total

    def _masked(self, example: Example) -> Tensor:
        """(B, K, T) boolean, of one pass: the tokens that are masked in each stage."""
        assert example.reading.ids is not None
        return example.reading.ids == self.mask_id

    @torch.no_grad()
    def score(self, rack: Rack, batch: Batch) -> Score:
        """Of each row one draw of the bound, of the levels that ``rack`` has Stacks for.

        Counts of masked tokens are exact, and spread evenly over the rows: the least noisy of the usual estimators.
        """
        objective = self.of(rack)
        example = objective.evaluated(batch)
        terms, right = objective.terms(rack, example.to(rack.device))
        score = scored(example, terms, right, objective.judged(example))
        masked = (example.targets != IGNORE).numpy().sum(axis=1)
        if self.variant == "prefix":
            return replace(score, tokens=masked)
        means = terms.cpu().double().numpy().sum(axis=1) / np.maximum(masked, 1)
        return replace(score, rates=masked / np.maximum(1, score.tokens), means=means)

    def terms(self, rack: Rack, example: Example) -> tuple[Tensor, Tensor]:
        """In one pass every token is scored at its own stage: a draw of the bound of as many steps as Stacks."""
        if self.variant != "prefix":
            return super().terms(rack, example)
        own = self._masked(example).sum(dim=1) - 1
        terms = torch.zeros(own.shape, device=rack.device)
        right = torch.zeros(own.shape, dtype=torch.bool, device=rack.device)
        for k, hidden in zip(example.reading.stages, rack(example.reading)):
            targets = torch.where(own == k, example.targets, IGNORE)
            more, correct = rack.cross_entropy_terms(hidden, targets, excluded=self.excluded)
            terms, right = terms + more, right | correct
        return terms, right


def _covers(noise: tuple[Interval, ...]) -> bool:
    """Whether the intervals make up (0, 1]: else their sum bounds nothing."""
    joined = all(before.low == after.high for before, after in pairwise(noise))
    return joined and noise[0].high == 1.0 and noise[-1].low == 0.0


def _routes(intervals: Sequence[Interval], which: NDArray[np.intp]) -> tuple[Route, ...]:
    """The routes of rows whose levels lie in the intervals at the places ``which``."""
    return tuple(
        Route(tuple(np.flatnonzero(which == k).tolist()), interval.start, interval.stop)
        for k, interval in enumerate(intervals)
        if (which == k).any()
    )
