"""The commands, run in this process on runs of a few seconds: what they write, print and refuse."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import stackwise
from stackwise.cli.main import main

METRICS = {
    "step", "phase", "stack", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes", "flops",
}  # fmt: skip
PHASE = {
    "name", "stack", "steps", "tokens", "flops", "first_loss", "last_loss", "validation_loss", "bits_per_byte",
    "objective", "trainable_parameters", "storage", "peak_memory_bytes", "seconds", "stopped_early",
}  # fmt: skip
CONFIG = """
model: {d_model: 20, n_heads: 2, d_ff: 36, architecture: {n_stacks: 3, blocks_per_stack: 1}}
training:
  batch_size: 3
  seq_len: 14
  max_steps: 23
  progressive: {joint_fraction: 0.25}
  schedule: {warmup_steps: 3, rewarmup_steps: 2}
  logging: {every_steps: 5}
  device: cpu
data: {source: files, tokenizer: {kind: characters}}
"""
MASKED = ["model.attention_preset=bert_style", "training.progressive.training_objective=mlm", "training.max_steps=8"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``config.yaml`` and the ``text.txt`` that it trains on."""
    folder = tmp_path_factory.mktemp("work")
    draw = random.Random(5)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 5))) for _ in range(50)]
    (folder / "text.txt").write_text(" ".join(draw.choices(words, k=2000)))
    settings = f"{CONFIG.rstrip()[:-1]}, path: {folder / 'text.txt'}, cache_dir: {folder / 'cache'}}}\n"
    (folder / "config.yaml").write_text(settings)
    return folder


@pytest.fixture(scope="module")
def run(work: Path) -> Path:
    """A run of ``config.yaml``."""
    assert main(["train", str(work / "config.yaml"), "--out", str(work / "run")]) == 0
    return work / "run"


@pytest.fixture(scope="module")
def masked(work: Path) -> Path:
    """A run of the same with masked tokens."""
    assert main(["train", str(work / "config.yaml"), *MASKED, "--out", str(work / "masked")]) == 0
    return work / "masked"


