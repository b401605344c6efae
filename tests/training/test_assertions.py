import pytest
import torch

from stackwise.config.optimization import OptimizerConfig
from stackwise.errors import RunError
from stackwise.growth.preparation import set_trainable, zero_residual_outputs
from stackwise.model.architecture import create_simple_rack
from stackwise.optim.create import create_optimizer
from stackwise.training.assertions import TrainingCheck, fingerprint
from stackwise.training.optimizers import trained_parameters

IDS = torch.arange(21).reshape(3, 7)


class Steps:
    """A phase that trains ``stack.1``, the norm and the head, with the check around each step."""

    def __init__(self, *, prepare=lambda rack: None, lacking=(), decay=0.0, lr=1e-3, patience=3):
        self.rack = create_simple_rack(2, 1, 26, 19, 13, 37)
        prepare(self.rack)
        set_trainable(self.rack, ["stack.1", "norm", "head"])
        self.parameters = trained_parameters(self.rack)
        optimized = {name: p for name, p in self.parameters.items() if name not in lacking}
        self.optimizer = create_optimizer(optimized, OptimizerConfig(weight_decay=decay, lr=lr))
        self.check = TrainingCheck(self.rack, self.parameters, patience)

    def loss(self):
        return torch.nn.functional.cross_entropy(self.rack(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())

    def run(self, n, before_update=lambda: None, after_update=lambda: None):
        for _ in range(n):
            self.loss().backward()
            before_update()
            self.check.after_backward({name for name, p in self.parameters.items() if p.grad is not None})
            self.optimizer.step()
            self.optimizer.zero_grad()
            after_update()
            self.check.after_step()


def test_a_correct_phase_passes_and_is_done_after_one_step():
    steps = Steps()
    assert not steps.check.done
    steps.run(1)
    assert steps.check.done


def test_a_trained_parameter_without_a_gradient_is_named():
    steps = Steps()
    steps.parameters["stack.1/blocks.0.ffn.up_proj.weight"].requires_grad_(False)
    with pytest.raises(RunError, match=r"stack\.1/blocks\.0\.ffn\.up_proj\.weight should train .* no gradient"):
        steps.run(1)


def test_a_parameter_detached_from_the_graph_is_named():
    steps = Steps()
    steps.rack.norm.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(RunError, match="got no gradient"):
        steps.run(1)


def test_a_frozen_parameter_with_a_gradient_is_named():
    steps = Steps()

    def thaw():
        weight = steps.rack.embedding.weight
        weight.grad = torch.ones_like(weight)

    with pytest.raises(RunError, match=r"embedding/weight is frozen .* got a gradient"):
        steps.run(1, before_update=thaw)


@torch.no_grad()
def _nudge(rack):
    weight = rack.stacks[0].blocks[0].attention.q_proj.weight
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(1e9))


def test_a_frozen_parameter_that_changes_by_one_bit_is_named():
    steps = Steps()
    with pytest.raises(RunError, match=r"stack\.0/blocks\.0\.attention\.q_proj\.weight is frozen .* changed"):
        steps.run(1, after_update=lambda: _nudge(steps.rack))


def test_a_parameter_that_the_optimizer_lacks_is_named_once_patience_is_over():
    steps = Steps(lacking=["head/weight"], patience=5)
    steps.run(4)
    assert not steps.check.done
    with pytest.raises(RunError, match=r"head/weight should train .* not changed in 5 steps"):
        steps.run(1)


def test_a_learning_rate_too_small_for_the_format_is_found():
    steps = Steps(lr=1e-30)
    with pytest.raises(RunError, match=r"training\.optimizer\.lr"):
        steps.run(3)


def test_parameters_behind_the_zeros_of_an_identity_stack_have_time_to_move():
    steps = Steps(prepare=lambda rack: zero_residual_outputs(rack.stacks[1]))
    steps.run(1)
    assert not steps.check.done  # q, k, v, gate, up and the norms of the Stack have had zero gradients
    steps.run(1)
    assert steps.check.done


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_fingerprints_follow_the_bits(dtype):
    values = (torch.arange(35).reshape(5, 7) / (1 if dtype == torch.uint8 else 3)).to(dtype)
    assert fingerprint(values) == fingerprint(values.clone())
    changed = values.clone()
    changed[3, 4] += 1
    assert fingerprint(changed) != fingerprint(values)


def test_minus_zero_is_not_zero_to_a_fingerprint():
    assert fingerprint(torch.tensor([0.0, 1.0])) != fingerprint(torch.tensor([-0.0, 1.0]))
