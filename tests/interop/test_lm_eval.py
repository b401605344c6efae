"""Runs under lm-evaluation-harness: its requests answered as a plain forward pass would, and as an export does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.cli.main import main
from stackwise.errors import UserError
from stackwise.runs.run import load

WORDS = ("red", "blue", "grey", "cold", "warm", "old", "new", "tall")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    text = "".join(f"the {WORDS[i % 8]} house is {WORDS[(i * 3 + 1) % 8]}.\n" for i in range(300))
    (folder / "text.txt").write_text(text)
    (folder / "config.yaml").write_text(
        "model: {d_model: 20, n_heads: 2, d_ff: 36, architecture: {n_stacks: 2, blocks_per_stack: 1}}\n"
        "training: {batch_size: 5, seq_len: 23, max_steps: 60, device: cpu, optimizer: {lr: 0.01}}\n"
        f"data: {{source: files, path: {folder / 'text.txt'}, cache_dir: {folder / 'cache'}, "
        "tokenizer: {kind: characters}}\n"
    )
    assert main(["train", str(folder / "config.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def model_of(run: Path, **options: Any) -> Any:
    from stackwise.interop.lm_eval import StackWiseLM  # seconds: only where it is used

    return StackWiseLM(run, **options)


def request(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def plain_log_p(run: Path, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Token by token, from full logits of all that came before."""
    rack, total, greedy = load(run).rack, 0.0, True
    for k, token in enumerate(continuation):
        logits = rack(torch.tensor([context + continuation[:k]]))[0, -1].double()
        total += float(logits[token] - logits.logsumexp(0))
        greedy &= int(logits.argmax()) == token
    return total, greedy


def test_log_likelihoods_are_those_of_a_pass_for_each_token(run: Path) -> None:
    words = load(run).tokenizer
    pairs = [("the red house is", " cold."), ("", "the old"), ("the blue ", "house"), ("is", " tall")]
    found = model_of(run, batch_size=3).loglikelihood(
        [request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True
    )
    for (context, continuation), (score, greedy) in zip(pairs, found):
        start = context.rstrip()  # a space at the end of a context begins what continues it
        before = words.encode(start).tolist() or [words.end_id]
        expected, likeliest = plain_log_p(run, before, words.encode(context + continuation).tolist()[len(start) :])
        assert score == pytest.approx(expected, abs=1e-4) and greedy == likeliest
    assert {greedy for _, greedy in found} == {True, False}


def test_a_long_text_is_scored_in_windows_that_each_predict_tokens_once(run: Path) -> None:
    words, text = load(run).tokenizer, "the grey house is new.\nthe tall house"
    ids = words.encode(text).tolist()
    model = model_of(run, max_length=13)
    (found,) = model.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    # Windows of 13 after the end token; the last one is full, and scores what is left.
    expected = plain_log_p(run, [words.end_id], ids[:13])[0] + plain_log_p(run, ids[12:13], ids[13:26])[0]
    expected += plain_log_p(run, ids[len(ids) - 14 : 26], ids[26:])[0]
    assert len(ids) == 37 and found == pytest.approx(expected, abs=1e-4)


def test_texts_end_before_their_stop_text_or_after_their_tokens(run: Path) -> None:
    wanted = [
        ("the red house", {"until": ["."], "max_gen_toks": 9}), ("the", {"until": "house", "max_gen_toks": 20}),
        ("the new house is", {"max_gen_toks": 3}),
    ]  # fmt: skip
    model = model_of(run, batch_size=2)
    texts = model.generate_until([request("generate_until", *one) for one in wanted], disable_tqdm=True)
    words, rack = load(run).tokenizer, load(run).rack
    for (context, settings), text in zip(wanted, texts):
        ids = words.encode(context).tolist()
        for _ in range(settings["max_gen_toks"]):
            logits = rack(torch.tensor([ids]))[0, -1]
            logits[[i for i in words.special_ids if i != words.end_id]] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == words.end_id:
                break
        whole = words.decode(ids)[len(context) :]
        stop = settings.get("until", "\0")
        assert text == whole.split(stop if isinstance(stop, str) else stop[0])[0]


def test_what_does_not_fit_the_run_s_length_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"a continuation of 30 tokens is longer than 23"):
        model_of(run).loglikelihood([request("loglikelihood", "the", " red house" * 3)], disable_tqdm=True)
    with pytest.raises(UserError, match="max_gen_toks: 23 leaves no room"):
        model_of(run).generate_until([request("generate_until", "the", {"max_gen_toks": 23})], disable_tqdm=True)


@pytest.mark.slow
def test_a_task_gives_a_run_and_its_export_the_same_accuracy_and_log_likelihoods(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [
        {
            "start": f"the {WORDS[i % 8]} house is",
            "ends": [WORDS[(i * 3 + 1 + k) % 8] for k in (0, 2, 5)],
            "right": i % 3,
        }
        for i in range(40)
    ]
    for row in rows:  # the right ending stands at the place that the row says
        row["ends"][0], row["ends"][row["right"]] = row["ends"][row["right"]], row["ends"][0]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "houses.yaml").write_text(
        "task: houses\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{start}}"\ndoc_to_choice: ends\ndoc_to_target: right\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    assert main(["export", str(run), str(tmp_path / "folder")]) == 0
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = {}
    for name, model, arguments in (
        ("run", model_of(run), None),
        ("name", "stackwise", f"run={run},batch_size=7"),
        ("export", "hf", f"pretrained={tmp_path / 'folder'},device=cpu,dtype=float32"),
    ):
        results[name] = lm_eval.simple_evaluate(
            model, arguments, tasks=["houses"], task_manager=tasks, bootstrap_iters=0, log_samples=True
        )
    accuracy = {name: result["results"]["houses"]["acc,none"] for name, result in results.items()}
    assert accuracy["run"] == accuracy["name"] == accuracy["export"] and 0 < accuracy["run"] < 1
    for name in ("name", "export"):
        for ours, theirs in zip(results["run"]["samples"]["houses"], results[name]["samples"]["houses"]):
            for (score, greedy), (other, other_greedy) in zip(ours["filtered_resps"], theirs["filtered_resps"]):
                assert float(score) == pytest.approx(float(other), abs=1e-4) and greedy == other_greedy
