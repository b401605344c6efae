"""Devices without double precision, such as Apple's MPS: a stand-in refuses it until a tensor is on the CPU."""

import pytest
import torch

from stackwise.generation.diffusion import unmask
from stackwise.generation.sampling import next_token, sample
from stackwise.model.reading import Reading
from stackwise.objectives.base import Example, scored

V, B, T, MASK = 13, 3, 7, 12


class Far(torch.Tensor):
    """A tensor of a device that has no float64."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor).clone()
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, Far) and out.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return out


def far(x):
    return x.as_subclass(Far)


def logits(*shape):
    return torch.randn(*shape, V, generator=torch.Generator().manual_seed(2))


def test_the_stand_in_refuses_double_precision_and_gives_it_on_the_cpu():
    with pytest.raises(TypeError, match="float64"):
        far(logits(B)).double()
    assert far(logits(B)).cpu().double().dtype == torch.float64


@pytest.mark.parametrize("how", [{}, {"top_p": 0.7, "temperature": 0.8}, {"top_k": 3, "min_p": 0.1}])
def test_the_next_token_is_drawn_on_a_device_without_double_precision(how):
    uniform = torch.rand(B, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(next_token(far(logits(B)), uniform, (4,), **how), next_token(logits(B), uniform, (4,), **how))
    assert torch.equal(sample(far(logits(B)), uniform), sample(logits(B), uniform))


@pytest.mark.parametrize("order", ["ancestral", "first_hitting", "confidence", "entropy"])
def test_gaps_are_filled_on_a_device_without_double_precision(order):
    tokens = torch.full((B, T), MASK)
    here, there = (
        list(unmask(lambda t, level, put=put: put(logits(B, T)), tokens, mask_id=MASK, order=order, temperature=0.9))
        for put in (torch.Tensor.clone, far)
    )
    assert torch.equal(here[-1], there[-1]) and not (there[-1] == MASK).any()


def test_scores_are_summed_on_a_device_without_double_precision():
    terms, targets = torch.rand(B, T), torch.randint(0, V, (B, T))
    right = torch.zeros(B, T, dtype=torch.bool)
    example = Example(Reading(targets), targets)
    nats = scored(example, far(terms), right, right).nats
    assert torch.from_numpy(nats).dtype == torch.float64
    torch.testing.assert_close(torch.from_numpy(nats), terms.double().sum(1))
