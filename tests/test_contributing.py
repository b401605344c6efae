"""CONTRIBUTING.md's examples: each is added to a copy of the package as printed, and its commands run there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from contributing import Example, examples, package_with

CONFIG = """
model: {vocab_size: 300, d_model: 16, n_heads: 2, d_ff: 40, architecture: {n_stacks: 3, blocks_per_stack: 1}}
training: {batch_size: 3, seq_len: 11, max_steps: 12, device: cpu, logging: {every_steps: 1}}
data: {source: files, path: text.txt, tokenizer: {kind: bytes}}
"""
TEXT = "".join(f"The {n}th line says {n * n}, and that is all it says.\n" for n in range(300))


ONE_PROCESS = """
import contextlib, io, json, sys
from stackwise.cli.main import main
outputs = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(command) == 0, command
    outputs.append(said.getvalue())
print(json.dumps(outputs))
"""
"""The commands one after another: importing torch anew for each would take most of the time."""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory):
    """Adds an example to a copy of the package, runs its commands, and gives their outputs and the folder."""

    def run(example: Example) -> tuple[list[str], Path]:
        folder = tmp_path_factory.mktemp("copy")
        package_with(example, folder)
        (folder / "config.yaml").write_text(CONFIG)
        (folder / "text.txt").write_text(TEXT)
        (folder / "letters.mbox").write_text(
            "".join(
                f"From a@b.c Thu Jan  1 00:00:00 1970\nFrom: a@b.c\n\nLetter {n}.\n{TEXT[:500]}\n" for n in range(30)
            )
        )
        environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "STACKWISE_CACHE": str(folder / "cache")}
        commands = [shlex.split(command) for command in example.commands]
        assert all(program == "stackwise" for program, *_ in commands)
        done = subprocess.run(
            [sys.executable, "-c", ONE_PROCESS, json.dumps([arguments for _, *arguments in commands])],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs = json.loads(done.stdout)
        return outputs, folder

    return run


def summary(folder: Path) -> dict:
    return json.loads((folder / "run/summary.json").read_text())


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def check_curriculum(outputs: list[str], folder: Path) -> None:
    """Every Stack trains alone, in the order of the sweeps, two steps each."""
    phases = summary(folder)["phases"]
    assert [re.findall(r"stack (\d)", phase["name"])[0] for phase in phases] == [*"012", *"210"]
    assert {phase["steps"] for phase in phases} == {2}
    more = [phase["trainable_parameters"] - phases[1]["trainable_parameters"] for phase in phases]
    assert more == [300 * 16, 0, 0, 0, 0, 300 * 16]  # the embedding trains beside the first Stack


def check_objective(outputs: list[str], folder: Path) -> None:
    """More is under test in ``objectives/test_one_file_and_one_line.py``."""
    assert json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 12


def check_attention(outputs: list[str], folder: Path) -> None:
    """No matrix for values is there, a kept cache gives text, and the folder's own code computes the run's logits."""
    from safetensors import safe_open

    with safe_open(folder / "folder/model.safetensors", "pt") as file:
        names = list(file.keys())
    assert any("k_proj" in name for name in names) and not any("v_proj" in name for name in names)
    assert len(json.loads(outputs[1])["text"]) > 0
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
theirs = AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True).eval()
assert not any(name == "stackwise" or name.startswith("stackwise.") for name in sys.modules)
ids = torch.arange(7, 16)[None]
found = theirs(ids).logits
from stackwise.runs.run import load
torch.testing.assert_close(found, load("run").rack.eval()(ids), rtol=1e-5, atol=1e-5)
"""
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def check_storage(outputs: list[str], folder: Path) -> None:
    """Three Stacks join one after another, and the trunk's matrices are of one byte in the last checkpoint."""
    from safetensors import safe_open

    dtypes = set()
    for path in (folder / "run/checkpoints/objects").iterdir():
        with safe_open(path, "pt") as file:
            dtypes |= {file.get_slice(name).get_dtype() for name in list(file.keys()) if "proj.weight" in name}
    assert "F8_E5M2" in dtypes and len(summary(folder)["phases"]) == 3


def check_optimizer(outputs: list[str], folder: Path) -> None:
    """One moment of four bytes a weight, in the plan; and the loss falls."""
    last = json.loads(outputs[0])["phases"][-1]
    assert last["memory_bytes"]["optimizer"] == 4 * last["trainable_parameters"]
    found = losses(folder)
    assert len(found) == 12 and found[-1] < found[0]


def check_corpus(outputs: list[str], folder: Path) -> None:
    meta = next((folder / "cache/tokens").glob("*/meta.json"))
    assert json.loads(meta.read_text())["n_documents"] == 30


def check_command(outputs: list[str], folder: Path) -> None:
    assert "embedding.weight  [300, 16]  torch.float32" in outputs[-1].splitlines()


CHECKS = {
    "A curriculum": check_curriculum,
    "An objective": check_objective,
    "An attention variant": check_attention,
    "A storage": check_storage,
    "An optimizer": check_optimizer,
    "A corpus": check_corpus,
    "A command": check_command,
}


def test_every_example_is_checked_and_touches_two_files_at_most() -> None:
    found = examples()
    assert set(found) == set(CHECKS)
    for heading, example in found.items():
        touched = {*example.files, *(path for path, _ in example.changes)}
        assert len(example.files) == 1 and len(touched) == 2 and example.commands, heading
        assert sum(line[0] == "+" for _, diff in example.changes for line in diff.splitlines()) <= 2, heading


@pytest.mark.parametrize("heading", CHECKS)
def test_an_example_works_as_printed(heading: str, extended) -> None:
    CHECKS[heading](*extended(examples()[heading]))