def said(capsys: pytest.CaptureFixture[str], *line: str | Path) -> Any:
    """The JSON that a command prints; it must succeed and print nothing else."""
    capsys.readouterr()
    assert main([str(word) for word in line]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *line: str | Path) -> str:
    """The one line of a command that must exit with 2, without its prefix."""
    capsys.readouterr()
    assert main([str(word) for word in line]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("stackwise: ") and err.count("\n") == 1, err
    return err.removeprefix("stackwise: ").rstrip("\n")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary_of(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    assert isinstance(summary, dict)
    return summary


def test_training_prints_the_summary_it_writes(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = work / "printed"
    printed = said(capsys, "train", work / "config.yaml", "training.max_steps=4", "--out", out, "--json")
    assert printed == summary_of(out)


def test_the_summary_has_the_promised_keys_and_adds_up(run: Path) -> None:
    summary = summary_of(run)
    assert set(summary) == {
        "validation", "tokens", "flops", "wall_seconds", "peak_memory_bytes", "best", "weights_sha256", "phases",
    }  # fmt: skip
    assert set(summary["validation"]) == {"loss", "perplexity", "bits_per_byte"}
    phases = summary["phases"]
    assert [set(phase) for phase in phases] == [PHASE] * 4
    assert [(phase["name"], phase["stack"]) for phase in phases] == [
        ("stack 0", 0), ("stack 1", 1), ("stack 2", 2), ("joint", None),
    ]  # fmt: skip
    assert sum(phase["steps"] for phase in phases) == 23
    assert summary["tokens"] == sum(phase["tokens"] for phase in phases) == 23 * 3 * 14
    assert summary["flops"] == sum(phase["flops"] for phase in phases)
    assert summary["validation"]["loss"] == phases[-1]["validation_loss"]
    assert summary["validation"]["bits_per_byte"] == phases[-1]["bits_per_byte"]


def test_metrics_have_the_promised_keys_at_the_first_every_fifth_and_each_phases_last_step(run: Path) -> None:
    lines = metrics_of(run)
    assert [METRICS - set(line) for line in lines] == [set()] * len(lines)
    ends = [sum(phase["steps"] for phase in summary_of(run)["phases"][: k + 1]) for k in range(4)]
    assert [line["step"] for line in lines] == sorted({1, 5, 10, 15, 20, *ends})
    for line in lines:
        assert line["tokens"] == line["step"] * 3 * 14
        assert line["loss"] > 0 and line["lr"] > 0 and line["grad_norm"] > 0 and line["tokens_per_second"] > 0
    assert [line["step"] for line in lines if "validation_loss" in line] == ends
    assert lines[-1]["flops"] == summary_of(run)["flops"]


def test_the_resolved_config_repeats_the_run(run: Path, work: Path) -> None:
    again = work / "again"
    assert main(["train", str(run / "config.yaml"), "--out", str(again)]) == 0
    assert summary_of(again)["weights_sha256"] == summary_of(run)["weights_sha256"]


def test_the_plans_totals_are_exactly_what_the_run_then_takes(
    run: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocab_size, summary = stackwise.load(run).tokenizer.vocab_size, summary_of(run)
    plan = said(capsys, "plan", work / "config.yaml", f"model.vocab_size={vocab_size}", "--json")
    assert {"phases", "peak_memory_bytes", "flops", "disk_bytes", "fits"} <= set(plan)
    assert plan["flops"] == summary["flops"]
    for planned, done in zip(plan["phases"], summary["phases"], strict=True):
        for key in ("name", "steps", "tokens", "flops", "trainable_parameters"):
            assert planned[key] == done[key], key
        memory = planned["memory_bytes"]
        assert {"weights", "gradients", "optimizer", "activations", "logits", "peak"} <= set(memory)
        assert 0 < max(memory.values()) <= plan["peak_memory_bytes"]
        assert memory["gradients"] == 4 * done["trainable_parameters"]
        assert memory["optimizer"] >= 8 * done["trainable_parameters"]
    assert plan["fits"] is True
    assert said(capsys, "plan", work / "config.yaml", "--memory", "1KB", "--json")["fits"] is False


def test_planning_writes_nothing(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(work / "config.yaml"), f"data.cache_dir={tmp_path / 'cache'}"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_evaluating_gives_the_summarys_validation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores, validation = said(capsys, "eval", run, "--json"), summary_of(run)["validation"]
    assert {key: scores[key] for key in validation} == validation
    assert scores["step"] == 23 and scores["objective"] == "clm"
    assert 0 < scores["bigram_bits_per_byte"] < scores["unigram_bits_per_byte"]


def test_evaluating_other_text_scores_that_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.txt").write_text("habcdefg" * 20)
    other = said(capsys, "eval", run, "--data", tmp_path / "other.txt", "--json")
    assert other["loss"] != summary_of(run)["validation"]["loss"]
    assert other["bigram_bits_per_byte"] < 0.1


def test_generating_is_a_function_of_the_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(seed: int) -> str:
        printed = said(capsys, "generate", run, "--prompt", "a", "--tokens", "40", "--seed", str(seed), "--json")
        assert printed["prompt"] == "a" and printed["seed"] == seed
        return str(printed["text"])

    texts = [text(seed) for seed in range(5)]
    assert texts == [text(seed) for seed in range(5)]
    assert len(set(texts)) > 1 and max(map(len, texts)) <= 40
    main(["generate", str(run), "--prompt", "a", "--tokens", "40", "--seed", "3"])
    assert capsys.readouterr().out == f"a{texts[3]}\n"


def test_a_masked_run_trains_and_is_scored_on_what_it_hid(masked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summary_of(masked)
    assert summary["validation"]["loss"] > 0
    assert summary["validation"]["bits_per_byte"] is None, "predicting some tokens is not the likelihood of a text"
    scores = said(capsys, "eval", masked, "--json")
    assert (scores["loss"], scores["objective"]) == (summary["validation"]["loss"], "mlm")


def test_a_masked_run_fills_gaps_and_has_no_options_of_prompts(
    masked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--top-k is only used for runs trained with clm" in refusal(capsys, "generate", masked, "--top-k", "3")


def test_a_prompt_with_unknown_characters_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'Z'" in refusal(capsys, "generate", run, "--prompt", "abZ")


@pytest.mark.parametrize("command", ["resume", "eval", "generate"])
def test_a_run_that_is_not_there_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, command, tmp_path / "none") == f"{tmp_path / 'none'}: no such run"
    assert refusal(capsys, command, tmp_path) == f"{tmp_path} is not a run: it has no config.yaml"


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal_after_notes(capsys, "train", work / "config.yaml", "model.vocab_size=5", "--out", work / "small")
    assert line.startswith("model.vocab_size: 5 is smaller than the tokenizer's")


def test_data_that_is_not_there_is_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "train", work / "config.yaml", "data.path=/no/such/text", "--out", work / "no-data")
    assert line.startswith("data.path:") and "/no/such/text" in line


def test_a_stopping_loss_that_is_not_finite_updates_nothing_and_exits_with_1(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["training.optimizer.lr=1e12", "training.grad_clip=null", "training.max_steps=40"]
    assert main(["train", str(work / "config.yaml"), *settings, "--out", str(work / "diverged")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("stackwise: step ") and "nothing was updated" in line
    assert not (work / "diverged" / "summary.json").exists()


def refusal_after_notes(capsys: pytest.CaptureFixture[str], *line: str | Path) -> str:
    """The last line of a command that must exit with 2 after it said something of its progress."""
    capsys.readouterr()
    assert main([str(word) for word in line]) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("stackwise: ")
