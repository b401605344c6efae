"""A run is planned before anything of it is written: what cannot fit is refused, with settings that do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from stackwise.config.base import StackWiseConfig
from stackwise.errors import UserError
from stackwise.files import nearest_folder
from stackwise.planning.devices import Machine, data_sheet_flops, free_memory, measured_flops, this_machine
from stackwise.planning.plan import Plan, expected_vocab_size, plan_run
from stackwise.planning.recommend import Change, change_that_fits
from stackwise.runs.initial import initial_stacks
from stackwise.units import duration, size


@dataclass(frozen=True)
class Limits:
    """What a run may take; ``None``: what there is.

    Attributes:
        memory: bytes of the device.
        seconds: by the plan's estimate.
        decimal: whether sizes are said in GB, and not GiB.
    """

    memory: int | None = None
    seconds: float | None = None
    decimal: bool = False


NO_LIMITS = Limits()
ENOUGH_LESS = 0.8
"""After a run that its plan let through has run out of memory: the share of it that other settings may need."""


def with_speed(machine: Machine) -> Machine:
    """``machine`` with its FLOP/s, by its data sheet, or measured where it is here and not known."""
    if machine.flops_per_second is not None or not machine.here:
        return machine
    rate = data_sheet_flops(machine.device, machine.compute_dtype)
    if rate is not None:
        return replace(machine, flops_per_second=rate)
    rate = measured_flops(machine.device, machine.compute_dtype or torch.float32)
    return replace(machine, flops_per_second=rate, rate="measured here")


class Guard:
    """Plans a run, and refuses it where it does not fit.

    Args:
        folder: of the run; it need not exist.
        going_on: the run is there already, and some of what it takes of the disk with it.
    """

    def __init__(
        self, config: StackWiseConfig, folder: str | Path, limits: Limits = NO_LIMITS, going_on: bool = False
    ) -> None:
        self.config, self.limits = config, limits
        self.present = initial_stacks(config)
        self._folder = nearest_folder(Path(folder))
        machine = this_machine(config.training, None if going_on else self._folder)
        if limits.memory is not None:
            machine = replace(machine, memory=limits.memory)
        self._machine = machine if limits.seconds is None else with_speed(machine)
        self._last: Plan | None = None

    def plan(self, vocab_size: int | None = None, given: Sequence[int] = ()) -> Plan:
        """The plan of the run, made once for a vocabulary.

        Args:
            vocab_size: default what can be told of it before the data is read.
            given: the steps of the first phases, where they do not follow from the budget.

        Raises:
            UserError: the run does not fit; the message names settings that do.
        """
        wanted = self.config.model.vocab_size or vocab_size or expected_vocab_size(self.config.data)[0]
        if self._last is None or self._last.vocab_size != wanted or given:
            planner = partial(self._plan, wanted, self._machine, None, given)
            plan = planner(self.config)
            if plan.missing:
                raise UserError(refusal(plan, change_that_fits(self.config, planner, plan), self.limits.decimal))
            self._last = plan
        return self._last

    def out_of_memory(self) -> str:
        """What the run needed when there was not enough, and settings that need less."""
        if self._last is None:
            return "out of memory before the run was planned"
        needed = self._last.peak_memory_bytes
        limit = int(min(ENOUGH_LESS * needed, free_memory(self._machine.device)))
        machine = replace(self._machine, memory=None)
        planner = partial(self._plan, self._last.vocab_size, machine, limit, ())
        change = change_that_fits(self.config, planner, replace(self._last, limit=limit))
        line = f"out of memory: this run needs {size(needed, self.limits.decimal)} by its plan"
        if change is None:
            return f"{line}; no recipe and none of the usual settings need enough less"
        return f"{line}; this needs less: {in_words(change, self.limits.decimal)}"

    def _plan(
        self, vocab_size: int, machine: Machine, limit: int | None, given: Sequence[int], config: StackWiseConfig
    ) -> Plan:
        return plan_run(
            config, self._folder, limit=limit, present=self.present, machine=machine, vocab_size=vocab_size,
            seconds_limit=self.limits.seconds, given=given,
        )  # fmt: skip


def refusal(plan: Plan, change: Change | None, decimal: bool = False) -> str:
    """What is needed, what is there, and the settings that fit."""
    parts = []
    for what, needed, there in plan.needs:
        if what in plan.missing:
            where = plan.machine.name if what == "device memory" else "there"
            have = f"{where} {'has' if what == 'device memory' else 'is'} {size(there, decimal)}"
            parts.append(f"{size(needed, decimal)} of {what.removeprefix('device ')}, and {have}")
    if "time" in plan.missing:
        parts.append(f"about {duration(plan.seconds)}, and --time allows {duration(plan.seconds_limit)}")
    needs = f"this run does not fit: it needs {'; '.join(parts)}"
    if change is None:
        return f"{needs}; no recipe and none of the usual settings fit: choose a smaller model or shorter sequences"
    return f"{needs}; this fits: {in_words(change, decimal)}"


def in_words(change: Change, decimal: bool = False) -> str:
    """The options and settings of ``change``, and what its plan takes."""
    options = [*([] if change.recipe is None else [f"--recipe {change.recipe}"]), *change.overrides]
    takes = [size(change.plan.peak_memory_bytes, decimal)]
    if change.plan.seconds is not None:
        takes.append(f"about {duration(change.plan.seconds)}")
    return f"{' '.join(options)} ({', '.join(takes)})"
