"""The examples, run as printed on small files made here."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "mlgka_text_classification.py"


def example():
    spec = importlib.util.spec_from_file_location("mlgka_text_classification", EXAMPLE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    for name, part in (("train.tsv", rows[:200]), ("validation.tsv", rows[200:])):
        (folder / name).write_text("sentence\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in part))
    (folder / "validation.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows[200:]))
    return folder


def run(*arguments, cwd=None):
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=cwd)


def printed():
    """The arguments of the commands that the example's own text prints."""
    lines = [line.split() for line in EXAMPLE.read_text(encoding="utf-8").split('"""')[1].splitlines()]
    return [line[2:] for line in lines if line[:1] == ["python"]]


def test_the_example_learns_and_shows_the_attentions_side_by_side(files):
    done = run(*printed()[1], "--model", "simple", "--epochs", "6", "--json", cwd=files)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [row["attention"] for row in results] == ["mlgka", "gpt_style", "bert_style"]
    assert all(row["accuracy"] > 0.9 and len(row["epochs"]) == 6 for row in results)
    assert results[0]["parameters"] == 1_183_234


def test_a_run_is_its_seeds_alone_and_reads_both_kinds_of_files(files):
    shown = []
    for validation in ("validation.tsv", "validation.jsonl"):
        done = run(*printed()[0], "--validation", validation, "--model", "simple", "--epochs", "1", cwd=files)
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout.splitlines()[1].split()[:3])
    assert shown[0] == shown[1] and shown[0][:2] == ["mlgka", "1,183,234"]


def test_without_a_validation_file_a_tenth_is_held_out(files):
    done = run("--train", files / "train.tsv", "--model", "simple", "--epochs", "1")
    assert done.returncode == 0 and "mlgka" in done.stdout


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("bad.tsv", "", 1),
        ("bad.tsv", "fine\t1\n", 1),
        ("bad.tsv", "sentence\tlabel\nfine\t1\nno label here\n", 3),
        ("bad.tsv", "sentence\tlabel\nfine\tgood\n", 2),
        ("bad.tsv", "sentence\tlabel\nfine\t-1\n", 2),
        ("bad.jsonl", '{"text": "fine", "label": 1}\n{"text": "fine"}\n', 2),
    ],
)
def test_a_wrong_file_is_answered_in_one_line_that_names_its_own(tmp_path, capsys, name, content, line):
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as stopped:
        example().read(tmp_path / name)
    answer = capsys.readouterr().err
    assert stopped.value.code == 2 and len(answer.splitlines()) == 1
    assert f"{name}, line {line}:" in answer


def test_a_label_that_training_never_saw_is_refused(files, tmp_path):
    (tmp_path / "other.tsv").write_text("sentence\tlabel\nfine\t2\n")
    done = run("--train", files / "train.tsv", "--validation", tmp_path / "other.tsv")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "other.tsv, line 2:" in done.stderr and "0 to 1" in done.stderr


def test_a_missing_file_is_answered_in_one_line(tmp_path):
    done = run("--train", tmp_path / "none.tsv")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "none.tsv" in done.stderr
