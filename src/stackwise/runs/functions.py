"""``stackwise.train``, ``resume``, ``plan``, ``generate``: the commands of the same names, one call in Python each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackwise.config.base import StackWiseConfig, as_override
from stackwise.generation.filling import fill_texts, starting_ids
from stackwise.generation.sampling import row_seeds
from stackwise.generation.text import stream_text
from stackwise.kinds import OBJECTIVES
from stackwise.planning.plan import Plan, plan_run
from stackwise.runs.data import resolved
from stackwise.runs.initial import initial_stacks
from stackwise.runs.run import LoadedRun, load, resume_run, train_run
from stackwise.store.identity import check_same_run
from stackwise.store.rundir import RunDir
from stackwise.store.state import StepName
from stackwise.training.callbacks import Callbacks, Seen
from stackwise.training.progress import Reporter, console_reporter

AnyConfig = StackWiseConfig | Mapping[str, Any] | str | Path
"""A config, its settings as nested dicts, or the YAML file that they are in."""


def train(
    config: AnyConfig,
    out: str | Path,
    *,
    resume: bool = False,
    on_step: Seen | None = None,
    on_phase: Seen | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Trains what ``config`` says, on the text that it names, into the run directory ``out``.

    Args:
        resume: go on with the run in ``out``, if there is one, exactly as if it had not been interrupted.
        on_step, on_phase: called after each step and each phase (see ``stackwise.training.callbacks.Callbacks``).
        reporter: what is shown; default a bar on a terminal and in a notebook, lines elsewhere, on stderr.

    Returns:
        What ``summary.json`` holds: phases, validation, tokens, flops, weights_sha256 …

    Raises:
        UserError: a setting, the text or ``out`` cannot be used; ``resume`` finds a run with other settings.
        RunError: it failed while running. StoppedBySignal: stopped, with a checkpoint saved.
    """
    settings, callbacks = as_config(config), Callbacks.of(on_step, on_phase)
    reporter = reporter or console_reporter()
    if not (resume and RunDir(out).config.exists()):
        return train_run(settings, out, reporter, callbacks)
    check_same_run(RunDir.open(out), resolved(settings))
    return resume_run(out, reporter, callbacks=callbacks)


def resume(
    run: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    step: StepName | None = None,
    on_step: Seen | None = None,
    on_phase: Seen | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Goes on with the run directory ``run`` where it stopped, or from its checkpoint of ``step`` (``best``: the best).

    Args:
        changes: settings that hold from there on, by dotted key: ``{"training.optimizer.lr": 1e-4}``. ``stackwise
            resume --help`` lists what can change.
        on_step, on_phase, reporter: as for ``train``.

    Returns and raises as ``train``.
    """
    overrides = [as_override(key, value) for key, value in (changes or {}).items()]
    return resume_run(run, reporter or console_reporter(), step, overrides, callbacks=Callbacks.of(on_step, on_phase))


def plan(config: AnyConfig) -> Plan:
    """What the run of ``config`` takes on this machine: phases, memory, FLOPs, disk; ``to_dict`` gives it as JSON."""
    settings = as_config(config)
    return plan_run(settings, Path.cwd(), present=initial_stacks(settings))


def generate(run: LoadedRun | str | Path, prompt: str = "", tokens: int = 200, *, seed: int = 0, **options: Any) -> str:
    """``prompt`` and the text that the run writes after it, of ``tokens`` tokens at most.

    Args:
        run: a run directory, or what ``stackwise.load`` gave.
        options: as the command's: temperature (0.8), top_p; of clm also top_k, min_p, stop (texts that end it); of
            diffusion also order, steps, threshold, guidance, and template, the text with gaps, in place of a prompt.
    """
    loaded = run if isinstance(run, LoadedRun) else load(run)
    rack, tokenizer, config, (seed,) = loaded.rack, loaded.tokenizer, loaded.config, row_seeds(seed, 1)
    options = {"temperature": 0.8, **options}
    if OBJECTIVES[config.training.objective].sampler != "filling":
        return prompt + "".join(stream_text(rack, tokenizer, config, prompt, tokens, seed=seed, **options))
    start = starting_ids(tokenizer, prompt, tokens, options.pop("template", None))
    for (text,) in fill_texts(rack, tokenizer, config, [start], seed=seed, **options):
        last = text
    return last


def as_config(config: AnyConfig) -> StackWiseConfig:
    """ConfigError says what is wrong."""
    if isinstance(config, StackWiseConfig):
        return config
    if isinstance(config, str | Path):
        return StackWiseConfig.from_yaml(config)
    return StackWiseConfig.from_dict(dict(config))
