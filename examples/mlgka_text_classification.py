"""Sentiment of sentences, with latent grouped kernel attention, trained from scratch.

    python examples/mlgka_text_classification.py --train train.tsv --validation validation.tsv
    python examples/mlgka_text_classification.py --train train.tsv --validation validation.tsv --attention all

Files are .tsv (a header, then sentence<TAB>label) or .jsonl (objects with text and label); labels are 0, 1, ….
A text longer than a window is read window by window: an epoch takes one of its windows, drawn anew, and the
class of a text is that of the mean of its windows' logits.

Two models: ``simple`` (one layer of width 256, 1.2 M parameters with two classes) and ``classifier`` (six layers of
width 512 with learned positions, 26.7 M parameters). Words, or word pieces, are learnt from the training file alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stackwise.config.attention import AttentionMode, AttentionSpec
from stackwise.growth.preparation import zero_residual_outputs
from stackwise.model.architecture import Block, BlockSpec
from stackwise.model.block import Blocks
from stackwise.model.classifier import SequenceClassifier
from stackwise.model.initialisation import init_weights
from stackwise.model.layers import MLGKALayer, never_trained

PAD, UNKNOWN = 0, 1
AVERAGE_DECAY = 0.995
"""Of the running average of weights: about the last 200 steps count."""
ATTENTIONS = ("mlgka", "gpt_style", "bert_style")


@dataclass(frozen=True)
class Recipe:
    """Sizes of a model and how it is trained.

    ``first_epochs`` of the ``epochs`` train its first Block alone. ``window`` is in tokens; of a longer text an epoch
    takes ``windows_of_a_text``.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    max_positions: int | None
    dropout: float
    lr: float
    embedding_lr: float
    epochs: int
    word_dropout: float
    first_epochs: int = 0
    window: int = 128
    windows_of_a_text: int = 1
    batch_size: int = 32
    weight_decay: float = 0.05
    n_heads: int = 8
    n_kv_heads: int = 2


RECIPES = {
    "simple": Recipe(1000, 256, 1024, 1, None, 0.2, 1e-3, 3e-3, 4, 0.3),
    "classifier": Recipe(10000, 512, 2048, 6, 512, 0.1, 2e-4, 3e-3, 8, 0.2, first_epochs=7),
}


