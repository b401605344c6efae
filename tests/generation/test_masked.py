"""Gaps filled by Racks of masked language modelling."""

import json

import pytest
import torch

from stackwise.cli.main import main
from stackwise.runs.run import load


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on words that always follow each other, and the text's tokenizer of characters."""
    folder = tmp_path_factory.mktemp("mlm")
    (folder / "text.txt").write_text("the cat sat. " * 300)
    (folder / "config.yaml").write_text(
        f"""
model: {{d_model: 24, n_heads: 3, d_ff: 44, architecture: {{n_stacks: 1, blocks_per_stack: 1}}}}
training:
  {{strategy: end_to_end, batch_size: 7, seq_len: 26, max_steps: 90, device: cpu, optimizer: {{lr: 1e-2}},
    progressive: {{training_objective: mlm}}, masking: {{rate: 0.3}}}}
data: {{source: files, path: {folder}/text.txt, cache_dir: {folder}/cache, tokenizer: {{kind: characters}}}}
"""
    )
    assert main(["train", str(folder / "config.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def filled(capsys, run, *options):
    assert main(["generate", str(run), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)["text"]


def test_one_gap_gets_the_likeliest_token_of_the_whole_context(run, capsys):
    capsys.readouterr()
    loaded = load(run)
    for template in ("the c{1}t sat. the cat", "the cat s{1}t. the cat", "t{1}e cat sat. the cat"):
        text = filled(capsys, run, "--template", template, "--temperature", "0")
        before, after = template.split("{1}")
        ids = [*loaded.tokenizer.encode(before), loaded.tokenizer.mask_id, *loaded.tokenizer.encode(after)]
        with torch.no_grad():
            logits = loaded.rack(torch.tensor([[int(i) for i in ids]]))[0, len(before)]
        logits[list(loaded.tokenizer.special_ids)] = -torch.inf
        likeliest = loaded.tokenizer.decode([int(logits.argmax())])
        assert text == before + likeliest + after
        assert text == "the cat sat. the cat", "the model did not learn the text"


def test_the_surest_gap_is_filled_first_unless_another_order_is_named(run, capsys):
    template = ["--template", "the cat {5} the {4}sat.", "--seed", "3"]
    usual = filled(capsys, run, *template)
    assert usual == filled(capsys, run, *template, "--order", "confidence")
    assert len(usual) == len("the cat sat.  the cat sat.") and usual[:8] == "the cat " and usual[-4:] == "sat."


def test_guidance_is_refused(run, capsys):
    assert main(["generate", str(run), "--template", "the {3}", "--guidance", "1"]) == 2
    assert "guidance is only used for runs trained with diffusion" in capsys.readouterr().err
