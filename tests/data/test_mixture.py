"""Mixtures of sources: exact shares, every text read evenly, runs that resume exactly."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stackwise
from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.data.batches import Batches
from stackwise.data.store import prepare
from stackwise.errors import ConfigError, UserError
from stackwise.training.progress import SilentReporter

T, B = 7, 5
FIRST, SECOND = 163, 78  # tokens: 23 and 11 samples


def test_shares_are_exact_in_every_round_and_each_source_is_read_whole_before_it_is_read_again() -> None:
    tokens = np.arange(FIRST + SECOND)  # each token is its place, and so says its source
    batches = Batches(tokens, T, B, 3, [(FIRST, 3), (SECOND, 1)])
    steps = 4 * 23 * 11  # whole rounds and whole epochs of both sources
    rows = [batches.batch(step) for step in range(steps)]
    starts = np.concatenate([batch.tokens[:, 0] for batch in rows])
    for batch in rows[:97]:
        assert (np.diff(batch.tokens, axis=1) == 1).all() and batch.tokens.shape == (B, T + 1)
    second = starts >= FIRST
    assert (second.reshape(-1, 4).sum(axis=1) == 1).all()  # 3:1 in each four
    for source, n, first in ((~second, 23, 0), (second, 11, FIRST)):
        read = (starts[source] - first) // T
        passes = read.reshape(-1, n)
        assert (np.sort(passes, axis=1) == np.arange(n)).all()
        assert any((passes[0] != later).any() for later in passes[1:])
    ends = np.concatenate([batch.tokens[:, -1] for batch in rows])
    assert ends[~second].max() < FIRST <= starts[second].min()  # no window reaches from one source into the other
    samples, epochs = (np.concatenate([getattr(batch, name) for batch in rows]) for name in ("sample", "epoch"))
    assert len(set(zip(samples.tolist(), epochs.tolist()))) == len(rows) * B  # no two rows are masked alike


def test_a_batch_of_a_mixture_is_a_function_of_the_step() -> None:
    tokens = np.arange(FIRST + SECOND)
    one = Batches(tokens, T, B, 3, [(FIRST, 2), (SECOND, 5)])
    forward = [one.batch(step).tokens for step in range(50)]
    for step in (49, 7, 31):
        assert np.array_equal(Batches(tokens, T, B, 3, [(FIRST, 2), (SECOND, 5)]).batch(step).tokens, forward[step])
    whole = Batches(tokens[:FIRST], T, B, 3)
    named = Batches(tokens[:FIRST], T, B, 3, [(FIRST, 9)])
    assert all(np.array_equal(whole.batch(s).tokens, named.batch(s).tokens) for s in range(20))


CONFIG = """
model: {{d_model: 20, n_heads: 2, d_ff: 36, architecture: {{n_stacks: 2, blocks_per_stack: 1}}}}
training: {{batch_size: 4, seq_len: 14, max_steps: 9, checkpoint: {{every_steps: 2}}, logging: {{every_steps: 1}},
           evaluation: {{max_tokens: 84}}, device: cpu}}
data:
  cache_dir: {work}/cache
  tokenizer: {{kind: characters}}
  sources:
    - {{source: files, path: {work}/letters.txt, weight: 3}}
    - {{source: files, path: {work}/digits.jsonl, text_field: body}}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("mixture")
    draw = random.Random(5)
    (folder / "letters.txt").write_text("".join(draw.choices("abcdefgh", k=2003)))
    lines = [json.dumps({"body": "".join(draw.choices("0123456", k=401))}) for _ in range(3)]
    (folder / "digits.jsonl").write_text("\n".join(lines))
    (folder / "config.yaml").write_text(CONFIG.format(work=folder))
    return folder


def test_a_run_over_a_mixture_resumes_exactly_after_a_kill(work: Path, tmp_path: Path, capsys: Any) -> None:
    stackwise.train(work / "config.yaml", work / "run", reporter=SilentReporter())
    child = os.fork()
    if child == 0:

        def kill(seen: dict[str, Any]) -> None:
            if seen["step"] == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        stackwise.train(work / "config.yaml", tmp_path / "run", on_step=kill, reporter=SilentReporter())
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    stackwise.resume(tmp_path / "run", reporter=SilentReporter())
    one, other = (json.loads((run / "summary.json").read_text()) for run in (work / "run", tmp_path / "run"))
    assert one["weights_sha256"] == other["weights_sha256"]
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (work / "run", tmp_path / "run")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    # scored as a whole, and each source for itself: of equal windows the whole is the mean by tokens
    assert main(["eval", str(work / "run"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    letters, digits = scores["sources"].values()
    assert list(scores["sources"]) == [str(work / "letters.txt"), str(work / "digits.jsonl")]
    mean = (letters["loss"] * letters["tokens"] + digits["loss"] * digits["tokens"]) / (
        letters["tokens"] + digits["tokens"]
    )
    assert mean == pytest.approx(scores["loss"], rel=0.03)
    assert letters["loss"] != digits["loss"]


def test_the_store_knows_which_tokens_are_whose_and_its_key_the_weights(work: Path) -> None:
    config = StackWiseConfig.from_yaml(work / "config.yaml")
    data = prepare(config.data)
    (letters, _, held), (digits, _, _) = data.sources
    text = data.tokenizer.decode(data.train[:letters].tolist())
    assert set(text) <= set("abcdefgh") | {""} and held == 2003 - int(2003 * 0.9)
    assert set(data.tokenizer.decode(data.train[letters : letters + digits - 1].tolist())) <= set("0123456")
    assert letters + digits == len(data.train)
    text = (work / "config.yaml").read_text()
    other = work / "other.yaml"
    other.write_text(text.replace("weight: 3", "weight: 2"))
    again = prepare(StackWiseConfig.from_yaml(other).data)
    assert again.key != data.key and again.sha256 == data.sha256


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight: 3", "weight: 0", r"data.sources\[0\].weight: 0"),
        ("weight: 3", "wieght: 3", r"data.sources\[0\].wieght: unknown key"),
        ("source: files, path: {work}/letters.txt", "source: files", r"data.sources\[0\].path: must be set"),
        ("source: files, path: {work}/letters.txt", "path: a.txt", r"data.sources\[0\].path: 'a.txt' is only used"),
        ("  sources:", "  source: files\n  path: a.txt\n  sources:", "data.path: .* cannot be combined with sources"),
        ("source: files, path: {work}/letters.txt", "source: loader", "'loader' has no text to mix"),
        ("source: files, path", "source: labelled, path", "'labelled' has no text to mix"),
    ],
)  # fmt: skip
def test_entries_that_cannot_be_meant_are_refused(work: Path, old: str, new: str, message: str) -> None:
    text = (work / "config.yaml").read_text()
    assert old.format(work=work) in text
    (work / "bad.yaml").write_text(text.replace(old.format(work=work), new))
    with pytest.raises(ConfigError, match=message):
        StackWiseConfig.from_yaml(work / "bad.yaml")


def test_a_source_too_small_for_a_sequence_is_named(work: Path) -> None:
    with pytest.raises(UserError, match="needs at least 8 training tokens, but the text has 7"):
        Batches(np.arange(107), 7, 5, 0, [(100, 1), (7, 1)])
