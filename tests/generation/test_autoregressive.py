import pytest
import torch

from stackwise.generation.autoregressive import generate
from stackwise.model.architecture import Rack, create_simple_rack

V, C, P, N = 37, 26, 7, 13


def rack(**settings):
    """A Rack whose logits are far apart and whose choices depend on all it has read."""
    made = create_simple_rack(2, 1, C, 19, 13, V, n_kv_heads=1, **settings)
    with torch.no_grad():
        made.embedding.weight.mul_(50)
        made.head.weight.mul_(100)
    return made.eval()


def prompt(B=3, T=P, seed=0):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def tokens(model, start, n=N, **settings):
    return torch.stack(list(generate(model, start, n, **settings)), dim=1)


def greedy_without_cache(model, start, n=N):
    read = start
    with torch.no_grad():
        for _ in range(n):
            read = torch.cat((read, model(read)[:, -1:].argmax(-1)), dim=1)
    return read[:, start.shape[1] :]


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_is_the_argmax_of_the_full_forward_pass(tied):
    model = create_simple_rack(2, 3, C, 19, 13, V, tie_embeddings=True) if tied else rack()
    expected = greedy_without_cache(model.eval(), prompt())
    assert torch.equal(tokens(model, prompt(), temperature=0), expected)
    assert tied or len(expected.unique()) > 5


def test_a_prompt_of_one_token_will_do_and_an_empty_one_will_not():
    assert torch.equal(tokens(rack(), prompt(T=1), temperature=0), greedy_without_cache(rack(), prompt(T=1)))
    with pytest.raises(ValueError, match="at least one token"):
        tokens(rack(), prompt(T=0))


@pytest.mark.parametrize("restriction", [{"top_k": 1}, {"top_p": 1e-6}])
def test_restricted_to_one_token_sampling_is_greedy(restriction):
    got = tokens(rack(), prompt(), temperature=1.7, **restriction)
    assert torch.equal(got, tokens(rack(), prompt(), temperature=0))


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    model = rack()
    with torch.no_grad():
        model.head.weight.mul_(0.02)
    first = tokens(model, prompt(), seed=5)
    torch.randn(11)  # the global generator must not matter
    assert torch.equal(first, tokens(model, prompt(), seed=5))
    assert not torch.equal(first, tokens(model, prompt(), seed=6))


def test_prompts_of_unequal_length_padded_on_the_left_go_on_as_each_alone():
    model, lengths = rack(), (7, 2, 5)
    padded, mask = prompt(seed=3), torch.zeros(3, P, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, P - length :] = True
    together = tokens(model, padded, temperature=0, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = tokens(model, padded[row : row + 1, P - length :], temperature=0)
        assert torch.equal(together[row], alone[0])
    assert not torch.equal(together, tokens(model, padded, temperature=0))  # the padding did matter without a mask


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_suppressed_tokens_never_appear(temperature):
    model = rack()
    with torch.no_grad():
        model.head.weight.mul_(0.02)
    blocked = frozenset(range(0, V, 2))
    got = tokens(model, prompt(), n=101, temperature=temperature, suppressed_ids=blocked)
    assert not set(got.flatten().tolist()) & blocked
    free = tokens(model, prompt(), n=101, temperature=1.0)
    assert set(free.flatten().tolist()) & blocked


def test_generation_ends_when_every_sequence_has_met_a_stop_token():
    free = tokens(rack(), prompt(), temperature=0)
    stops = frozenset({int(free[0, 4]), int(free[1, 2]), int(free[2, 7])})
    met = [min(t for t in range(N) if int(free[b, t]) in stops) for b in range(3)]
    got = tokens(rack(), prompt(), temperature=0, stop_ids=stops)
    assert torch.equal(got, free[:, : max(met) + 1])
    assert got.shape[1] < N


def test_no_more_tokens_than_asked_for():
    assert tokens(rack(), prompt(), n=5).shape == (3, 5)
    assert list(generate(rack(), prompt(), 0)) == []


class Fixed(Rack):
    """A Rack without Stacks, whose logits after token i are row i of a table made by hand."""

    def __init__(self, table):
        super().__init__(len(table), len(table))
        with torch.no_grad():
            n = len(table)
            self.embedding.weight.copy_(torch.eye(n))
            self.norm.weight.fill_(n**-0.5)  # the norm of a unit vector is √n
            self.head.weight.copy_(table.T)


def test_frequencies_of_generated_pairs_match_the_softmax_of_the_models_logits():
    table = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.5], [-0.5, 0.3, 0.1]])
    model = Fixed(table).eval()
    model.make_cache = lambda n: None  # without Stacks there is nothing to remember
    torch.testing.assert_close(model(torch.arange(3)[None])[0], table, atol=1e-4, rtol=1e-4)
    start = torch.zeros(101, 1, dtype=torch.int64)
    got = torch.cat((start, tokens(model, start, n=211, seed=1)), dim=1)
    pairs = torch.bincount((got[:, :-1] * 3 + got[:, 1:]).flatten(), minlength=9).reshape(3, 3).double()
    expected = pairs.sum(1, keepdim=True) * table.double().softmax(-1)
    assert float(((pairs - expected) ** 2 / expected).sum()) < 22.5  # 6 degrees of freedom: once in 1000
    swapped = pairs.sum(1, keepdim=True) * table.T.double().softmax(-1)
    assert float(((pairs - swapped) ** 2 / swapped).sum()) > 1000
