"""What only a GPU shows. `make gpu` runs these; without a GPU it says so and does nothing."""

from pathlib import Path

import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.growth.curricula import build_phases
from stackwise.model.architecture import create_simple_rack
from stackwise.model.reading import Reading
from stackwise.objectives import CausalObjective, Example
from stackwise.ops.attention import attend
from stackwise.ops.losses import linear_cross_entropy
from stackwise.ops.precision import autocast
from stackwise.planning.cost import PhaseCoster
from stackwise.planning.devices import measured_flops
from stackwise.runs.run import train_run
from stackwise.training.progress import SilentReporter

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
V, B, T = 521, 4, 512


def config(tmp_path: Path, *overrides: str) -> StackWiseConfig:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 4000)
    return StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": V, "d_model": 256, "n_heads": 4, "architecture": {"n_stacks": 3, "blocks_per_stack": 1},
            },
            "training": {
                "batch_size": B, "seq_len": T, "max_steps": 9, "device": "cuda", "evaluation": {"max_tokens": T},
            },
            "data": {
                "source": "files", "path": str(text), "tokenizer": {"kind": "bytes"},
                "cache_dir": str(tmp_path / "store"),
            },
        }, overrides
    )  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_plan_holds_on_the_device(dropout):
    made = create_simple_rack(4, 1, 512, 1408, 8, V, dropout=dropout)
    settings = StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": V, "d_model": 512, "d_ff": 1408, "n_heads": 8, "dropout": dropout,
                "architecture": {"n_stacks": 4, "blocks_per_stack": 1},
            },
            "training": {"strategy": "end_to_end", "batch_size": B, "seq_len": T, "device": "cuda"},
        }
    )  # fmt: skip
    phase = build_phases(settings)[-1]
    planned = PhaseCoster(settings, V, torch.bfloat16, rack=made, device="cuda")(phase)
    made.to(CUDA).train()
    ids = torch.randint(0, V, (B, T), device=CUDA)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with autocast(CUDA, torch.bfloat16):
        loss = CausalObjective().loss(made, Example(Reading(ids), ids), 1.0)
    loss.backward()
    measured = torch.cuda.max_memory_allocated() + planned.optimizer
    assert planned.peak == pytest.approx(measured, rel=0.1)


def test_attention_and_the_chunked_loss_agree_with_the_cpu():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 67, 40, generator=g) for _ in range(3))
    mask = torch.ones(2, 67, dtype=torch.bool)
    mask[0, 50:] = False
    here = attend(q, k, v, causal=True, key_mask=mask)
    there = attend(q.to(CUDA), k.to(CUDA), v.to(CUDA), causal=True, key_mask=mask.to(CUDA)).cpu()
    torch.testing.assert_close(there[mask[:, None].expand(2, 4, 67)], here[mask[:, None].expand(2, 4, 67)], atol=5e-3,
                               rtol=5e-3)  # fmt: skip
    hidden, weight = torch.randn(101, 17, generator=g), torch.randn(1009, 17, generator=g)
    targets = torch.randint(0, 1009, (101,), generator=g)
    losses = [
        linear_cross_entropy(*(x.to(d) for x in (hidden, weight, targets)), chunk=13).cpu() for d in ("cpu", CUDA)
    ]
    torch.testing.assert_close(*losses, atol=0.5, rtol=2e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.progressive.trunk_strategy=frozen"],
        ["training.progressive.trunk_strategy=frozen", "training.offload=host"],
        ["training.progressive.trunk_strategy=frozen", "training.progressive.cache_activations=true"],
        ["training.optimizer.in_backward=true", "training.grad_clip=null"],
        ["training.optimizer.moments=int8"],
        ["training.compile=true"],
    ],
    ids=lambda overrides: overrides[-1],
)
def test_a_run_trains_on_the_device(tmp_path, overrides):
    summary = train_run(config(tmp_path, *overrides), tmp_path / "run", SilentReporter())
    first, last = summary["phases"][0]["first_loss"], summary["phases"][-1]["last_loss"]
    assert last < first and summary["peak_memory_bytes"] > 0


def test_a_measured_rate_is_above_a_teraflop():
    assert measured_flops(CUDA, torch.bfloat16) > 1e12
