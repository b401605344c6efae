"""A phase made real on this device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from stackwise.config.base import StackWiseConfig
from stackwise.config.objectives import ObjectiveName
from stackwise.growth.phases import Phase
from stackwise.growth.precision import PrecisionManager
from stackwise.growth.preparation import prepare_phase
from stackwise.model.architecture import Rack
from stackwise.objectives.base import Objective
from stackwise.objectives.scoring import Validation
from stackwise.optim.create import InBackward, create_optimizer
from stackwise.store.state import RunState
from stackwise.training.assertions import TrainingCheck
from stackwise.training.caching import Caching
from stackwise.training.examples import ExampleSource
from stackwise.training.offload import Offload
from stackwise.training.optimizers import (
    AnyOptimizer,
    Moments,
    heights,
    moments_for_phase,
    moments_of,
    moments_to_keep,
    set_moments,
    trained_parameters,
)
from stackwise.training.placement import Placement
from stackwise.training.progress import Reporter


@dataclass
class Context:
    """What the stages of a run share.

    Attributes:
        rack: without the Stacks that the phases add; with those of the phase in progress when resuming.
        config: batch, optimizer, clipping, logging and checkpoint settings.
        source: gives the example of each step.
        objectives: of all phases, by name.
        placement: where each Stack of the Rack is.
        caching: the activation cache, and what a phase reads from it.
        compute_dtype: in what products run.
        validate: scores the Rack by an objective; ``None`` skips validation.
        reporter: what people see.
        moments: optimizer states between two phases, by parameter.
    """

    rack: Rack
    config: StackWiseConfig
    source: ExampleSource
    objectives: Mapping[ObjectiveName, Objective]
    placement: Placement
    caching: Caching
    compute_dtype: torch.dtype | None
    validate: Callable[[Rack, Objective], Validation] | None
    reporter: Reporter
    moments: Moments = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.placement.device

    def direct(self, phase: Phase) -> None:
        """Gives attention the direction of ``phase``."""
        if phase.attention is not None:
            self.rack.set_attention_mode(phase.attention)

    def score(self, phase: Phase) -> Validation | None:
        """Scores all that the Rack can do by the objective of ``phase``."""
        return None if self.validate is None else self.validate(self.rack, self.objectives[phase.objective])


class Stage:
    """A phase made real on this device: a context manager.

    On entry, in this order: Stacks that wait elsewhere and change are recalled; the Rack grows, is stored, adapted and
    frozen as the phase says; its parts are placed or offloaded; Stacks are compiled; the optimizer is made and takes
    the moments over; the cache is filled. On exit the examples end, the moments that the next phase can use are kept,
    and the others are let go; the caller drops the Stage before it enters the next one.

    Args:
        context: what the stages of a run share.
        phases: of the run; this is the one that ``state`` is in, after ``state.phase_step`` of its steps.
    """

    def __init__(self, context: Context, phases: Sequence[Phase], state: RunState) -> None:
        self.context, self.phase = context, phases[state.phase]
        self._earlier, self._following = phases[max(0, state.phase - 1)], phases[state.phase + 1 :]
        self._state = state
        self.objective = context.objectives[self.phase.objective].during(self.phase.noise)
        self.changed: set[str] = set()
        """Parts whose tensors are other ones than before the phase."""
        self.storage: dict[str, Any] | None = None
        """What storing Stacks in another precision cost: validation loss before and after."""

    def __enter__(self) -> Self:
        context, phase, state = self.context, self.phase, self._state
        with ExitStack() as stack:
            context.placement.recall(phase)
            self._grow_and_store()
            context.direct(phase)
            self.source = context.source.during(self.objective)
            context.placement.place(phase)
            context.rack.checkpoint_activations(context.config.training.activation_checkpointing)
            compile_stacks(context.rack, context.config.training.compile, context.placement.offload, stack)
            self.parameters = trained_parameters(context.rack)
            self._make_optimizer(stack)
            self.check = TrainingCheck(context.rack, self.parameters, phase.schedule.warmup_steps)
            examples = context.caching.examples(phase, self.source, state.phase_step, state.step)
            self.examples = stack.enter_context(examples)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._open:
            if kind is None:
                self.context.moments = moments_to_keep(self.moments(), self._following)

    def moments(self) -> Moments:
        """The optimizer's state of each parameter that has one."""
        return moments_of(self.optimizer, self.parameters)

    def _grow_and_store(self) -> None:
        """Prepares the Rack, and measures what storing its Stacks in another precision costs."""
        context, state = self.context, self._state
        changes = {
            stack.stack_id: self.phase.precision_of(stack.stack_id)
            for stack in context.rack.stacks
            if PrecisionManager().precision_of(stack) != self.phase.precision_of(stack.stack_id)
        }
        before = state.records[-1].validation_loss if state.records else None
        if changes:
            context.direct(self._earlier)
            if before is None:
                scored = context.score(self._earlier)
                before = None if scored is None else scored.loss

        def measure() -> None:
            scored = context.score(self._earlier)
            after = None if scored is None else scored.loss
            precision = {str(k): name for k, name in changes.items()}
            self.storage = {
                "precision": precision, "validation_loss_before": before, "validation_loss_after": after
            }  # fmt: skip
            if before is not None and after is not None:
                kinds = ", ".join(sorted(set(changes.values())))
                context.reporter.note(f"  trunk stored as {kinds}: validation loss {before:.4f} → {after:.4f}")

        self.changed = prepare_phase(context.rack, self.phase, context.config, measure)

    def _make_optimizer(self, stack: ExitStack) -> None:
        """The optimizer, with its moments: those of the checkpoint, or what the phase keeps of those before it."""
        training, context = self.context.config.training, self.context
        rates = heights(context.rack)
        self.in_backward: InBackward | None = None
        self.optimizer: AnyOptimizer
        if training.optimizer.in_backward:
            self.in_backward = InBackward(self.parameters, training.optimizer, training.seed, rates)
            stack.callback(self.in_backward.close)
            self.optimizer = self.in_backward.optimizer
        else:
            self.optimizer = create_optimizer(self.parameters, training.optimizer, training.seed, rates)
        resumed = self._state.phase_step > 0
        moments = context.moments if resumed else moments_for_phase(self.phase, context.moments, self.parameters)
        set_moments(self.optimizer, self.parameters, moments)
        context.moments = {}  # the optimizer has them: what it does not take over is let go


def compile_stacks(rack: Rack, compiled: bool, offload: Offload, stack: ExitStack) -> None:
    """Compiles the Stacks that stay on the device, until ``stack`` closes; if not ``compiled``, none is."""
    for module in rack.stacks:
        module._compiled_call_impl = None  # of an earlier phase or run
    if not compiled:
        return
    # Fresh graphs: a compiled graph does not notice that requires_grad changed.
    torch._dynamo.reset()
    # The limits apply to one piece of code, which all Stacks share: each may differ from the others.
    limits = ("recompile_limit", "accumulated_recompile_limit")
    wider = {name: getattr(torch._dynamo.config, name) * len(rack.stacks) for name in limits}
    stack.enter_context(torch._dynamo.config.patch(wider))
    for module in rack.stacks:
        if module.stack_id not in offload.offloaded:
            module.compile(dynamic=False)
