import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from stackwise.config import StackWiseConfig
from stackwise.config.objectives import MaskingConfig
from stackwise.errors import ConfigError, UserError
from stackwise.model.architecture import create_rack_from_config, create_simple_rack
from stackwise.objectives import CausalObjective, MaskedObjective
from stackwise.ops.losses import IGNORE
from stackwise.training import ArchitectureTrainer, ProgressiveDataLoader, ProgressiveRackBuilder, ProgressiveTrainer
from stackwise.training.sources import IterableSource, peek_shape

V, B, T = 37, 3, 7
TOKENS = np.random.default_rng(0).integers(0, V, 503)


def config(*overrides):
    return StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": V,
                "d_model": 26,
                "n_heads": 13,
                "d_ff": 19,
                "architecture": {"n_stacks": 3, "blocks_per_stack": 1},
            },
            "training": {
                "batch_size": B,
                "seq_len": T,
                "max_steps": 6,
                "device": "cpu",
                "schedule": {"warmup_steps": 0, "rewarmup_steps": 0},
            },
        },
        overrides,
    )


def ids(*shape, seed=0):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# ---- growing


@pytest.mark.parametrize("mode, order", [("append", [0, 1, 2]), ("prepend", [2, 1, 0])])
def test_a_rack_grows_to_the_target_within_the_budget(mode, order):
    builder = ProgressiveRackBuilder(config(), mode)
    results = ProgressiveTrainer(config()).train_rack(builder, ProgressiveDataLoader(TOKENS, config()), target_stacks=3)
    assert [stack.stack_id for stack in builder.rack.stacks] == order
    assert [(p["name"], p["steps"]) for p in results["phases"]] == [("stack 0", 2), ("stack 1", 2), ("stack 2", 2)]
    assert (results["steps"], results["tokens"]) == (6, 6 * B * T)
    assert results["flops"] == sum(p["flops"] for p in results["phases"]) > 0
    assert results["final_loss"] == results["phases"][-1]["last_loss"]
    assert results["rack"]["stacks"] == order


def test_stacks_that_the_builder_has_are_the_frozen_trunk():
    settings = config("training.progressive.trunk_strategy=frozen")
    builder = ProgressiveRackBuilder(settings)
    builder.append_stack()
    builder.append_stack()
    before = weights(builder.rack)
    results = ProgressiveTrainer(settings).train_rack(builder, ProgressiveDataLoader(TOKENS, settings))
    after = weights(builder.rack)
    assert [p["name"] for p in results["phases"]] == ["stack 2"]
    for name in before:
        frozen = name.startswith(("stacks.0.", "stacks.1.", "embedding."))
        assert torch.equal(before[name], after[name]) == frozen


def test_new_stacks_have_the_shapes_of_the_builder():
    builder = ProgressiveRackBuilder(config("model.d_ff=23", "model.n_heads=1"))
    ProgressiveTrainer(config()).train_rack(builder, ProgressiveDataLoader(TOKENS, config()), target_stacks=2)
    for block in builder.rack.blocks():
        assert block.ffn.up_proj.weight.shape == (23, 26) and block.attention.n_heads == 1


def test_growing_from_a_rack_that_is_large_enough_is_the_users_error():
    builder = ProgressiveRackBuilder(config())
    builder.build_rack(3)
    with pytest.raises(UserError, match="leaves no Stack to add to the 3 of the Rack"):
        ProgressiveTrainer(config()).train_rack(builder, ProgressiveDataLoader(TOKENS, config()))


def test_a_budget_in_flops_is_kept():
    budget = 3e7
    builder = ProgressiveRackBuilder(config())
    results = ProgressiveTrainer(config(f"training.max_flops={budget}")).train_rack(
        builder, ProgressiveDataLoader(TOKENS, config())
    )
    last = results["phases"][-1]
    assert budget - last["flops"] / last["steps"] < results["flops"] <= budget


