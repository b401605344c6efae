"""Every use of a Rack goes through its ``forward``: what a hook, a wrapper or a compiler there does is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stackwise.config import StackWiseConfig
from stackwise.config.objectives import ClassificationConfig, MaskingConfig
from stackwise.data.batches import Batch
from stackwise.evaluation.pseudo import pseudo_perplexity
from stackwise.generation.autoregressive import generate
from stackwise.generation.denoisers import RackDenoiser, generate_blocks
from stackwise.generation.diffusion import unmask
from stackwise.model.architecture import Rack, create_rack_from_config
from stackwise.model.reading import Reading, Route
from stackwise.objectives import CausalObjective, ClassificationObjective, DiffusionObjective, MaskedObjective
from stackwise.training.examples import Boundaries
from stackwise.training.offload import Offload

B, T, V, MASK, K = 7, 6, 11, 2, 3
LEVELS = (1.0, 0.55, 0.2, 0.0)
KNOWN: dict[str, Any] = {"seed": 3, "mask_id": MASK, "special_ids": frozenset({0, MASK}), "vocab_size": V}
TOKENS = np.random.default_rng(0).integers(3, V, (B, T + 1))


def batch(rows: int = B) -> Batch:
    return Batch(TOKENS[:rows], np.arange(rows), np.zeros(rows, dtype=np.int64), TOKENS[:rows, 0] % 5)


KINDS: dict[str, dict[str, Any]] = {
    "clm": {},
    "classification": {},
    "mlm": {},
    "diffusion": {},
    "blocks": {"block_length": 2},
    "input": {"time_interpretation": "input"},
    "experts": {"time_interpretation": "depth", "depth_variant": "experts"},
    "suffix": {"time_interpretation": "depth", "depth_variant": "suffix"},
    "prefix": {"time_interpretation": "depth", "depth_variant": "prefix"},
}


def config_of(kind: str) -> StackWiseConfig:
    settings = dict(KINDS[kind])
    name = kind if kind in ("clm", "mlm", "classification") else "diffusion"
    progressive = {"training_objective": name, "time_interpretation": settings.pop("time_interpretation", None)}
    if progressive["time_interpretation"] == "depth":
        settings["levels"] = list(LEVELS)
    model = {"d_model": 12, "n_heads": 2, "d_ff": 17, "architecture": {"n_stacks": K, "blocks_per_stack": 1}}
    training = {"strategy": "end_to_end", "batch_size": B, "seq_len": T, "progressive": progressive}
    if name == "diffusion":
        training["diffusion"] = settings
    if name == "classification":
        training["classification"] = {"classes": 5}
    preset = "gpt_style" if kind in ("clm", "classification") else "bert_style"
    return StackWiseConfig.from_dict({"model": {**model, "attention_preset": preset}, "training": training})


def rack_of(kind: str) -> Rack:
    rack = create_rack_from_config(config_of(kind), vocab_size=V).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in rack.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return rack


def objective_of(kind: str) -> Any:
    if kind == "clm":
        return CausalObjective()
    if kind == "classification":
        return ClassificationObjective(ClassificationConfig(classes=5), "last")
    if kind == "mlm":
        return MaskedObjective(MaskingConfig(rate=0.4), **KNOWN)
    training = config_of(kind).training
    told, variant = "rate" if kind == "input" else None, training.depth_variant
    levels = (1.0, 0.0) if variant is None else LEVELS
    made = DiffusionObjective(training.diffusion, variant=variant, levels=levels, conditioned=told, **KNOWN)
    return made.during(())


def loss_of(kind: str, rack: Any) -> Tensor:
    objective = objective_of(kind)
    example = objective.corrupt(batch())
    return objective.loss(rack, example, 1.0 / example.n_targets)


def score_of(kind: str, rack: Any) -> Tensor:
    return torch.from_numpy(objective_of(kind).score(rack, batch()).nats)


def filled(kind: str, rack: Rack) -> Tensor:
    """Gaps that a sampler fills, after every step."""
    tokens = torch.full((2, T), MASK)
    levels = LEVELS if kind in ("experts", "suffix", "prefix") else (1.0, 0.6, 0.3, 0.0)
    denoise = RackDenoiser(rack, objective_of(kind))
    return torch.cat(list(unmask(denoise, tokens, mask_id=MASK, levels=levels, seed=1)))


def blocks_filled(rack: Rack, cached: bool) -> Tensor:
    tokens = torch.full((2, T), MASK)
    return torch.cat(list(generate_blocks(rack, tokens, 2, mask_id=MASK, cached=cached, order="confidence")))


def boundary_of(rack: Rack) -> Tensor:
    """The hidden state that a cache keeps, after two Stacks."""

    class Source:
        repeatable = True

        def during(self, objective: Any) -> Any:
            return self

        def example(self, step: int) -> Any:
            return CausalObjective().corrupt(batch())

    device = torch.device("cpu")
    return Boundaries(rack, Source(), config_of("clm"), device, None, Offload(device)).recomputed(0, 2)


def pseudo(rack: Rack) -> Tensor:
    found = pseudo_perplexity(rack, MASK, KNOWN["special_ids"], TOKENS.ravel(), T, 4, 13)
    return torch.tensor(found["pseudo_perplexity"])


PROMPT = torch.from_numpy(TOKENS[:2, :3])
USES: dict[str, tuple[str, Callable[[Rack], Tensor]]] = {
    **{f"loss of {kind}": (kind, lambda rack, kind=kind: loss_of(kind, rack)) for kind in KINDS},
    **{f"score of {kind}": (kind, lambda rack, kind=kind: score_of(kind, rack)) for kind in KINDS},
    **{
        f"sampling with {kind}": (kind, lambda rack, kind=kind: filled(kind, rack))
        for kind in ("diffusion", "input", "experts", "suffix", "prefix")
    },
    "blocks, cached": ("blocks", lambda rack: blocks_filled(rack, True)),
    "blocks, read again": ("blocks", lambda rack: blocks_filled(rack, False)),
    "left to right": ("clm", lambda rack: torch.stack(list(generate(rack, PROMPT, 3, temperature=0)))),
    "pseudo-perplexity": ("mlm", pseudo),
    "filling a cache": ("clm", boundary_of),
    "classes of texts": ("classification", lambda rack: objective_of("classification").logits(rack, PROMPT)),
}


@pytest.mark.parametrize("use", USES)
@torch.no_grad()
def test_forward_sees_every_use(use: str) -> None:
    """All weights but the head's are there only while ``forward`` runs, as where a wrapper gathers shards."""
    kind, run = USES[use]
    expected = run(rack_of(kind))
    rack, calls = rack_of(kind), []
    whole = {p: p.data.clone() for name, p in rack.named_parameters() if not name.startswith("head.")}
    assert len(whole) > 20

    def gather(module: nn.Module, inputs: Any) -> None:
        calls.append(inputs)
        for parameter, values in whole.items():
            parameter.data = values

    def scatter(module: nn.Module, inputs: Any, output: Any) -> None:
        for parameter, values in whole.items():
            parameter.data = torch.full_like(values, float("nan"))

    scatter(rack, None, None)
    rack.register_forward_pre_hook(gather)
    rack.register_forward_hook(scatter)
    assert torch.equal(run(rack), expected) and expected.isfinite().all()
    assert len(calls) == 1 if use.startswith(("loss", "score")) else calls


