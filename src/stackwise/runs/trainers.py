"""The two front doors of the loop for people with a data loader of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import UserError
from stackwise.growth.adapters import plain_rack
from stackwise.model.architecture import Rack, rack_spec_from_config
from stackwise.objectives import Objective, create_objective
from stackwise.ops.precision import resolve_device
from stackwise.planning.plan import Planned, plan_phases
from stackwise.runs.build import create_loop, train_to_summary
from stackwise.runs.builder import ProgressiveRackBuilder
from stackwise.runs.initial import initial_checkpoint, initial_rack
from stackwise.runs.run import checkpoint_to_go_on_from, rack_to_go_on_with
from stackwise.runs.validation import ValidationData, scorer
from stackwise.signals import stoppable
from stackwise.store.checkpoints import Checkpoint
from stackwise.store.identity import check_same_run, identity
from stackwise.store.origin import signature
from stackwise.store.rundir import RunDir
from stackwise.store.structure import fill_rack
from stackwise.training.callbacks import Callbacks, Seen
from stackwise.training.memory import PeakMemory, return_freed_memory
from stackwise.training.progress import Reporter, SilentReporter
from stackwise.training.sources import IterableSource, ProgressiveDataLoader, TokenSource, peek_shape

GoOn = Callable[[RunDir, Checkpoint, StackWiseConfig, Planned], Rack]
"""Gives the Rack of a checkpoint."""


class _Trainer:
    """What both share.

    Args:
        config: ``training`` is what is read; shapes come from the Rack (or its builder), batches from the data loader.
        tokenizer: needed by mlm, which must know the mask token; a run directory keeps it, for what reads text.
        reporter: what is shown; default nothing.
        on_step, on_phase: called after each step and each phase (see ``Callbacks``).
    """

    def __init__(
        self,
        config: StackWiseConfig,
        *,
        tokenizer: Tokenizer | None = None,
        reporter: Reporter | None = None,
        on_step: Seen | None = None,
        on_phase: Seen | None = None,
    ) -> None:
        self.config, self.reporter, self.tokenizer = config, reporter or SilentReporter(), tokenizer
        self.objective: Objective = create_objective(config, tokenizer)
        self.callbacks = Callbacks.of(on_step, on_phase)

    def _train(
        self,
        config: StackWiseConfig,
        rack: Rack,
        dataloader: ProgressiveDataLoader | Iterable[Any],
        validation: ValidationData | None,
        out: str | Path | None,
        resume: bool,
        go_on: GoOn,
    ) -> dict[str, Any]:
        if isinstance(dataloader, ProgressiveDataLoader):
            source: TokenSource | IterableSource = TokenSource(dataloader, self.objective)
            shape = dataloader.batches.batch_size, dataloader.batches.seq_len
        else:
            source = IterableSource(dataloader, self.objective, config.training.seed)
            shape = peek_shape(dataloader)
        config = config.changed({"training.batch_size": shape[0], "training.seq_len": shape[1]})
        if out is not None:
            config = _of_a_run(config, rack)
        device = resolve_device(config.training.device)
        if device.type == "cpu" and config.tight_allocator:
            return_freed_memory()
        memory = PeakMemory(device)
        present = tuple(stack.stack_id for stack in rack.stacks)
        planned = plan_phases(config, rack.vocab_size, present, rack=rack)
        with _run_directory(out, config, resume) as run:
            about = self._identity(config, dataloader) if run is not None else None
            checkpoint = None if run is None else checkpoint_to_go_on_from(run, config)
            if run is not None and self.tokenizer is not None and not run.tokenizer.exists():
                self.tokenizer.save(run.tokenizer)
            if run is not None and about is not None and checkpoint is not None:
                _check_identity(checkpoint, about, run)
                rack = go_on(run, checkpoint, config, planned)
            loop = create_loop(
                config, rack, planned, source, {config.training.objective: self.objective}, self.reporter, memory,
                validate=scorer(validation, config, planned.compute_dtype), run=run, identity=about,
                checkpoint=checkpoint, callbacks=self.callbacks,
            )  # fmt: skip
            try:
                summary = train_to_summary(loop, run)
            finally:
                self.reporter.close()
        loop.context.placement.reunite()
        state = loop.state
        return {**summary, "steps": state.step, "final_loss": state.records[-1].last_loss}

    def _identity(self, config: StackWiseConfig, dataloader: ProgressiveDataLoader | Iterable[Any]) -> dict[str, Any]:
        """What checkpoints keep of the run: of a token array its hash; of other batches nothing can be told."""
        about = identity(config, self.tokenizer, None)
        if not isinstance(dataloader, ProgressiveDataLoader):
            return {"fingerprint": "", **about}
        sha256 = _sha256(dataloader.batches.tokens)
        return {"fingerprint": sha256, **about, "data": {"key": "tokens", "sha256": sha256}}


def _sha256(tokens: np.ndarray) -> str:
    digest = hashlib.sha256(f"{tokens.dtype.str} {tokens.shape}".encode())
    for i in range(0, len(tokens), 1 << 22):
        digest.update(tokens[i : i + (1 << 22)].tobytes())
    return digest.hexdigest()


def _check_identity(checkpoint: Checkpoint, about: dict[str, Any], run: RunDir) -> None:
    if checkpoint.state.get("data") != about["data"]:
        raise UserError(f"{run.path}: the run there was trained on other tokens than the data loader's; give the same")
    if checkpoint.state.get("tokenizer") != about["tokenizer"]:
        raise UserError(f"{run.path}: the run there was trained with another tokenizer, or with none; give the same")


def _of_a_run(config: StackWiseConfig, rack: Rack) -> StackWiseConfig:
    """What a run directory keeps as its config, from which ``stackwise.load`` makes the Rack again.

    Raises:
        UserError: ``rack`` is not the one that ``config.model`` describes.
    """
    size = config.model.vocab_size or rack.vocab_size
    config = StackWiseConfig.from_dict({**config.to_dict(), "data": {"source": "loader"}})
    config = config.changed({"model.vocab_size": size})
    described = rack_spec_from_config(config, [stack.stack_id for stack in rack.stacks], rack.vocab_size)
    if rack.spec != described:
        what = next(f.name for f in fields(described) if getattr(rack.spec, f.name) != getattr(described, f.name))
        raise UserError(
            f"the Rack is not the one that config.model describes: its {what} differs; a run directory is loaded by "
            "its config: make the Rack by ProgressiveRackBuilder(config) or create_rack_from_config(config), "
            "or give no out"
        )
    return config


@contextmanager
def _run_directory(out: str | Path | None, config: StackWiseConfig, resume: bool) -> Iterator[RunDir | None]:
    """The run in ``out``, held for this process alone: a new one, or where ``resume`` is true the one that is there.

    Raises:
        UserError: something else is there, or a run of another config.
    """
    if out is None:
        if resume:
            raise UserError("resume: true, but out names no run directory to continue")
        yield None
    elif resume and RunDir(out).config.exists():
        run = RunDir.open(out)
        with stoppable(), run.lock():
            check_same_run(run, config)
            yield run
    else:
        with stoppable(), RunDir.creating(out, config.to_yaml(), signature(config)) as run:
            try:
                yield run
            except UserError:
                if not run.checkpoints.exists():
                    run.discard()  # nothing was trained: the same call, corrected, may use the same folder
                raise


class ProgressiveTrainer(_Trainer):
    """Grows a Rack Stack by Stack, as ``training.progressive`` says."""

    def train_rack(
        self,
        rack_builder: ProgressiveRackBuilder,
        dataloader: ProgressiveDataLoader | Iterable[Any],
        target_stacks: int | None = None,
        *,
        validation: ValidationData | None = None,
        out: str | Path | None = None,
        resume: bool = False,
    ) -> dict[str, Any]:
        """Adds and trains Stacks until ``rack_builder.rack`` has ``target_stacks`` (default: the config's).

        Stacks that the builder has already are the first trunk. The budget (``training.max_steps`` …) is that of the
        whole call.

        Args:
            validation: tokens or batches that are scored at the end of each phase, and as ``training.evaluation`` says.
            out: the run directory: config, metrics, checkpoints, summary; ``stackwise.load(out)`` reads it.
            resume: go on with the run in ``out``, if there is one, exactly as if it had not been interrupted; the
                builder is as it was at its start.

        Returns:
            What ``summary.json`` holds (phases, validation, tokens, flops, weights_sha256 …), and ``steps``,
            ``final_loss`` and ``rack``.
        """
        target = target_stacks or self.config.target_stacks
        config = self.config.changed(
            {
                "training.strategy": "progressive",
                "training.progressive.target_stacks": target,
                "training.progressive.building_mode": rack_builder.building_mode,
            }
        )
        config = StackWiseConfig.from_dict({**config.to_dict(), "model": rack_builder.config.to_dict()["model"]})

        def go_on(run: RunDir, checkpoint: Checkpoint, config: StackWiseConfig, planned: Planned) -> Rack:
            rack_builder.rack = rack_to_go_on_with(run, checkpoint, config, planned)
            return rack_builder.rack

        results = self._train(config, rack_builder.rack, dataloader, validation, out, resume, go_on)
        return {**results, "rack": rack_builder.get_rack_info()}


class ArchitectureTrainer(_Trainer):
    """Trains all of a given Rack, end to end."""

    def train_architecture(
        self,
        rack: Rack,
        dataloader: ProgressiveDataLoader | Iterable[Any],
        *,
        validation: ValidationData | None = None,
        out: str | Path | None = None,
        resume: bool = False,
    ) -> dict[str, Any]:
        """Trains all of ``rack`` for the budget; with ``model.initial``, from the weights of the run that it names.

        Args:
            validation, out: as for ``ProgressiveTrainer.train_rack``. A run directory needs the Rack that
                ``config.model`` describes.
            resume: go on with the run in ``out``, if there is one; ``rack`` gets the weights of its checkpoint.

        Returns:
            What ``summary.json`` holds, and ``steps`` and ``final_loss``.
        """
        config = self.config.changed({"training.strategy": "end_to_end", "model.tie_embeddings": rack.tied})
        initial = initial_checkpoint(config)
        if initial is not None:
            given = plain_rack(initial_rack(initial, config, rack.vocab_size))
            if given.spec != rack.spec:
                raise UserError(
                    f"model.initial: the Rack has other Stacks or Blocks than the run that {config.model.initial!r} "
                    "names; make it by ProgressiveRackBuilder(config)"
                )
            rack.load_state_dict(given.state_dict())

        def go_on(run: RunDir, checkpoint: Checkpoint, config: StackWiseConfig, planned: Planned) -> Rack:
            fill_rack(rack, checkpoint)
            return rack

        return self._train(config, rack, dataloader, validation, out, resume, go_on)
