import pytest
import torch
import torch.nn.functional as F

from stackwise.ops import losses
from stackwise.ops.losses import IGNORE, linear_cross_entropy, linear_cross_entropy_terms

N, C, V = 23, 7, 31


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, C, generator=g, requires_grad=True)
    weight = torch.randn(V, C, generator=g, requires_grad=True)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[[0, 11, 22]] = IGNORE
    return hidden, weight, targets


def plain(hidden, weight, targets, scale):
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum") * scale


@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 100, None])
def test_chunked_loss_and_gradients_equal_the_plain_ones(problem, chunk):
    hidden, weight, targets = problem
    expected = plain(hidden, weight, targets, 0.37)
    expected_grads = torch.autograd.grad(3.0 * expected, (hidden, weight))
    actual = linear_cross_entropy(hidden, weight, targets, 0.37, chunk)
    grads = torch.autograd.grad(3.0 * actual, (hidden, weight))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grads, expected_grads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_chunked_loss_skips_the_gradient_of_what_is_frozen(problem, frozen):
    hidden, weight, targets = problem
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets, 1.0, chunk=5).backward()
    trained = weight if frozen == "hidden" else hidden
    other = hidden if frozen == "hidden" else weight
    assert other.grad is None
    expected = torch.autograd.grad(plain(hidden, weight, targets, 1.0), trained)[0]
    torch.testing.assert_close(trained.grad, expected, atol=1e-6, rtol=1e-5)


def test_all_positions_ignored_give_zero_loss_and_zero_gradient(problem):
    hidden, weight, targets = problem
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE), 1.0, chunk=5)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_chunks_are_used_when_logits_would_be_large(problem, monkeypatch):
    hidden, weight, targets = problem
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * V)
    monkeypatch.setattr(losses, "MIN_ROWS", 1)
    made = []
    original = torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda x, *a: made.append(x.shape) or original(x, *a))
    linear_cross_entropy(hidden, weight, targets)
    assert max(rows for rows, _ in made) == 4 and sum(rows for rows, _ in made) == N


def test_terms_are_the_cross_entropy_of_each_position(problem):
    hidden, weight, targets = problem
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="none")
    terms, right = linear_cross_entropy_terms(hidden, weight, targets, chunk=6)
    torch.testing.assert_close(terms, expected.detach())
    assert torch.equal(right, (hidden @ weight.T).argmax(-1) == targets) and right.any()


@pytest.mark.parametrize("chunk", [5, 100])
def test_weights_count_each_position_and_an_excluded_token_is_never_predicted(problem, chunk):
    hidden, weight, targets = problem
    excluded = 11
    targets = torch.where(targets == excluded, 12, targets)
    weights = torch.rand(N, generator=torch.Generator().manual_seed(8))
    logits = (hidden @ weight.T).index_fill(1, torch.tensor([excluded]), float("-inf"))
    plain = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    expected = (plain * weights).sum() * 0.7
    actual = linear_cross_entropy(hidden, weight, targets, 0.7, chunk, weights=weights, excluded=excluded)
    torch.testing.assert_close(actual, expected)
    grads = (torch.autograd.grad(loss, (hidden, weight)) for loss in (actual, expected))
    for a, e in zip(*grads):
        torch.testing.assert_close(a, e, atol=1e-6, rtol=1e-5)
    terms, right = linear_cross_entropy_terms(hidden, weight, targets, chunk, excluded=excluded)
    torch.testing.assert_close(terms, plain.detach())
    assert torch.equal(right, logits.argmax(-1) == targets)


def test_bf16_autocast_keeps_the_softmax_in_fp32(problem):
    hidden, weight, targets = problem
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, 1.0 / 20, chunk=5)
    loss.backward()
    assert loss.dtype == torch.float32 and weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, plain(hidden, weight, targets, 1.0 / 20), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("chunk", [5, 100])
def test_a_bias_on_the_logits_counts_in_loss_gradients_and_terms(problem, chunk):
    hidden, weight, targets = problem
    bias = torch.randn(V, generator=torch.Generator().manual_seed(6), requires_grad=True)
    inputs = (hidden, weight, bias)
    logits = hidden @ weight.T + bias
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") * 0.37
    actual = linear_cross_entropy(hidden, weight, targets, 0.37, chunk, bias=bias)
    torch.testing.assert_close(actual, expected)
    grads = (torch.autograd.grad(loss, inputs) for loss in (actual, expected))
    for a, e in zip(*grads):
        torch.testing.assert_close(a, e, atol=1e-6, rtol=1e-5)
    terms, _ = linear_cross_entropy_terms(hidden, weight, targets, chunk, bias=bias)
    torch.testing.assert_close(terms, F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none"))
