"""A run whose input turns out wrong leaves its folder free."""

from stackwise.cli.main import main


def test_a_run_that_fails_on_its_input_leaves_nothing_and_its_folder_can_be_used_again(tmp_path, capsys):
    config, out, text = tmp_path / "c.yaml", tmp_path / "run", tmp_path / "t.txt"
    config.write_text(
        "model: {d_model: 16, n_heads: 2, vocab_size: 7, architecture: {n_stacks: 1, blocks_per_stack: 1}}\n"
        "training: {max_steps: 2, batch_size: 2, seq_len: 11, device: cpu}\n"
        f"data: {{source: files, path: {text}, cache_dir: {tmp_path}, tokenizer: {{kind: bytes}}}}\n"
    )
    text.write_text("a line of text\n" * 50)
    assert main(["train", str(config), "--out", str(out)]) == 2
    assert "model.vocab_size: 7 is smaller" in capsys.readouterr().err
    assert not out.exists()
    assert main(["train", str(config), "model.vocab_size=null", "--out", str(out)]) == 0
    assert (out / "summary.json").exists()
