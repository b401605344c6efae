"""A run that goes on in a folder of its own, with a larger budget: ``stackwise train --extend RUN``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import load_tokenizer
from stackwise.errors import UserError
from stackwise.files import new_folder, write_text_atomic
from stackwise.planning.plan import plan_phases
from stackwise.runs.initial import initial_stacks, run_and_step
from stackwise.runs.run import checkpoint_to_go_on_from, resume_run, vocab_size_of
from stackwise.runs.steering import Course
from stackwise.signals import stoppable
from stackwise.store.checkpoints import CheckpointStore
from stackwise.store.identity import check_tokenizer
from stackwise.store.origin import origin_of
from stackwise.store.rundir import RunDir
from stackwise.training.callbacks import NO_CALLBACKS, Callbacks
from stackwise.training.progress import Reporter


def extend_run(
    name: str | Path,
    out: str | Path,
    overrides: Sequence[str],
    reporter: Reporter,
    *,
    trust_paths: bool = False,
    callbacks: Callbacks = NO_CALLBACKS,
) -> dict[str, Any]:
    """Goes on with a copy of a run, which stays as it is; returns the summary of the copy.

    Weights, moments, counters and the place in the data are carried over: the copy ends as the run would have ended,
    had ``resume`` been given the same settings.

    Args:
        name: the run, or ``RUN@STEP`` for the checkpoint of a step of it.
        out: the new run, which is there whole, the changed settings in it, before it trains.
        overrides: ``key.path=value`` settings; the budget, for a run that is complete.

    Raises:
        UserError: a setting cannot change in mid-run, or nothing changes, or ``out`` is taken.
    """
    path, step = run_and_step(name)
    run, out = RunDir.open(path), Path(out)
    config = StackWiseConfig.from_yaml(run.config)
    if not CheckpointStore(run.checkpoints).has_any():
        raise UserError(f"{path}: it has no checkpoint yet; stackwise resume {path} continues its training")
    with stoppable(f"nothing is in {out} yet"):
        checkpoint = checkpoint_to_go_on_from(run, config, step)
        assert checkpoint is not None
        course = Course.of(run, config, checkpoint, overrides)
        if course.change is None:
            raise UserError("--extend: no setting changes; give the larger budget (training.max_steps=…)")
        present = initial_stacks(course.config)
        given, tokenizer = course.given(present), load_tokenizer(run.tokenizer)
        check_tokenizer(checkpoint, tokenizer, run.tokenizer)
        phases = plan_phases(course.config, vocab_size_of(course.config, tokenizer), present, given=given).phases
        course.check(phases)
        with new_folder(out) as scratch:
            copy = RunDir(scratch)
            CheckpointStore(run.checkpoints).copy(checkpoint, copy.checkpoints)
            tokenizer.save(copy.tokenizer)
            for metrics in run.read_metrics():
                if metrics["step"] <= checkpoint.step:
                    copy.append_metrics(metrics)
            course.recorded(phases).write(copy)
            origin = origin_of(run)
            if origin is not None:
                write_text_atomic(copy.origin, origin)
            write_text_atomic(copy.config, course.config.to_yaml())
    longer = ""
    if len(given) < len(phases):
        longer = f"; its phase '{phases[len(given)].name}' then has {phases[len(given)].steps:,} steps"
    reporter.note(f"{out} goes on from step {checkpoint.step:,} of {path}{longer}")
    return resume_run(out, reporter, trust_paths=trust_paths, callbacks=callbacks)