def read(path: Path, n_classes: int = 1000) -> tuple[list[str], list[int]]:
    """Texts and labels 0 … ``n_classes`` − 1. SystemExit with one line where the file is not as it must be."""
    texts, labels, objects = [], [], path.suffix == ".jsonl"
    form = "{text, label}" if objects else "sentence<TAB>label, after a line with these names,"
    number, line = 0 if objects else 1, ""
    try:
        with open(path, encoding="utf-8") as file:
            if not objects and (line := next(file, "")).rstrip("\n").split("\t")[1:] != ["label"]:
                raise ValueError
            for line in file:
                number += 1
                if line.strip():
                    text, label = itemgetter("text", "label")(json.loads(line)) if objects else line.split("\t")
                    texts.append(text)
                    labels.append(range(n_classes).index(int(label)))
    except OSError as error:
        wrong(f"{path}: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        wrong(f"{path}, line {number}: {line[:40]!r} is not {form} with a label from 0 to {n_classes - 1}")
    if not texts:
        wrong(f"{path}: it has no rows")
    return texts, labels


def wrong(message: str) -> NoReturn:
    print(f"mlgka_text_classification: {message}", file=sys.stderr)
    raise SystemExit(2)


def learn_tokens(texts: list[str], vocab_size: int) -> Tokenizer:
    """Words of lower-cased text, and pieces of the rarer ones."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\p{P}"), "isolated")]
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=["[PAD]", "[UNK]"], show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build(recipe: Recipe, attention: str, n_classes: int, seed: int) -> SequenceClassifier:
    """The model; ``gpt_style`` and ``bert_style`` have full attention in the same Blocks, causal or not."""
    r, blocks = recipe, []
    for i in range(r.n_layers):
        if attention == "mlgka":
            layer_seed = seed * 1000 + i
            block: Block = MLGKALayer(
                r.d_model, r.d_ff, r.n_heads, r.n_kv_heads, dropout=r.dropout, seed=layer_seed, n_blocks=r.n_layers
            )
        else:
            mode: AttentionMode = "causal" if attention == "gpt_style" else "bidirectional"
            full = AttentionSpec(r.d_model, r.n_heads, r.n_heads, mode, r.dropout)
            spec = BlockSpec(full, r.d_ff, freeze_up_proj=True, norm="layernorm", norm_bias=True)
            block = Block(spec)
            init_weights(block, n_blocks=r.n_layers, seed=seed, stream=i)
        blocks.append(block)
    return SequenceClassifier(
        r.vocab_size, r.d_model, blocks, n_classes, max_positions=r.max_positions, dropout=r.dropout, seed=seed
    )


def grow(model: SequenceClassifier, waiting: list[Block]) -> None:
    """The ``waiting`` Blocks join, each the identity at first, so the model goes on from where it was."""
    for block in waiting:
        zero_residual_outputs(block)
        model.blocks.append(block)


def batches(ids: list[list[int]], size: int, generator: np.random.Generator | None) -> list[np.ndarray]:
    """Indices of texts of like length; shuffled with ``generator``."""
    noise = generator.uniform(0.8, 1.25, len(ids)) if generator is not None else 1.0
    order = np.argsort(np.array([len(row) for row in ids]) * noise, kind="stable")
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    if generator is not None:
        generator.shuffle(groups)
    return groups


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask


def windows(ids: list[list[int]], size: int) -> tuple[list[list[int]], np.ndarray]:
    """All windows of all texts, of like length within a text, and the text of each."""
    parts, owners = [], []
    for i, row in enumerate(ids):
        n = -(-len(row) // size)
        edges = [len(row) * k // n for k in range(n + 1)]
        parts += [row[a:b] for a, b in pairwise(edges)]
        owners += [i] * n
    return parts, np.array(owners)


def some_windows(owners: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """Indices of ``most`` windows of each text at most, drawn with ``generator``."""
    order = generator.permutation(len(owners))
    _, place, counts = np.unique(owners[order], return_inverse=True, return_counts=True)
    within = np.empty(len(order), dtype=int)
    within[np.argsort(place, kind="stable")] = np.concatenate([np.arange(n) for n in counts])
    return order[within < most]


def accuracy(model: torch.nn.Module, ids: list[list[int]], labels: torch.Tensor, window: int) -> float:
    model.eval()
    parts, owners = windows(ids, window)
    scores: torch.Tensor | None = None
    with torch.no_grad():
        for group in batches(parts, 64, None):
            logits = model(*padded([parts[i] for i in group]))
            scores = torch.zeros(len(ids), logits.shape[1]) if scores is None else scores
            scores.index_add_(0, torch.from_numpy(owners[group]), logits)
    assert scores is not None
    return float((scores.argmax(-1) == labels).float().mean())


def train(
    recipe: Recipe, attention: str, data: tuple[list[list[int]], ...], labels: tuple[torch.Tensor, ...], seed: int
) -> dict[str, object]:
    """Trains one model; what counts is a running average of its weights (Polyak and Juditsky 1992) at the end."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    model = build(recipe, attention, int(labels[0].max()) + 1, seed)
    count = sum(p.numel() for p in model.parameters())
    for parameter in never_trained(model):
        parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    words = model.embedding.weight  # a row gets few gradients, so each of its steps is larger
    groups = [
        {"params": [words], "weight_decay": 0.0, "rate": recipe.embedding_lr},
        {"params": [p for p in trained if p.dim() > 1 and p is not words], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    parts, owners = windows(data[0], recipe.window)
    counts = np.minimum(np.bincount(owners), recipe.windows_of_a_text)
    per_epoch = -(-int(counts.sum()) // recipe.batch_size)
    total, warmup = recipe.epochs * per_epoch, max(1, recipe.epochs * per_epoch // 16)
    print(f"{attention}: {count:,} parameters, {total} steps", file=sys.stderr)
    waiting = list(model.blocks)[1:] if recipe.first_epochs else []
    model.blocks = Blocks(list(model.blocks)[: recipe.n_layers - len(waiting)])
    step, joined, start, scores = 0, 0, time.perf_counter(), []
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
    for epoch in range(recipe.epochs):
        if waiting and epoch == recipe.first_epochs:
            grow(model, waiting)
            waiting, joined = [], step
            averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
        model.train()
        drawn = some_windows(owners, recipe.windows_of_a_text, order)
        for group in batches([parts[i] for i in drawn], recipe.batch_size, order):
            chosen = drawn[group]
            rate = min(1.0, (step - joined + 1) / warmup) * (total - step) / total
            for group_ in optimizer.param_groups:
                group_["lr"] = group_.get("rate", recipe.lr) * rate
            ids, mask = padded([parts[i] for i in chosen])
            hidden = (torch.rand(ids.shape) < recipe.word_dropout) & mask
            logits = model(ids.masked_fill(hidden, UNKNOWN), mask)
            loss = F.cross_entropy(logits, labels[0][owners[chosen]], label_smoothing=0.1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            averaged.update_parameters(model)
            step += 1
        scores.append(accuracy(averaged, data[1], labels[1], recipe.window))
        seconds = time.perf_counter() - start
        print(f"  epoch {epoch + 1}: accuracy {scores[-1]:.4f}, {seconds:.0f} s", file=sys.stderr)
    return {
        "attention": attention, "parameters": count, "accuracy": scores[-1], "epochs": scores,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, help="default: a tenth of the training file, held out")
    parser.add_argument("--model", choices=sorted(RECIPES), default="classifier")
    parser.add_argument("--attention", choices=[*ATTENTIONS, "all"], default="mlgka")
    parser.add_argument("--epochs", type=int)
    parser.add_argument(
        "--first-epochs", type=int, help="of these, those with the first Block alone; default: the model's"
    )
    parser.add_argument("--lr", type=float)
    parser.add_argument("--embedding-lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.epochs is not None and options.epochs < 1:
        wrong(f"--epochs is {options.epochs}; it must be at least 1")
    recipe = RECIPES[options.model]
    given = {key: getattr(options, key) for key in ("epochs", "first_epochs", "lr", "embedding_lr")}
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    if not 0 <= recipe.first_epochs < recipe.epochs:
        wrong(f"--first-epochs is {recipe.first_epochs}; it must be below --epochs ({recipe.epochs}), and at least 0")
    texts, labels = read(options.train)
    if options.validation is None:
        held = set(np.random.default_rng(0).permutation(len(texts))[: len(texts) // 10].tolist())
        parts = [[i for i in range(len(texts)) if (i in held) == side] for side in (False, True)]
        sets = [([texts[i] for i in part], [labels[i] for i in part]) for part in parts]
    else:
        sets = [(texts, labels), read(options.validation, max(labels) + 1)]
    tokenizer = learn_tokens(sets[0][0], recipe.vocab_size)
    data = tuple([row.ids or [UNKNOWN] for row in tokenizer.encode_batch(part)] for part, _ in sets)
    targets = tuple(torch.tensor(part) for _, part in sets)
    kinds = ATTENTIONS if options.attention == "all" else (options.attention,)
    results = [train(recipe, kind, data, targets, options.seed) for kind in kinds]
    if options.json:
        print(json.dumps({"model": options.model, "seed": options.seed, "results": results}))
        return
    print(f"{'attention':12}{'parameters':>14}{'accuracy':>10}{'seconds':>9}")
    for row in results:
        print(f"{row['attention']:12}{row['parameters']:14,}{row['accuracy']:10.4f}{row['seconds']:9.0f}")


if __name__ == "__main__":
    main()
