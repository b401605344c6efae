"""A run is planned before it is written: what cannot fit is refused with settings that do, and so is running out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.data import store
from stackwise.errors import RunError
from stackwise.growth.recipes import apply_recipe
from stackwise.planning import cost, devices
from stackwise.planning.devices import Machine
from stackwise.planning.plan import Plan, plan_run
from stackwise.runs import limits
from stackwise.runs.run import resume_run, train_run
from stackwise.training.callbacks import Callbacks
from stackwise.training.progress import SilentReporter

ROOT = Path(__file__).parents[2]
CONFIG = """
model: {{d_model: 20, n_heads: 2, d_ff: 26, architecture: {{n_stacks: 3, blocks_per_stack: 1}}}}
training: {{strategy: end_to_end, batch_size: 6, seq_len: 13, max_steps: 5, device: cpu, grad_clip: null}}
data: {{source: files, path: {0}/text.txt, cache_dir: {0}/cache, tokenizer: {{kind: bytes}}}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 90)
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(tmp_path))
    return file


@pytest.fixture(autouse=True)
def tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small runs differ in their tensors, beside which a process takes some memory that is always the same."""
    monkeypatch.setattr(cost, "RUNTIME_BYTES", 0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, out: Path) -> str:
    """The one line with which ``train`` refuses; nothing may be written."""
    capsys.readouterr()
    assert main(["train", *arguments, "--out", str(out)]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == "" and not out.exists()
    return line


def planned(file: Path, line: str, memory: int | None = None) -> Plan:
    """The plan of ``file`` with the settings that ``line`` proposes."""
    found = re.search(r"this fits: (.*?) \(", line)
    assert found, line
    words = found[1].split()
    settings = StackWiseConfig.from_yaml(file)
    if words[0] == "--recipe":
        settings, words = apply_recipe(settings, words[1]), words[2:]
    machine = Machine("cpu", torch.device("cpu"), None, memory=memory)
    return plan_run(StackWiseConfig.from_dict(settings.to_dict(), words), file.parent, machine=machine)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The vocabularies for which runs are planned from now on, in order."""
    made: list[int] = []

    def plan(*arguments: Any, **options: Any) -> Plan:
        found = plan_run(*arguments, **options)
        made.append(found.vocab_size)
        return found

    monkeypatch.setattr(limits, "plan_run", plan)
    return made


@pytest.mark.slow
def test_a_model_too_large_for_the_machine_is_refused_at_once_with_what_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("the data is read")

    monkeypatch.setattr(store, "_scan", read)
    monkeypatch.setattr(devices, "available_memory", lambda device: 32 << 30)
    monkeypatch.setattr(devices.shutil, "disk_usage", lambda folder: type("", (), {"free": 1 << 40}))
    file = ROOT / "configs/models/llama_7b.yaml"
    made = counted(monkeypatch)
    line = refused(capsys, str(file), "training.device=cpu", out=tmp_path / "run")
    assert len(made) < 16, "a plan of it takes a second or two"
    assert re.search(r"it needs \d+\.\d GiB of memory, and cpu has 32\.0 GiB; this fits: ", line), line
    assert planned(file, line).peak_memory_bytes <= 32 << 30


@pytest.mark.parametrize("share", [0.6])
def test_the_settings_that_are_named_fit_the_memory_that_is_given(
    config: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    settings = StackWiseConfig.from_yaml(config)
    whole = plan_run(settings, config.parent).peak_memory_bytes
    memory = int(share * whole)
    line = refused(capsys, str(config), "--memory", f"{memory}B", out=config.parent / "run")
    found = planned(config, line, memory)
    assert found.peak_memory_bytes <= memory < whole and "memory" not in found.missing
    # ... and the run that they describe is taken.
    words = re.search(r"this fits: (.*?) \(", line)
    assert words
    assert (
        main(["train", str(config), *words[1].split(), "--memory", f"{memory}B", "--out", str(config.parent / "a")])
        == 0
    )


def test_a_disk_that_is_too_small_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices.shutil, "disk_usage", lambda folder: type("", (), {"free": 1000}))
    line = refused(capsys, str(config), out=config.parent / "run")
    assert "of disk, and there is 1000 B; no recipe and none of the usual settings fit" in line