class Wrapper(nn.Module):
    """What stands in the place of a Rack: it acts on ``forward``, and is otherwise the Rack."""

    def __init__(self, rack: Rack) -> None:
        super().__init__()
        self.rack, self.calls = rack, 0

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        return self.rack(*args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.rack, name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapper_of_the_whole_model_gives_the_same_loss_and_gradients(kind: str) -> None:
    plain, wrapped = rack_of(kind), Wrapper(rack_of(kind))
    losses = [loss_of(kind, rack) for rack in (plain, wrapped)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses) and wrapped.calls == 1
    for p, q in zip(plain.parameters(), wrapped.rack.parameters()):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(
    "kind",
    ["clm", "blocks", "prefix", *(pytest.param(k, marks=pytest.mark.slow) for k in ("diffusion", "input", "suffix"))],
)
def test_the_whole_model_compiled_gives_the_same_loss_and_gradients(kind: str) -> None:
    plain, other = rack_of(kind), rack_of(kind)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    losses = [loss_of(kind, rack) for rack in (plain, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-6)
    for p, q in zip(plain.parameters(), other.parameters()):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-5)


def test_a_reading_ends_where_it_is_told_and_goes_on_from_there():
    rack, ids = rack_of("clm"), torch.from_numpy(TOKENS)
    mask = torch.ones(B, T + 1, dtype=torch.bool)
    mask[1:3, :2] = False
    embedded = rack(Reading(ids, mask, stop=0, finished=False))
    middle = rack(Reading(ids, mask, stop=2, finished=False))
    assert torch.equal(rack(Reading(attention_mask=mask, boundary=embedded, stop=2, finished=False)), middle)
    last = rack(Reading(attention_mask=mask, boundary=middle, start=2, finished=False))
    hidden = rack(Reading(boundary=last, start=3))
    assert torch.equal(rack.logits(hidden), rack(ids, mask)) and torch.equal(hidden, rack(Reading(ids, mask)))
    assert torch.equal(rack(Reading(ids, boundary=middle, stop=0, finished=False)), rack.embedding(ids) + middle)


def test_rows_on_routes_of_their_own_are_as_they_would_be_alone():
    rack, ids = rack_of("clm"), torch.from_numpy(TOKENS)
    routes = (Route((1, 4, 5), 1, 3), Route((0, 2, 6), 0, 1), Route((3,), 2, 3))
    found = rack(Reading(ids, routes=routes))
    for route in routes:
        for row in route.rows:
            alone = rack(Reading(ids[row : row + 1], start=route.start, stop=route.stop))
            torch.testing.assert_close(found[row : row + 1], alone)
    parts = [rack(Reading(ids, routes=routes).between(first, first + 2)) for first in range(0, B, 2)]
    torch.testing.assert_close(torch.cat(parts), found)


def test_padding_is_counted_in_both_halves_of_blocks_and_clean_tokens():
    """Padding on the left changes neither half: positions are counted over real tokens."""
    rack, ids = rack_of("blocks"), torch.from_numpy(TOKENS[:, :T])
    noised = torch.where(torch.arange(T) % 2 == 0, MASK, ids)
    pad, mask = torch.zeros(B, 2, dtype=torch.int64), torch.ones(B, T + 2, dtype=torch.bool)
    mask[:, :2] = False
    wide, clean = torch.cat((pad, noised), dim=1), torch.cat((pad, ids), dim=1)
    found = rack(Reading(wide, mask, block_length=2, clean=clean))
    torch.testing.assert_close(found[:, 2:], rack(Reading(noised, block_length=2, clean=ids)))


def test_a_reading_of_nothing_is_refused():
    with pytest.raises(ValueError, match="token ids or the hidden state"):
        rack_of("clm")(Reading())
    rack = rack_of("diffusion")
    with pytest.raises(ValueError, match="no block_length"):
        rack(Reading(PROMPT, block_length=2, cache=rack.make_cache(5)))
