"""A pretrained model grows: a Hugging Face folder comes in, Stacks join between its own, and it goes out again.

    python examples/grow_imported.py LLAMA_FOLDER mybook.txt
    python examples/grow_imported.py            # makes a small Llama with random weights and a text of its own

The Stacks that join start as the identity, so that the model computes at first what it did before, bit for bit; they,
the final norm and the head learn the text, and the pretrained Stacks stay as they are (block expansion, LLaMA Pro,
2401.02415). Takes half a minute on two cores with the small model. Needs the extra hf.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stackwise.cli.main import main as stackwise

CONFIG = {
    "model": {"initial": "runs/base"},
    "training": {
        "batch_size": 8, "seq_len": 64, "max_steps": 100, "optimizer": {"lr": 1e-3},
        "progressive": {
            "building_mode": "interleave", "target_stacks": 4, "trunk_strategy": "frozen", "new_stack_init": "identity",
        },
    },
    "data": {"source": "files", "path": "text.txt"},
}  # fmt: skip


def small_llama(folder: Path, text: str) -> None:
    """Writes a Llama of four layers with random weights, and a tokenizer of ``text``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="Hugging Face folder")
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/grow-imported"))
    options = parser.parse_args(arguments)
    out, folder, text = options.out, options.folder, options.text
    out.mkdir(parents=True)
    if folder is None:
        folder, text = out / "llama", Path(argparse.__file__)
        small_llama(folder, text.read_text())
    (out / "expand.json").write_text(json.dumps(CONFIG))  # JSON is YAML
    for command in (
        ["import", folder, out / "base", "--stacks", "2"],
        ["train", out / "expand.json", "--from", out / "base", f"data.path={text}",
         f"training.max_steps={options.steps}", "--out", out / "expanded"],
        ["export", out / "expanded", out / "expanded-llama"],
    ):  # fmt: skip
        code = stackwise([str(word) for word in command])
        if code:
            raise SystemExit(code)
    print(f'AutoModelForCausalLM.from_pretrained("{out}/expanded-llama") loads it')


if __name__ == "__main__":
    main()
