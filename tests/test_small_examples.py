"""The short examples, each run in this process at a size of seconds."""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
OTHERS = {"mlgka_text_classification"}
"""Tested in a file of their own."""
SMALL = ["model.d_model=12", "model.n_heads=2", "model.d_ff=20", "training.device=cpu", "training.seq_len=11"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``data.path=…`` of a text made here; the working folder is new."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path / "cache"))
    draw = random.Random(7)
    Path("text.txt").write_text("".join(draw.choices("abcdefgh \n", k=3000)))
    return "data.path=text.txt"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_each_example_is_tested_and_says_how_long_it_takes() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")}
    tested = set(re.findall(r'example\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert names - OTHERS == tested
    for name in tested:
        about = (FOLDER / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
        assert f"    python examples/{name}.py" in about
        assert re.search(r"Takes [\w ]+ on two cores", about), name


def test_the_small_llama_grows_and_writes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    example("tiny_llama").main([*SMALL, "model.n_kv_heads=1", text, "data.source=files", "training.max_steps=6"])
    *phases, _ = lines_of(capsys)[:4]
    assert [line.split()[:2] for line in phases] == [["stack", str(k)] for k in range(3)]


def test_the_experts_of_depth_as_time_fill_a_gap(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["training.max_steps=4", "data.source=files", "data.tokenizer.kind=bytes", text]
    example("depth_as_time").main([*SMALL, *small])
    first, second, bound, *filled = lines_of(capsys)
    assert "parameters trained" in first and "parameters trained" in second
    assert bound.startswith("at most ") and bound.endswith(" bits per byte")
    assert "\n".join(filled).startswith("def ") and "\n".join(filled).endswith(" return None")


def test_the_trunk_of_two_adapters_does_not_move(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    example("dual_lora").main([*SMALL, "training.max_steps=9"])
    *phases, verdict = lines_of(capsys)
    assert [line.split(":")[0] for line in phases] == ["stack 0", "stack 1", "stack 2"]
    assert verdict == "the first Stack's own weights have not moved since its phase"


@pytest.mark.slow
def test_the_killed_run_ends_in_the_same_weights(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    example("kill_and_resume").main([])
    signal, whole, resumed = lines_of(capsys)
    assert signal == "the process ended by signal 9"
    assert resumed.endswith(": equal") and whole.split()[0] == resumed.split()[0]


def test_unlike_stacks_train_together(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    example("encoder_decoder_stacks").main(["--steps", "12"])
    first, second, loss = lines_of(capsys)
    assert first.startswith("Stack 0: 3 Blocks") and second.startswith("Stack 1: 2 Blocks")
    begin, end = map(float, re.findall(r"\d+\.\d+", loss))
    assert end < begin


def test_an_imported_model_grows_and_goes_out(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    example("grow_imported").main(["--steps", "2"])
    assert "loads it" in lines_of(capsys)[-1]
    grown = AutoModelForCausalLM.from_pretrained("runs/grow-imported/expanded-llama")
    assert grown.config.num_hidden_layers == 8


def test_the_first_recipe_that_fits_is_trained(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = [*SMALL, "training.max_steps=6", text]
    example("memory_budget").main([*small, "--mebibytes", "100"])
    *planned, measured = lines_of(capsys)
    peaks = [float(line.split()[1]) for line in planned]
    assert peaks[0] > peaks[1] and all(line.endswith(" fits") for line in planned)
    assert measured.endswith(" MiB measured")
    with pytest.raises(SystemExit, match=r"none of the recipes fits 0\.01 MiB"):
        example("memory_budget").main([*small, "--mebibytes", "0.01"])


def test_a_curriculum_of_ones_own_runs_as_planned(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["training.max_steps=20", "data.source=files", text]
    example("custom_curriculum").main([*SMALL, *small])
    lines = lines_of(capsys)
    planned = [line.removeprefix("planned: ")[:18].strip() for line in lines if line.startswith("planned")]
    trained = [line[:18].strip() for line in lines if not line.startswith("planned")]
    assert planned == trained and len(trained) == 8
    assert [line.split(":")[0].split()[-1] for line in lines[8:]] == ["mlm"] * 3 + ["clm"] * 5
