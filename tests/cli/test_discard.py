"""A run whose input turns out wrong leaves its folder free."""

import contextlib

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from stackwise.cli.main import main
from stackwise.data.tokenizers import open_pretrained
from stackwise.errors import UserError
from stackwise.runs import run as training_run
from stackwise.store.rundir import RunDir
from stackwise.training.loop import Loop

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


def tokenizer_file(path, model):
    library = Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["</s>"])
    library.save(str(path))
    return ["data.tokenizer.kind=pretrained", f"data.tokenizer.path={path}"]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("too little to validate", "needs at least 12 validation tokens, but there are 9"),
        ("nothing masked to validate", "no token is masked in the 1 window of"),
        ("cache is a file", "the token store cannot be written: Not a directory (data.cache_dir"),
        ("no token for unknown words", "data.tokenizer: the tokenizer cannot encode the text"),
        ("characters dropped", "data.tokenizer: the tokenizer has no token for 'f'"),
        ("larger than any machine", "this run does not fit: it needs"),
    ],
)
def test_what_is_known_before_training_is_said_before_it_and_leaves_nothing(tmp_path, capsys, monkeypatch, case, said):
    config, out, text = tmp_path / "c.yaml", tmp_path / "run", tmp_path / "t.txt"
    config.write_text(CONFIG.replace("TEXT", str(text)).replace("CACHE", str(tmp_path)))
    text.write_text("a line of text\n" * 53)
    masked = "training.progressive.training_objective=mlm"
    more = {
        "too little to validate": ["data.validation_fraction=0.01"],
        "nothing masked to validate": [masked, "training.masking.rate=0.001", "data.validation_fraction=0.02"],
        "cache is a file": [f"data.cache_dir={text}"],
        "no token for unknown words": tokenizer_file(tmp_path / "a.json", models.WordLevel({"line": 0})),
        "characters dropped": tokenizer_file(tmp_path / "b.json", models.BPE(dict(zip("alinetx", range(7))), [])),
        "larger than any machine": ["model.d_model=2000000", "model.d_ff=4000000"],
    }[case]

    def never(*arguments):
        raise AssertionError("it trains")

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "train", never)
        assert main(["train", str(config), "model.vocab_size=null", *more, "--out", str(out)]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
    assert main(["train", str(config), "model.vocab_size=null", "--out", str(out)]) == 0
    assert (out / "summary.json").exists()


def test_a_tokenizer_may_lose_what_its_normalizer_takes_away(tmp_path):
    library = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    library.add_special_tokens(["[SEP]"])
    library.save(str(tmp_path / "t.json"))
    assert open_pretrained(tmp_path / "t.json").encode("\u200bAB\u0301 c\n").tolist() == [0, 1, 2]
