import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stackwise.cli.main import main
from stackwise.data.batches import Batch
from stackwise.errors import UserError
from stackwise.model.architecture import create_simple_rack
from stackwise.objectives import CustomObjective
from stackwise.ops.losses import IGNORE
from stackwise.training.sources import IterableSource

V, B, T = 23, 3, 7


def batches():
    draw = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(0, V, (B, T), generator=draw) for _ in range(2))
    labels[0, 2:5] = IGNORE
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[2, 4:] = False
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def test_targets_are_the_labels_as_they_are_and_padding_never_counts():
    batch = batches()
    example = IterableSource([batch], CustomObjective()).example(0)
    assert torch.equal(example.reading.ids, batch["input_ids"])
    assert torch.equal(example.targets, torch.where(batch["attention_mask"], batch["labels"], IGNORE))
    assert example.n_targets == B * T - 3 - 3
    rack = create_simple_rack(1, 1, 16, 20, 2, V)
    logits = rack(example.reading.ids, example.reading.attention_mask)
    expected = F.cross_entropy(logits.flatten(0, 1), example.targets.flatten(), reduction="sum", ignore_index=IGNORE)
    found = CustomObjective().loss(rack, example, 1.0)
    torch.testing.assert_close(found, expected)


def test_batches_without_labels_are_refused():
    with pytest.raises(UserError, match="needs batches with labels"):
        IterableSource([batches()["input_ids"]], CustomObjective()).example(0)
    with pytest.raises(ValueError, match="needs batches with targets"):
        CustomObjective().corrupt(Batch(np.zeros((2, 4), dtype=np.int64), np.arange(2), np.zeros(2, dtype=np.int64)))


def test_the_command_line_which_has_no_targets_refuses_it_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("training: {progressive: {training_objective: custom}}\n")
    assert main(["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "takes its targets from a data loader" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
