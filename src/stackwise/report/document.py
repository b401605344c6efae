"""The report: one HTML file of one run, of several side by side, or of a comparison of recipes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stackwise import __version__
from stackwise.config.base import StackWiseConfig
from stackwise.config.yaml_io import dump
from stackwise.errors import UserError
from stackwise.files import reason, write_atomic
from stackwise.report import comparison, run_charts
from stackwise.report.evaluation import evaluation_section, scores_of
from stackwise.report.facts import Facts, read_facts
from stackwise.report.film import SCRIPT, film, film_of
from stackwise.report.html import Html, element, figures, joined, page, section, table
from stackwise.report.picture import draw
from stackwise.runs.compare import RESULT
from stackwise.runs.run import load
from stackwise.units import duration, size

MAX_BYTES = 2_000_000
"""Of a report."""


def write_report(paths: Sequence[str | Path], out: str | Path) -> Path:
    """Writes the report of the runs, or folders of comparisons, in ``paths`` as the file ``out``.

    Where ``out`` ends in ``.svg`` that is the picture of one run alone.

    Raises:
        UserError: something is neither, or the file cannot be written. RunError: a file of a run is damaged.
    """
    out = Path(out)
    if out.suffix == ".svg" and len(paths) > 1:
        raise UserError(f"{out}: a picture is of one run; name one, or a file that ends in .html")
    content = (draw(paths[0]).svg if out.suffix == ".svg" else report(paths)).encode()
    if len(content) > MAX_BYTES:
        raise UserError(f"a report of {len(paths)} runs would take {len(content):,} bytes; give fewer runs at a time")
    try:
        write_atomic(out, [content])
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {reason(error)}") from None
    return out


def report(paths: Sequence[str | Path]) -> str:
    """The page, as ``write_report`` writes it."""
    folders = [Path(path) for path in paths]
    compared = [folder for folder in folders if (folder / RESULT).is_file()]
    names = _names([folder for folder in folders if folder not in compared])
    runs = [read_facts(folder, name) for folder, name in names.items()]
    heading = len(folders) > 1
    parts = [_comparison(folder, element("h2", folder.name) if heading else None) for folder in compared]
    if len(runs) > 1:
        parts.append(_side_by_side(runs))
    parts += [_run(facts, element("h2", facts.name) if heading else None) for facts in runs]
    title = " · ".join([*(folder.name for folder in compared), *names.values()])
    foot = element("p", f"Made by stackwise report, version {__version__}.", class_="quiet")
    return page(title, element("h1", title), *parts, foot, SCRIPT if any("film" in part for part in parts) else "")


def _names(folders: Iterable[Path]) -> dict[Path, str]:
    """The last part of each path, with more of them where that is not unique."""
    paths = {folder: folder.resolve().parts for folder in folders}
    count = 1
    while len({parts[-count:] for parts in paths.values()}) < len(set(paths.values())):
        count += 1
    return {folder: "/".join(parts[-count:]) for folder, parts in paths.items()}


def _tiles(pairs: Iterable[tuple[str, str]]) -> Html:
    tiles = (element("div", element("b", value), element("span", name), class_="tile") for name, value in pairs)
    return element("div", *tiles, class_="tiles")


def _run(facts: Facts, heading: Html | None) -> Html:
    rack, memory = run_charts.rack_as_it_grew(facts), run_charts.memory(facts)
    pictures = [run_charts.losses(facts, "flops"), run_charts.losses(facts, "tokens"), rack, memory]
    pictures += run_charts.over_steps(facts)
    unplanned = f"It could not be planned here: {facts.unplanned}" if facts.unplanned else None
    curve = None if facts.evaluation is None else run_charts.noise_levels(facts.evaluation.points)
    return joined(
        [
            heading,
            element("p", _state(facts), class_="lead"),
            _tiles(_numbers(facts)),
            figures(pictures),
            element("p", unplanned, class_="note") if unplanned else None,
            section("Phases", _phases(facts)),
            section("Evaluation", evaluation_section(facts.evaluation), figures([curve]) if curve else None),
            section("Denoising", film(film_of(load(facts.run.path))) if facts.summary else None),
            section("Samples while it trained", _samples(facts)),
            section("Settings", _settings(facts.config)),
        ]
    )


def _state(facts: Facts) -> str:
    last = facts.lines[-1]
    size_of_it = f"{facts.config.model.d_model} wide, {facts.config.target_stacks} Stacks"
    what = f"A Rack, {size_of_it}, trained for {facts.objectives} on {_text(facts.config)}"
    if facts.summary is None:
        return f"{what}. The run is not complete: it has reached step {last.step:,}, in the phase {last.phase}."
    return f"{what}: {len(facts.records)} phases, {sum(record['steps'] for record in facts.records):,} steps."


def _text(config: StackWiseConfig) -> str:
    entries = config.data.sources or (config.data,)
    return " + ".join(
        entry.source if entry.path is None else entry.path if isinstance(entry.path, str) else ", ".join(entry.path)
        for entry in entries
    )


def _numbers(facts: Facts) -> list[tuple[str, str]]:
    summary, totals, last = facts.summary, facts.totals, facts.lines[-1]
    if summary is None or totals is None:
        return [("step", f"{last.step:,}"), ("training loss", f"{last.loss:.4f}"), ("FLOPs", f"{last.flops:.3g}")]
    trained = max(record["trainable_parameters"] for record in facts.records)
    return [
        *scores_of(summary),
        ("most parameters at once", f"{trained:,}"),
        ("tokens", f"{totals.tokens:,}"),
        ("FLOPs", f"{totals.flops:.3g}"),
        ("time", duration(totals.wall_seconds)),
        ("peak memory", size(totals.peak_memory_bytes)),
    ]


def _phases(facts: Facts) -> Html:
    planned = facts.planned
    rows = []
    for k, record in enumerate(facts.records):
        phase = planned.phases[k] if planned is not None else None
        rows.append(
            [
                f"{k + 1}. {record['name']}",
                "–" if phase is None else run_charts.what_trains(phase),
                f"{record['steps']:,}",
                f"{record['trainable_parameters']:,}",
                f"{record['flops']:.3g}",
                duration(record["seconds"]),
                "–" if planned is None else size(planned.costs[k].peak),
                size(record["peak_memory_bytes"]),
                *(_number(record[key]) for key in ("first_loss", "last_loss", "validation_loss", "bits_per_byte")),
            ]
        )
    header = (
        "phase", "Stacks", "steps", "parameters", "FLOPs", "time", "planned", "measured", "first loss", "last loss",
        "validation", "bits/byte",
    )  # fmt: skip
    return table(header, rows, words=2)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _samples(facts: Facts) -> Html | None:
    if not facts.samples:
        return None
    return element(
        "div",
        *(
            element(
                "div", element("p", f"step {s.step:,}", class_="note"), element("pre", element("b", s.prompt), s.text)
            )
            for s in facts.samples
        ),
        class_="samples",
    )


def _settings(config: StackWiseConfig) -> Html:
    """What differs from the defaults, and everything behind a line that opens."""
    changed = _without(config.to_dict(), StackWiseConfig().to_dict())
    return joined(
        [
            element("pre", dump(changed) if changed else "all as the defaults are"),
            element("details", element("summary", "all settings"), element("pre", config.to_yaml())),
        ]
    )


def _without(settings: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """The settings that ``others`` does not have, or has otherwise; sections that are left empty are left out."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(others.get(key), dict):
            value = _without(value, others[key])
            if value:
                found[key] = value
        elif key not in others or value != others[key]:
            found[key] = value
    return found


