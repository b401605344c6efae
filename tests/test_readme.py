"""What the README prints runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.growth.curricula import build_phases

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def test_the_python_examples_run_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    training, classes, attention = blocks("python")
    exec(compile(training, "README.md", "exec"), {"__name__": "readme"})
    loss, rack = capsys.readouterr().out.split(" ", 1)
    assert 0 < float(loss) < 6 and "Stack" in rack
    exec(compile(classes, "README.md", "exec"), {"__name__": "readme"})
    logits = [float(x) for x in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
    assert len(logits) == 3 and max(logits) == logits[1]
    exec(compile(attention, "README.md", "exec"), {"__name__": "readme"})
    shape, layer = capsys.readouterr().out.split("\n", 1)
    assert shape == "torch.Size([2, 100, 512])" and "kv_a_norm" in layer


def test_the_commands_for_ones_own_text_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [b for b in blocks("") if "--preset characters" in b]
    commands = [shlex.split(line, comments=True) for line in block.strip().splitlines()]
    assert [c[:2] for c in commands] == [["stackwise", v] for v in ("init", "plan", "train", "eval", "generate")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path / "cache"))
    Path("mybook.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 60)
    for command in commands:
        # the printed run is of thousands of steps: take four of them
        smaller = ["training.max_steps=4", "training.device=cpu"] if command[1] == "train" else []
        assert main([*command[1:], *smaller]) == 0
    out = capsys.readouterr().out
    assert "bits_per_byte" in out and "It was" in out


def test_the_commands_of_masked_diffusion_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [b for b in blocks("") if "--preset diffusion" in b]
    commands = [shlex.split(line, comments=True) for line in block.strip().splitlines()]
    assert [c[1] for c in commands] == ["init", "train", "eval", "generate", "generate", "train"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path / "cache"))
    Path("mybook.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 60)
    assert main(["init", "config.yaml", "--preset", "characters"]) == 0
    for command in commands:
        smaller = ["training.max_steps=4", "training.device=cpu"] if command[1] == "train" else []
        assert main([*command[1:], *smaller]) == 0
    printed = capsys.readouterr()
    assert "standard_error" in printed.out and "It was a " in printed.out and "░" in printed.err


def test_the_commands_for_texts_with_labels_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [b for b in blocks("") if "stackwise finetune" in b]
    commands = [shlex.split(line, comments=True) for line in block.strip().splitlines()]
    assert [c[1] for c in commands] == ["train", "finetune", "eval", "eval", "embed"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path / "cache"))
    Path("mybook.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 60)
    for name in ("train.tsv", "validation.tsv"):
        Path(name).write_text("sentence\tlabel\nIt was a night.\t1\nThe rain was dark.\t0\n")
    Path("other.jsonl").write_text('{"sentence": "It fell.", "label": 0}\n')
    Path("configs").mkdir()
    Path("configs/tiny_bert.yaml").write_bytes((ROOT / "configs/tiny_bert.yaml").read_bytes())
    for command in commands:
        smaller = {
            "train": ["training.max_steps=4", "training.seq_len=9", "model.d_model=16", "training.device=cpu"],
            "finetune": ["training.max_steps=2"],
        }
        assert main([*command[1:], *smaller.get(command[1], [])]) == 0
    assert '"confusion"' in capsys.readouterr().out and Path("vectors.npy").is_file()


def test_the_commands_from_and_to_hugging_face_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    (block,) = [b for b in blocks("") if "stackwise import" in b]
    commands = [shlex.split(line, comments=True) for line in block.strip().splitlines()]
    assert [c[1] for c in commands] == ["import", "generate", "train", "export"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path / "cache"))
    text = "It was a dark and stormy night; the rain fell in torrents.\n" * 60
    Path("mybook.txt").write_text(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False))
    sizes = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 4, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).save_pretrained("llama-folder")
    tokenizer.save("llama-folder/tokenizer.json")
    for path in (ROOT / "configs").rglob("*.yaml"):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    for command in commands:
        smaller = ["training.max_steps=2", "training.seq_len=9", "training.device=cpu"]
        assert main([*command[1:], *(smaller if command[1] == "train" else [])]) == 0
    assert AutoModelForCausalLM.from_pretrained("expanded-folder").config.num_hidden_layers == 8


SMALL = ("model.d_model=16", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=24", "training.seq_len=8")


def test_the_commands_of_recipes_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [b for b in blocks("") if "stackwise recipes" in b]
    commands = [shlex.split(line, comments=True)[1:] for line in block.strip().splitlines()]
    assert [c[0] for c in commands] == ["recipes", "train", "compare", "report", "plan", "train"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path / "cache"))
    for name in ("mybook.txt", "shakespeare.txt"):
        Path(name).write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 60)
    for path in (ROOT / "configs").rglob("*.yaml"):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    assert main(["init", "config.yaml", "--preset", "characters"]) == 0
    less = {
        1: [*SMALL, "training.max_steps=8"],
        2: [*SMALL, "model.n_kv_heads=2", "training.max_flops=1e8", "--seeds=1"],
        5: [
            *SMALL,
            "model.architecture.n_stacks=3",
            "data.source=files",
            "data.path=mybook.txt",
            "data.tokenizer.kind=bytes",
        ],
    }
    for i, command in enumerate(commands):
        device = [] if command[0] in ("recipes", "report") else ["training.device=cpu"]
        assert main([*command, *less.get(i, []), *device]) == 0
        out = capsys.readouterr().out
        assert i != 2 or all(name in out for name in ("end-to-end", "grown", "append-frozen", "FLOPs of training use"))
        assert i != 4 or "of 6.0 GiB, fits" in out
    assert Path("runs/one-billion/summary.json").exists()


def test_the_phases_it_prints_are_phases() -> None:
    block, switched = blocks("yaml")
    config = StackWiseConfig.from_dict(yaml.safe_load(block))
    names = [phase.name for phase in build_phases(config)]
    sweeps = [f"sweep {i}, stack {k}" for i in (1, 2) for k in range(4)]
    assert names == ["stacks 0–1", "stack 2", "stack 3", *sweeps, "joint"]
    config = StackWiseConfig.from_dict(yaml.safe_load(switched))
    assert [phase.objective for phase in build_phases(config)] == ["mlm", "clm"]
    assert config.training.objective == "clm"


def test_the_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_files_it_links_to_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
