"""A run from config to summary: prepare the data, plan the phases, train them, and write what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.data.cache import cache_root
from stackwise.data.labelled import prepare_labelled
from stackwise.data.store import prepare
from stackwise.data.tokenizers import Tokenizer, load_tokenizer
from stackwise.errors import ConfigError, RunError, UserError, out_of_memory
from stackwise.files import new_folder, write_text_atomic
from stackwise.growth.adapters import plain_rack
from stackwise.kinds import CORPORA, OBJECTIVES
from stackwise.model.architecture import Rack, create_rack_from_config, create_stack_from_config
from stackwise.objectives import Objective, create_objectives
from stackwise.objectives.scoring import Validation
from stackwise.ops.precision import resolve_device
from stackwise.planning.plan import Planned
from stackwise.runs.build import create_loop, train_to_summary
from stackwise.runs.data import Rows, RunData, Text, resolved
from stackwise.runs.initial import initial_checkpoint, initial_rack, resolve_initial
from stackwise.runs.limits import NO_LIMITS, Guard, Limits
from stackwise.runs.steering import Course
from stackwise.signals import stop_if_asked, stoppable
from stackwise.store.changes import Changes
from stackwise.store.checkpoints import Checkpoint, CheckpointStore
from stackwise.store.identity import check_config, check_data, check_tokenizer, identity, run_fingerprint
from stackwise.store.origin import check_origin, signature
from stackwise.store.rundir import RunDir
from stackwise.store.state import RunState, StepName, load_checkpoint, read_summary
from stackwise.store.structure import rack_of_checkpoint
from stackwise.training.callbacks import NO_CALLBACKS, Callbacks
from stackwise.training.memory import PeakMemory, return_freed_memory
from stackwise.training.progress import Reporter

TEXT = ("data.path", "data.sources", "data.validation_path", "data.cache_dir")
"""Settings that name what preparing the text of a run reads and writes."""

OUTSIDE = (*TEXT, "data.tokenizer.path", "model.initial", "model.tokenizer_embedding.family")
"""And what else going on with its training may read."""

IMPORTED = "imported"
"""The fingerprint in the checkpoint of a run that was imported and not trained."""


@dataclass(frozen=True)
class LoadedRun:
    """A trained Rack in evaluation mode, its config, and the checkpoint that it comes from.

    ``known_tokenizer`` is None where a trainer was given none.
    """

    rack: Rack
    known_tokenizer: Tokenizer | None
    config: StackWiseConfig
    checkpoint: Checkpoint

    @property
    def tokenizer(self) -> Tokenizer:
        """UserError where the run has none."""
        if self.known_tokenizer is None:
            raise UserError("the run has no tokenizer: give one to the trainer (tokenizer=…) for what reads text")
        return self.known_tokenizer

    @property
    def step(self) -> int:
        return self.checkpoint.step


def load(path: str | Path, step: StepName | None = None, device: str | torch.device = "cpu") -> LoadedRun:
    """The newest checkpoint of the run in ``path``, or that of ``step``: a number, or ``best``.

    Raises:
        UserError: no run is there, it has no such checkpoint, or its config or tokenizer is not the checkpoint's.
        RunError: the checkpoint is damaged.
    """
    run = RunDir.open(path)
    config = StackWiseConfig.from_yaml(run.config)
    store = CheckpointStore(run.checkpoints)
    if not store.has_any():
        raise UserError(f"{path}: it has no checkpoint yet; stackwise resume {path} continues its training")
    checkpoint = load_checkpoint(store, step)
    if step is None:
        _check_against_summary(run, checkpoint.step)
    config = Changes.of(run).config_of(checkpoint.step, config)
    check_config(checkpoint, config, run.config)
    tokenizer = None
    if config.data.source != "loader" or run.tokenizer.exists():
        tokenizer = load_tokenizer(run.tokenizer)
        check_tokenizer(checkpoint, tokenizer, run.tokenizer)
    rack = rack_of_checkpoint(checkpoint, config, vocab_size_of(config, tokenizer))
    return LoadedRun(rack.to(device).eval().requires_grad_(False), tokenizer, config, checkpoint)


def _check_against_summary(run: RunDir, newest: int) -> None:
    """RunError when the newest checkpoint is not the one that the training ended with."""
    end = run.steps_of_summary()
    if end is not None and newest < end:
        raise RunError(
            f"{run.path}: summary.json belongs to step {end}, but the newest checkpoint to step {newest}: the last one "
            f"is lost; --step {newest} uses this one, stackwise resume {run.path} --step {newest} continues from it"
        )


def vocab_size_of(config: StackWiseConfig, tokenizer: Tokenizer | None) -> int:
    """Rows of the embedding: the config's, else the tokenizer's. ConfigError where the config's are too few."""
    wanted = config.model.vocab_size
    if tokenizer is None:
        assert wanted is not None, "a trainer writes it"
        return wanted
    if wanted is not None and wanted < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {wanted} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            "set it to null (the tokenizer's) or higher"
        )
    return wanted or tokenizer.vocab_size


