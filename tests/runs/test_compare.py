"""Recipes at equal FLOPs."""

import csv
import io
import json
import random
from xml.etree import ElementTree

import pytest

from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.errors import UserError
from stackwise.growth.recipes import apply_recipe
from stackwise.planning.plan import plan_run
from stackwise.runs.compare import compare_recipes, equal_budget
from stackwise.runs.run import train_run
from stackwise.training.progress import SilentReporter


def config(*overrides):
    return StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": 37, "d_model": 26, "n_heads": 13, "d_ff": 19,
                "architecture": {"n_stacks": 3, "blocks_per_stack": 2},
            },
            "training": {"batch_size": 5, "seq_len": 7, "max_steps": 31, "device": "cpu"},
        }, overrides
    )  # fmt: skip


@pytest.mark.parametrize(
    "recipe", ["end-to-end-checkpointed", "late-expansion", "append-cached", "append-qlora", "blockwise", "fusion"]
)
def test_the_budget_is_that_of_end_to_end_however_the_config_trains(tmp_path, recipe):
    expected = plan_run(config("training.strategy=end_to_end"), tmp_path).flops
    assert equal_budget(apply_recipe(config(), recipe)) == expected
    assert equal_budget(config("training.max_steps=null", "training.max_flops=1e9")) == 1e9


def test_what_does_not_go_with_a_recipe_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"recipe append-frozen.*tie_embeddings"):
        compare_recipes(config("model.tie_embeddings=true"), ["grown", "append-frozen"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- a comparison whose runs are there


RECIPES, SEEDS = ["end-to-end", "append-cached"], (3, 4)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The file of a config, and a folder in which every run of its comparison is complete."""
    folder = tmp_path_factory.mktemp("compared")
    text = folder / "text.txt"
    text.write_text("".join(random.Random(5).choices("abcdefgh ", k=4000)))
    settings = config(
        "data.source=files", f"data.path={text}", f"data.cache_dir={folder}/cache", "data.tokenizer.kind=characters",
        "training.max_steps=null", "training.max_flops=5e7", "training.seed=3", "training.logging.every_steps=1",
        "model.architecture.blocks_per_stack=1",
    )  # fmt: skip
    for name in RECIPES:
        for seed in SEEDS:
            run = apply_recipe(settings, name).changed({"training.seed": seed})
            train_run(run, folder / "out" / f"{name}-seed-{seed}", SilentReporter())
    file = folder / "base.yaml"
    settings.to_yaml(file)
    return file, folder / "out"


def arguments(file, out, *more):
    return ["compare", str(file), "--recipes", ",".join(RECIPES), "--seeds", "2", "--out", str(out), *more]


def test_the_table_is_what_the_runs_say(compared, capsys):
    file, out = compared
    assert main(arguments(file, out, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((out / "compare.json").read_text()) == result
    assert result["seeds"] == [3, 4] and result["measure"] == "bits_per_byte" and not result["bound"]
    means = {}
    for row in result["recipes"]:
        ends = [json.loads((out / f"{row['recipe']}-seed-{seed}" / "summary.json").read_text()) for seed in SEEDS]
        for key, pair in {
            "bits_per_byte": [end["validation"]["bits_per_byte"] for end in ends],
            "peak_memory_bytes": [end["peak_memory_bytes"] for end in ends],
            "wall_seconds": [end["wall_seconds"] for end in ends],
            "flops": [end["flops"] for end in ends],
        }.items():
            assert row[key]["mean"] == pytest.approx(sum(pair) / 2)
            assert row[key]["deviation"] == pytest.approx(abs(pair[0] - pair[1]) / 2**0.5)
        assert ends[0]["flops"] <= 5e7
        assert sum(row["flops_by_kind"].values()) == pytest.approx(ends[0]["flops"])
        assert (row["flops_by_kind"]["cache"] > 0) == (row["recipe"] == "append-cached")
        assert [run["weights_sha256"] for run in row["runs"]] == [end["weights_sha256"] for end in ends]
        means[row["recipe"]] = row["bits_per_byte"]["mean"]
    assert list(means) == sorted(RECIPES, key=means.__getitem__)


def test_the_files_beside_it_hold_every_run_and_every_recipe(compared, capsys):
    file, out = compared
    assert main(arguments(file, out)) == 0
    rows = list(csv.DictReader(io.StringIO((out / "compare.csv").read_text())))
    assert {(row["recipe"], int(row["seed"])) for row in rows} == {(name, seed) for name in RECIPES for seed in SEEDS}
    for row in rows:
        summary = json.loads((out / f"{row['recipe']}-seed-{row['seed']}" / "summary.json").read_text())
        assert float(row["bits_per_byte"]) == summary["validation"]["bits_per_byte"]
        assert sum(float(row[key]) for key in row if key.endswith("_flops")) == pytest.approx(summary["flops"])
    svg = (out / "compare.svg").read_text()
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    words = {"".join(node.itertext()) for node in root.iter(f"{space}text")}
    assert {*RECIPES, "Validation against memory", "Training against FLOPs", "bits per byte"} <= words
    assert len(list(root.iter(f"{space}circle"))) == len(list(root.iter(f"{space}path"))) == len(RECIPES)
    assert len(svg) < 60_000


def test_the_table_and_the_verdict_fit_in_80_columns(compared, capsys):
    file, out = compared
    assert main(arguments(file, out)) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[-1].startswith("For ") and lines[-1].endswith(".")
    assert all(len(line.rstrip()) <= 80 for line in lines[:-1]) and "…" not in shown
    for name in RECIPES:
        numbers = next(line for line in lines if line.startswith(name))
        assert numbers.count(" ± ") == 3
        shares = [line for line in lines if line.startswith(name)][1].split()[1:]
        assert sum(map(float, shares)) == pytest.approx(100, abs=0.3)


def test_a_run_whose_settings_mean_the_same_is_kept_and_any_other_is_refused(compared, tmp_path, monkeypatch, capsys):
    file, out = compared
    monkeypatch.chdir(file.parent)
    # As they stand in the file: null, a text, and an absolute path.
    same = [
        "training.micro_batch_size=5", "model.n_kv_heads=13", "model.architecture.blocks_per_stack=[1,1,1]",
        "training.progressive.target_stacks=3", "data.path=[text.txt]", "training.max_flops=50000000",
        "training.logging.every_steps=7", f"data.cache_dir={tmp_path}",
    ]  # fmt: skip
    assert main(arguments(file, out, *same)) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    assert main(arguments(file, out, "training.grad_clip=0.5")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "training.grad_clip = 1.0, but you give 0.5" in error
    assert {path: path.read_bytes() for path in out.rglob("*.json*")} == before
