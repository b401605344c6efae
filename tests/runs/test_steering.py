"""Runs that go on with other settings: from which step, how the budget is shared, what is written, what is refused.

Each case is also killed by SIGKILL, and must end as the one that nothing happened to.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import stackwise
from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.config.base import why_fixed
from stackwise.config.messages import all_keys, section_of
from stackwise.errors import RunError, UserError
from stackwise.runs.extend import extend_run
from stackwise.runs.run import load
from stackwise.store.rundir import RunDir
from stackwise.training.callbacks import Callbacks
from stackwise.training.progress import SilentReporter

LR = 0.03
CONFIG = """
model: {{vocab_size: 31, d_model: 20, n_heads: 2, d_ff: 36, dropout: 0.1,
        architecture: {{n_stacks: 2, blocks_per_stack: 1}}}}
training:
  batch_size: 3
  seq_len: 14
  max_steps: 12
  optimizer: {{lr: 0.03}}
  schedule: {{kind: wsd, decay_fraction: 0.5, min_lr_ratio: 0, warmup_steps: 0, rewarmup_steps: 0}}
  checkpoint: {{every_steps: 2, keep_last: 99}}
  logging: {{every_steps: 1}}
  evaluation: {{max_tokens: 84}}
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
    folder = tmp_path_factory.mktemp("work")
    draw = random.Random(5)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 5))) for _ in range(50)]
    (folder / "text.txt").write_text(" ".join(draw.choices(words, k=900)))
    (folder / "config.yaml").write_text(CONFIG.format(work=folder))
    return folder


@pytest.fixture(scope="module")
def base(work: Path) -> Path:
    """A complete run of two phases of six steps."""
    stackwise.train(work / "config.yaml", work / "base", reporter=SilentReporter())
    return work / "base"


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(base, tmp_path / "run"))


def resume(run: Path, changes: dict[str, Any] | None = None, step: int | None = None, **more: Any) -> dict[str, Any]:
    return stackwise.resume(run, changes, step=step, reporter=SilentReporter(), **more)


