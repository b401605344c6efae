"""Which checkpoints stay, which is the best, and training that ends early: checked against the run's own records."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stackwise
from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.errors import ConfigError, UserError
from stackwise.planning.plan import plan_run
from stackwise.runs.run import load
from stackwise.training.architecture_trainer import ArchitectureTrainer
from stackwise.training.progress import SilentReporter

CONFIG = """
model: {{vocab_size: 31, d_model: 20, n_heads: 2, d_ff: 36, architecture: {{n_stacks: 2, blocks_per_stack: 1}}}}
training:
  batch_size: 3
  seq_len: 14
  max_steps: 46
  progressive: {{trunk_strategy: frozen}}
  optimizer: {{lr: 0.09}}
  schedule: {{warmup_steps: 1, rewarmup_steps: 1}}
  checkpoint: {{every_steps: 5, keep_last: 2}}
  evaluation: {{every_steps: 2, max_tokens: 140}}
  keep_best: true
  early_stopping: {{patience: 3, min_improvement: 0.01, ends: phase}}
  device: cpu
data: {{source: files, path: {work}/text.txt, cache_dir: {work}/cache, tokenizer: {{kind: characters}}}}
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``config.yaml`` and the ``text.txt`` that it trains on."""
    folder = tmp_path_factory.mktemp("work")
    draw = random.Random(5)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 5))) for _ in range(50)]
    (folder / "text.txt").write_text(" ".join(draw.choices(words, k=900)))
    (folder / "config.yaml").write_text(CONFIG.format(work=folder))
    return folder


def train(work: Path, name: str, *overrides: str) -> Path:
    config = StackWiseConfig.from_yaml(work / "config.yaml", overrides)
    stackwise.train(config, work / name, reporter=SilentReporter())
    return work / name


@pytest.fixture(scope="module")
def run(work: Path) -> Path:
    return train(work, "run")


def read(run: Path, name: str = "summary.json") -> Any:
    return json.loads((run / name).read_text())


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def validations(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["validation_loss"]) for line in metrics(run) if "validation_loss" in line]


def steps(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*.json"))


def outcome(run: Path) -> dict[str, Any]:
    """Everything that must not depend on what happened to a run."""
    clock = {"seconds", "peak_memory_bytes", "wall_seconds", "tokens_per_second", "mfu", "memory_bytes"}
    summary = read(run)
    return {
        "summary": {key: value for key, value in summary.items() if key not in {"phases", *clock}},
        "phases": [{k: v for k, v in phase.items() if k not in clock} for phase in summary["phases"]],
        "metrics": [{k: v for k, v in line.items() if k not in clock} for line in metrics(run)],
        "checkpoints": {s: read(run, f"checkpoints/step-{s:08}.json")["parts"] for s in steps(run)},
    }


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss_and_scores_what_was_measured(run: Path) -> None:
    lowest = min(validations(run), key=lambda pair: pair[1])
    assert lowest[0] < metrics(run)[-1]["step"], "the case needs a run that gets worse at the end"
    assert read(run)["best"] == {"step": lowest[0], "validation_loss": lowest[1]}
    best = load(run, "best")
    assert best.step == lowest[0] in steps(run)
    assert load(run).step == metrics(run)[-1]["step"] != best.step


def test_eval_generate_and_export_take_the_best(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = read(run)["best"]

    def said(*line: str) -> Any:
        capsys.readouterr()
        assert main([line[0], str(run), *line[1:], "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    # the whole validation text here, 140 tokens of it during training
    assert said("eval", "--step", "best") == said("eval", "--step", str(best["step"])) != said("eval")
    texts = [said("generate", "--tokens", "17", *step) for step in ((), ("--step", "best"))]
    assert texts[0] != texts[1]
    said("export", str(tmp_path / "best"), "--step", "best")
    said("export", str(tmp_path / "same"), "--step", str(best["step"]))
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("best", "same")]
    assert found[0] == found[1]


def test_ends_of_phases_stay_and_two_of_the_others_and_what_is_best(run: Path) -> None:
    ends = np.cumsum([phase["steps"] for phase in read(run)["phases"]]).tolist()
    saved, lowest = set(), float("inf")  # every checkpoint that was ever there
    for step in range(1, ends[-1] + 1):
        loss = dict(validations(run)).get(step, float("inf"))
        if loss < lowest or step % 5 == 0 or step in ends:
            saved.add(step)
        lowest = min(lowest, loss)
    others = sorted(saved - set(ends))
    kept = {*ends, *others[-2:]}
    for step in list(kept):  # and the best one at the time of each, so that going on from there finds it
        before = [(loss, s) for s, loss in validations(run) if s <= step]
        kept |= {min(before)[1]} if before else set()
    assert steps(run) == sorted(kept)
    assert len(others) > 2, "the case needs checkpoints that went"


def test_a_phase_ends_when_its_validations_stop_improving_and_the_next_one_begins(run: Path) -> None:
    summary, done = read(run), 0
    for phase in summary["phases"]:
        found = [(s, loss) for s, loss in validations(run) if done < s <= done + phase["steps"]]
        reference, waited, ends = found[0][1], 0, None
        for step, loss in found[1:]:
            waited = 0 if loss < reference - 0.01 else waited + 1
            reference = loss if waited == 0 else reference
            if waited == 3 and ends is None:
                ends = step
        assert phase["stopped_early"] == (None if ends is None or ends == done + 23 else "phase")
        assert done + phase["steps"] == (done + 23 if ends is None else ends)
        done += phase["steps"]
        assert phase["validation_loss"] == found[-1][1]
    assert [phase["stopped_early"] for phase in summary["phases"]].count("phase") >= 1
    assert done == metrics(run)[-1]["step"]


def test_training_that_ends_early_leaves_the_later_phases_out(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = work / "ended"
    line = ["train", str(work / "config.yaml"), "training.early_stopping.ends=run", "--out", str(out)]
    assert main(line) == 0
    (phase,) = read(out)["phases"]
    assert phase["stopped_early"] == "run" and phase["steps"] == metrics(out)[-1]["step"] < 23
    said = capsys.readouterr().err
    assert f"stack 0: validations ended the run early, after {phase['steps']} steps" in said
    assert f"step {read(out)['best']['step']}: --step best takes it" in said
    # complete: nothing is left to do, also where the summary was lost
    before = outcome(out)
    (out / "summary.json").unlink()
    assert main(["resume", str(out)]) == 0
    assert outcome(out) == before
    assert load(out).rack.spec == load(out, "best").rack.spec


@pytest.mark.parametrize("at", [3, 20])
def test_killed_and_resumed_it_keeps_and_stops_the_same(at: int, run: Path, work: Path, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:

        def kill(seen: dict[str, Any]) -> None:
            if seen["step"] == at:
                os.kill(os.getpid(), signal.SIGKILL)

        config = StackWiseConfig.from_yaml(work / "config.yaml")
        stackwise.train(config, tmp_path / "run", on_step=kill, reporter=SilentReporter())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    stackwise.train(
        StackWiseConfig.from_yaml(work / "config.yaml"), tmp_path / "run", resume=True, reporter=SilentReporter()
    )
    assert outcome(tmp_path / "run") == outcome(run)


def test_going_back_finds_the_best_of_that_time_and_takes_the_same_course(run: Path, tmp_path: Path) -> None:
    first_end = read(run)["phases"][0]["steps"]
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    assert main(["resume", str(copy), "--step", str(first_end)]) == 0
    assert outcome(copy) == outcome(run)


def test_without_the_settings_two_checkpoints_stay_and_the_weights_are_the_same(work: Path) -> None:
    plain = ["training.keep_best=false", "training.early_stopping.patience=null", "training.max_steps=20",
             "training.early_stopping.min_improvement=0", "training.early_stopping.ends=run"]  # fmt: skip
    bare = train(work, "bare", *plain, "training.checkpoint.keep_phase_ends=false")
    kept = train(work, "kept", *plain, "training.keep_best=true")
    assert steps(bare) == [15, 20] and read(bare)["best"] is None
    assert read(kept)["weights_sha256"] == read(bare)["weights_sha256"]
    with pytest.raises(UserError, match=r"keeps no best checkpoint \(training.keep_best: true keeps it\)"):
        load(bare, "best")


@pytest.mark.parametrize("best", ["true", "false"])
@pytest.mark.parametrize("trunk", ["frozen", "trainable"])
def test_the_plan_counts_what_is_kept_on_disk(work: Path, trunk: str, best: str) -> None:
    overrides = [f"training.progressive.trunk_strategy={trunk}", f"training.keep_best={best}", "training.max_steps=20"]
    out = train(work, f"{trunk} {best}", *overrides)
    plan = plan_run(StackWiseConfig.from_yaml(out / "config.yaml"), work)
    there = sum(path.stat().st_size for path in (out / "checkpoints" / "objects").iterdir())
    headers = 40_000  # names and shapes
    assert plan.disk_bytes / 4 < there < plan.disk_bytes + headers


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.evaluation.every_steps=null"], "training.early_stopping: is only used when training.evaluation"),
        (["training.early_stopping.patience=null"], "training.early_stopping.min_improvement: .* only used when "),
        (["training.early_stopping.patience=0"], "training.early_stopping.patience: 0 "),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(work: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StackWiseConfig.from_yaml(work / "config.yaml", overrides)


def test_a_step_is_a_number_or_best(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--step", "last"]) == 2
    assert "'last' is neither the number of a step nor best" in capsys.readouterr().err


def test_a_trainer_without_validation_data_cannot_keep_the_best() -> None:
    config = StackWiseConfig.from_dict(
        {"model": {"vocab_size": 31, "d_model": 20, "n_heads": 2}, "training": {"keep_best": True, "max_steps": 2}}
    )
    rack = stackwise.model.architecture.create_rack_from_config(config)
    with pytest.raises(UserError, match=r"training.keep_best: it goes by the validation loss, but no validation data"):
        ArchitectureTrainer(config).train_architecture(rack, [{"input_ids": torch.zeros(2, 5, dtype=torch.long)}])