def train_run(
    config: StackWiseConfig,
    out: str | Path,
    reporter: Reporter,
    callbacks: Callbacks = NO_CALLBACKS,
    limits: Limits = NO_LIMITS,
) -> dict[str, Any]:
    """Trains ``config`` into the new run directory ``out``; returns its summary.

    Raises:
        UserError: a setting cannot be used, or by its plan the run does not fit ``limits`` or this machine.
    """
    resolve_device(config.training.device)  # before anything is written
    config = resolve_initial(resolved(config))
    RunDir(out).refuse_if_taken()
    guard = Guard(config, out, limits)
    guard.plan()
    with stoppable(_prospect(out)), RunDir.creating(out, config.to_yaml(), signature(config)) as run:
        try:
            return _go(run, config, reporter, None, callbacks, guard)
        except UserError:
            if not run.checkpoints.exists():
                run.discard()  # nothing was trained: the same command, corrected, may use the same folder
            raise


def resume_run(
    path: str | Path,
    reporter: Reporter,
    step: StepName | None = None,
    overrides: Sequence[str] = (),
    *,
    trust_paths: bool = False,
    callbacks: Callbacks = NO_CALLBACKS,
) -> dict[str, Any]:
    """Goes on with a run from its newest checkpoint, or from that of ``step``; from the start when it has none.

    Args:
        overrides: ``key.path=value`` settings that hold from the next step on (``config.section.Section.steerable``).
        trust_paths: what the config of a run that was not begun here names outside its folder may be used, from now on.
    """
    run = RunDir.open(path)
    if run.is_complete() and step is None and not overrides:
        _check_against_summary(run, load_checkpoint(CheckpointStore(run.checkpoints)).step)
        reporter.note(f"{path} is complete; nothing to do")
        return read_summary(run)
    with stoppable(_prospect(path)), run.lock():
        config = StackWiseConfig.from_yaml(run.config)
        own = signature(config)
        if trust_paths and own is not None:
            write_text_atomic(run.origin, own)
        if not trust_paths:
            check_origin(run, config, OUTSIDE, "")
        return _go(run, config, reporter, step, callbacks, None, overrides)


def _prospect(path: str | Path) -> str:
    return f"stackwise resume {path} continues from the last checkpoint, or from the start"


def write_untrained_run(
    out: Path,
    config: StackWiseConfig,
    tokenizer: Tokenizer,
    parts: Mapping[str, Mapping[str, Tensor]],
    stacks: Sequence[int],
    data: dict[str, str] | None = None,
    origin: str | None = None,
) -> None:
    """Writes weights that came from elsewhere as the new run ``out``, whole or not at all.

    Args:
        data: what a checkpoint keeps of the text that they were trained on, where it is the one that ``config`` names.
        origin: what ``RUN/.origin`` holds; None leaves the run unsigned.

    Raises:
        UserError: something is there. RunError: it cannot be written.
    """
    with new_folder(out) as scratch:
        run = RunDir(scratch)
        write_text_atomic(run.config, config.to_yaml())
        if origin is not None:
            write_text_atomic(run.origin, origin)
        tokenizer.save(run.tokenizer)
        whose = identity(config, tokenizer, None) | {"data": data}
        state = {"fingerprint": IMPORTED, **whose, "stacks": list(stacks), "run": RunState().to_dict()}
        CheckpointStore(run.checkpoints).save(0, parts, state)


def run_data(run: RunDir, config: StackWiseConfig, checkpoint: Checkpoint | None, reporter: Reporter) -> RunData:
    """The text or the rows that ``config`` names, by the tokenizer that the run keeps, if it has one yet.

    Raises:
        UserError: they are not those that ``checkpoint`` was trained on, or cannot be read.
    """
    tokenizer = load_tokenizer(run.tokenizer) if run.tokenizer.exists() else None
    if checkpoint is not None and tokenizer is not None:
        check_tokenizer(checkpoint, tokenizer, run.tokenizer)
    data: RunData
    if CORPORA[config.data.source].labelled:
        names = config.training.classification.names
        memo = cache_root(config.data.cache_dir) / "hashes"
        seq_len = config.training.seq_len
        data = Rows(
            prepare_labelled(
                config.data, seq_len, names=names, memo=memo, progress=reporter.work, tokenizer=tokenizer
            ),
            config,
        )  # fmt: skip
    else:
        data = Text(
            prepare(
                config.data,
                need_mask=config.training.needs_mask,
                progress=reporter.work,
                tokenizer=tokenizer,
                check_key=None if checkpoint is None else partial(check_data, checkpoint, config),
            ),
            config,
        )
    if checkpoint is not None:
        check_data(checkpoint, config, data.prepared.key, data.prepared.sha256)
    return data