def killed(work: Callable[[], object]) -> None:
    """Does ``work`` in a process of its own, which must end by SIGKILL."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killing(at: int) -> Callable[[dict[str, Any]], None]:
    return lambda seen: kill() if seen["step"] == at else None


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rates(run: Path) -> list[float]:
    return [line["lr"] for line in metrics(run)]


def record(run: Path) -> list[dict[str, Any]]:
    return list(json.loads((run / "changes.json").read_text())["changes"])


def outcome(run: Path) -> dict[str, Any]:
    """Everything that must not depend on what happened to a run."""
    clock = {"seconds", "peak_memory_bytes", "wall_seconds", "tokens_per_second", "mfu", "memory_bytes"}
    summary = json.loads((run / "summary.json").read_text())
    manifests = {path.name: json.loads(path.read_text())["parts"] for path in run.glob("checkpoints/step-*.json")}
    return {
        "summary": {key: value for key, value in summary.items() if key not in {"phases", *clock}},
        "phases": [{k: v for k, v in phase.items() if k not in clock} for phase in summary["phases"]],
        "metrics": [{k: v for k, v in line.items() if k not in clock} for line in metrics(run)],
        "checkpoints": manifests,
        "config": (run / "config.yaml").read_text(),
        "changes": (run / "changes.json").read_text() if (run / "changes.json").exists() else None,
    }


def down(lr: float, steps: int) -> list[float]:
    """The rates of a decay, which reaches zero at its last step."""
    return [lr * (steps - 1 - i) / steps for i in range(steps)]


CASES: dict[str, tuple[int | None, dict[str, Any], list[int], list[float]]] = {
    # the rate holds from the next step on; it decays over the last half of the run
    "rate": (4, {"training.optimizer.lr": 0.01}, [6, 6], [LR] * 4 + [0.01] * 2 + down(0.01, 6)),
    # no phase is over, so that both are longer
    "budget in the first phase": (4, {"training.max_steps": 20}, [10, 10], [LR] * 10 + down(LR, 10)),
    # the first one is over and stays; the rate is the one that a run of 20 steps has at step 9
    "budget in the second phase": (
        8, {"training.max_steps": 20, "training.optimizer.lr": 0.02}, [6, 14],
        [LR] * 6 + down(LR, 6)[:2] + [0.02] * 2 + down(0.02, 10),
    ),
    "budget at the end of a phase": (6, {"training.max_tokens": 16 * 42}, [6, 10], [LR] * 8 + down(LR, 8)),
    "fewer steps": (8, {"training.max_steps": 10}, [6, 4], [LR] * 6 + down(LR, 6)[:2] + down(LR, 5)[3:]),
    # a complete run goes on in its last phase
    "complete": (
        None, {"training.max_steps": 17, "training.schedule.kind": "constant"}, [6, 11],
        [LR] * 6 + down(LR, 6) + [LR] * 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_change_holds_from_the_next_step_on_and_survives_a_kill(case: str, run: Path, base: Path) -> None:
    step, changes, steps, expected = CASES[case]
    at = step or 12
    again = Path(shutil.copytree(run, run.parent / "again"))
    resume(run, changes, step)
    assert [phase["steps"] for phase in json.loads((run / "summary.json").read_text())["phases"]] == steps
    assert rates(run) == pytest.approx(expected)
    before = [line["loss"] for line in metrics(base)][:at]
    assert [line["loss"] for line in metrics(run)][:at] == before
    (change,) = record(run)
    old = {"training.max_steps": 12, "training.optimizer.lr": LR, "training.schedule.kind": "wsd"}
    assert change["step"] == at
    for key, value in changes.items():
        assert change["settings"][key] == [old.get(key), value]
    settings = StackWiseConfig.from_yaml(run / "config.yaml")
    assert settings == StackWiseConfig.from_yaml(base / "config.yaml").changed(changes)

    killed(lambda: resume(again, changes, step, on_step=killing(at + 1)))
    if case in ("rate", "complete"):
        killed(lambda: resume(again, on_step=killing(at + 3)))
    resume(again)
    assert outcome(again) == outcome(run)


@pytest.mark.parametrize("when", ["before the record", "before the config", "after both"])
def test_a_kill_while_the_change_is_written_leaves_it_made_or_not_made(when: str, run: Path, base: Path) -> None:
    again, change = Path(shutil.copytree(run, run.parent / "again")), {"training.optimizer.lr": 0.01}

    def interrupted() -> None:
        import stackwise.runs.steering as steering
        import stackwise.store.changes as changes

        module: Any = changes if when == "before the record" else steering
        write = module.write_text_atomic

        def dying(*arguments: Any) -> None:
            if when == "after both":
                write(*arguments)
            kill()

        module.write_text_atomic = dying
        resume(again, change, 8)

    killed(interrupted)
    resume(again)
    if when == "before the record":
        assert outcome(again) == outcome(base)
    else:
        resume(run, change, 8)
        assert outcome(again) == outcome(run)


def test_going_back_before_a_change_undoes_it(run: Path, base: Path) -> None:
    resume(run, {"training.optimizer.lr": 0.01}, 4)
    resume(run, {"training.max_steps": 14, "training.grad_clip": 0.5}, 8)
    assert [change["step"] for change in record(run)] == [4, 8]
    assert load(run, 4).config.training.optimizer.lr == LR
    assert load(run, 8).config.training.grad_clip == 1.0
    assert load(run).config.training.grad_clip == 0.5
    resume(run, step=6)
    assert [change["step"] for change in record(run)] == [4]
    settings = StackWiseConfig.from_yaml(run / "config.yaml").training
    assert (settings.optimizer.lr, settings.grad_clip, settings.max_steps) == (0.01, 1.0, 12)
    resume(run, step=2)
    assert record(run) == []
    assert outcome(run) | {"changes": None} == outcome(base)


def test_a_second_change_at_the_same_step_takes_the_place_of_the_first(run: Path) -> None:
    again = Path(shutil.copytree(run, run.parent / "again"))
    killed(lambda: resume(again, {"training.optimizer.lr": 0.5}, 8, on_step=killing(9)))
    resume(again, {"training.optimizer.lr": 0.01})
    resume(run, {"training.optimizer.lr": 0.01}, 8)
    assert outcome(again) | {"changes": None} == outcome(run) | {"changes": None}
    assert [change["settings"]["training.optimizer.lr"] for change in record(again)] == [[LR, 0.5], [0.5, 0.01]]


REFUSED = {
    "training.seq_len=15": "training.seq_len: it cannot change in mid-run, because the phases, batches and moments",
    "training.optimizer.moments=int8": "it cannot change in mid-run, because the moments in its checkpoints have",
    "model.d_model=40": "model.d_model: it cannot change in mid-run, because the weights of the run have its shape; "
    "stackwise train CONFIG --from ",
    "data.validation_fraction=0.2": "data.validation_fraction: it cannot change in mid-run, because the batch of each",
    "training.progressive.joint_fraction=0.5": "joint_fraction: it cannot change in mid-run, because the phases,",
    "training.max_steps=3": "training.max_steps: it gives the phase 'stack 0' 1 steps, but the run has taken 4 of it",
    "training.lr=1": "training.lr: unknown key",
    "training.optimizer.lr=-1": "training.optimizer.lr: -1",
    "training.optimizer.lr": "is not an override; write key.path=value",
    "training.micro_batch_size=2": "training.micro_batch_size: 2 does not divide batch_size (3)",
}


def test_other_changes_are_refused_in_one_line_and_nothing_is_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def files() -> dict[str, bytes]:
        kept = (p for p in run.rglob("*") if p.is_file() and p.name != ".lock")
        return {str(p.relative_to(run)): p.read_bytes() for p in kept}

    before = files()
    for setting, message in REFUSED.items():
        assert main(["resume", str(run), setting, "--step", "4"]) == 2
        err = capsys.readouterr().err
        assert message in err.splitlines()[-1] and "Traceback" not in err, err
        assert files() == before
    assert main(["resume", str(run), "training.logging.every_steps=3"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{run} is complete, so that training.logging.every_steps changes nothing; raise its budget" in said
    assert files() == before
    assert main(["resume", str(run), "training.max_steps=12"]) == 0  # as it was
    assert files().keys() - {"summary.json"} == before.keys() - {"summary.json"}


STEERABLE: dict[str, Any] = {
    "training.max_steps": 13, "training.max_tokens": None, "training.max_flops": None,
    "training.micro_batch_size": 1, "training.grad_clip": None, "training.device": "cpu",
    "training.cpu_allocator": "fast", "training.compile": False, "training.activation_checkpointing": True,
    "training.offload": "none", "training.optimizer.lr": 0.02, "training.optimizer.weight_decay": 0.2,
    "training.optimizer.betas": [0.8, 0.9], "training.optimizer.eps": 1e-7, "training.optimizer.momentum": None,
    "training.schedule.kind": "cosine", "training.schedule.warmup_steps": 1, "training.schedule.rewarmup_steps": 1,
    "training.schedule.decay_fraction": 0.3, "training.schedule.min_lr_ratio": 0.2, "training.schedule.span": "phase",
    "training.evaluation.every_steps": 1, "training.evaluation.max_tokens": 70, "training.evaluation.draws": 1,
    "training.keep_best": True, "training.early_stopping.patience": 3,
    "training.early_stopping.min_improvement": 0.1, "training.early_stopping.ends": "phase",
    "training.checkpoint.every_steps": 5, "training.checkpoint.keep_last": 1,
    "training.checkpoint.keep_phase_ends": False, "training.logging.every_steps": 2,
    "training.logging.trackers": [],
}  # fmt: skip


def test_everything_that_can_change_changes_in_a_run(run: Path) -> None:
    leaves = {key for key in all_keys(StackWiseConfig) if section_of(StackWiseConfig, tuple(key.split("."))) is None}
    assert {key for key in leaves if why_fixed(key) is None} == STEERABLE.keys()
    resume(run, STEERABLE, 10)
    (change,) = record(run)
    same = {"training.max_tokens", "training.max_flops", "training.device", "training.compile", "training.offload",
            "training.optimizer.momentum", "training.evaluation.draws", "training.logging.trackers"}  # fmt: skip
    assert {key: after for key, (_, after) in change["settings"].items()} == {
        key: value for key, value in STEERABLE.items() if key not in same
    }
    assert metrics(run)[-1]["step"] == 13 and {"validation_loss"} <= metrics(run)[-2].keys()


def test_a_damaged_record_is_one_line(run: Path) -> None:
    RunDir(run).changes.write_text('{"changes": [{"step": -1, "settings": {}}]}')
    with pytest.raises(RunError, match=r"changes.json: not a record of changed settings: .*greater than or equal to 0"):
        load(run)


def test_a_config_changed_by_hand_is_refused_and_the_way_is_named(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("lr: 0.03", "lr: 0.04"))
    with pytest.raises(UserError, match=r"stackwise resume .* training.optimizer.lr=… changes it"):
        resume(run, step=4)


def test_the_command_says_what_changes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(run), "training.optimizer.lr=0.001", "--step", "10", "--json"]) == 0
    said = capsys.readouterr()
    assert "from step 11 on: training.optimizer.lr 0.03 → 0.001" in said.err.splitlines()
    assert json.loads(said.out)["phases"][-1]["steps"] == 6


@pytest.mark.parametrize("step", [None, 4])
def test_an_extended_run_ends_as_the_run_itself_would_and_leaves_it_as_it_was(
    step: int | None, run: Path, base: Path, tmp_path: Path
) -> None:
    def extend(out: Path, at: int | None = None) -> None:
        name = base if step is None else f"{base}@{step}"
        callbacks = Callbacks.of(None if at is None else killing(at), None)
        extend_run(
            name, out, ["training.max_steps=17", "training.grad_clip=0.5"], SilentReporter(), callbacks=callbacks
        )

    before = outcome(base)
    extend(tmp_path / "whole")
    assert outcome(base) == before
    resume(run, {"training.max_steps": 17, "training.grad_clip": 0.5}, step)
    expected, found = outcome(run), outcome(tmp_path / "whole")
    assert {key: found[key] for key in found if key != "checkpoints"} == {
        key: expected[key] for key in expected if key != "checkpoints"
    }
    assert found["checkpoints"].items() <= expected["checkpoints"].items()
    steps = [phase["steps"] for phase in found["phases"]]
    assert steps == ([6, 11] if step is None else [8, 9])

    killed(lambda: extend(tmp_path / "again", (step or 12) + 3))
    resume(tmp_path / "again")
    assert outcome(tmp_path / "again") == found


def test_extending_is_refused_in_one_line_and_leaves_nothing(
    base: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*line: object) -> str:
        assert main(["train", *map(str, line), "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert "no setting changes; give the larger budget" in refused("--extend", base)
    assert "it gives the phase 'stack 1' 3 steps, but the run has taken 6" in refused(
        "--extend", base, "training.max_steps=9"
    )
    assert "training.seed: it cannot change in mid-run" in refused("--extend", base, "training.seed=3")
    assert "cannot be combined with --from" in refused("--extend", base, "--from", base)
    assert "CONFIG is missing" in refused()
    assert "keeps no best checkpoint" in refused(work / "config.yaml", "--from", f"{base}@best")


def test_a_run_from_a_step_starts_with_its_weights_and_survives_a_kill(base: Path, work: Path, tmp_path: Path) -> None:
    def start(name: str, *overrides: str) -> int:
        words = ["training.max_steps=5", "training.checkpoint.every_steps=2", *overrides, "--from", f"{base}@4"]
        return main(["train", str(work / "config.yaml"), *words, "--out", str(tmp_path / name)])

    assert start("still", "training.progressive.trunk_strategy=frozen") == start("whole") == 0
    at_4, at_12 = load(base, 4).rack, load(base).rack
    found = load(tmp_path / "still").rack
    assert [stack.stack_id for stack in found.stacks] == [0, 1] and len(at_4.stacks) == 1
    for name, tensor in at_4.stacks[0].state_dict().items():
        assert torch.equal(found.stacks[0].state_dict()[name], tensor)
    assert not torch.equal(at_4.embedding.weight, at_12.embedding.weight)
    assert torch.equal(found.embedding.weight, at_4.embedding.weight)

    def interrupted() -> None:
        config = StackWiseConfig.from_yaml(tmp_path / "whole" / "config.yaml")
        assert config.model.initial == f"{base}@4"
        stackwise.train(config, tmp_path / "again", on_step=killing(3), reporter=SilentReporter())

    killed(interrupted)
    resume(tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(tmp_path / "whole")
