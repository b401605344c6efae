"""A run in a notebook: a line that says what it is, its pictures, its text and its scores."""

import random
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from IPython.core.formatters import DisplayFormatter

import stackwise
from stackwise.config import StackWiseConfig
from stackwise.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "text.txt").write_text("".join(random.Random(5).choices("abcdefgh ", k=3000)))
    config = StackWiseConfig.from_dict(
        {
            "model": {"d_model": 26, "n_heads": 13, "d_ff": 19, "architecture": {"n_stacks": 3, "blocks_per_stack": 1}},
            "training": {"batch_size": 5, "seq_len": 17, "max_steps": 11, "device": "cpu"},
            "data": {
                "source": "files", "path": str(folder / "text.txt"), "cache_dir": str(folder / "cache"),
                "tokenizer": {"kind": "characters"},
            },
        }
    )  # fmt: skip
    stackwise.train(config, folder / "run")
    return folder


def shown(value: object) -> dict[str, str]:
    """What a notebook shows of the last value of a cell, by its kind."""
    return DisplayFormatter().format(value)[0]


def test_a_run_says_what_it_is_in_a_line(folder: Path) -> None:
    run = stackwise.load(folder / "run")
    parameters = sum(p.numel() for p in run.rack.parameters())
    words = f"<run {folder}/run, 3 Stacks, {parameters:,} parameters, clm, step 11>"
    assert repr(run) == words and shown(run)["text/plain"] == words
    assert all(word in shown(run)["text/html"] for word in ("3 Stacks", "clm", "step 11", str(folder)))


def test_its_picture_is_an_image_of_its_losses_and_its_rack(folder: Path, tmp_path: Path) -> None:
    picture = stackwise.load(folder / "run").plot()
    found: list[tuple[str, dict[str, str | None]]] = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attrs: found.append((tag, dict(attrs)))  # type: ignore[method-assign]
    reader.feed(shown(picture)["text/html"])
    ((tag, attributes),) = found
    assert tag == "img" and (attributes["src"] or "").startswith("data:image/svg+xml;base64,")
    picture.save(tmp_path / "p.svg")
    words = [node.text for node in ElementTree.parse(tmp_path / "p.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"Loss over FLOPs", "The Rack as it grew", "training", "validation, in bits per byte"} <= set(words)


def test_it_writes_and_scores_as_the_functions_do(folder: Path) -> None:
    run = stackwise.load(folder / "run")
    assert run.generate("abc", 7, seed=3) == stackwise.generate(folder / "run", "abc", 7, seed=3)
    assert run.evaluate() == stackwise.evaluate(folder / "run")
    assert run.evaluate(folder / "text.txt")["tokens"] > run.evaluate()["tokens"]
    earlier = int(min((folder / "run" / "checkpoints").glob("step-*.json")).stem.removeprefix("step-"))
    assert stackwise.load(folder / "run", step=earlier).evaluate()["step"] == earlier < run.step


def test_a_run_without_a_step_has_no_picture(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    run = stackwise.load(tmp_path / "run")
    with pytest.raises(UserError, match="contains no step"):
        run.plot()