def _go(
    run: RunDir,
    config: StackWiseConfig,
    reporter: Reporter,
    step: StepName | None,
    callbacks: Callbacks,
    guard: Guard | None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    try:
        stop_if_asked()
        checkpoint = checkpoint_to_go_on_from(run, config, step)
        course = Course.of(run, config, checkpoint, overrides)
        guard = guard or Guard(course.config, run.path, going_on=checkpoint is not None)
        return _train(course, checkpoint, reporter, callbacks, guard)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    finally:
        reporter.close()
    # Here, and not above, where the error still holds all that was in memory.
    store = CheckpointStore(run.checkpoints)
    kept = f"the checkpoint of step {load_checkpoint(store).step}" if store.has_any() else "no checkpoint yet"
    less = "out of memory" if guard is None else guard.out_of_memory()
    raise RunError(f"{less}; {run.path} has {kept}: stackwise resume {run.path} continues it")


def _train(
    course: Course, checkpoint: Checkpoint | None, reporter: Reporter, callbacks: Callbacks, guard: Guard
) -> dict[str, Any]:
    run, config, training = course.run, course.config, course.config.training
    found = run_data(run, config, checkpoint, reporter)
    data = found.prepared
    reporter.note(f"data: {found.described()}")
    objectives = create_objectives(config, data.tokenizer)
    if not run.tokenizer.exists():
        data.tokenizer.save(run.tokenizer)
        if data.mask_added:
            masks = next(name for name in training.objectives if OBJECTIVES[name].needs_mask)
            reporter.note(
                f"the tokenizer had no mask token, which {masks} needs: one is added, with the id "
                f"{data.tokenizer.mask_id}, and a row to the embedding"
            )
    source = found.source(objectives[training.objective])
    initial = initial_checkpoint(config)
    planned = guard.plan(vocab_size_of(config, data.tokenizer), course.given(guard.present))
    course.check(planned.phases)
    for name, noise in dict.fromkeys((phase.objective, phase.noise) for phase in planned.phases):
        found.check(objectives[name].during(noise))
    stop_if_asked()
    if planned.device.type == "cpu" and config.tight_allocator:
        return_freed_memory()
    memory = PeakMemory(planned.device)
    if checkpoint is None:
        if initial is not None:
            rack = plain_rack(initial_rack(initial, config, planned.vocab_size))
        else:
            rack = create_rack_from_config(config, n_stacks=0, vocab_size=planned.vocab_size)
            if not planned.phases[0].growth:
                rack.stacks.extend(create_stack_from_config(k, config) for k in planned.phases[0].stacks)
    else:
        rack = rack_to_go_on_with(run, checkpoint, config, planned)
        reporter.note(f"going on from the checkpoint of step {checkpoint.step}")

    def score(rack: Rack, objective: Objective) -> Validation:
        return found.score(rack, objective, planned.compute_dtype)

    about = {"fingerprint": run_fingerprint(config, data), **identity(config, data.tokenizer, data)}
    loop = create_loop(
        config, rack, planned, source, objectives, reporter, memory,
        validate=score, run=run, identity=about, checkpoint=checkpoint, callbacks=callbacks,
    )  # fmt: skip
    course.take(loop.state, planned.phases, reporter)
    data.verify()
    return train_to_summary(loop, run)


def checkpoint_to_go_on_from(run: RunDir, config: StackWiseConfig, step: StepName | None = None) -> Checkpoint | None:
    """The checkpoint of ``step``, or the newest; ``None`` where a run without one begins.

    Raises:
        UserError: the checkpoint belongs to another config, or to a run that was not trained here.
        RunError: it is damaged or lost.
    """
    store, settings = CheckpointStore(run.checkpoints), config.training.checkpoint
    if step is None and not store.has_any():
        _refuse_if_lost(run, settings.every_steps)
        run.remove_summary()
        run.truncate_metrics(0)
        return None
    checkpoint = load_checkpoint(store, step)
    if checkpoint.state["fingerprint"] == IMPORTED:
        raise UserError(f"{run.path} was imported and not trained; use train CONFIG --from {run.path} --out RUN")
    check_config(checkpoint, Changes.of(run).config_of(checkpoint.step, config), run.config)
    return checkpoint


def rack_to_go_on_with(run: RunDir, checkpoint: Checkpoint, config: StackWiseConfig, planned: Planned) -> Rack:
    """The Rack of ``checkpoint``; the Stacks that its phase leaves in the store stay there, verified."""
    phase = planned.phases[min(checkpoint.state["run"]["phase"], len(planned.phases) - 1)]
    offloaded = phase.offloaded(config.training.offload) & set(checkpoint.state["stacks"])
    CheckpointStore(run.checkpoints).verify(checkpoint, [f"stack.{k}" for k in sorted(offloaded)])
    return rack_of_checkpoint(checkpoint, config, planned.vocab_size, offloaded)


def _refuse_if_lost(run: RunDir, every_steps: int) -> None:
    """RunError when a run without a checkpoint has trained beyond its first one: nothing is begun anew over it."""
    records = run.read_metrics()
    last = records[-1] if records else {"step": 0}
    if run.is_complete() or last["step"] > every_steps or last.get("phase") != (records or [last])[0].get("phase"):
        raise RunError(
            f"{run.path}: its checkpoints are lost: it has trained to step {last['step']}, but {run.checkpoints} holds "
            "no manifest (step-*.json); put them back, or start a new run in another folder"
        )
