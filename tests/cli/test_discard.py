"""A run whose input turns out wrong leaves its folder free."""

import contextlib

import pytest

from stackwise.cli.main import main
from stackwise.errors import UserError
from stackwise.training import run as training_run
from stackwise.training.rundir import RunDir

CONFIG = (
    "model: {d_model: 16, n_heads: 2, vocab_size: 7, architecture: {n_stacks: 1, blocks_per_stack: 1}}\n"
    "training: {max_steps: 2, batch_size: 2, seq_len: 11, device: cpu}\n"
    "data: {source: files, path: TEXT, cache_dir: CACHE, tokenizer: {kind: bytes}}\n"
)


def test_a_run_that_fails_on_its_input_leaves_nothing_and_its_folder_can_be_used_again(tmp_path, capsys):
    config, out, text = tmp_path / "c.yaml", tmp_path / "run", tmp_path / "t.txt"
    config.write_text(CONFIG.replace("TEXT", str(text)).replace("CACHE", str(tmp_path)))
    text.write_text("a line of text\n" * 50)
    assert main(["train", str(config), "--out", str(out)]) == 2
    assert "model.vocab_size: 7 is smaller" in capsys.readouterr().err
    assert not out.exists()
    assert main(["train", str(config), "model.vocab_size=null", "--out", str(out)]) == 0
    assert (out / "summary.json").exists()


@pytest.mark.parametrize("vocab_size", ["null", "7"])
def test_no_process_gets_hold_of_a_run_between_its_creation_and_its_training(tmp_path, monkeypatch, vocab_size):
    """Else the one that trains it would have it deleted by the one that created it and finds it taken."""
    config, out, text = tmp_path / "c.yaml", tmp_path / "run", tmp_path / "t.txt"
    config.write_text(CONFIG.replace("TEXT", str(text)).replace("CACHE", str(tmp_path)))
    text.write_text("a line of text\n" * 50)
    others, held = contextlib.ExitStack(), []
    original = training_run._go

    def reached(*arguments):
        with contextlib.suppress(UserError):
            others.enter_context(RunDir(out).lock())  # as stackwise resume does
            held.append(out)
        return original(*arguments)

    monkeypatch.setattr(training_run, "_go", reached)
    with others:
        code = main(["train", str(config), f"model.vocab_size={vocab_size}", "--out", str(out)])
    assert not held
    assert (code, (out / "summary.json").exists()) == ((0, True) if vocab_size == "null" else (2, False))
    assert out.exists() is (vocab_size == "null")