def _side_by_side(runs: Sequence[Facts]) -> Html:
    rows = []
    for facts in runs:
        last, summary, totals = facts.lines[-1], facts.summary, facts.totals
        scores = (summary["validation"] if summary else None) or {"loss": None, "bits_per_byte": None}
        rows.append(
            [
                facts.name,
                "complete" if summary else f"at step {last.step:,}",
                facts.objectives,
                _number(scores["loss"]),
                _number(scores["bits_per_byte"]),
                f"{last.tokens:,}",
                f"{last.flops:.3g}",
                duration(totals.wall_seconds) if totals else "–",
                size(totals.peak_memory_bytes) if totals else "–",
            ]
        )
    header = ("run", "state", "objective", "validation", "bits/byte", "tokens", "FLOPs", "time", "peak memory")
    return joined(
        [
            table(header, rows, words=3),
            figures(run_charts.together(runs, unit) for unit in run_charts.UNITS),
        ]
    )


def _comparison(folder: Path, heading: Html | None) -> Html:
    result = comparison.read_result(folder)
    return joined(
        [
            heading,
            element("p", result["verdict"], class_="lead"),
            figures(comparison.charts(result, folder)),
            section("Recipes", table(*comparison.summary_table(result))),
            section("FLOPs by kind, in %", table(*comparison.kinds_table(result))),
        ]
    )