# ---- training what is there


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_of_a_given_rack_trains(tied):
    rack = create_simple_rack(2, 1, 26, 19, 13, V, tie_embeddings=tied)
    before = weights(rack)
    results = ArchitectureTrainer(config()).train_architecture(rack, ProgressiveDataLoader(TOKENS, config()))
    assert not any(torch.equal(before[name], p) for name, p in rack.named_parameters())
    assert (results["steps"], results["tokens"]) == (6, 6 * B * T)
    assert [p["name"] for p in results["phases"]] == ["end-to-end"]


def test_training_goes_on_from_the_weights_that_are_there():
    rack = create_rack_from_config(config())
    trainer = ArchitectureTrainer(config("training.max_steps=40", "training.optimizer.lr=0.01"))
    batch = [ids(B, T)]
    first = trainer.train_architecture(rack, batch)
    second = trainer.train_architecture(rack, batch)
    assert first["final_loss"] < first["phases"][0]["first_loss"] / 2
    assert second["phases"][0]["first_loss"] < 1.1 * first["final_loss"]


def test_a_rack_that_was_compiled_trains_again(monkeypatch):
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **settings: setattr(
            module, "_compiled_call_impl", torch.compile(module._call_impl, backend="aot_eager", **settings)
        ),
    )
    rack = create_simple_rack(1, 1, 26, 19, 13, V)
    for compiled in ("true", "false"):
        trainer = ArchitectureTrainer(config("training.max_steps=1", f"training.compile={compiled}"))
        before = weights(rack)
        assert trainer.train_architecture(rack, [ids(B, T)])["flops"] > 0
        assert not any(torch.equal(before[name], p) for name, p in rack.named_parameters())


def test_any_re_iterable_of_batches_will_do_and_gives_the_same_as_any_other():
    batches = [ids(B, T, seed=k) for k in range(3)]
    mask = torch.ones(B, T, dtype=torch.int64)
    forms = [
        batches,
        [(b, b.clone()) for b in batches],
        [{"input_ids": b, "attention_mask": mask, "labels": b.clone()} for b in batches],
        DataLoader(torch.cat(batches), batch_size=B),
        DataLoader([{"input_ids": row} for row in torch.cat(batches)], batch_size=B),
    ]
    losses = []
    for form in forms:
        rack = create_rack_from_config(config())
        losses.append(ArchitectureTrainer(config()).train_architecture(rack, form)["final_loss"])
    assert losses == pytest.approx([losses[0]] * len(forms), abs=1e-5)


def test_batches_of_unequal_size_train():
    loader = DataLoader(ids(2 * B + 1, T), batch_size=B)
    results = ArchitectureTrainer(config()).train_architecture(create_rack_from_config(config()), loader)
    assert results["steps"] == 6 and results["tokens"] == 2 * (2 * B + 1) * T


def test_the_batch_shape_is_the_data_loaders():
    trainer = ArchitectureTrainer(config("training.max_tokens=110", "training.batch_size=50"))
    results = trainer.train_architecture(create_rack_from_config(config()), [ids(5, 11)])
    assert results["steps"] == 2
    with pytest.raises(ConfigError, match="micro_batch_size"):
        ArchitectureTrainer(config("training.batch_size=4", "training.micro_batch_size=2")).train_architecture(
            create_rack_from_config(config()), [ids(5, 11)]
        )


def test_a_progressive_data_loader_iterates_over_what_it_gives_the_loop():
    loader = ProgressiveDataLoader(TOKENS, config())
    for step, batch in enumerate(itertools.islice(loader, 5)):
        assert torch.equal(batch["input_ids"], torch.from_numpy(loader.batch(step).tokens[:, :-1]))
        assert torch.equal(batch["labels"], batch["input_ids"])


def test_mlm_needs_the_tokenizer():
    settings = config("model.attention_preset=bert_style", "training.progressive.training_objective=mlm")
    with pytest.raises(UserError, match="tokenizer"):
        ArchitectureTrainer(settings)


