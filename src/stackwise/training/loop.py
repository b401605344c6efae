"""The one training loop: it runs a list of phases.

Every number that a step depends on (batch, masks, dropout, learning rate) is a function of the seed and the step, so a
checkpoint holds weights, moments and counters, and no iterator or generator state; a resumed run takes the same steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stackwise.config.base import StackWiseConfig
from stackwise.config.objectives import ObjectiveName
from stackwise.errors import RunError, StoppedBySignal, UserError
from stackwise.growth.phases import Phase
from stackwise.growth.precision import PrecisionManager, parameters_of
from stackwise.growth.rack_builder import prepare_phase
from stackwise.model.architecture import Rack, Stack
from stackwise.model.linear import linears
from stackwise.objectives.base import Objective
from stackwise.objectives.scoring import Validation
from stackwise.ops.boundary import BoundaryLayout
from stackwise.ops.precision import autocast
from stackwise.optim.create import InBackward, create_optimizer
from stackwise.randomness import seed_of
from stackwise.signals import StopRequest, stop_if_asked, stoppable
from stackwise.store.activation_cache import ActivationCache, BoundaryId, UpstreamPart, cache_key
from stackwise.store.checkpoints import Checkpoint, CheckpointStore
from stackwise.store.objects import weights_sha256
from stackwise.store.rundir import RunDir
from stackwise.store.state import PhaseRecord, RunState
from stackwise.store.structure import structure
from stackwise.training.assertions import TrainingCheck
from stackwise.training.examples import Boundaries, ExampleSource, PhaseExamples
from stackwise.training.memory import PeakMemory
from stackwise.training.offload import Offload, Source, all_tensors
from stackwise.training.optimizers import (
    AnyOptimizer,
    flatten,
    moments_for_phase,
    moments_of,
    moments_to_keep,
    set_moments,
    trained_parameters,
    unflatten,
)
from stackwise.training.progress import Reporter
from stackwise.training.schedules import lr_ratio
from stackwise.training.tracking import Tracker


class Loop:
    """Trains ``rack`` through ``phases``.

    Args:
        rack: without the Stacks that the phases add; with those of the phase in progress when resuming.
        phases: in order.
        source: the example of each step.
        objectives: of all phases, by name.
        config: batch, optimizer, clipping, logging and checkpoint settings.
        step_flops: true FLOPs of one step of each phase, in order.
        preparation_flops: of what comes before a phase's first step (filling its cache); default none.
        device, compute_dtype: where and in what products run.
        peak_flops: of the device, for MFU; ``None`` leaves MFU out.
        validate: scores the Rack by an objective; ``None`` skips validation.
        run: where metrics and checkpoints go; ``None`` keeps nothing.
        reporter: what people see.
        fingerprint: of config and data, stored in checkpoints.
        identity: what else checkpoints keep of the run they belong to.
        checkpoint: to go on from.
    """

    def __init__(
        self,
        rack: Rack,
        phases: Sequence[Phase],
        source: ExampleSource,
        objectives: Mapping[ObjectiveName, Objective],
        config: StackWiseConfig,
        *,
        step_flops: Sequence[float],
        device: torch.device,
        compute_dtype: torch.dtype | None,
        peak_flops: float | None,
        validate: Callable[[Rack, Objective], Validation] | None,
        run: RunDir | None,
        reporter: Reporter,
        memory: PeakMemory,
        fingerprint: str = "",
        identity: Mapping[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
        preparation_flops: Sequence[float] | None = None,
    ) -> None:
        self.rack, self.phases, self.source, self.objectives = rack, list(phases), source, objectives
        self.config, self.step_flops = config, step_flops
        self.preparation_flops = preparation_flops or [0.0] * len(self.phases)
        self.device, self.compute_dtype, self.peak_flops = device, compute_dtype, peak_flops
        self.validate, self.run, self.reporter, self.memory = validate, run, reporter, memory
        self.fingerprint, self.identity = fingerprint, identity or {}
        self.state = RunState()
        self.validation: Validation | None = None
        settings = config.training.checkpoint
        self.store = CheckpointStore(run.checkpoints, settings.keep_last) if run else None
        self.tracker = Tracker(run.path if run and config.training.logging.tensorboard else None)
        self._moments: dict[str, dict[str, torch.Tensor]] = {}
        self._saved_frozen: set[str] = set()
        self.offload = Offload(device)
        self.cache: ActivationCache | None = None
        self._inside: InBackward | None = None
        self._of_phase = source, objectives[config.training.objective]
        if checkpoint is not None:
            self._restore(checkpoint)

    def train(self) -> RunState:
        """Runs what is left of the phases. Raises ``StoppedBySignal`` once a checkpoint is saved, ``RunError``."""
        state = self.state
        with ExitStack() as stack:
            stop = stack.enter_context(stoppable())
            stack.callback(self.tracker.close)
            stack.callback(self.offload.close)
            while state.phase < len(self.phases):
                phase = self.phases[state.phase]
                if state.phase_step < phase.steps:
                    with ExitStack() as of_phase:
                        self._run_phase(phase, stop, of_phase)
                if phase.cached and not any(later.cached for later in self.phases[state.phase + 1 :]):
                    self._cache_of(phase).clear()  # also of a phase whose last step a stopped process took
                state.phase += 1
                if state.phase < len(self.phases):
                    state.phase_step = 0
        return state

    def _run_phase(self, phase: Phase, stop: StopRequest, stack: ExitStack) -> None:
        """The steps of one phase: evaluate, save, step, log."""
        state, training, rack = self.state, self.config.training, self.rack
        started = time.perf_counter()
        self._recall(phase)
        stored = self._store_and_grow(phase)
        self._read_for(phase)
        self._place(phase)
        rack.checkpoint_activations(training.activation_checkpointing)
        for module in rack.stacks:
            module._compiled_call_impl = None  # of an earlier phase or run
        if training.compile:
            # Fresh graphs: a compiled graph does not notice that requires_grad changed.
            torch._dynamo.reset()
            # The limits are of one piece of code, which all Stacks share: each may differ from the others.
            limits = ("recompile_limit", "accumulated_recompile_limit")
            wider = {name: getattr(torch._dynamo.config, name) * len(rack.stacks) for name in limits}
            stack.enter_context(torch._dynamo.config.patch(wider))
            for module in rack.stacks:
                if module.stack_id not in self.offload.away:
                    module.compile(dynamic=False)
        parameters = trained_parameters(rack)
        self._inside = None
        optimizer: AnyOptimizer
        if training.optimizer.in_backward:
            self._inside = InBackward(parameters, training.optimizer, training.seed)
            stack.callback(self._inside.close)
            optimizer = self._inside.optimizer
        else:
            optimizer = create_optimizer(parameters, training.optimizer, training.seed)
        resumed = state.phase_step > 0
        set_moments(
            optimizer,
            parameters,
            self._moments if resumed else moments_for_phase(phase, self._moments, parameters),
        )
        self._moments = {}
        if not resumed:
            count = sum(p.numel() for p in parameters.values())
            state.records.append(
                PhaseRecord(
                    phase.name,
                    phase.stack,
                    phase.steps,
                    objective=self._of_phase[1].name,
                    trainable_parameters=count,
                    storage=stored,
                )
            )
        record = state.records[-1]
        check = TrainingCheck(rack, parameters, phase.schedule.warmup_steps)
        if not resumed and phase.cached:
            state.flops += self.preparation_flops[state.phase]
            record.flops += self.preparation_flops[state.phase]
        examples = stack.enter_context(self._examples(phase))
        self.memory.reset()
        self.reporter.phase(self._describe(phase, record), phase.steps, state.phase_step)
        flops = self.step_flops[state.phase]
        log_tokens, log_flops, log_time = state.tokens, state.flops, time.perf_counter()

        while state.phase_step < phase.steps:
            ratio = lr_ratio(phase.schedule, state.phase_step)
            for group in optimizer.param_groups:
                group["lr"] = training.optimizer.lr * ratio
            loss, grad_norm, n_tokens = self._step(optimizer, parameters, check, examples)
            state.step += 1
            state.phase_step += 1
            state.tokens += n_tokens
            state.flops += flops
            record.tokens += n_tokens
            record.flops += flops
            record.first_loss = loss if record.first_loss is None else record.first_loss
            record.last_loss = loss
            last = state.phase_step == phase.steps

            due = training.evaluation.every_steps
            evaluate = self.validate is not None and (last or (due is not None and state.step % due == 0))
            metrics = None
            if state.step % training.logging.every_steps == 0 or last or state.step == 1 or evaluate:
                now = time.perf_counter()
                elapsed = now - log_time
                metrics = {
                    "step": state.step,
                    "phase": phase.name,
                    "stack": phase.stack,
                    "tokens": state.tokens,
                    "loss": loss,
                    "lr": training.optimizer.lr * ratio,
                    "grad_norm": grad_norm,
                    "tokens_per_second": (state.tokens - log_tokens) / elapsed,
                    "mfu": (state.flops - log_flops) / elapsed / self.peak_flops if self.peak_flops else None,
                    "memory_bytes": self.memory.peak(),
                    "flops": state.flops,
                }
                log_tokens, log_flops, log_time = state.tokens, state.flops, now
            pause = time.perf_counter()  # validating and saving are not training: they do not count in tokens/s
            self.reporter.step(state.phase_step, metrics)

            if self.validate is not None and evaluate and metrics is not None:
                self.validation = self.validate(rack, self._objective_of(phase))
                metrics["validation_loss"] = self.validation.loss
                if last:
                    record.validation_loss = self.validation.loss
                    record.bits_per_byte = self.validation.bits_per_byte
            if metrics is not None:
                self._log(metrics)
            save = last or bool(stop) or state.step % training.checkpoint.every_steps == 0
            if save:
                peak = self.memory.peak()
                if peak is not None:
                    record.peak_memory_bytes = max(peak, record.peak_memory_bytes or 0)
                elapsed = time.perf_counter() - started
                record.seconds += elapsed
                state.seconds, started = state.seconds + elapsed, time.perf_counter()
                self._save(phase, optimizer, parameters)
            log_time += time.perf_counter() - pause
            if stop and not (last and state.phase == len(self.phases) - 1):
                raise StoppedBySignal(f"stopped by {stop.name} after step {state.step}; its checkpoint is saved")
        following = self.phases[state.phase + 1 :]
        self._moments = moments_to_keep(moments_of(optimizer, parameters), following)
        self._inside = None
        self.reporter.note(self._phase_end(record))

    def _step(
        self,
        optimizer: AnyOptimizer,
        parameters: dict[str, torch.nn.Parameter],
        check: TrainingCheck,
        examples: PhaseExamples,
    ) -> tuple[float, float, int]:
        """One optimizer step: (mean loss of the tokens that count, gradient norm, tokens read)."""
        training, state = self.config.training, self.state
        # Dropout of any kind, and what an objective of the user's own draws, comes from the global generator.
        torch.manual_seed(seed_of(training.seed, "dropout", state.step))
        example = examples.next()
        count = example.n_targets  # before it moves to the device, which would have to be waited for
        if count == 0:
            raise RunError(f"step {state.step}: no token of the batch counts in the loss; raise batch_size or seq_len")
        example = example.to(self.device)
        total = torch.zeros((), device=self.device)
        micro_batches = list(example.micro_batches(training.micro_batch_size or len(example.targets)))
        for i, micro in enumerate(micro_batches):
            with autocast(self.device, self.compute_dtype):
                loss = self._of_phase[1].loss(self.rack, micro, 1.0 / count)
            total += loss.detach()
            if self._inside is not None and i == len(micro_batches) - 1:
                self._check_finite("the loss", float(total), "nothing was updated")
                self._inside.start()
            loss.backward()
        if self._inside is not None:
            loss_value, norm_value = float(total), self._inside.norm()
            if not check.done:
                check.after_backward(self._inside.seen)
            self._check_finite("the gradient norm", norm_value, "some parameters were updated and others not")
        else:
            if not check.done:
                check.after_backward({name for name, p in parameters.items() if p.grad is not None})
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
            loss_value, norm_value = float(total), float(norm)
            self._check_finite("the loss", loss_value, "nothing was updated")
            self._check_finite("the gradient norm", norm_value, "nothing was updated")
            if training.grad_clip is not None and norm_value > training.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(parameters.values(), training.grad_clip, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not check.done:
            check.after_step()
        return loss_value, norm_value, math.prod(example.reading.shape)

    @property
    def _away_on_disk(self) -> bool:
        """Whether what is away is in the checkpoint store; else it is in this machine's memory."""
        return self.store is not None and self.config.training.offload != "host"

    def _examples(self, phase: Phase) -> PhaseExamples:
        """The examples of what is left of ``phase``, its cache filled."""
        state = self.state
        if phase.examples is not None and not self.source.repeatable:
            raise UserError(
                "training.progressive.cache_activations: true needs batches that can be taken again; "
                "give a ProgressiveDataLoader, or set it to false"
            )
        if not phase.enters:
            return PhaseExamples(self._of_phase[0], phase, state.phase_step, state.step)
        compute = Boundaries(self.rack, self._of_phase[0], self.config, self.device, self.compute_dtype, self.offload)
        cached = None
        if phase.cached:
            cache, ids = self._cache(phase)
            count = cache.layout.count

            def progress(boundary: int, batch: int) -> None:
                stop_if_asked()
                self.reporter.work(f"activations at boundary {boundary}", batch - cache.layout.first, count)

            cached = compute.prepared(cache, ids, progress)
        return PhaseExamples(self._of_phase[0], phase, state.phase_step, state.step, compute, cached)

    def _cache_of(self, phase: Phase) -> ActivationCache:
        training = self.config.training
        assert phase.examples is not None
        layout = BoundaryLayout(
            training.batch_size, training.seq_len, self.rack.d_model, *phase.examples, training.cache.dtype
        )
        if self.cache is None:
            in_memory = training.cache.in_memory or self.run is None
            folder = Path() if self.run is None else self.run.cache
            self.cache = ActivationCache(folder, layout, limit_bytes=training.cache.max_bytes, in_memory=in_memory)
        assert self.cache.layout == layout, "phases that share a cache name the same examples"
        return self.cache

    def _cache(self, phase: Phase) -> tuple[ActivationCache, list[BoundaryId]]:
        """The cache, and the boundaries 1 … ``enters`` of the Rack as it is."""
        training, cache = self.config.training, self._cache_of(phase)
        assert phase.examples is not None
        layout = cache.layout
        upstream = [UpstreamPart(weights_sha256(self.rack.embedding.state_dict().items()), "full")]
        ids: list[BoundaryId] = []
        for stack in list(self.rack.stacks)[: phase.enters]:
            part = f"stack.{stack.stack_id}"
            on_disk = stack.stack_id in self.offload.away and self._away_on_disk
            assert self.store is not None or not on_disk
            sha256 = self.store.hash_of(part) if on_disk and self.store else weights_sha256(stack.own_tensors().items())
            adapters = tuple(
                (a.kind, a.rank, a.alpha, weights_sha256(stack.adapter_tensors(a.kind).items()))
                for a in phase.adapters
                if a.stack == stack.stack_id
            )
            upstream.append(UpstreamPart(sha256, phase.precision_of(stack.stack_id), adapters))
            key = cache_key(
                upstream=upstream, model={}, data_sha256=self.fingerprint, seed=training.seed, corruption={},
                layout=layout, compute_dtype=str(self.compute_dtype), device=self.device.type,
            )  # fmt: skip
            ids.append(BoundaryId(len(ids) + 1, key))
        return cache, ids

    def _recall(self, phase: Phase) -> None:
        """Brings back the Stacks that train in ``phase``, or change their storage, or are copied."""
        wanted = phase.trained_stacks | {new.source for new in phase.growth}
        for stack in self.rack.stacks:
            stored = PrecisionManager().precision_of(stack)
            if stack.stack_id in wanted or stored != phase.precision_of(stack.stack_id):
                self.offload.bring(stack)

    def _place(self, phase: Phase) -> None:
        """Puts the Rack on the device, and away what the phase does not need there."""
        away = phase.away(self.config.training.offload)
        if not self._away_on_disk and self.device.type == "cpu":
            away = set()  # this machine's memory is the device's
        for name, module in self.rack.parts().items():
            if not isinstance(module, Stack):
                waits = name == "embedding" and phase.cached and not self.rack.tied
                module.to("cpu" if waits else self.device)
                continue
            if module.stack_id not in away:
                self.offload.bring(module)
                module.to(self.device)
                continue
            for _, layer in linears(module):
                layer.adapters.to(self.device)
            if module.stack_id not in self.offload.away:
                self.offload.send(module, self._source_of(module))

    def _source_of(self, stack: Stack) -> Source:
        """Writes the tensors of ``stack`` where they wait, and says how they come back."""
        part, tensors = f"stack.{stack.stack_id}", stack.own_tensors()
        if self._away_on_disk:
            assert self.store is not None
            self.store.deposit(part, tensors)
            return partial(self.store.withdraw, part)
        waiting = {name: tensor.cpu() for name, tensor in tensors.items()}
        if self.device.type == "cuda":
            waiting = {name: tensor.pin_memory() for name, tensor in waiting.items()}
        return lambda: waiting

    def _objective_of(self, phase: Phase) -> Objective:
        """The objective of all that the Rack can do, as ``phase`` trains it."""
        return self.objectives[phase.objective]

    def _read_for(self, phase: Phase) -> None:
        """Examples, loss and the direction of attention are those of ``phase``."""
        objective = self.objectives[phase.objective].during(phase.noise)
        self._of_phase = self.source.during(objective), objective
        if phase.attention is not None:
            self.rack.set_attention_mode(phase.attention)

    def _store_and_grow(self, phase: Phase) -> dict[str, Any] | None:
        """Prepares the Rack; what storing its Stacks in another precision cost: validation loss before and after."""
        precisions = PrecisionManager()
        measured: dict[str, Any] = {}
        changes = {
            stack.stack_id: phase.precision_of(stack.stack_id)
            for stack in self.rack.stacks
            if precisions.precision_of(stack) != phase.precision_of(stack.stack_id)
        }
        before = self.state.records[-1].validation_loss if self.state.records else None
        earlier = self.phases[max(0, self.state.phase - 1)]
        if changes:
            self._read_for(earlier)
        if changes and before is None and self.validate is not None:
            before = self.validate(self.rack, self._objective_of(earlier)).loss

        def measure() -> None:
            after = None if self.validate is None else self.validate(self.rack, self._objective_of(earlier)).loss
            precision = {str(k): name for k, name in changes.items()}
            measured.update(precision=precision, validation_loss_before=before, validation_loss_after=after)
            if before is not None and after is not None:
                kinds = ", ".join(sorted(set(changes.values())))
                self.reporter.note(f"  trunk stored as {kinds}: validation loss {before:.4f} → {after:.4f}")

        self._saved_frozen -= prepare_phase(self.rack, phase, self.config, measure)
        return measured or None

    def weights_sha256(self) -> str:
        """Of all weights, those that are away too."""
        return weights_sha256((f"{part}/{name}", t.detach()) for part, name, t in all_tensors(self.rack, self.offload))

    def _check_finite(self, what: str, value: float, updated: str) -> None:
        if not math.isfinite(value):
            raise RunError(
                f"step {self.state.step}: {what} is {value}; {updated}, the last checkpoint is good; "
                "a lower training.optimizer.lr or a longer warm-up is the usual cure"
            )

    def _save(self, phase: Phase, optimizer: AnyOptimizer, parameters: dict[str, torch.nn.Parameter]) -> None:
        if self.store is None:
            return
        parts: dict[str, dict[str, torch.Tensor]] = {}
        away = {f"stack.{k}" for k in self.offload.away}
        deposited = away if self._away_on_disk else set()
        for part, name, tensor in self.rack.part_tensors() if deposited else all_tensors(self.rack, self.offload):
            if part not in deposited:
                parts.setdefault(part, {})[name] = tensor.detach()
        frozen = set(parts) - {name.partition("/")[0] for name in parameters}
        parts["optimizer"] = flatten(moments_of(optimizer, parameters))
        state = {"fingerprint": self.fingerprint, **self.identity, **structure(self.rack), "run": self.state.to_dict()}
        self.store.save(self.state.step, parts, state, unchanged=frozen & self._saved_frozen, deposited=deposited)
        self._saved_frozen = frozen

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Takes up weights, moments and counters; the Rack already has the right Stacks."""
        assert self.store is not None
        for stack in self.rack.stacks:
            if any(p.is_meta for p in stack.parameters()):
                part = f"stack.{stack.stack_id}"
                self.store.adopt(checkpoint, part)
                self.offload.send(stack, partial(self.store.withdraw, part))
        self._moments = unflatten(checkpoint.part("optimizer"))
        self.state = RunState.from_dict(checkpoint.state["run"])
        assert self.run is not None and self.store is not None
        # Checkpoints before metrics: killed in between, the run still has every line up to its newest checkpoint. The
        # summary first: a run that goes on from one of its steps is no longer complete.
        self.run.remove_summary()
        self.store.delete_after(self.state.step)
        self.run.truncate_metrics(self.state.step)

    def _log(self, metrics: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.append_metrics(metrics)
        self.tracker.log(metrics)

    def _describe(self, phase: Phase, record: PhaseRecord) -> str:
        total = sum(parameters_of(module) for module in self.rack.parts().values())
        how = f", from the cache at boundary {phase.enters}" if phase.cached else ""
        for new in phase.growth if len(phase.stacks) > 1 else ():
            source = f" of stack {new.source}" if new.source is not None else ""
            how += f", new stack {new.stack}: {new.init}{source}"
        if len(self.objectives) > 1:
            how += f", objective {self._of_phase[1].name}"
        return (
            f"phase {self.state.phase + 1}/{len(self.phases)}  {phase.name}: {len(phase.stacks)} stacks, "
            f"{record.trainable_parameters:,} of {total:,} parameters train, {phase.steps:,} steps{how}"
        )

    def _phase_end(self, record: PhaseRecord) -> str:
        text = f"  {record.name}: training loss {record.last_loss:.4f}"
        if record.validation_loss is not None:
            text += f", validation loss {record.validation_loss:.4f}"
        if record.bits_per_byte is not None:
            text += f" ({record.bits_per_byte:.4f} bits per byte)"
        return f"{text}, {record.seconds:.0f} s"
