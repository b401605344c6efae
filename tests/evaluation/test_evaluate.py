"""Scores of text in many short documents, worked out by hand."""

import json
import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from stackwise.cli.main import main
from stackwise.config.objectives import DiffusionConfig, MaskingConfig
from stackwise.evaluation.entropy import ngram_entropies
from stackwise.model.architecture import create_simple_rack
from stackwise.objectives import CausalObjective, DiffusionObjective, MaskedObjective
from stackwise.objectives.scoring import validate

END, MASK, V = 0, 2, 13
WORDS = ("déjà", "ab", "été", "b", "abc")  # 4, 2, 3, 1, 3 characters; 6, 2, 5, 1, 3 bytes
IDS = {"a": 3, "b": 4, "c": 5, "d": 6, "é": 7, "j": 8, "à": 9, "t": 10}
TOKENS = np.array([token for word in WORDS for token in (*(IDS[c] for c in word), END)])  # 13 characters, 5 ends
KNOWN = {"mask_id": MASK, "special_ids": frozenset({0, 1, 2}), "vocab_size": V}


def uniform_rack(mode):
    rack = create_simple_rack(1, 1, 14, 17, 7, V, attention_mode=mode)
    with torch.no_grad():
        rack.head.weight.zero_()
    return rack


def scored(objective, mode):
    rack = uniform_rack(mode)
    return validate(rack, objective, TOKENS, seq_len=17, batch_size=3, bytes_per_token=17 / 18)


def test_clm_pays_for_end_tokens_which_have_no_bytes():
    assert len(TOKENS) == 18
    found = scored(CausalObjective(), "causal")
    assert found.loss == pytest.approx(math.log(13)) and found.tokens == 17
    assert found.bits_per_byte == pytest.approx(18 * math.log2(13) / 17)  # 13 characters and 5 ends in 17 bytes


def test_diffusion_has_end_tokens_for_free_and_they_are_not_in_its_tokens_either():
    objective = DiffusionObjective(DiffusionConfig(), seed=0, **KNOWN)
    found = scored(objective, "bidirectional")
    assert found.loss == pytest.approx(math.log(12)) and found.tokens == 13  # the mask token has no probability
    assert found.bits_per_byte == pytest.approx(13 * math.log2(12) / 17)


def test_masked_tokens_alone_are_no_likelihood_of_a_text():
    found = scored(MaskedObjective(MaskingConfig(rate=0.5), seed=0, **KNOWN), "bidirectional")
    assert found.loss == pytest.approx(math.log(13)) and found.bits_per_byte is None


