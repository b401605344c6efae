"""Masked diffusion: tokens hidden at every rate, weighted so that the loss bounds −log p.

With c(r) the mean cross-entropy of a token masked at rate r, −log p(x) ≤ L ∫₀¹ c(r) dr whatever the schedule (MDLM
2406.07524 §3; RADD 2406.03736 §4). Both forms of the loss estimate it, in nats a token, where ``weight_power`` is 1.

B sequences, T tokens, S tokens of a block.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stackwise.config.objectives import DiffusionConfig
from stackwise.data.batches import Batch
from stackwise.data.masking import count_mask, mask_uniforms, protected, rate_mask
from stackwise.model.architecture import Rack
from stackwise.objectives.base import CrossEntropyObjective, Example, Route, Score, scored
from stackwise.objectives.depth import Interval, Variant, intervals_of
from stackwise.ops.losses import IGNORE, linear_cross_entropy
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
        return self._noised(batch, self.settings.weighting == "exact_counts", self.settings.weight_power)

    def evaluated(self, batch: Batch) -> Example:
        # Each draw (an epoch here) moves the rates on by rows: the draws of a sequence are spread over all rates.
        turn = int(batch.epoch[0] * GOLDEN % 1.0 * len(batch.tokens))
        return self._noised(batch, exact=True, power=1.0, turn=turn)

    def _noised(self, batch: Batch, exact: bool, power: float, turn: int = 0) -> Example:
        """The example whose loss is a mean over rates of density (2 − power) · rate^(1 − power); power 1: the bound."""
        tokens = batch.tokens[:, :-1]
        fixed = protected(tokens, self.special_ids, self.vocab_size)
        u = mask_uniforms(tokens, batch.epoch, batch.sample, seed=self.seed)
        if self.variant == "prefix":
            return self._by_stages(tokens, fixed, u)
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
        example = Example(
            inputs,
            torch.from_numpy(np.where(hidden, tokens, IGNORE)),
            weights=torch.from_numpy(np.repeat(weight.reshape(B, n_blocks), rows, axis=1)).float(),
            time=time,
            routes=self._routes(level) if self.variant is not None else (),
            counted=torch.from_numpy((~fixed).sum(axis=1)),
        )
        return example if n_blocks == 1 else replace(example, clean=torch.from_numpy(tokens))

    def masked_share(self, inputs: Tensor) -> Tensor:
        """(B, T) tokens → (B,) fp32: mask tokens as a share of all that are masked or could be."""
        fixed = torch.tensor(sorted(self.special_ids - {self.mask_id}), dtype=inputs.dtype, device=inputs.device)
        could_be = ~torch.isin(inputs, fixed)
        return (inputs == self.mask_id).sum(dim=1) / could_be.sum(dim=1).clamp(min=1)

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

    def _routes(self, rates: NDArray[np.float64]) -> tuple[Route, ...]:
        """The Stacks that denoise each row, by its rate."""
        trained = [interval for interval in self.noise if interval.trains]
        highs = np.array([interval.high for interval in trained])
        which = np.maximum((rates[:, None] <= highs).sum(axis=1) - 1, 0)  # the last whose upper end is not below
        return tuple(
            Route(tuple(np.flatnonzero(which == k).tolist()), interval.start, interval.stop)
            for k, interval in enumerate(trained)
            if (which == k).any()
        )

    def _by_stages(self, tokens: NDArray[np.int64], fixed: NDArray[np.bool_], u: NDArray[np.float64]) -> Example:
        """Of one pass: the stage of each token, whose targets all stages before it share."""
        highs = np.array([interval.high for interval in self.noise])
        stage = (u[..., None] < highs).sum(axis=-1) - 1  # the last interval whose upper end is above u
        stage = np.where(fixed, -1, stage)
        counts = ~fixed
        if self.noise[-1].low > 0:  # a Rack that still grows: tokens with lower u are never revealed, nor counted alone
            counts = counts & (u >= self.noise[-1].low)
        return Example(
            torch.full(tokens.shape, self.mask_id),
            torch.from_numpy(np.where(counts, tokens, IGNORE)),
            clean=torch.from_numpy(tokens),
            stage=torch.from_numpy(stage),
            counted=torch.from_numpy((~fixed).sum(axis=1)),
        )

    def typical(self, inputs: Tensor) -> Example:
        """An example of the shapes that a step of sequences (B, T) has; the Stacks share rows by their intervals."""
        B, T = inputs.shape
        ones = torch.ones(B, T)
        trained = [interval for interval in self.noise if interval.trains]
        ends = np.cumsum([interval.width for interval in trained])
        which = np.searchsorted(ends, (np.arange(B) + 0.5) / B * (ends[-1] if trained else 1.0))
        staged, blocks = self.variant == "prefix", self.settings.block_length not in (None, T)
        return Example(
            inputs,
            inputs,
            weights=None if staged else ones,
            time=None if self.conditioned is None else ones[:, 0],
            clean=inputs if staged or blocks else None,
            stage=inputs if staged else None,
            routes=()
            if staged
            else tuple(
                Route(tuple(np.flatnonzero(which == k).tolist()), interval.start, interval.stop)
                for k, interval in enumerate(trained)
                if (which == k).any()
            ),
        )

    def stages(self, example: Example) -> list[Tensor]:
        """z_k (B, T) of each stage: tokens of later stages, and of this one, are masked."""
        assert example.clean is not None and example.stage is not None
        return [
            torch.where(example.stage >= k, self.mask_id, example.clean) for k in range(len(self.noise))
        ]  # fmt: skip

    def _stage_times(self, stages: list[Tensor]) -> Tensor | None:
        if self.conditioned is None:
            return None
        if self.conditioned == "masked":
            return torch.stack([self.masked_share(z) for z in stages])
        highs = torch.tensor([interval.high for interval in self.noise], device=stages[0].device)
        return highs[:, None].expand(-1, len(stages[0]))

    def loss(self, rack: Rack, example: Example, scale: float) -> Tensor:
        if self.variant != "prefix":
            return super().loss(rack, example, scale)
        stages = self.stages(example)
        assert example.clean is not None
        hidden = rack.unroll(stages, example.attention_mask, time=self._stage_times(stages))
        width = sum(interval.width for interval in self.noise if interval.trains)
        total = torch.zeros((), device=rack.device)
        for z, h, interval in zip(stages, hidden, self.noise):
            if interval.trains:  # (r_k − r_{k+1}) / r_k of all that is masked, as a mean over the levels that train
                targets = torch.where(z == self.mask_id, example.clean, IGNORE)
                total = total + linear_cross_entropy(
                    rack.finish(h).flatten(0, 1), rack.head_weight, targets.flatten(),
                    scale * interval.width / interval.high / width, bias=rack.head_bias, excluded=self.excluded,
                )  # fmt: skip
        return total

    def hidden(self, rack: Rack, example: Example) -> Tensor:
        if example.clean is None:
            return super().hidden(rack, example)
        T = example.inputs.shape[1]
        assert self.settings.block_length is not None
        both = torch.cat((example.inputs, example.clean), dim=1)
        positions = torch.arange(T, device=both.device).repeat(2)[None]
        seen = noised_and_clean(T, self.settings.block_length, both.device)
        return rack.hidden(both, positions=positions, seen=seen, time=example.time)[:, :T]

    @torch.no_grad()
    def score(self, rack: Rack, batch: Batch) -> Score:
        """Of each row one draw of the bound, of the levels that ``rack`` has Stacks for.

        Counts of masked tokens are exact, and spread evenly over the rows: the least noisy of the usual estimators.
        """
        objective = self.of(rack)
        example = objective.evaluated(batch)
        on_device = example.to(rack.device)
        if self.variant == "prefix":
            terms, right = objective._stage_terms(rack, on_device)
        else:
            terms, right = objective.terms(rack, objective.hidden(rack, on_device), on_device.targets)
        score = scored(example, terms, right, objective.judged(example))
        there = (example.targets != IGNORE).numpy()
        masked = there.sum(axis=1)
        if self.variant == "prefix":
            return replace(score, tokens=masked)
        means = terms.cpu().double().numpy().sum(axis=1) / np.maximum(masked, 1)
        return replace(score, rates=masked / np.maximum(1, score.tokens), means=means)

    def _stage_terms(self, rack: Rack, example: Example) -> tuple[Tensor, Tensor]:
        """Every token is scored once, at its own stage: an unbiased draw of the bound of as many steps as Stacks."""
        stages = self.stages(example)
        assert example.stage is not None
        hidden = rack.unroll(stages, example.attention_mask, time=self._stage_times(stages))
        terms = torch.zeros(example.inputs.shape, device=rack.device)
        right = torch.zeros(example.inputs.shape, dtype=torch.bool, device=rack.device)
        for k, h in enumerate(hidden):
            targets = torch.where(example.stage == k, example.targets, IGNORE)
            more, correct = self.terms(rack, rack.finish(h), targets)
            terms, right = terms + more, right | correct
        return terms, right


def _covers(noise: tuple[Interval, ...]) -> bool:
    """Whether the intervals make up (0, 1]: else their sum bounds nothing."""
    joined = all(before.low == after.high for before, after in pairwise(noise))
    return joined and noise[0].high == 1.0 and noise[-1].low == 0.0


def noised_and_clean(n_tokens: int, block_length: int, device: torch.device) -> Tensor:
    """(2T, 2T) boolean: which tokens each of [noised, clean] sees, in one pass over all blocks (2503.09573 §3.1).

    A noised token sees its own block's noised tokens and the clean ones of earlier blocks; a clean one its own and
    earlier blocks' clean ones.
    """
    block = torch.arange(n_tokens, device=device) // block_length
    same, earlier = block[:, None] == block, block[:, None] > block
    none = torch.zeros_like(same)
    return torch.cat((torch.cat((same, earlier), dim=1), torch.cat((none, same | earlier), dim=1)))
