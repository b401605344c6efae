from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.config.objectives import ClassificationConfig
from stackwise.data.batches import Batch
from stackwise.errors import ConfigError, UserError
from stackwise.growth.curricula import build_phases
from stackwise.model.architecture import create_rack_from_config, create_simple_rack
from stackwise.model.reading import Reading
from stackwise.objectives import ClassificationObjective, create_objective
from stackwise.planning.cost import PhaseCoster
from stackwise.training import ArchitectureTrainer, ProgressiveDataLoader, ProgressiveRackBuilder, ProgressiveTrainer
from stackwise.training.sources import IterableSource

V, B, T, N = 23, 4, 9, 3


def config(*overrides):
    return StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": V, "d_model": 26, "n_heads": 13, "d_ff": 19,
                "architecture": {"n_stacks": 2, "blocks_per_stack": 1},
            },
            "training": {
                "batch_size": B, "seq_len": T, "max_steps": 120, "device": "cpu", "strategy": "end_to_end",
                "progressive": {"training_objective": "classification"}, "classification": {"classes": N},
                "schedule": {"warmup_steps": 0, "rewarmup_steps": 0}, "optimizer": {"lr": 3e-3},
            },
        }, overrides
    )  # fmt: skip


def objective(pooling="mean"):
    return ClassificationObjective(ClassificationConfig(classes=N), pooling)


