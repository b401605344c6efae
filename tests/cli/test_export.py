"""``stackwise import`` and ``export``: what they need, what they refuse, and what they leave behind."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from stackwise.cli.main import main

LETTERS = "abcdefgh "
V = 17


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a random model of three layers and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("hub") / "llama"
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=34,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    library = Library(models.WordLevel({"<eos>": 0} | {c: i + 1 for i, c in enumerate(LETTERS)}, unk_token="<eos>"))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    library.add_special_tokens(["<eos>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


def test_importing_and_exporting_need_no_transformers(llama, tmp_path):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from stackwise.cli.main import main\n"
        "hub, run, out = sys.argv[1:]\n"
        "sys.exit(main(['import', hub, run]) or main(['export', run, out]))"
    )
    arguments = [sys.executable, "-c", code, str(llama), str(tmp_path / "run"), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    a, b = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (llama, tmp_path / "out"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copy_without(folder, to, *left_out):
    to.mkdir()
    for file in folder.iterdir():
        if file.name not in left_out:
            (to / file.name).write_bytes(file.read_bytes())
    return to


def test_what_is_missing_is_said_in_one_line(llama, tmp_path, capsys):
    cases = {
        "tokenizer.json": "it has no tokenizer.json, the only form in which tokenizers are read",
        "model.safetensors": "it has no model.safetensors",
    }
    for i, (left_out, message) in enumerate(cases.items()):
        folder = copy_without(llama, tmp_path / str(i), left_out)
        assert main(["import", str(folder), str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err == f"stackwise: {folder}: {message}\n"
    folder = copy_without(llama, tmp_path / "pickled", "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert main(["import", str(folder), str(tmp_path / "run")]) == 2
    assert "pickles, which are never loaded" in capsys.readouterr().err
    assert main(["import", str(llama), str(tmp_path / "run"), "--stacks", "4"]) == 2
    expected = "--stacks: 4 is out of range; must be at least 1 and at most 3, the number of layers"
    assert capsys.readouterr().err == f"stackwise: {expected}\n"
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".run*"))


def test_a_folder_that_cannot_be_written_leaves_nothing_behind(llama, tmp_path, capsys):
    assert main(["import", str(llama), str(tmp_path / "run")]) == 0
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "file" / "out")]) == 1
    assert main(["import", str(llama), str(tmp_path / "file" / "out")]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "cannot be written" in first and "cannot be written" in second
    assert sorted(os.listdir(tmp_path)) == ["file", "run"]


def test_an_imported_run_is_not_one_to_go_on_with(llama, tmp_path, capsys):
    assert main(["import", str(llama), str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "run")]) == 2
    run = tmp_path / "run"
    said = f"stackwise: {run} was imported and not trained; use train CONFIG --from {run} --out RUN\n"
    assert capsys.readouterr().err == said


def test_a_masked_model_is_scored_as_it_is_and_goes_out_as_it_came(llama, tmp_path, capsys):
    torch.manual_seed(7)
    config = ModernBertConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=34,
        num_hidden_layers=3,
        num_attention_heads=4,
        local_attention=6,
        max_position_embeddings=16,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id"), 0),
    )
    folder = tmp_path / "bert"
    ModernBertForMaskedLM(config).save_pretrained(folder)
    library = Library.from_file(str(llama / "tokenizer.json"))
    library.add_special_tokens(["[MASK]"])
    library.save(str(folder / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("bad cafe " * 60)
    run = tmp_path / "run"
    assert main(["import", str(folder), str(run), "--stacks", "3"]) == 0
    assert main(["eval", str(run), "--data", str(tmp_path / "text.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(math.log(V), abs=0.3)
    assert main(["generate", str(run), "--prompt", "bad", "--top-k", "3"]) == 2
    assert main(["generate", str(run), "--template", "bad {2}"]) == 0
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    a, b = (AutoModelForMaskedLM.from_pretrained(f).state_dict() for f in (folder, tmp_path / "out"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == library.token_to_id("[MASK]")
