"""CONTRIBUTING's objective, one file and a line in ``kinds.py``, can do all that the others can."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from contributing import examples, package_with

SETTINGS = [
    "data.source=files", "data.tokenizer.kind=bytes", "training.progressive.training_objective=skip",
    "model.d_model=16", "model.n_heads=2", "model.d_ff=23", "model.architecture.n_stacks=2",
    "model.architecture.blocks_per_stack=1", "training.max_steps=60", "training.seq_len=19", "training.batch_size=5",
    "training.optimizer.lr=0.02", "training.progressive.cache_activations=true",
    "training.strategy=progressive", "training.progressive.trunk_strategy=frozen", "training.device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def with_skip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with CONTRIBUTING's objective, the token after next."""
    folder = tmp_path_factory.mktemp("copy")
    package_with(examples()["An objective"], folder)
    (folder / "text.txt").write_text("abcabcabcabddabcabc" * 400)
    (folder / "config.yaml").write_text("{}\n")
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stackwise", *arguments], capture_output=True, text=True, check=False, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "src"), "STACKWISE_CACHE": str(folder / "cache")}, timeout=300,
    )  # fmt: skip


def test_an_objective_of_ones_own_is_planned_trained_cached_and_scored(with_skip: Path) -> None:
    settings = [f"data.path={with_skip / 'text.txt'}", f"data.cache_dir={with_skip / 'cache'}", *SETTINGS]
    done = run(with_skip, "train", "config.yaml", *settings, "--out", "run")
    assert done.returncode == 0, done.stderr
    plan = run(with_skip, "plan", "config.yaml", *settings, "--json")
    assert plan.returncode == 0, plan.stderr
    summary = json.loads((with_skip / "run" / "summary.json").read_text())
    assert [phase["name"] for phase in summary["phases"]] == [p["name"] for p in json.loads(plan.stdout)["phases"]]
    assert summary["flops"] == pytest.approx(json.loads(plan.stdout)["flops"], rel=0.01)
    assert summary["phases"][-1]["last_loss"] < 0.6 < summary["phases"][0]["first_loss"]
    scored = run(with_skip, "eval", "run", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["objective"] == "skip"


def test_an_objective_of_ones_own_is_refused_where_its_record_says_so(with_skip: Path) -> None:
    settings = [f"data.path={with_skip / 'text.txt'}", *SETTINGS]
    seen = run(with_skip, "plan", "config.yaml", *settings, "model.attention_preset=bert_style")
    assert seen.returncode == 2 and "the tokens that skip predicts" in seen.stderr
    unknown = run(with_skip, "plan", "config.yaml", "training.progressive.training_objective=slip")
    assert unknown.returncode == 2 and "did you mean skip" in unknown.stderr


def test_a_run_whose_objective_has_no_sampler_makes_no_text(with_skip: Path) -> None:
    refused = run(with_skip, "generate", "run")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "trained with skip, which does not go on from a prompt; generate needs clm" in refused.stderr