def padded(side):
    """Ids, labels and the mask of a batch whose rows have 9, 4, 1 and 6 real tokens."""
    draw = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(0, V, (B, T), generator=draw), torch.tensor([2, 0, 1, 2])
    mask = torch.arange(T) < torch.tensor([[9], [4], [1], [6]])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask if side == "right" else mask.flip(1)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_loss_is_that_of_each_row_alone_without_its_padding(pooling, side):
    batch, seen = padded(side), objective(pooling)
    mode = "causal" if pooling == "last" else "bidirectional"
    rack = create_simple_rack(2, 1, 26, 19, 13, V, attention_mode=mode)
    example = IterableSource([batch], seen).example(0)
    assert example.n_targets == B
    expected, rows = 0.0, []
    for ids, label, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
        hidden = rack(Reading(ids[mask][None]))[0]
        pooled = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
        rows.append(rack.head.weight[:N] @ pooled)
        expected = expected + F.cross_entropy(rows[-1], label)
    torch.testing.assert_close(seen.loss(rack, example, 1.0), expected, atol=1e-5, rtol=1e-5)
    found = seen.logits(rack, batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(found, torch.stack(rows), atol=1e-5, rtol=1e-5)
    seen.loss(rack, example, 1.0).backward()
    assert (rack.head.weight.grad[N:] == 0).all() and (rack.head.weight.grad[:N] != 0).all()


def test_the_score_counts_what_is_right():
    rack, seen = create_simple_rack(1, 1, 26, 19, 13, V, attention_mode="bidirectional"), objective()
    tokens = np.random.default_rng(0).integers(0, V, (50, T + 1))
    labels = np.random.default_rng(1).integers(0, N, 50)
    score = seen.score(rack, Batch(tokens, np.arange(50), np.zeros(50, dtype=np.int64), labels))
    logits = seen.logits(rack, torch.from_numpy(tokens[:, :-1])).detach()
    nats = F.cross_entropy(logits, torch.from_numpy(labels), reduction="none")
    np.testing.assert_allclose(score.nats, nats.numpy(), rtol=1e-5)
    assert (score.right, score.predicted) == (int((logits.argmax(1) == torch.from_numpy(labels)).sum()), 50)
    assert score.tokens.tolist() == [1] * 50


def rows_with_a_class(n):
    """Rows of random tokens, of which the class is how many of three marks are in it: any order, any place."""
    rng = np.random.default_rng(5)
    rows, labels = rng.integers(3, V, (n, T)), rng.integers(0, N, n)
    for row, label in zip(rows, labels):
        row[rng.choice(T, label, replace=False)] = 1
    return [{"input_ids": torch.from_numpy(row), "labels": torch.tensor(label)} for row, label in zip(rows, labels)]


@pytest.mark.parametrize("trunk", ["frozen", "trainable"])
def test_a_grown_rack_learns_the_classes_and_random_labels_stay_at_chance(trunk):
    settings = config("training.strategy=progressive", f"training.progressive.trunk_strategy={trunk}",
                      "training.max_steps=400", "training.optimizer.lr=0.01")  # fmt: skip
    builder = ProgressiveRackBuilder(settings)
    ProgressiveTrainer(settings).train_rack(builder, DataLoader(rows_with_a_class(800), batch_size=32))
    seen = create_objective(settings, None)
    assert isinstance(seen, ClassificationObjective) and seen.pooling == "mean"
    fresh = rows_with_a_class(1100)[800:]
    ids, labels = (torch.stack([row[key] for row in fresh]) for key in ("input_ids", "labels"))
    right = (seen.logits(builder.rack.eval(), ids).argmax(1) == labels).float().mean()
    assert float(right) > 0.95
    others = labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    chance = (seen.logits(builder.rack, ids).argmax(1) == others).float().mean()
    assert abs(float(chance) - 1 / N) < 0.11  # four standard errors


def test_the_flops_of_a_step_are_those_that_run():
    settings = config("training.max_steps=1")
    rack = create_rack_from_config(settings, n_stacks=2, vocab_size=V)
    seen, loader = create_objective(settings, None), DataLoader(rows_with_a_class(B), batch_size=B)
    (phase,) = build_phases(settings, present=(0, 1))
    planned = PhaseCoster(settings, V, None, rack)(phase).flops
    example = IterableSource(loader, seen).example(0)
    with FlopCounterMode(display=False) as counter:
        seen.loss(rack, example, 1.0 / B).backward()
    assert planned >= counter.get_total_flops()  # torch does not count a CPU's attention kernel
    other = config("training.max_steps=1", "training.progressive.training_objective=clm",
                   "training.classification.classes=2")  # fmt: skip
    whole = PhaseCoster(other, V, None, rack)(replace(phase, objective="clm")).flops
    assert whole - planned == 6 * 26 * B * (T * V - N)  # the head reads B vectors, for N classes


def test_what_is_taken_to_train_is_trained_by_the_other_trainer_too():
    settings = config("training.max_steps=3")
    rack = create_rack_from_config(settings, n_stacks=2, vocab_size=V)
    before = {name: p.detach().clone() for name, p in rack.named_parameters()}
    results = ArchitectureTrainer(settings).train_architecture(rack, DataLoader(rows_with_a_class(40), batch_size=B))
    assert results["steps"] == 3
    assert all((p != before[name]).any() for name, p in rack.named_parameters())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": None}, "needs batches with labels: the class of each sequence$"),
        ({"labels": torch.zeros(B, T, dtype=torch.int64)}, r"the class of each sequence, \(4,\), not \(4, 9\)"),
        ({"labels": torch.tensor([0, 1, 3, 1])}, "labels: 3 is out of range; .* so labels are 0 to 2"),
        ({"labels": torch.tensor([0, 1, -1, 1])}, "labels: -1 is out of range"),
        ({"labels": torch.tensor([0.0, 1.0, 0.5, 1.0])}, r"labels are torch\.float32; .* takes whole numbers"),
    ],
)
def test_labels_that_are_no_classes_are_refused(batch, message):
    with pytest.raises(UserError, match=message):
        IterableSource([padded("right") | batch], objective()).example(0)


def test_labels_of_any_integer_type_serve():
    batch = padded("right")
    example = IterableSource([batch | {"labels": batch["labels"].to(torch.int32)}], objective()).example(0)
    assert example.targets.dtype == torch.int64 and torch.equal(example.targets, batch["labels"])


def test_what_cannot_be_classified_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="classes: 3, but the head has 2 rows"):
        objective().logits(create_simple_rack(1, 1, 26, 19, 13, 2), torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="is only used when the objective is classification"):
        config("training.progressive.training_objective=clm")
    with pytest.raises(ConfigError, match="cache_activations: true requires windows of text"):
        config("training.strategy=progressive", "training.progressive.trunk_strategy=frozen",
               "training.progressive.cache_activations=true")  # fmt: skip
    loader = ProgressiveDataLoader(np.zeros(100, dtype=np.int64), config())
    with pytest.raises(UserError, match="classification needs labels, which a token array does not have"):
        ArchitectureTrainer(config()).train_architecture(create_rack_from_config(config(), n_stacks=2), loader)
    (tmp_path / "config.yaml").write_text("training: {progressive: {training_objective: classification}}\n")
    assert main(["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "'classification' takes its targets from labelled files" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
