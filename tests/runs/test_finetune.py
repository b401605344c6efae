"""A run trained further on labelled texts, by the commands."""

import json
import random

import numpy as np
import pytest
import torch

import stackwise
from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.growth.adapters import merge_adapters
from stackwise.runs.finetune import finetune_config
from stackwise.runs.run import load
from stackwise.training.progress import SilentReporter

WORDS = {"pos": ("good", "fine"), "neg": ("bad", "dull")}


def sentences(n, seed):
    draw = random.Random(seed)
    for _ in range(n):
        label = draw.choice(["neg", "pos"])
        words = draw.choices(("film", "the", "an", "is"), k=draw.randint(1, 4))
        words.insert(draw.randrange(len(words) + 1), draw.choice(WORDS[label]))
        yield " ".join(words), label


def run(*arguments):
    return main([str(argument) for argument in arguments])


def summary(path):
    return json.loads((path / "summary.json").read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A small masked model, and one that it was fine-tuned into."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "text.txt").write_text("\n".join(text for text, _ in sentences(300, 1)))
    for name, n, seed in (("train", 160, 2), ("validation", 67, 3)):
        rows = "".join(f"{text}\t{label}\n" for text, label in sentences(n, seed))
        (folder / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}")
    (folder / "base.yaml").write_text(
        f"""
model: {{d_model: 26, n_heads: 13, d_ff: 19, attention_preset: bert_style,
         architecture: {{n_stacks: 2, blocks_per_stack: 1}}}}
training: {{batch_size: 4, seq_len: 31, max_steps: 20, strategy: end_to_end, device: cpu,
            progressive: {{training_objective: mlm}}}}
data: {{source: files, path: {folder / "text.txt"}, cache_dir: {folder / "cache"}, tokenizer: {{kind: bytes}}}}
"""
    )
    assert run("train", folder / "base.yaml", "--out", folder / "base") == 0
    assert finetune(folder, "tuned", "--epochs", 5, "training.checkpoint.every_steps=17") == 0
    return folder


def finetune(folder, out, *more, train="train.tsv", validation="validation.tsv"):
    return run(
        "finetune", folder / "base", "--train", folder / train, "--validation", folder / validation,
        "--out", folder / out,
        f"data.cache_dir={folder / 'cache'}", "training.batch_size=16", "training.optimizer.lr=0.02", *more,
    )  # fmt: skip


def test_it_learns_the_classes_and_its_config_has_what_it_took(work):
    config = StackWiseConfig.from_yaml(work / "tuned" / "config.yaml")
    assert config.training.classification.names == ("neg", "pos")
    longest = max(len(text) + 1 for name in (2, 3) for text, _ in sentences(160 if name == 2 else 67, name))
    assert config.training.seq_len == min(31, -(-longest // 8) * 8)
    assert config.training.max_steps == 5 * 160 // 16
    assert summary(work / "tuned")["validation"]["accuracy"] > 0.95


def test_eval_gives_the_scores_with_intervals_and_what_was_wrong(work, capsys):
    assert run("eval", work / "tuned", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    accuracy = scores["metrics"]["accuracy"]
    assert accuracy["value"] == pytest.approx(summary(work / "tuned")["validation"]["accuracy"])
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    confusion = np.array(scores["confusion"])
    labels = [label for _, label in sentences(67, 3)]
    assert confusion.sum(axis=1).tolist() == [labels.count("neg"), labels.count("pos")]
    assert np.trace(confusion) == round(accuracy["value"] * 67) and len(scores["wrong"]) == 67 - np.trace(confusion)

    (work / "other.jsonl").write_text(
        '{"sentence": "good film", "label": "neg"}\n{"sentence": "bad", "label": "neg"}\n'
    )
    assert run("eval", work / "tuned", "--data", work / "other.jsonl", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["confusion"] == [[1, 1], [0, 0]]
    (wrong,) = scores["wrong"]
    assert (wrong["texts"], wrong["label"], wrong["predicted"]) == (["good film"], "neg", "pos")
    assert wrong["where"].endswith("other.jsonl, line 1") and 0.5 < wrong["probability"] <= 1
    assert run("eval", work / "tuned") == 0
    shown = capsys.readouterr().out
    assert "matthews" in shown and "f1 macro" in shown and "taken for" in shown


def test_a_run_continued_from_one_of_its_steps_ends_bit_identical(work, capsys):
    before = summary(work / "tuned")
    assert run("resume", work / "tuned", "--step", 34) == 0
    assert summary(work / "tuned")["weights_sha256"] == before["weights_sha256"]
    capsys.readouterr()


def parts(rack):
    return {f"{part}/{name}": tensor.clone() for part, name, tensor in rack.part_tensors()}


@pytest.mark.parametrize("trunk", ["frozen", "lora"])
def test_a_trunk_that_does_not_train_stays_bit_identical(work, trunk, capsys):
    assert finetune(work, trunk, "--trunk", trunk, "--epochs", 1) == 0
    base, tuned = parts(load(work / "base").rack), parts(load(work / trunk).rack)
    still = {name for name in base if torch.equal(base[name], tuned[name])}
    assert {name.partition("/")[0] for name in base.keys() - still} == {"norm", "head"}
    adapters = {name for name in tuned if name.startswith("adapters")}
    assert bool(adapters) == (trunk == "lora")
    merged = load(work / trunk).rack
    merge_adapters(merged)
    adapted = parts(merged)
    moved = any(not torch.equal(adapted[name], base[name]) for name in base if name.startswith("stack"))
    assert moved == (trunk == "lora")
    capsys.readouterr()


def refusal(capsys, work, *more, **files):
    assert finetune(work, "refused", *more, **files) == 2
    assert not (work / "refused").exists()
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


@pytest.mark.parametrize("preset", ["efficient_gqa", "mlgka", "null"])
def test_attention_keeps_the_direction_that_it_was_trained_in(work, tmp_path, preset):
    small = ["training.max_steps=1", "training.progressive.training_objective=clm"]
    preset = f"model.attention_preset={preset}"
    kv = ["model.n_kv_heads=1"] if "gqa" in preset else []
    assert run("train", work / "base.yaml", preset, *small, *kv, "--out", tmp_path / "clm") == 0
    files = ([work / "train.tsv"], [work / "validation.tsv"])
    config = finetune_config(tmp_path / "clm", *files, reporter=SilentReporter())
    assert config.attention_mode == "causal" and config.training.objective == "classification"


def test_what_cannot_be_learnt_is_refused_in_one_line_and_nothing_is_written(work, capsys):
    rows = (work / "validation.tsv").read_text()
    (work / "unseen.tsv").write_text(rows + "so so\tmixed\n")
    line = refusal(capsys, work, validation="unseen.tsv")
    assert "unseen.tsv, line 69: the label 'mixed' is not a class of the training rows; they have neg, pos" in line
    (work / "scores.tsv").write_text("sentence\tscore\na\t1.5\nb\t2\n")
    assert "use --objective regression" in refusal(capsys, work, train="scores.tsv")
    (work / "one.tsv").write_text("sentence\tlabel\na\tx\nb\tx\n")
    assert "all rows have the class 'x'" in refusal(capsys, work, train="one.tsv")
    assert "no such file" in refusal(capsys, work, train="none.tsv")
    assert run("train", work / "base.yaml", "data.source=labelled", f"data.path={work / 'train.tsv'}") == 2
    assert "'mlm' learns from text, but data.source is labelled" in capsys.readouterr().err


def test_numbers_are_learnt_from_pairs(work, capsys):
    draw = random.Random(7)
    rows = "".join(
        f"{'a' * n}\t{'b' * m}\t{(n - m) / 4}\n"
        for n, m in ((draw.randint(1, 9), draw.randint(1, 9)) for _ in range(192))
    )
    (work / "pairs.tsv").write_text(f"sentence1\tsentence2\tscore\n{rows}")
    assert finetune(work, "numbers", "--objective", "regression", "--epochs", 4,
                    train="pairs.tsv", validation="pairs.tsv") == 0  # fmt: skip
    capsys.readouterr()
    assert run("eval", work / "numbers", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    validation = summary(work / "numbers")["validation"]
    assert validation["perplexity"] is None and "accuracy" not in validation
    assert scores["metrics"]["mean squared error"]["value"] == pytest.approx(validation["loss"], rel=1e-4)
    assert scores["metrics"]["pearson"]["value"] > 0.7 and len(scores["wrong"]) == 20


def test_train_alone_takes_labelled_files_from_scratch(work, capsys):
    changes = ("training.progressive.training_objective=classification", "data.source=labelled", "training.max_steps=9")
    names = (f"data.path={work / 'train.tsv'}", f"data.validation_path={work / 'validation.tsv'}")
    assert run("train", work / "base.yaml", *changes, *names, "--out", work / "scratch") == 0
    assert "160 training and 67 validation rows with the classes neg, pos" in capsys.readouterr().err
    assert StackWiseConfig.from_yaml(work / "scratch" / "config.yaml").training.classification.names == ("neg", "pos")
    (work / "three.tsv").write_text("sentence\tlabel\na\tx\nb\ty\nc\tz\n")
    assert run("train", work / "base.yaml", *changes, f"data.path={work / 'three.tsv'}", "--out", work / "t") == 2
    assert "training.classification.classes: 2, but the training rows have 3 classes (x, y, z); set it to 3" in (
        capsys.readouterr().err
    )


def test_embeddings_are_the_mean_of_what_the_head_reads(work, tmp_path, capsys):
    texts = ["good film", "x", "the dull is fine, and longer than any window of the run is"]
    found = stackwise.embed(str(work / "tuned"), texts)
    tuned = load(work / "tuned")
    seq_len = tuned.config.training.seq_len
    for text, vector in zip(texts, found):
        ids = torch.tensor([[*(b + 3 for b in text.encode()[: seq_len - 1]), 0]])
        read = torch.linalg.lstsq(tuned.rack.head.weight, tuned.rack(ids)[0].mT).solution.mT  # what gives these logits
        np.testing.assert_allclose(vector, read.mean(0).detach().numpy(), atol=1e-4)
    (tmp_path / "t.txt").write_text("\n".join(texts[:2]) + "\n\n")
    for name in ("v.npy", "v.jsonl", "v.parquet"):
        assert run("embed", work / "tuned", "--data", tmp_path / "t.txt", "--out", tmp_path / name) == 0
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), found[:2], atol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == texts[:2]
    np.testing.assert_allclose([line["embedding"] for line in lines], found[:2], atol=1e-6)
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "v.parquet").to_pydict()
    assert table["text"] == texts[:2]
    np.testing.assert_allclose(table["embedding"], found[:2], atol=1e-6)
    capsys.readouterr()
    assert run("embed", work / "tuned", "--data", tmp_path / "t.txt", "--out", tmp_path / "v.csv") == 2
    assert "allowed: .npy, .parquet, .jsonl" in capsys.readouterr().err
