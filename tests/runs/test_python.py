"""A run from Python: killed and resumed in a script and a notebook; callbacks, validation data, one-line functions."""

import json
import os
import random
import signal
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from torch.utils.data import DataLoader

import stackwise
from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.data.tokenizers import ByteTokenizer
from stackwise.errors import ConfigError, StoppedBySignal, UserError
from stackwise.model.architecture import create_rack_from_config, create_simple_rack
from stackwise.training import ArchitectureTrainer, ProgressiveDataLoader, ProgressiveRackBuilder, ProgressiveTrainer

V, B, T = 37, 3, 7

TRAINER = """\
import os, signal, sys
import numpy as np
from stackwise.config.base import StackWiseConfig
from stackwise.training import ProgressiveDataLoader, ProgressiveRackBuilder, ProgressiveTrainer

out, dies_at = sys.argv[1], int(sys.argv[2])
config = StackWiseConfig.from_dict({
    "model": {"vocab_size": 37, "d_model": 26, "n_heads": 13, "d_ff": 19, "dropout": 0.1,
              "architecture": {"n_stacks": 2, "blocks_per_stack": 1}},
    "training": {"batch_size": 3, "seq_len": 7, "max_steps": 14, "device": "cpu", "checkpoint": {"every_steps": 5},
                 "logging": {"every_steps": 1}}})
tokens = np.random.default_rng(0).integers(0, 37, 503)

def on_step(seen):
    print(seen["step"], flush=True)
    if seen["step"] == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)

trainer = ProgressiveTrainer(config, on_step=on_step)
loader = ProgressiveDataLoader(tokens[:400], config)
trainer.train_rack(ProgressiveRackBuilder(config), loader, validation=tokens[400:], out=out, resume=True)
"""
FUNCTION = """\
import os, signal, sys
import stackwise

out, dies_at = sys.argv[1], int(sys.argv[2])

def on_step(seen):
    print(seen["step"], flush=True)
    if seen["step"] == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)

config = {
    "model": {"d_model": 26, "n_heads": 13, "d_ff": 19, "architecture": {"n_stacks": 2, "blocks_per_stack": 1}},
    "training": {"batch_size": 3, "seq_len": 7, "max_steps": 14, "device": "cpu", "checkpoint": {"every_steps": 5},
                 "logging": {"every_steps": 1}},
    "data": {"source": "files", "path": os.environ["TEXT"], "cache_dir": os.environ["TEXT"] + ".cache",
             "tokenizer": {"kind": "characters"}}}
stackwise.train(config, out, resume=True, on_step=on_step)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(random.Random(5).choices("abcdefgh ", k=4000)))
    return path


def run_script(script, out, dies_at, text):
    """The exit code, and the steps that the callback saw."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(out), str(dies_at)], capture_output=True, text=True, timeout=240,
        env={**os.environ, "TEXT": str(text)},
    )  # fmt: skip
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, [int(line) for line in done.stdout.split()]


def without_times(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k not in ("tokens_per_second", "mfu", "memory_bytes")} for m in lines]


