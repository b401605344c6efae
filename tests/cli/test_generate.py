"""``stackwise generate``, run in this process on runs of two steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from stackwise.cli.main import main
from stackwise.generation.sampling import row_seeds

CONFIG = """
model: {d_model: 20, n_heads: 2, d_ff: 36, architecture: {n_stacks: 1, blocks_per_stack: 1}}
training: {batch_size: 3, seq_len: 14, max_steps: 2, device: cpu, schedule: {warmup_steps: 1}}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    words = "to be or not to be that is the question"
    (folder / "text.txt").write_text(f"{words} " * 100)
    data = f"data: {{source: files, path: {folder / 'text.txt'}, cache_dir: {folder / 'cache'}}}\n"
    (folder / "config.yaml").write_text(CONFIG + data)
    vocabulary = {word: i for i, word in enumerate(["</s>", "[UNK]", *sorted(set(words.split()))])}
    library = Library(models.WordLevel(vocabulary, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(folder / "tokenizer.json"))
    return folder


def trained(work: Path, name: str, *settings: str) -> Path:
    assert main(["train", str(work / "config.yaml"), *settings, "--out", str(work / name)]) == 0
    return work / name


@pytest.fixture(scope="module")
def run(work: Path) -> Path:
    return trained(work, "run", "data.tokenizer.kind=bytes")


@pytest.fixture(scope="module")
def learned(work: Path) -> Path:
    settings = ["data.tokenizer.kind=bytes", "model.use_rope=false", "model.learned_positions=17"]
    return trained(work, "learned", *settings)


@pytest.fixture(scope="module")
def unpadded(work: Path) -> Path:
    """A run whose tokenizer has no padding token."""
    path = f"data.tokenizer.path={work / 'tokenizer.json'}"
    return trained(work, "unpadded", "data.tokenizer.kind=pretrained", path)


def printed(capsys: pytest.CaptureFixture[str], *line: str | Path) -> str:
    capsys.readouterr()
    assert main(["generate", *map(str, line)]) == 0
    return capsys.readouterr().out


def said(capsys: pytest.CaptureFixture[str], *line: str | Path) -> Any:
    return json.loads(printed(capsys, *line, "--json"))


def refusal(capsys: pytest.CaptureFixture[str], *line: str | Path) -> str:
    capsys.readouterr()
    assert main(["generate", *map(str, line)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.removeprefix("stackwise: ").rstrip("\n")


def test_one_prompt_is_printed_with_what_follows_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = said(capsys, run, "--prompt", "to be", "--tokens", 40, "--seed", 3)
    assert set(result) == {"prompt", "seed", "text"} and result["text"]
    assert (result["prompt"], result["seed"]) == ("to be", 3)
    assert printed(capsys, run, "--prompt", "to be", "--tokens", 40, "--seed", 3) == f"to be{result['text']}\n"
    assert said(capsys, run, "--tokens", 40)["prompt"] == ""


@pytest.mark.parametrize("which", ["run", "unpadded"])
def test_several_prompts_are_printed_each_above_what_follows_it(
    which: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    path, prompts = request.getfixturevalue(which), ["to be or not", "", "that"]
    several = [word for prompt in prompts for word in ("--prompt", prompt)]
    results = said(capsys, path, *several, "--tokens", 30, "--seed", 5)
    assert [(r["prompt"], r["seed"]) for r in results] == list(zip(prompts, row_seeds(5, 3)))
    # the seed that is printed gives the same to the prompt alone
    for result in results:
        assert said(capsys, path, "--prompt", result["prompt"], "--seed", result["seed"], "--tokens", 30) == result
    out = printed(capsys, path, *several, "--tokens", 30, "--seed", 5)
    assert out == "\n\n".join(f"{r['prompt']}\n{r['text']}" for r in results) + "\n"
    assert len({r["text"] for r in results}) == 3


def test_generation_ends_before_a_stop_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [run, "--prompt", "to", "--tokens", 60, "--seed", 1]
    free = said(capsys, *line)["text"]
    stop = next(free[i : i + 2] for i in range(5, len(free)) if "\ufffd" not in free[i : i + 2])
    assert free.index(stop) > 0
    assert said(capsys, *line, "--stop", stop, "--stop", "no such text")["text"] == free[: free.index(stop)]
    assert printed(capsys, *line, "--stop", stop) == f"to{free[: free.index(stop)]}\n"


def test_min_p_of_1_is_the_likeliest_token(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = said(capsys, run, "--temperature", 0, "--tokens", 20)["text"]
    assert said(capsys, run, "--min-p", 1, "--temperature", 1.5, "--tokens", 20)["text"] == greedy
    assert said(capsys, run, "--min-p", 0, "--temperature", 1.5, "--tokens", 20)["text"] != greedy


def test_more_tokens_than_learned_positions_are_refused_before_anything_is_printed(
    learned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, learned, "--prompt", "to be", "--tokens", 13)
    assert line == (
        "13 tokens after a prompt of 6 are more than the 17 positions that the model has learned "
        "(model.learned_positions); at most 12 fit"
    )
    printed(capsys, learned, "--prompt", "to be", "--tokens", 12)
    assert "a prompt may have 17 tokens at most" in refusal(capsys, learned, "--prompt", "to be or not to be")


def test_settings_that_mean_nothing_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, run, "--stop", "").startswith("stop: an empty text")
    assert refusal(capsys, run, "--temperature", "inf").startswith("temperature is inf; allowed: ")