def test_a_time_that_is_too_short_is_refused_with_the_budget_that_it_allows(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "measured_flops", lambda *_: 1e8)
    every = "training.evaluation.max_tokens=13"
    steps = "training.max_steps=3000"
    line = refused(capsys, str(config), steps, every, "--time", "1min", out=config.parent / "run")
    found = re.search(r"it needs about (\S+ \S+), and --time allows 60 s; this fits: training.max_steps=(\d+) \(", line)
    assert found, line
    kept = int(found[2])
    settings = StackWiseConfig.from_yaml(config, [every, f"training.max_steps={kept}"])
    machine = Machine("cpu", torch.device("cpu"), None, flops_per_second=1e8, rate="measured here")
    seconds = plan_run(settings, config.parent, machine=machine).seconds
    assert seconds is not None and 50 < seconds <= 60


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--memory", "3"), "--memory: '3' has no unit; write 3GB or 3GiB"),
        (("--memory", "much"), "--memory: 'much' is not a size; write for example 24GiB, 800MiB or 16GB"),
        (("--time", "8"), "--time: '8' has no unit; write 8h or 8min"),
        (("--time", "soon"), "--time: 'soon' is not a time; write for example 90s, 30min, 8h or 2days"),
        (("--memory", "100kB"), "kB of memory, and cpu has 100.0 kB; no recipe"),
        (("--memory", "100KiB"), "KiB of memory, and cpu has 100.0 KiB; no recipe"),
    ],
)
def test_sizes_and_times_need_units_and_come_back_in_those_that_were_typed(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: tuple[str, str],
    said: str,
) -> None:
    monkeypatch.setattr(limits, "change_that_fits", lambda *_: None)
    assert said in refused(capsys, str(config), *option, out=config.parent / "run")


def test_a_run_is_planned_once_and_again_only_for_another_vocabulary(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted(monkeypatch)
    for kind, expected in (
        ("bytes", [259]),
        ("characters", [100, len(set("the quick brown fox jumps over the lazy dog\n")) + 1]),
    ):
        made.clear()
        settings = StackWiseConfig.from_yaml(config, [f"data.tokenizer.kind={kind}"])
        train_run(settings, config.parent / kind, SilentReporter())
        assert len(made) == len(expected) and made[0] == expected[0], (kind, made)


def test_running_out_of_memory_is_a_line_with_settings_that_need_less_and_the_run_can_go_on(
    config: Path,
) -> None:
    out, settings = config.parent / "run", StackWiseConfig.from_yaml(config, ["training.checkpoint.every_steps=2"])

    def greedy(seen: dict[str, object]) -> None:
        if seen["step"] == 4:
            torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(RunError) as caught:
        train_run(settings, out, SilentReporter(), Callbacks(on_step=greedy))
    said = str(caught.value)
    found = re.match(
        r"out of memory: this run needs (\S+) KiB by its plan; this needs less: (.+?) \((\S+) KiB\); ", said
    )
    assert found, said
    assert float(found[3]) < float(found[1])
    assert said.endswith(f"; {out} has the checkpoint of step 2: stackwise resume {out} continues it")
    resumed = resume_run(out, SilentReporter())
    unbroken = train_run(settings, config.parent / "unbroken", SilentReporter())
    assert resumed["weights_sha256"] == unbroken["weights_sha256"]


def test_memory_of_a_control_group_is_what_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "group_limit", lambda: 7 << 20)
    assert devices.available_memory(torch.device("cpu")) == 7 << 20
    monkeypatch.setattr(devices, "group_limit", lambda: 1 << 60)
    assert 1 << 28 < (devices.available_memory(torch.device("cpu")) or 0) < 1 << 60