@pytest.mark.parametrize("script", [TRAINER, FUNCTION], ids=["trainer", "function"])
def test_a_killed_script_run_again_ends_where_an_unbroken_one_does(script, tmp_path, text, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setenv("TEXT", str(text))

    def run_here(out):
        monkeypatch.setattr(sys, "argv", ["script", str(out), "0"])
        exec(compile(script, "script", "exec"), {})
        return [int(line) for line in capsys.readouterr().out.split()]

    assert run_here(whole) == list(range(1, 15))
    assert run_script(script, cut, 9, text) == (-signal.SIGKILL, list(range(1, 10)))
    assert not (cut / "summary.json").exists()
    # The checkpoints are of steps 5 and 7, where the first phase ends.
    assert run_script(script, cut, 0, text) == (0, list(range(8, 15)))
    ends = [json.loads((run / "summary.json").read_text()) for run in (whole, cut)]
    for key in ("weights_sha256", "validation", "tokens", "flops"):
        assert ends[0][key] == ends[1][key]
    assert without_times(whole) == without_times(cut)
    assert [m["step"] for m in without_times(cut)] == list(range(1, 15))
    assert run_here(cut) == []  # it is complete
    assert json.loads((cut / "summary.json").read_text())["weights_sha256"] == ends[0]["weights_sha256"]


def notebook(cells):
    """Runs the cells in a kernel: (whether it died, {what each stream printed, and the plain text of displays})."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    died = False
    try:
        NotebookClient(nb, timeout=240, kernel_name="python3").execute()
    except DeadKernelError:
        died = True
    found = {"stdout": "", "stderr": "", "display": ""}
    for output in (output for cell in nb.cells for output in cell.get("outputs", ())):
        if output.output_type == "stream":
            found[output.name] += output.text
        elif output.output_type == "display_data":
            found["display"] += output.data["text/plain"] + "\n"
    return died, found


def test_a_notebook_whose_kernel_is_killed_ends_where_an_unbroken_script_does(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setenv("TEXT", str(text))
    monkeypatch.setattr(sys, "argv", ["script", str(tmp_path / "whole"), "0"])
    exec(compile(FUNCTION, "script", "exec"), {})
    capsys.readouterr()
    setup, _, rest = FUNCTION.partition("out, dies_at = sys.argv[1], int(sys.argv[2])\n")
    cut = tmp_path / "cut"
    died, _ = notebook([setup, f"out, dies_at = {str(cut)!r}, 9", rest])
    assert died and not (cut / "summary.json").exists()
    died, found = notebook([setup, f"out, dies_at = {str(cut)!r}, 0", rest])
    assert not died and [int(line) for line in found["stdout"].split("\n") if line.isdigit()] == list(range(8, 15))
    ends = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut")]
    assert ends[0]["weights_sha256"] == ends[1]["weights_sha256"]
    # Lines that stay, and one that follows the steps in place: it ends at the last of the 7 steps of the phase.
    assert "going on from the checkpoint of step 7" in found["stdout"] and not found["stderr"]
    assert found["display"].count("7/7") == 1 and "  loss " in found["display"]


# ---- trainers


def config(*overrides):
    return StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": V, "d_model": 26, "n_heads": 13, "d_ff": 19,
                "architecture": {"n_stacks": 2, "blocks_per_stack": 1},
            },
            "training": {
                "batch_size": B, "seq_len": T, "max_steps": 8, "device": "cpu",
                "schedule": {"warmup_steps": 0, "rewarmup_steps": 0}, "checkpoint": {"every_steps": 3},
            },
        },
        overrides,
    )  # fmt: skip


TOKENS = np.random.default_rng(0).integers(0, V, 503)


class Dies(Exception):
    pass


def dying(at):
    def on_step(seen):
        if seen["step"] == at:
            raise Dies

    return on_step


def train(settings, out=None, loader=None, rack=None, **options):
    """Grows a Rack, or trains ``rack`` end to end: (what the trainer returns, the Rack)."""
    hooks = {name: options.pop(name) for name in ("on_step", "on_phase", "tokenizer") if name in options}
    loader = ProgressiveDataLoader(TOKENS, settings) if loader is None else loader
    if rack is not None:
        results = ArchitectureTrainer(settings, **hooks).train_architecture(rack, loader, out=out, **options)
        return results, rack
    builder = ProgressiveRackBuilder(settings)
    results = ProgressiveTrainer(settings, **hooks).train_rack(builder, loader, out=out, **options)
    return results, builder.rack


def shuffled():
    """Batches whose order torch's own generator draws, of rows that it draws too."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 11

        def __getitem__(self, i):
            return {"input_ids": torch.randint(0, V, (T,))}

    return DataLoader(Rows(), batch_size=B, shuffle=True)


@pytest.mark.parametrize(
    "at, overrides",
    [
        (2, ()),
        (7, ("trunk_strategy=frozen", "cache_activations=true")),
        (7, ("trunk_strategy=qlora", "trunk_precision=nf4")),
        (5, ("trunk_strategy=frozen", "new_stack_init=copy")),
    ],
)
def test_a_rack_grown_in_a_run_directory_resumes_exactly_and_is_loaded_from_it(at, overrides, tmp_path):
    qlora = "true" if "trunk_strategy=qlora" in overrides else "false"
    place = "disk" if "trunk_strategy=frozen" in overrides else "none"
    progressive = [f"training.progressive.{override}" for override in overrides]
    settings = config("model.dropout=0.2", f"training.qlora.enabled={qlora}", f"training.offload={place}", *progressive)
    cut = tmp_path / "cut"
    whole, rack = train(settings)
    with pytest.raises(Dies):
        train(settings, cut, on_step=dying(at))
    resumed, again = train(settings, cut, resume=True)
    assert resumed["weights_sha256"] == whole["weights_sha256"] and resumed["steps"] == 8
    ids = torch.from_numpy(TOKENS[:T]).view(1, T)
    loaded = stackwise.load(cut)
    assert torch.equal(loaded.rack(ids), rack.eval()(ids)) and torch.equal(again.eval()(ids), rack(ids))
    with pytest.raises(UserError, match="no tokenizer"):
        _ = loaded.tokenizer


@pytest.mark.parametrize("at", [2, 5, 7])
def test_batches_of_torchs_own_generator_resume_exactly_in_the_rack_that_is_given(at, tmp_path):
    settings, cut = config("model.dropout=0.2"), tmp_path / "cut"

    def fresh():
        return create_rack_from_config(settings)

    torch.manual_seed(1)
    whole, rack = train(settings, loader=shuffled(), rack=fresh(), validation=shuffled())
    torch.manual_seed(2)
    with pytest.raises(Dies):
        train(settings, cut, shuffled(), fresh(), on_step=dying(at), validation=shuffled())
    torch.manual_seed(3)
    resumed, again = train(settings, cut, shuffled(), fresh(), resume=True, validation=shuffled())
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["validation"] == whole["validation"]
    assert all(torch.equal(a, b) for a, b in zip(rack.parameters(), again.parameters(), strict=True))


def test_callbacks_see_every_step_and_every_phase():
    steps, phases = [], []
    results, _ = train(config("training.evaluation.every_steps=3"), validation=TOKENS[:90], on_step=steps.append,
                       on_phase=phases.append)  # fmt: skip
    assert [s["step"] for s in steps] == list(range(1, 9))
    assert [s["phase"] for s in steps] == ["stack 0"] * 4 + ["stack 1"] * 4
    assert [s["tokens"] for s in steps] == [B * T * i for i in range(1, 9)]
    assert [s["step"] for s in steps if "validation_loss" in s] == [3, 4, 6, 8]
    assert phases == results["phases"] and [p["validation_loss"] for p in phases] == [
        steps[3]["validation_loss"], steps[7]["validation_loss"]
    ]  # fmt: skip
    assert results["phases"][0]["first_loss"] == steps[0]["loss"] and results["final_loss"] == steps[7]["loss"]


def test_validation_data_of_every_form_is_scored_alike():
    rack = create_rack_from_config(config())
    held = TOKENS[: 5 * T + 1]
    rows = torch.from_numpy(np.stack([held[i * T : i * T + T + 1] for i in range(5)]))
    expected = torch.nn.functional.cross_entropy(rack.eval()(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()
    frozen = config("training.optimizer.lr=1e-30", "training.optimizer.weight_decay=0", "training.max_steps=1")
    loader = ProgressiveDataLoader(held, frozen)
    # A batch of T + 1 tokens predicts T of them: the last has nothing after it.
    batches = [rows[:3], {"input_ids": rows[3:]}]
    for data in (held, loader, batches):
        results, _ = train(frozen, rack=create_rack_from_config(frozen), validation=data)
        assert results["validation"]["loss"] == pytest.approx(expected, rel=1e-5)
        assert results["validation"]["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
        assert results["validation"]["bits_per_byte"] is None
    assert train(frozen, rack=create_rack_from_config(frozen))[0]["validation"] is None
    for data, message in (
        (TOKENS.astype(float), "whole numbers"), (iter(batches), "only once"),
        ([{"input_ids": rows, "labels": torch.full_like(rows, -100)}], "no token of its batches counts"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            train(frozen, rack=create_rack_from_config(frozen), validation=data)


def test_a_run_directory_refuses_what_is_not_its_run(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Dies):
        train(config(), out, on_step=dying(5))
    with pytest.raises(UserError, match=r"training\.seed = 0, but you give 3"):
        train(config("training.seed=3"), out, resume=True)
    others = ProgressiveDataLoader(TOKENS[::-1].copy(), config())
    with pytest.raises(UserError, match="trained on other tokens"):
        train(config(), out, others, resume=True)
    with pytest.raises(UserError, match="holds a run"):
        train(config(), out)
    with pytest.raises(UserError, match="out names no run directory"):
        train(config(), resume=True)
    with pytest.raises(UserError, match=r"config\.model describes: its d_model differs"):
        train(config(), tmp_path / "other", rack=create_simple_rack(2, 1, 52, 19, 13, V))
    assert not (tmp_path / "other").exists()
    results, _ = train(config(), out, resume=True)
    assert results["weights_sha256"] == train(config())[0]["weights_sha256"]


def test_the_command_line_says_that_the_batches_are_in_python(tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(Dies):
        train(config(), out, on_step=dying(2))  # before its first checkpoint
    for command in (["resume", str(out)], ["train", str(out / "config.yaml"), "--out", str(tmp_path / "other")]):
        assert main(command) == 2
        assert "data.source: 'loader'" in capsys.readouterr().err
    train(config(), out, resume=True)
    assert main(["resume", str(out)]) == 0
    assert "no validation data was given" in capsys.readouterr().err


def test_a_run_of_a_trainer_that_has_a_tokenizer_is_generated_from_and_evaluated(tmp_path, text):
    tokenizer = ByteTokenizer()
    tokens = np.asarray(tokenizer.encode(text.read_text()))
    settings = config(f"model.vocab_size={tokenizer.vocab_size}")
    train(settings, tmp_path / "run", ProgressiveDataLoader(tokens, settings), tokenizer=tokenizer)
    assert stackwise.generate(tmp_path / "run", "abc", 5).startswith("abc")
    assert stackwise.evaluate(tmp_path / "run", text)["tokens"] > 3000
    with pytest.raises(UserError, match=r"data\.source: 'loader'.*--data F scores other text"):
        stackwise.evaluate(tmp_path / "run")
    with pytest.raises(UserError, match="another tokenizer, or with none"):
        train(settings, tmp_path / "run", ProgressiveDataLoader(tokens, settings), resume=True)


def test_an_interrupted_trainer_stops_with_a_checkpoint_and_goes_on(tmp_path):
    def interrupt(seen):
        if seen["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedBySignal, match="step 2; its checkpoint is saved"):
        train(config(), tmp_path / "run", on_step=interrupt)
    with pytest.raises(StoppedBySignal, match="step 2; nothing is saved"):
        train(config(), None, on_step=interrupt)
    steps = []
    train(config(), tmp_path / "run", resume=True, on_step=lambda seen: steps.append(seen["step"]))
    assert steps == list(range(3, 9))


# ---- five functions


def test_five_functions_plan_train_load_generate_and_evaluate(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: {d_model: 26, n_heads: 13, d_ff: 19, architecture: {n_stacks: 2, blocks_per_stack: 1}}\n"
        "training: {batch_size: 3, seq_len: 7, max_steps: 6, device: cpu}\n"
        f"data: {{source: files, path: {text}, cache_dir: {tmp_path}/cache, tokenizer: {{kind: characters}}}}\n"
    )
    planned = stackwise.plan(file)
    steps = []
    summary = stackwise.train(file, tmp_path / "run", on_step=steps.append)
    assert [p.steps for p in planned.phases] == [p["steps"] for p in summary["phases"]] == [3, 3]
    assert planned.to_dict()["peak_memory_bytes"] > 0 and len(steps) == 6
    run = stackwise.load(tmp_path / "run")
    written = stackwise.generate(run, "abc", 11, seed=3)
    assert written == stackwise.generate(tmp_path / "run", "abc", tokens=11, seed=3) and written.startswith("abc")
    assert len(written) <= 14 and written != stackwise.generate(run, "abc", 11, seed=4)
    scores = stackwise.evaluate(tmp_path / "run")
    assert scores["loss"] == pytest.approx(summary["validation"]["loss"], rel=1e-6)
    assert stackwise.evaluate(tmp_path / "run", text)["tokens"] == 571 * T
    with pytest.raises(ConfigError, match=r"d_model"):
        stackwise.plan({"model": {"d_model": -1}})
    with pytest.raises(UserError, match=r"training\.max_steps = 6, but you give 7"):
        longer = StackWiseConfig.from_yaml(file).changed({"training.max_steps": 7})
        stackwise.train(longer, tmp_path / "run", resume=True)