def test_entropies_are_of_the_tokens_that_are_predicted():
    tokens = np.array([3, 4, END, 3, 4, END, 4, END])  # "ab", "ab", "b"
    found = ngram_entropies(tokens, frozenset({END}))
    assert found.unigram == pytest.approx(-(0.4 * math.log(0.4) + 0.6 * math.log(0.6)))
    # Of 4 pairs that end in a letter two begin with a, followed by b always, two with an end: once a, once b.
    assert found.bigram == pytest.approx(0.5 * math.log(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents")
    draw = random.Random(3)
    documents = [" ".join(draw.choices(("to", "be", "or", "né"), k=draw.randint(2, 9))) for _ in range(90)]
    (path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    settings = {
        "model": {"d_model": 20, "n_heads": 2, "d_ff": 18, "architecture": {"n_stacks": 1, "blocks_per_stack": 1}},
        "training": {
            "strategy": "end_to_end", "batch_size": 5, "seq_len": 19, "max_steps": 2, "device": "cpu",
            "schedule": {"warmup_steps": 0, "rewarmup_steps": 0},
        },
        "data": {
            "source": "files", "path": str(path / "text.jsonl"), "cache_dir": str(path / "store"),
            "validation_fraction": 0.3, "tokenizer": {"kind": "bytes"},
        },
    }  # fmt: skip
    (path / "config.yaml").write_text(json.dumps(settings))
    return path


def evaluated(folder, capsys, objective, *more):
    run = folder / objective
    if not run.exists():
        name = f"training.progressive.training_objective={objective}"
        assert main(["train", str(folder / "config.yaml"), name, "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def held_out(folder):
    """Tokens of the validation text as the store holds them: each byte, and what is below 3 between documents."""
    (file,) = folder.glob("store/tokens/*/validation.bin")
    return np.fromfile(file, dtype="<u2").astype(int).tolist()


def entropy(counts):
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


@pytest.mark.parametrize("objective", ["clm", "mlm", "diffusion"])
def test_eval_gives_bits_of_all_predicted_tokens_over_the_bytes_of_the_text_and_says_what_is_given(
    folder: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    found = evaluated(folder, capsys, objective)
    tokens = held_out(folder)
    ends, n_bytes = tokens.count(END), sum(token > 2 for token in tokens)
    assert ends > 15 and ends + n_bytes == len(tokens)
    if objective == "clm":
        predicted, given = tokens, {"first_token": 1}
    else:
        predicted, given = [t for t in tokens if t > 2], {"end_tokens": ends, "other_special_tokens": 0}
    assert found["given"] == given
    per_byte = len(predicted) / n_bytes  # tokens; one of each byte where ends are given
    if objective == "mlm":
        assert found["bits_per_byte"] is None
    else:
        assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) * per_byte)
    assert found["unigram_bits_per_byte"] == pytest.approx(entropy(Counter(predicted)) * per_byte)
    pairs = Counter((a, b) for a, b in pairwise(tokens) if objective == "clm" or b > 2)
    firsts = Counter(a for a, b in pairs.elements())
    assert found["bigram_bits_per_byte"] == pytest.approx((entropy(pairs) - entropy(firsts)) * per_byte)


def test_eval_shows_what_is_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = evaluated(folder, capsys, "diffusion")["given"]["end_tokens"]
    assert main(["eval", str(folder / "diffusion")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "end tokens" in line]
    assert line.split() == ["given,", "not", "predicted:", "end", "tokens", f"{ends:,}"]


def refusal(capsys, *line):
    capsys.readouterr()
    assert main([str(word) for word in line]) == 2
    out, err = capsys.readouterr()
    (said,) = [line for line in err.splitlines() if not line.endswith("100 %")]  # others say what was being done
    assert out == "" and said.startswith("stackwise: "), err
    return said


def as_trained(folder, path, *more):
    """A run on a text file of its own, which a test may change."""
    text = folder / "text.jsonl"
    path.mkdir()
    (path / "own.jsonl").write_bytes(text.read_bytes())
    line = ["train", folder / "config.yaml", f"data.path={path / 'own.jsonl'}", *more, "--out", path / "run"]
    assert main([str(word) for word in line]) == 0
    return path / "run"


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_text_that_changed_since_the_run_is_not_scored_in_its_place(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: str
) -> None:
    run = as_trained(folder, tmp_path / "a", f"data.tokenizer.kind={tokenizer}")
    text = tmp_path / "a" / "own.jsonl"
    assert main(["eval", str(run)]) == 0
    before = text.read_bytes()
    text.write_bytes(before + b'\n{"text": "Quite another document."}')
    stores = sorted((folder / "store" / "tokens").iterdir())
    assert "--data F" in refusal(capsys, "eval", run)
    assert sorted((folder / "store" / "tokens").iterdir()) == stores, "a refusal builds no token store"
    text.unlink()
    assert "--data F" in refusal(capsys, "eval", run)
    text.write_bytes(before)
    assert main(["eval", str(run)]) == 0


def test_another_split_of_the_same_text_is_refused_since_it_holds_training_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = as_trained(folder, tmp_path / "a")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("0.3", "0.4"))
    assert "--data F" in refusal(capsys, "eval", run)


def test_any_text_is_scored_by_the_tokenizer_of_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = as_trained(folder, tmp_path / "a", "data.tokenizer.kind=characters")
    (tmp_path / "a" / "own.jsonl").unlink()
    (tmp_path / "one.txt").write_text("né to be or né " * 9)
    capsys.readouterr()
    assert main(["eval", str(run), "--data", str(tmp_path / "one.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # 15 characters, 17 bytes each time; an end token, and of 136 tokens 133 in 7 windows of 19.
    assert found["tokens"] == 133
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) * 136 / 153)
    (tmp_path / "unknown.txt").write_text("qqq")
    assert "'q'" in refusal(capsys, "eval", run, "--data", tmp_path / "unknown.txt")


@pytest.mark.parametrize("content", ["", '{"text": ""}\n'])
def test_data_without_text_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    evaluated(folder, capsys, "clm")
    (tmp_path / "none.jsonl").write_text(content)
    assert "contains no text" in refusal(capsys, "eval", folder / "clm", "--data", tmp_path / "none.jsonl")
    assert "--data" in refusal(capsys, "eval", folder / "clm", "--data", tmp_path / "absent")


def test_text_too_short_to_hide_a_token_in_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(folder, capsys, "mlm")
    (tmp_path / "short.txt").write_text("a")
    assert "give more text" in refusal(capsys, "eval", folder / "mlm", "--data", tmp_path / "short.txt")
