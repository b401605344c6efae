"""The examples, run as printed on small files made here."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "mlgka_text_classification.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Sentences whose class is that of one word among others."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(3)
    good, bad, other = ["fine", "warm", "bright"], ["dull", "cold", "grey"], ["a", "film", "and", "story", "the", "one"]
    rows = []
    for _ in range(260):
        label = draw.randint(0, 1)
        words = [*draw.choices(other, k=draw.randint(2, 9)), draw.choice(good if label else bad)]
        draw.shuffle(words)
        rows.append((" ".join(words), label))
    (folder / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in rows[:200]))
    (folder / "validation.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows[200:]))
    return folder


def run(*arguments):
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_the_example_learns_and_shows_the_attentions_side_by_side(files):
    done = run(
        "--train", files / "train.tsv", "--validation", files / "validation.jsonl", "--model", "simple",
        "--attention", "all", "--epochs", "6", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [row["attention"] for row in results] == ["mlgka", "gpt_style", "bert_style"]
    assert all(row["accuracy"] > 0.9 and len(row["epochs"]) == 6 for row in results)


def test_without_a_validation_file_a_tenth_is_held_out(files):
    done = run("--train", files / "train.tsv", "--model", "simple", "--epochs", "1")
    assert done.returncode == 0 and "mlgka" in done.stdout


@pytest.mark.parametrize("content", ["", "sentence\tlabel\nno label here\n", "sentence\tlabel\nfine\tgood\n"])
def test_a_wrong_file_is_answered_in_one_line(files, tmp_path, content):
    (tmp_path / "bad.tsv").write_text(content)
    done = run("--train", tmp_path / "bad.tsv")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "bad.tsv" in done.stderr


def test_a_missing_file_is_answered_in_one_line(tmp_path):
    done = run("--train", tmp_path / "none.tsv")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "none.tsv" in done.stderr
