"""The noise level as an input of the model."""

import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.model.architecture import create_rack_from_config
from stackwise.model.embedding import TimeEmbedding
from stackwise.model.reading import Reading
from stackwise.model.spec import RackSpec

V, B, T = 23, 3, 7


def rack(kind=None, condition="rate"):
    progressive = {"training_objective": "diffusion", "time_interpretation": "input" if kind else None}
    diffusion = {"time_embedding": kind, "time_dim": 10, "condition": condition} if kind else {}
    config = StackWiseConfig.from_dict(
        {
            "model": {"d_model": 18, "n_heads": 3, "architecture": {"n_stacks": 2, "blocks_per_stack": 2}},
            "training": {"progressive": progressive, "diffusion": diffusion},
        }
    )
    return create_rack_from_config(config, vocab_size=V)


IDS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(4))
TIME = torch.tensor([0.03, 0.4, 1.0])


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_a_conditioned_model_starts_bit_identical_to_the_same_one_without(kind):
    plain, told = rack(), rack(kind)
    shared = dict(plain.named_parameters())
    assert all(torch.equal(p, shared[name]) for name, p in told.named_parameters() if name in shared)
    extra = {name for name, _ in told.named_parameters()} - set(shared)
    assert all("modulation" in name or "embedding.time" in name for name in extra) and len(extra) > 8
    logits = plain(IDS)
    assert torch.equal(told.logits(told(Reading(IDS, time=TIME))), logits)
    with pytest.raises(ValueError, match="give time"):
        told(IDS)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_everything_that_conditions_moves_and_levels_come_to_differ(kind):
    told = rack(kind)
    before = {name: p.detach().clone() for name, p in told.named_parameters()}
    optimizer = torch.optim.SGD(told.parameters(), lr=0.5)
    for _ in range(2):  # behind the zero layer the second step is the first with a gradient
        optimizer.zero_grad()
        told.logits(told(Reading(IDS, time=TIME))).square().mean().backward()
        optimizer.step()
    still = [name for name, p in told.named_parameters() if torch.equal(p, before[name])]
    assert still == []
    logits = told.logits(told(Reading(IDS[:1].repeat(B, 1), time=TIME)))
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])


def test_a_learned_embedding_is_linear_between_its_rows():
    table = TimeEmbedding("learned", 4)
    with torch.no_grad():
        table.table.copy_(torch.randn(65, 4, generator=torch.Generator().manual_seed(1)))
    ends = table(torch.tensor([0.0, 1.0]))
    assert torch.equal(ends, table.table[[0, 64]])
    middle = table(torch.tensor([10.25 / 64]))
    torch.testing.assert_close(middle[0], 0.75 * table.table[10] + 0.25 * table.table[11])


def test_the_spec_knows_the_condition_and_refuses_blocks_without():
    spec = rack("learned").spec
    assert (spec.time_embedding, spec.time_dim) == ("learned", 10)
    assert RackSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ValueError, match="time_dim None"):
        RackSpec.from_dict({**spec.to_dict(), "time_embedding": None})