@pytest.mark.parametrize(
    "batch, message",
    [
        ({"ids": ids(B, T)}, "no input_ids"),
        ("text", "a batch is a str"),
        ((ids(B, T),) * 3, "a batch is a tuple"),
        (ids(T), "integer tensor"),
        (ids(B, T).float(), "integer tensor"),
        ((ids(B, T), ids(B, T, seed=1)), "labels of a batch differ"),
    ],
)
def test_batches_in_another_form_are_the_users_error(batch, message):
    with pytest.raises(UserError, match=message):
        ArchitectureTrainer(config()).train_architecture(create_rack_from_config(config()), [batch])


def test_a_data_loader_without_batches_is_the_users_error():
    with pytest.raises(UserError, match="no batch"):
        peek_shape([])
    with pytest.raises(UserError, match="no batch"):
        IterableSource([], CausalObjective()).example(0)


# ---- what counts


def counting_loss(rack, example):
    return CausalObjective().loss(rack, example, 1 / example.n_targets)


@pytest.mark.parametrize("with_labels", [False, True])
def test_the_loss_on_padded_batches_is_that_of_hugging_face(with_labels):
    """Logits at t are scored against label t + 1; −100 and padding on the right do not count."""
    rack = create_rack_from_config(config())
    tokens, mask = ids(5, 11), torch.ones(5, 11, dtype=torch.int64)
    mask[1, 8:], mask[3, 2:] = 0, 0
    labels = tokens.masked_fill(mask == 0, IGNORE)
    batch = {"input_ids": tokens, "attention_mask": mask}
    if with_labels:
        labels[0, :4] = IGNORE
        batch["labels"] = labels
    example = IterableSource([batch], CausalObjective()).example(0)
    logits = rack(tokens, mask.bool())
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(counting_loss(rack, example), expected)
    assert example.n_targets == int((labels[:, 1:] != IGNORE).sum())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_what_counts_nor_the_loss(side):
    rack = create_rack_from_config(config())
    tokens = ids(5, 11)
    alone = IterableSource([tokens], CausalObjective()).example(0)
    padding, mask = ids(5, 4, seed=9), torch.ones(5, 15, dtype=torch.bool)
    if side == "left":
        padded = torch.cat((padding, tokens), dim=1)
        mask[:, :4] = False
    else:
        padded = torch.cat((tokens, padding), dim=1)
        mask[:, 11:] = False
    example = IterableSource([{"input_ids": padded, "attention_mask": mask}], CausalObjective()).example(0)
    assert example.n_targets == alone.n_targets == 5 * 10
    torch.testing.assert_close(counting_loss(rack, example), counting_loss(rack, alone), rtol=1e-4, atol=1e-5)


def test_masked_targets_count_at_their_own_position_and_never_in_padding():
    objective = MaskedObjective(
        MaskingConfig(rate=0.5), seed=0, mask_id=2, special_ids=frozenset({0, 1, 2}), vocab_size=V
    )
    tokens, mask = ids(53, 11).clamp(min=3), torch.ones(53, 11, dtype=torch.bool)
    mask[:, 8:] = False
    labels = tokens.clone()
    labels[:, 0] = IGNORE
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    example = IterableSource([batch], objective).example(0)
    counted = example.targets != IGNORE
    assert not counted[:, 8:].any() and not counted[:, 0].any()
    assert torch.equal(example.targets[counted], tokens[counted])
    assert 0.4 < counted[:, 1:8].float().mean() < 0.6
    assert torch.equal(example.reading.attention_mask, mask)


def test_masks_change_from_epoch_to_epoch_of_a_data_loader_and_repeat_with_it():
    objective = MaskedObjective(
        MaskingConfig(rate=0.3), seed=0, mask_id=2, special_ids=frozenset({0, 1, 2}), vocab_size=V
    )
    tokens = ids(13, 11).clamp(min=3)

    def epochs():
        source = IterableSource([tokens, tokens], objective)
        return [source.example(step).reading.ids for step in range(4)]

    first, again = epochs(), epochs()
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for a, b in itertools.combinations(first, 2):
        assert not torch.equal(a, b)
