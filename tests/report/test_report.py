"""The HTML report: what it says, that it believes nothing, and how a browser shows it."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import stackwise
from report.chromium import PROGRAM, Tab, chromium
from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.errors import RunError, UserError
from stackwise.report.document import report, write_report
from stackwise.report.film import chosen
from stackwise.runs.run import train_run
from stackwise.store.rundir import RunDir
from stackwise.training.progress import SilentReporter

HOSTILE = "</pre></td></svg><script>document.title='taken'</script><img src=http://127.0.0.1:9/x>\"' onload='"


def settings(folder: Path, **training: object) -> StackWiseConfig:
    return StackWiseConfig.from_dict(
        {
            "model": {"d_model": 26, "n_heads": 13, "d_ff": 19, "architecture": {"n_stacks": 3, "blocks_per_stack": 1}},
            "training": {
                "batch_size": 5, "seq_len": 17, "max_steps": 13, "device": "cpu", "logging": {"every_steps": 1},
                **training,
            },
            "data": {
                "source": "files", "path": str(folder / f"text{HOSTILE.replace('/', '')}.txt"),
                "cache_dir": str(folder / "cache"), "tokenizer": {"kind": "characters"},
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: ``grown`` on a frozen trunk, and ``filled`` by diffusion, with what other commands leave in one."""
    folder = tmp_path_factory.mktemp("report")
    Path(settings(folder).data.path).write_text("".join(random.Random(5).choices("abc<&>\"' ", k=3000)))
    # The names of phases and folders are a run's too.
    trunk = {"trunk_strategy": "qlora", "trunk_precision": "nf4"}
    adapters = {"enabled": True, "rank": 2, "progressive_enabled": True, "progressive_rank": 3}
    train_run(settings(folder, progressive=trunk, qlora=adapters), folder / "grown", SilentReporter())
    objective = {"training_objective": "diffusion", "time_interpretation": "input"}
    filled = settings(folder, strategy="end_to_end", progressive=objective)
    train_run(filled, folder / "filled", SilentReporter())
    scores = stackwise.evaluate(folder / "filled")
    (folder / "filled" / "evaluation.json").write_text(json.dumps(scores))
    samples = [{"step": 5, "text": HOSTILE, "prompt": "a&b", "phase": "x"}, {"step": 7, "text": "after"}]
    (folder / "grown" / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    """Both runs in one report, as ``stackwise report`` writes it."""
    out = folder / "both.html"
    assert main(["report", str(folder / "grown"), str(folder / "filled"), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Tags that were opened and never closed, attributes, and words by the tag that they stand in."""

    EMPTY = ("meta", "input", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.words.append((self.open[-1], data))

    def of(self, tag: str) -> list[str]:
        return [text for where, text in self.words if where == tag]


def test_a_report_is_one_file_that_asks_for_nothing_else(page: str) -> None:
    reader = Reader(page)
    assert not reader.open and len(page.encode()) < 120_000
    assert not [a for a in reader.attributes if a[1] in ("src", "href", "srcset", "data", "action") or a[1][:2] == "on"]
    assert not re.search(r"@import|url\(|<link|<iframe|<object", page)


def test_what_a_run_holds_is_text_and_never_markup(folder: Path, page: str) -> None:
    reader = Reader(page)
    assert len(reader.of("script")) == 1 and "taken" not in reader.of("script")[0]
    assert "img" not in {tag for tag, _, _ in reader.attributes}
    assert HOSTILE in reader.of("pre") and "a&b" in reader.of("b")
    assert any(HOSTILE.replace("/", "") in text for text in reader.of("p"))


def test_it_says_what_the_summary_says(folder: Path, page: str) -> None:
    reader = Reader(page)
    for name, limit in (("grown", ""), ("filled", "≤ ")):
        summary = json.loads((folder / name / "summary.json").read_text())
        assert f"{limit}{summary['validation']['bits_per_byte']:.4f}" in reader.of("b")
        assert f"{summary['tokens']:,}" in reader.of("b")
        for phase in summary["phases"]:
            assert {f"{phase['last_loss']:.4f}", f"{phase['trainable_parameters']:,}"} <= set(reader.of("td"))
    assert {"2 of 3 trains", "1 of 3 trains"} & set(reader.of("td"))
    tips = reader.of("title")
    assert any(tip.startswith("stack 2: Stack 0, frozen, its adapters train, nf4") for tip in tips)
    assert any(tip.startswith("stack 2: Stack 2, new Stack, trains") for tip in tips)


def test_runs_share_axes_and_have_a_part_each(page: str) -> None:
    reader = Reader(page)
    assert reader.of("h2") == ["grown", "filled"]
    for words in ("Training loss over FLOPs", "Training loss over tokens"):
        assert reader.of("text").count(words) == 1
    for words in (
        "Loss over FLOPs",
        "Loss over tokens",
        "The Rack as it grew",
        "Peak memory by phase",
        "Learning rate",
    ):
        assert reader.of("text").count(words) == 2


def test_diffusion_has_its_noise_levels_and_a_film_that_ends_without_gaps(folder: Path, page: str) -> None:
    reader = Reader(page)
    scores = json.loads((folder / "filled" / "evaluation.json").read_text())
    tips = [tip for tip in reader.of("title") if "masked:" in tip]
    assert tips == [f"{rate:.0%} masked: {mean:.4f}" for rate, mean, _ in scores["curve"]]
    rows = re.findall(r'<div class="text">(.*?)</div>', page)
    whole = [re.sub(r"<[^>]+>", "", row) for row in rows]
    assert whole[0] == "░" * 17 and "░" not in whole[-1] and len(whole) >= 5
    gaps = [row.count("░") for row in whole]
    assert gaps == sorted(gaps, reverse=True)


TASK = {
    "metrics": {"accuracy": {"value": 0.75, "low": 0.5, "high": 0.875}, "matthews": {"value": None}},
    "majority": 0.5,
    "classes": ["good", "<b>bad</b>"],
    "confusion": [[31, 2], [7, 11]],
    "wrong": [
        {"row": 3, "where": "f.tsv:4", "texts": [HOSTILE, "second"], "label": "good",
         "predicted": "<b>bad</b>", "probability": 0.97}
    ],
}  # fmt: skip


def test_a_task_has_its_scores_its_confusion_and_its_wrong_examples(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "grown", run)
    (run / "evaluation.json").write_text(json.dumps(TASK))
    reader = Reader(report([run]))
    cells = reader.of("td")
    assert {"0.7500", "0.5000 to 0.8750"} <= set(cells)
    assert [cells[i : i + 2] for i in range(len(cells)) if cells[i] == "31"] == [["31", "2"]]
    assert reader.of("th").count("<b>bad</b>") == 2
    assert f"{HOSTILE} ⏎ second" in cells and "97%" in cells
    (run / "evaluation.json").write_text(json.dumps({**TASK, "confusion": "x"}))
    with pytest.raises(RunError, match=r"evaluation\.json: confusion: "):
        report([run])


def test_of_many_states_the_first_and_the_last_are_kept() -> None:
    assert chosen("abcdefg", 3) == ["a", "d", "g"] and chosen("ab", 3) == ["a", "b"]


def test_a_run_that_has_not_ended_is_reported_as_far_as_it_is(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    shutil.copytree(folder / "grown", run)
    (run / "summary.json").unlink()
    text = Reader(write_report([run], tmp_path / "r.html").read_text()).of("p")
    assert any("is not complete: it has reached step 13" in line for line in text)


def test_a_thousand_times_more_lines_make_no_larger_page(folder: Path, page: str, tmp_path: Path) -> None:
    run = tmp_path / "long"
    shutil.copytree(folder / "grown", run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with open(run / "metrics.jsonl", "w") as file:
        for line in lines:
            for part in range(1000):
                file.write(
                    json.dumps({**line, "step": 1000 * line["step"] + part, "flops": line["flops"] + part}) + "\n"
                )
    assert len(report([run])) < 150_000


def test_what_is_no_run_or_a_damaged_one_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "no such run" in capsys.readouterr().err
    run = tmp_path / "run"
    shutil.copytree(folder / "grown", run)
    for name, content, message in (
        ("metrics.jsonl", '{"step": 1, "phase": "p", "tokens": 1, "loss": "x", "lr": 0.1, "flops": 1.0}\n', "0.loss"),
        ("samples.jsonl", '{"step": 1}\n', "0.text: Field required"),
        ("evaluation.json", "[]", "not an object"),
    ):
        kept = (folder / "grown" / name).read_text() if (folder / "grown" / name).exists() else None
        (run / name).write_text(content)
        with pytest.raises(RunError, match=re.escape(message)):
            report([run])
        (run / name).unlink() if kept is None else (run / name).write_text(kept)
    with pytest.raises(UserError, match="cannot be written"):
        write_report([run], tmp_path / "none" / "r.html")
    assert not (run / "report.html").exists()


def compared(folder: Path) -> dict[str, Any]:
    """A comparison that never was, of two recipes with two seeds."""
    recipes = []
    for name, bits, memory in (("grown", 1.875, 58), ("append-frozen", 1.9314, 32)):
        runs = []
        for seed in (0, 1):
            run = RunDir.create(folder / f"{name}-seed-{seed}", "")
            for step in range(1, 41):
                line = {"step": step, "phase": "p", "stack": None, "tokens": 7 * step, "lr": 0.1, "grad_norm": 1.0}
                line |= {"tokens_per_second": 1.0, "mfu": None, "memory_bytes": None}
                run.append_metrics({**line, "loss": 4 - step / 30 + 0.1 * seed, "flops": 25e9 * step})
            scores = {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": bits}
            runs.append(
                {"seed": seed, "run": run.path.name, "validation": scores, "tokens": 7, "flops": 1e12,
                 "wall_seconds": 61.0, "peak_memory_bytes": None, "weights_sha256": "", "phases": []}
            )  # fmt: skip
        spread = {"mean": bits, "deviation": 0.003}
        recipes.append(
            {
                "recipe": name, "loss": spread, "bits_per_byte": spread,
                "peak_memory_bytes": {"mean": memory * 2.0**20, "deviation": 2.0**18},
                "wall_seconds": {"mean": 61.0, "deviation": 2.5}, "flops": {"mean": 1e12, "deviation": 0.0},
                "flops_by_kind": {"forward": 4e11, "head": 1e11, "backward": 5e11, "cache": 0.0}, "ties": [],
                "runs": runs,
            }
        )  # fmt: skip
    verdict = f"use {HOSTILE}"
    return {
        "budget_flops": 1e12, "seeds": [0, 1], "measure": "bits_per_byte", "bound": False, "recipes": recipes,
        "verdict": verdict,
    }  # fmt: skip


def test_a_comparison_is_its_table_its_sentence_and_its_pictures(tmp_path: Path) -> None:
    result = compared(tmp_path)
    (tmp_path / "compare.json").write_text(json.dumps(result))
    reader = Reader(report([tmp_path]))
    assert result["verdict"] in reader.of("p")
    assert {"grown", "1.8750 ± 0.0030", "58.0 ± 0.2", "61 ± 2", "1.9314 ± 0.0030", "40.0", "50.0"} <= set(
        reader.of("td")
    )
    assert "cache" not in reader.of("th")
    assert {"Validation against memory", "Training against FLOPs"} <= set(reader.of("text"))
    result["recipes"][1]["runs"][0]["run"] = "../../etc"
    (tmp_path / "compare.json").write_text(json.dumps(result))
    with pytest.raises(RunError, match=r"recipes\.1\.runs\.0\.run"):
        report([tmp_path])


# ---- in a browser


@pytest.fixture(scope="module")
def tab(folder: Path, page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if PROGRAM is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        tab.look()
        tab.open(folder / "both.html")
        yield tab


OUTSIDE = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg') &&
    (e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5))
    .map(e => e.tagName + ' ' + e.className).join(', ')"""


@pytest.mark.parametrize("width", [400, 701, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off(tab: Tab, width: int, scheme: str) -> None:
    tab.look(width, scheme=scheme)
    assert tab.ask("document.documentElement.scrollWidth") == width
    assert tab.ask(OUTSIDE) == ""
    # Words of pictures lie within them and, though scaled, can be read.
    assert (
        tab.ask("""[...document.querySelectorAll('figure text')].filter(t => { const a = t.getBoundingClientRect(),
        b = t.closest('figure').querySelector('svg').getBoundingClientRect();
        return a.left < b.left - 1 || a.right > b.right + 1 || a.height < 10.5 }).map(t => t.textContent).join(', ')""")
        == ""
    )


@pytest.mark.parametrize(
    ("scheme", "medium", "dark"), [("light", "screen", 0), ("dark", "screen", 1), ("dark", "print", 0)]
)
def test_colours_follow_the_reader_and_paper_is_white(tab: Tab, scheme: str, medium: str, dark: int) -> None:
    tab.look(scheme=scheme, medium=medium)

    def brightness(what: str, style: str) -> float:
        colour = tab.ask(f"getComputedStyle(document.querySelector('{what}')).{style}")
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3]))

    paper, ink = brightness("body", "backgroundColor"), brightness("figure text", "fill")
    assert (paper < 150 and ink > 500) if dark else (paper > 700 and ink < 200)


def test_the_film_plays_and_the_slider_moves_it(tab: Tab) -> None:
    tab.look()
    shown = "[...document.querySelectorAll('.player pre>div')].filter(d => !d.hidden).map(d => d.textContent)"
    move = "(at => { const a = document.querySelector('.player input'); a.value = at; a.oninput() })"
    tab.ask(f"{move}(0)")
    (first,) = tab.ask(shown)
    tab.ask(f"{move}(1000)")
    (last,) = tab.ask(shown)
    assert first == "░" * 17 and "░" not in last


def test_it_prints_on_pages(tab: Tab) -> None:
    pages = len(re.findall(rb"/Type\s*/Page\b", tab.pdf()))
    assert 2 <= pages <= 12


def test_the_console_is_silent(tab: Tab) -> None:
    assert tab.complaints == [] and tab.ask("document.title") == "grown · filled"
