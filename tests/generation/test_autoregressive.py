import pytest
import torch

from stackwise.generation.autoregressive import generate, pad_prompts
from stackwise.generation.sampling import row_seeds
from stackwise.model.architecture import Rack, RackSpec, create_rack_from_specs, create_simple_rack
from variants import BLOCKS, rack_of

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


def test_prompts_are_padded_on_the_left():
    ids, mask = pad_prompts([[5, 6, 7], [8], [9, 0]], pad_id=36)
    assert ids.tolist() == [[5, 6, 7], [36, 36, 8], [36, 9, 0]]
    assert mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one"):
            pad_prompts(bad, 0)


PROMPTS = [prompt(B=1, T=length, seed=length)[0].tolist() for length in (7, 2, 5)]


def variant(name, learned=None):
    return apart(rack_of(name, learned_positions=learned))


def apart(made):
    """The Rack in double precision (features of some kernels magnify rounding errors), with choices that depend on all
    that it has read."""
    made = made.double().eval()
    with torch.no_grad():
        for i, (key, parameter) in enumerate(made.named_parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)).double()
            if key.startswith(("embedding", "head")):
                parameter.copy_(noise * (0.3 if key.startswith("embedding") else 1.0))
            else:
                parameter.add_(0.2 * noise)
    return made


@pytest.mark.parametrize("learned", [None, 17])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_batch_of_unequal_prompts_goes_on_as_each_alone_read_from_the_start_each_time(name, learned):
    model, n = variant(name, learned), 11
    ids, mask = pad_prompts(PROMPTS, pad_id=V - 1)
    together = tokens(model, ids, n=n, temperature=0, attention_mask=mask)
    for row, one in enumerate(PROMPTS):
        assert torch.equal(together[row], greedy_without_cache(model, torch.tensor([one]), n)[0])
    assert len(together.unique()) > 3
    assert not torch.equal(together, tokens(model, ids, n=n, temperature=0))  # the padding did matter without a mask


def test_stacks_with_and_without_windows_and_latents_keep_their_own_caches():
    names = ("window", "mla_attention", "gpt_style", "kernel_attention")
    stacks = [{"stack_id": k, "n_blocks": 1, "block_spec": BLOCKS[name]} for k, name in enumerate(names)]
    model = apart(create_rack_from_specs(V, 48, stacks))
    ids, mask = pad_prompts(PROMPTS, pad_id=V - 1)
    together = tokens(model, ids, temperature=0, attention_mask=mask)
    for row, one in enumerate(PROMPTS):
        assert torch.equal(together[row], greedy_without_cache(model, torch.tensor([one]))[0])
    assert len(together.unique()) > 8


@pytest.mark.parametrize("name", BLOCKS)
def test_what_a_sequence_draws_depends_on_its_prompt_and_seed_alone(name):
    model = variant(name)
    ids, mask = pad_prompts(PROMPTS, pad_id=V - 1)
    settings = {"temperature": 4.0, "top_p": 0.95, "min_p": 0.02}
    together = tokens(model, ids, seed=5, attention_mask=mask, **settings)
    seeds = row_seeds(5, 3)
    for row, one in enumerate(PROMPTS):
        assert torch.equal(together[row], tokens(model, torch.tensor([one]), seed=seeds[row], **settings)[0])
        assert not torch.equal(together[row], tokens(model, torch.tensor([one]), seed=6, **settings)[0])
    turned = tokens(model, ids.flip(0), seed=seeds[::-1], attention_mask=mask.flip(0), **settings)
    assert torch.equal(turned, together.flip(0))


def test_equal_prompts_in_a_batch_draw_different_tokens():
    got = tokens(rack(), prompt(B=1).expand(5, -1), temperature=3.0)
    assert len({tuple(row) for row in got.tolist()}) == 5


def test_min_p_restricts_the_draw():
    model = rack()
    assert torch.equal(tokens(model, prompt(), min_p=1.0, seed=3), tokens(model, prompt(), temperature=0))
    assert not torch.equal(tokens(model, prompt(), min_p=0.0, seed=3), tokens(model, prompt(), temperature=0))


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


@pytest.mark.parametrize("pad", [None, V - 1])
def test_a_sequence_that_met_a_stop_token_repeats_it_or_the_padding_and_changes_no_other(pad):
    free = tokens(rack(), prompt(), temperature=0)
    stops = frozenset({int(free[0, 4]), int(free[1, 2]), int(free[2, 7])})
    met = [min(t for t in range(N) if int(free[b, t]) in stops) for b in range(3)]
    assert len(set(met)) == 3 and max(met) < N - 1
    got = tokens(rack(), prompt(), temperature=0, stop_ids=stops, pad_id=pad)
    assert got.shape[1] == max(met) + 1
    for row, end in enumerate(met):
        assert torch.equal(got[row, : end + 1], free[row, : end + 1])
        assert set(got[row, end + 1 :].tolist()) <= {int(free[row, end]) if pad is None else pad}


def test_stopping_moves_no_other_sequences_random_stream():
    settings = {"temperature": 3.0, "seed": 2}
    free = tokens(rack(), prompt(), **settings)
    stops = frozenset(free[1, : N - 4].tolist()) - frozenset(free[[0, 2]].flatten().tolist())
    got = tokens(rack(), prompt(), stop_ids=stops, **settings)
    assert torch.equal(got[[0, 2]], free[[0, 2]]) and not torch.equal(got[1], free[1])


def test_learned_positions_are_used_to_the_last_and_more_tokens_refused_before_the_first():
    model = variant("gpt_style", learned=11)
    assert tokens(model, prompt(), n=5).shape == (3, 5)  # the last token is not read again: 7 + 4 rows
    with pytest.raises(
        ValueError, match=r"^6 tokens after a prompt of 7 are more than the 11 positions.*at most 5 fit"
    ):
        generate(model, prompt(), 6)
    with pytest.raises(ValueError, match=r"^1 tokens after a prompt of 12.*a prompt may have 11 tokens at most"):
        generate(model, prompt(T=12), 1)
    assert tokens(variant("gpt_style"), prompt(), n=40).shape == (3, 40)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"seed": [1, 2]}, "2 seeds for 3 sequences"),
        ({"attention_mask": torch.ones(3, P + 1, dtype=torch.bool)}, "attention_mask is"),
        ({"attention_mask": torch.arange(P).expand(3, -1) < P - 1}, "padded on the left"),
        ({"n_tokens": -1}, "n_tokens is -1"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_call(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(rack(), prompt(), **{"n_tokens": N, **settings})


def test_a_model_that_sees_what_follows_is_refused():
    model = rack()
    model.set_attention_mode("bidirectional")
    with pytest.raises(ValueError, match="causal"):
        generate(model, prompt(), N)


def test_no_more_tokens_than_asked_for():
    assert tokens(rack(), prompt(), n=5).shape == (3, 5)
    assert list(generate(rack(), prompt(), 0)) == []


class Fixed(Rack):
    """A Rack without Stacks, whose logits after token i are row i of a table made by hand."""

    def __init__(self, table):
        super().__init__(RackSpec(len(table), len(table)))
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
