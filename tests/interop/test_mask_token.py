"""A causal model without a mask token goes on as one that fills gaps."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from stackwise.cli.main import main
from stackwise.model.architecture import create_simple_rack
from stackwise.runs.run import load

TEXT = "It was a dark and stormy night; the rain fell in torrents.\n" * 60


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_row_is_the_mean_and_changes_no_other_logit(tied):
    rack = create_simple_rack(1, 2, 12, 20, 3, 17, tie_embeddings=tied)
    ids = torch.randint(0, 17, (2, 5), generator=torch.Generator().manual_seed(1))
    before = rack(ids)
    rack.extend_vocabulary(1)
    after = rack(ids)
    assert after.shape == (2, 5, 18) and rack.spec.vocab_size == rack.vocab_size == 18
    torch.testing.assert_close(after[..., :17], before)
    torch.testing.assert_close(after[..., 17], before.mean(dim=-1))
    rack(torch.full((1, 3), 17)).sum().backward()
    assert rack.embedding.weight.grad is not None and rack.embedding.weight.grad[17].abs().sum() > 0


def test_an_imported_model_is_given_a_mask_token_and_learns_to_fill_gaps(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False))
    sizes = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    V = tokenizer.get_vocab_size()
    LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)).save_pretrained("llama")
    tokenizer.save("llama/tokenizer.json")
    assert main(["import", "llama", "base"]) == 0
    (tmp_path / "config.yaml").write_text(
        "model: {vocab_size: null, attention_preset: null}\n"
        "training: {strategy: end_to_end, max_steps: 3, batch_size: 4, seq_len: 8, device: cpu,\n"
        "  progressive: {training_objective: diffusion}}\n"
        "data: {source: files, path: text.txt}\n"
    )
    assert main(["train", "config.yaml", "--from", "base", "--out", "filled"]) == 0
    assert "one is added" in capsys.readouterr().err
    before, after = load("base"), load("filled")
    assert before.tokenizer.mask_id is None and after.tokenizer.mask_id == V
    assert after.rack.embedding.weight.shape == (V + 1, 16)
    assert main(["resume", "filled"]) == 0 and main(["eval", "filled"]) == 0
    capsys.readouterr()
    assert main(["generate", "filled", "--template", "It was a {3} night"]) == 0
    assert capsys.readouterr().out.startswith("It was a")
