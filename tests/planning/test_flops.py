"""FLOPs against closed forms: every product written out by hand, and counted by shape while a run trains.

B sequences, T tokens, C width, H heads of D, F width of the feed-forward, V vocabulary. Tokens times vocabulary lie
above 2²², where the loss is computed in chunks.
"""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F_
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from stackwise.config import StackWiseConfig
from stackwise.growth.phases import Adapter, Phase, Schedule
from stackwise.model.architecture import Rack, create_rack_from_config, rack_spec_from_config
from stackwise.ops.kernels import laplacian_weight_attention
from stackwise.planning.cost import PhaseCoster
from stackwise.planning.dry_step import Ledger
from stackwise.planning.flops import formula_of
from stackwise.planning.plan import plan_phases, plan_run
from stackwise.runs.builder import ProgressiveRackBuilder
from stackwise.training import ArchitectureTrainer, ProgressiveDataLoader, ProgressiveTrainer
from stackwise.training.loop import Loop

B, T, C, H, D, F, V = 8, 139, 66, 3, 22, 29, 4099
N = B * T
assert N * V > 1 << 22

GATED = 3 * C * F
BLOCK = 4 * C * C + GATED  # q, k, v, o; gate, up, down
HEAD = V * C


def attention(tokens=T, width=D, heads=H, sequences=B):
    """q kᵀ and the weights times v, over all pairs."""
    return 2 * (2 * sequences * heads * tokens * tokens * width)


# Trained: forward, to the input and to the weights, two each. Attention: two products forward and five backward.
def trained(block=BLOCK, attended=None, tokens=N):
    return 6 * block * tokens + 3.5 * (attention() if attended is None else attended)


TWO_BLOCKS = 2 * trained()
WHOLE = TWO_BLOCKS + 6 * HEAD * N


def newton_schulz(rows, columns):
    """Five times: X Xᵀ, its square, and that times X; the shorter side first."""
    m, n = sorted((rows, columns))
    return 5 * (2 * m * n * m + 2 * m * m * m + 2 * m * m * n)


MUON = 2 * (4 * newton_schulz(C, C) + 3 * newton_schulz(C, F))  # of two Blocks


def config(*overrides):
    return StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": V,
                "d_model": C,
                "n_heads": H,
                "d_ff": F,
                "architecture": {"n_stacks": 2, "blocks_per_stack": 1},
            },
            "training": {
                "strategy": "end_to_end",
                "batch_size": B,
                "seq_len": T,
                "max_steps": 5,
                "device": "cpu",
                "compute_dtype": "float32",
            },
        },
        overrides,
    )


def costs(*overrides):
    return plan_phases(config(*overrides), V).costs


MLA = "model.attention_custom={attention_type: mla, mla_rq: 13, mla_rkv: 17, mla_rope_dim: 6, mla_v_head_dim: 10}"
SEPARATE = "model.attention_custom={attention_type: mla, mla_latents: separate, mla_rq: 13, mla_rkv: 17}"
CUSTOM = "model.attention_preset=custom"
MLA_BLOCK = C * 13 + 13 * H * (D + 6) + C * (17 + 6) + 17 * H * (D + 10) + H * 10 * C + GATED
SEPARATE_BLOCK = (C * 13 + 13 * C) + 2 * (C * 17 + 17 * C) + C * C + GATED
FEATURES = "model.attention_custom={kernel_type: gaussian, kernel_dim: 34}"
TO_FEATURES = 2 * N * H * D * 17  # one of q and k: frequencies do not train, so twice this with the way back
WEIGHTS = "model.attention_custom={kernel_type: gaussian, kernel_meaning: weight}"
LAPLACIAN = "model.attention_custom={kernel_type: laplacian, kernel_meaning: weight}"
# Distances from D + 2 columns. Backward: distances again, to the weights, to v, to q and to k.
LAPLACIAN_PAIRS = 2 * B * H * T * T * ((D + 2) + D + 3 * (D + 2) + 2 * D)
SPANS = 2 * (2 * B * H * (3 * 64) * (4 + 64) * D)  # 3 chunks of 64 queries, each with the 4 keys before it

PARTS = {
    "in fp32": ((), WHOLE),
    "in bfloat16": (("training.compute_dtype=bfloat16",), WHOLE),
    "tied": (("model.tie_embeddings=true",), WHOLE),
    "tied in bfloat16": (("model.tie_embeddings=true", "training.compute_dtype=bfloat16"), WHOLE),
    "biases": (("model.bias=true",), WHOLE),
    "a head with a transformation": (("model.mlm_head=true",), WHOLE + 6 * C * C * N),
    "grouped": (("model.n_kv_heads=1",), WHOLE - 2 * 6 * 2 * C * (C - D) * N),
    "gelu": (("model.ffn=gelu",), WHOLE - 2 * 6 * C * F * N),
    "shared latents": (
        (CUSTOM, MLA),
        2 * trained(MLA_BLOCK, attention(width=D + 6)) + 6 * HEAD * N,  # the kernel takes one width for q, k and v
    ),
    "separate latents": ((CUSTOM, SEPARATE), 2 * trained(SEPARATE_BLOCK) + 6 * HEAD * N),
    "features of a kernel": (
        (CUSTOM, FEATURES),
        2 * (trained(BLOCK, attention(width=34)) + 2 * 2 * TO_FEATURES) + 6 * HEAD * N,
    ),
    "gaussian weights": ((CUSTOM, WEIGHTS), 2 * trained(BLOCK, attention(width=D + 2)) + 6 * HEAD * N),
    "laplacian weights": ((CUSTOM, LAPLACIAN), 2 * (6 * BLOCK * N + LAPLACIAN_PAIRS) + 6 * HEAD * N),
    "a window": (("model.window=5",), 2 * trained(BLOCK, SPANS) + 6 * HEAD * N),
    "an up-projection that never trains": (("model.freeze_up_proj=true",), WHOLE - 2 * 2 * C * F * N),
    "micro-batches": (("training.micro_batch_size=4",), WHOLE),
}


@pytest.mark.parametrize(("overrides", "flops"), PARTS.values(), ids=PARTS)
def test_the_flops_of_every_part_are_its_products(overrides, flops):
    (cost,) = costs(*overrides)
    assert cost.flops == pytest.approx(flops, rel=1e-9)


# The loss takes other branches for small logits and for a narrow dtype: the work is the same.
@pytest.mark.parametrize("vocab_size", [41, V])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_counted_alike_whatever_the_loss_does(vocab_size, dtype):
    settings = config(f"model.vocab_size={vocab_size}", f"training.compute_dtype={dtype}")
    (cost,) = plan_phases(settings, vocab_size).costs
    assert cost.kinds.head == 6 * vocab_size * C * N
    assert cost.kinds.forward == 2 * (2 * BLOCK * N + attention())
    assert cost.kinds.backward == 2 * (4 * BLOCK * N + 2.5 * attention())
    assert cost.flops == cost.kinds.forward + cost.kinds.backward + cost.kinds.head


def objective(name, *more):
    return (f"training.progressive.training_objective={name}", *more)


BLOCKED = 9 * 17
DEPTH = ("training.progressive.time_interpretation=depth", "training.diffusion.levels=[1.0, 0.5, 0.0]")
TIMED = ("training.progressive.time_interpretation=input", "training.diffusion.time_dim=14")
OBJECTIVES = {
    "clm": (objective("clm"), WHOLE),
    "mlm": (objective("mlm"), WHOLE),
    "diffusion": (objective("diffusion"), WHOLE),
    # Noised and clean tokens in one pass; the head reads the noised ones.
    "blocks": (
        objective("diffusion", f"training.seq_len={BLOCKED}", "training.diffusion.block_length=17"),
        2 * trained(BLOCK, attention(2 * BLOCKED), 2 * B * BLOCKED) + 6 * HEAD * B * BLOCKED,
    ),
    "experts": (objective("diffusion", *DEPTH, "training.diffusion.depth_variant=experts"), trained() + 6 * HEAD * N),
    # Half of the sequences pass both Stacks, the less noisy half the last one.
    "suffix": (
        objective("diffusion", *DEPTH, "training.diffusion.depth_variant=suffix"),
        1.5 * trained() + 6 * HEAD * N,
    ),
    "prefix": (
        objective("diffusion", *DEPTH, "training.diffusion.depth_variant=prefix"),
        2 * trained() + 2 * 6 * HEAD * N,
    ),
    # Every Block turns the noise level of a sequence into six vectors; two layers embed it, the first of constants.
    "time": (objective("diffusion", *TIMED), WHOLE + 2 * 6 * B * 14 * 6 * C + (4 + 6) * B * 14 * 14),
    "classification": (
        objective("classification", "training.classification.classes=5"),
        TWO_BLOCKS + 6 * 5 * C * B,
    ),
}


@pytest.mark.parametrize(("overrides", "flops"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_flops_of_every_objective_are_its_products(overrides, flops):
    (cost,) = costs(*overrides)
    assert cost.flops == pytest.approx(flops, rel=1e-9)


OPTIMIZERS = {
    "adamw": ((), 0),
    "adamw, moments in 8 bits": (("training.optimizer.moments=int8",), 0),
    "sgd": (("training.optimizer.optimizer_type=sgd",), 0),
    "muon": (("training.optimizer.optimizer_type=muon",), MUON),
    "muon in micro-batches": (("training.optimizer.optimizer_type=muon", "training.micro_batch_size=2"), MUON),
}


@pytest.mark.parametrize(("overrides", "flops"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_products_of_every_optimizer_count_once_a_step(overrides, flops):
    (cost,) = costs(*overrides)
    assert cost.kinds.optimizer == flops
    assert cost.flops == WHOLE + flops


def test_updates_in_the_backward_pass_count_as_much():
    overrides = ("training.optimizer.optimizer_type=muon", "training.optimizer.in_backward=true")
    (cost,) = costs(*overrides, "training.grad_clip=null")
    assert cost.flops == WHOLE + MUON


def test_many_equal_stacks_cost_what_each_of_them_costs():
    muon = "training.optimizer.optimizer_type=muon"
    (cost,) = costs("model.architecture.n_stacks=11", muon)
    assert cost.flops == 11 * (trained() + MUON / 2) + 6 * HEAD * N


def test_activation_checkpointing_recomputes_each_block_but_for_its_last_product():
    (cost,) = costs("training.activation_checkpointing=true")
    assert cost.kinds.recomputation == 2 * (2 * (BLOCK - C * F) * N + attention())
    assert cost.flops == WHOLE + cost.kinds.recomputation


# ---- phases


def phase(stacks, *trains, **fields):
    return Phase("phase", stacks, trains, 1, Schedule(0, "linear", 1, 1, 1.0), "clm", **fields)


def cost_of(found, *overrides, **options):
    return PhaseCoster(config(*overrides), V, None, **options)(found)


FORWARD = 2 * BLOCK * N + attention()


def test_a_frozen_stack_below_what_trains_costs_its_forward_pass():
    cost = cost_of(phase((0, 1), "stack.1", "norm", "head"))
    assert cost.flops == FORWARD + trained() + 6 * HEAD * N


def values(precision):
    """Multiplications that decode a Block's matrices: one a value, and one a scale that is itself scaled."""
    block = {"int8": 128, "fp8": 128, "nf4": 64, "nvfp4": 16}[precision]
    rows = [math.ceil(n / block) for n in (*(4 * [C * C]), *(3 * [C * F]))]
    return sum(rows) * (block + (precision == "nvfp4"))


@pytest.mark.parametrize("precision", ["full", "half", "bfloat16", "fp8", "int8", "nf4", "nvfp4"])
def test_a_stack_that_is_stored_above_what_trains_is_decoded_for_both_passes(precision):
    cost = cost_of(phase((1, 0), "embedding", "stack.1", "norm", "head", precision=((0, precision),)))
    decoded = 0 if precision in ("full", "half", "bfloat16") else 2 * values(precision)
    assert cost.kinds.dequantisation == decoded
    assert cost.flops == (4 * BLOCK * N + 3.5 * attention()) + trained() + 6 * HEAD * N + decoded


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_stored_prefix_is_decoded_once_in_every_micro_batch(micro_batches):
    found = phase((0, 1), "stack.1", "norm", "head", precision=((0, "nvfp4"),))
    cost = cost_of(found, f"training.micro_batch_size={B // micro_batches}")
    assert cost.kinds.dequantisation == micro_batches * values("nvfp4")
    assert cost.flops == FORWARD + trained() + 6 * HEAD * N + micro_batches * values("nvfp4")


def test_adapters_cost_their_two_factors_beside_a_frozen_layer():
    r = 5
    cost = cost_of(phase((0,), adapters=(Adapter(0, "stack", r, 3.0),), precision=((0, "nf4"),)))
    inputs_need_none = 3 * C * C  # q, k and v read a constant
    base = (2 * BLOCK + 2 * (BLOCK - inputs_need_none)) * N + 3.5 * attention()
    sizes = [(C, C)] * 4 + [(C, F)] * 2 + [(F, C)]
    factors = sum(6 * r * (n_in + n_out) * N for n_in, n_out in sizes) - 3 * 2 * r * C * N
    blocks = [math.ceil(n_in * n_out / 64) * 64 for n_in, n_out in sizes]
    assert cost.kinds.dequantisation == sum(blocks) + sum(blocks[3:])
    assert cost.flops == base + factors + 4 * HEAD * N + cost.kinds.dequantisation


CACHED = (
    "training.strategy=progressive", "training.progressive.trunk_strategy=frozen",
    "training.progressive.cache_activations=true", "model.architecture.n_stacks=3", "training.max_steps=30",
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_filling_a_cache_costs_each_batch_one_stack_and_its_coding(dtype):
    found = plan_phases(config(*CACHED, f"training.cache.dtype={dtype}"), V)
    coded = N * 128 if dtype == "fp8" else 0  # a row of 66 values is one group of 128
    assert found.costs[0].flops == trained() + 6 * HEAD * N
    batches = found.phases[1].examples[1]
    for cost in found.costs[1:]:
        assert cost.flops == trained() + 6 * HEAD * N + coded  # read once a step
    assert found.preparation_flops[0] == 0
    assert found.preparation_flops[1] == batches * (FORWARD + coded)
    assert found.preparation_flops[2] == batches * (FORWARD + 2 * coded)  # read, and written again


def test_a_boundary_that_is_computed_anew_is_rounded_as_a_cache_would():
    found = phase((0, 1), "stack.1", "norm", "head", enters=1, examples=(0, 3))
    cost = cost_of(found, "training.cache.dtype=fp8")
    assert cost.flops == FORWARD + trained() + 6 * HEAD * N + 2 * N * 128


def test_the_adapter_of_an_embedding_runs_for_a_frozen_prefix_and_for_a_cache():
    settings = config()
    spec = replace(rack_spec_from_config(settings, (), V), embedding_dim=10, adapter_hidden_dim=19)
    adapter = 2 * (10 * 19 + 19 * C) * N
    plain, cached = (
        PhaseCoster(settings, V, None, Rack(spec))(phase((0, 1), "stack.1", "norm", "head", **fields))
        for fields in ({}, {"cached": True, "enters": 1, "examples": (0, 3)})
    )
    assert plain.flops == adapter + FORWARD + trained() + 6 * HEAD * N
    assert cached.flops == trained() + 6 * HEAD * N
    assert cached.roll_flops == (adapter + FORWARD,)


def test_the_plan_gives_flops_by_kind_and_they_add_up(tmp_path):
    settings = config(*CACHED, "training.cache.dtype=fp8", "training.optimizer.optimizer_type=muon")
    found = plan_run(settings, tmp_path).to_dict()
    for row in found["phases"]:
        assert sum(row["flops_by_kind"].values()) == pytest.approx(row["flops"])
        assert row["flops_by_kind"]["optimizer"] == row["steps"] * MUON / 2
    assert sum(row["flops"] for row in found["phases"]) == found["flops"]
    steps = found["phases"][1]["steps"]
    assert found["phases"][1]["flops_by_kind"]["cache"] > steps * N * 128


# ---- operations


def spellings():
    """(call, FLOPs) of products of a (2, 3, 5), b (2, 5, 7), m (3, 5), n (5, 7), v (5)."""
    a, b, m, n, v = torch.ones(2, 3, 5), torch.ones(2, 5, 7), torch.ones(3, 5), torch.ones(5, 7), torch.ones(5)
    out, outs, w = torch.ones(3, 7), torch.ones(2, 3, 7), torch.ones(3)
    one, two = 2 * 3 * 5 * 7, 2 * 2 * 3 * 5 * 7
    q = torch.ones(2, 3, 11, 6)
    return {
        "mm": (lambda: m @ n, one),
        "mm, out": (lambda: torch.mm(m, n, out=out), one),
        "addmm": (lambda: torch.addmm(out, m, n, beta=2, alpha=3), one),
        "addmm in place": (lambda: out.addmm_(m, n), one),
        "addmm, out": (lambda: torch.addmm(out, m, n, out=out), one),
        "linear": (lambda: F_.linear(m, n.T), one),
        "linear with bias": (lambda: F_.linear(m, n.T, torch.ones(7)), one),
        "linear of many": (lambda: F_.linear(a, n.T, torch.ones(7)), two),
        "bmm": (lambda: torch.bmm(a, b), two),
        "bmm, out": (lambda: torch.bmm(a, b, out=outs), two),
        "baddbmm": (lambda: torch.baddbmm(outs, a, b), two),
        "baddbmm in place": (lambda: outs.baddbmm_(a, b), two),
        "addbmm": (lambda: torch.addbmm(out, a, b), two),
        "addbmm in place": (lambda: out.addbmm_(a, b), two),
        "matmul that broadcasts": (lambda: torch.matmul(a, n), two),
        "einsum": (lambda: torch.einsum("xij,xjk->xik", a, b), two),
        "tensordot": (lambda: torch.tensordot(a, n, dims=1), two),
        "mv": (lambda: m @ v, 2 * 3 * 5),
        "addmv": (lambda: torch.addmv(w, m, v), 2 * 3 * 5),
        "addmv in place": (lambda: w.addmv_(m, v), 2 * 3 * 5),
        "dot": (lambda: v @ v, 2 * 5),
        "vdot": (lambda: torch.vdot(v, v), 2 * 5),
        "addr": (lambda: torch.addr(torch.ones(3, 5), w, v), 2 * 3 * 5),
        "multi_dot": (lambda: torch.linalg.multi_dot((m, n, torch.ones(7, 2))), 2 * 5 * 7 * 2 + 2 * 3 * 5 * 2),
        "chain": (lambda: torch.linalg.matrix_power(torch.ones(3, 3), 4), 2 * 2 * 3**3),
        "convolution": (lambda: F_.conv1d(torch.ones(1, 3, 13), torch.ones(5, 3, 2)), 2 * 12 * 5 * 3 * 2),
        "attention": (lambda: F_.scaled_dot_product_attention(q, q, q, is_causal=True), 2 * 2 * 2 * 3 * 11 * 11 * 6),
        "attention with dropout": (
            lambda: F_.scaled_dot_product_attention(q, q, q, dropout_p=0.5), 2 * 2 * 2 * 3 * 11 * 11 * 6,
        ),
        "integers": (
            lambda: torch._int_mm(torch.ones(17, 8, dtype=torch.int8), torch.ones(8, 16, dtype=torch.int8)),
            2 * 17 * 8 * 16,
        ),
        "laplacian attention": (
            lambda: laplacian_weight_attention(q, q, q, 1.0, causal=True), 2 * 2 * 3 * 11 * 11 * (8 + 6),
        ),
        "elementwise": (lambda: (m * 3 + m).softmax(-1).sum(), 0),
    }  # fmt: skip


@pytest.mark.parametrize("name", spellings())
def test_a_product_counts_however_it_is_spelt(name):
    call, flops = spellings()[name]
    with Ledger() as ledger:
        call()
    assert ledger.flops.total == ledger.flops.forward == flops


FAMILIES = {
    "mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "addmv", "dot", "vdot", "addr", "linear", "matmul", "einsum",
    "convolution", "attention", "rnn", "lstm", "gru",
}  # fmt: skip


def aten_products():
    """Operations of torch that no other operations stand for, and whose names tell that they multiply matrices."""
    names = {}
    for full in torch._C._dispatch_get_all_op_names():
        space, _, rest = full.partition("::")
        name = rest.partition(".")[0]
        if space == "aten" and set(name.strip("_").split("_")) & FAMILIES:
            made_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd")
            names[name] = names.get(name, True) and made_of_others
    return sorted(name for name, made_of_others in names.items() if not made_of_others)


@pytest.mark.parametrize("name", aten_products())
def test_no_operation_that_multiplies_matrices_runs_uncounted(name):
    packet = getattr(torch.ops.aten, name)
    try:
        assert formula_of(packet) is not None
    except NotImplementedError as refused:
        assert name in str(refused)
        assert name.rstrip("_") not in FAMILIES  # the plain ones all have formulas


# ---- real steps


class ByShape(TorchDispatchMode):
    """Counts the products that run on tensors with data, from the shapes that go in and come out."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if any(isinstance(x, FakeTensor) or x.is_meta for x in tensors):
            return out
        name = func.__name__.partition(".")[0].rstrip("_")
        if name in ("mm", "bmm"):
            self.flops += 2 * out.numel() * tensors[0].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.flops += 2 * out.numel() * tensors[1].shape[-1]
        elif "attention" in name and "backward" not in name:
            q, k, v = tensors[:3]
            self.flops += 2 * q[..., 0].numel() * k.shape[2] * (q.shape[3] + v.shape[3])
        elif "attention" in name:
            _, q, k, v = tensors[:4]  # q kᵀ again, to q and to k; to the weights and to v
            self.flops += 2 * q[..., 0].numel() * k.shape[2] * (3 * q.shape[3] + 2 * v.shape[3])
        elif set(name.strip("_").split("_")) & FAMILIES:
            raise AssertionError(f"the test does not know {func}")
        return out


RUNS = {
    "end to end": ("training.optimizer.optimizer_type=muon",),
    "end to end in bfloat16": ("training.optimizer.optimizer_type=muon", "training.compute_dtype=bfloat16"),
    "tied, clipped, in micro-batches": (
        "model.tie_embeddings=true", "training.micro_batch_size=4", "training.grad_clip=0.1",
        "training.optimizer.optimizer_type=muon",
    ),
    "in the backward pass": (
        "training.optimizer.optimizer_type=muon", "training.optimizer.in_backward=true", "training.grad_clip=null",
    ),
    "sgd, checkpointed": ("training.optimizer.optimizer_type=sgd", "training.activation_checkpointing=true"),
    "grown": ("training.strategy=progressive", "training.optimizer.optimizer_type=muon"),
    "grown on a cache": (
        "training.strategy=progressive", "training.progressive.trunk_strategy=frozen",
        "training.progressive.cache_activations=true", "training.cache.dtype=fp8",
    ),
    "grown with adapters on four bits": (
        "training.strategy=progressive", "training.progressive.trunk_strategy=qlora", "training.qlora.enabled=true",
        "training.qlora.rank=5", "training.progressive.trunk_precision=nf4",
        "training.progressive.building_mode=prepend", "training.optimizer.optimizer_type=muon",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_reports_is_what_ran(name):
    """Whole runs, updates and cache included; decoding is elementwise, and too little to see here."""
    settings = config(*RUNS[name], "training.max_steps=3")
    tokens = np.random.default_rng(0).integers(0, V, 20 * N).astype(np.uint16)
    loader, counter, train = ProgressiveDataLoader(tokens, settings), ByShape(), Loop.train

    def counted(loop):
        with counter:
            return train(loop)

    with mock.patch.object(Loop, "train", counted):
        if settings.training.strategy == "progressive":
            found = ProgressiveTrainer(settings).train_rack(ProgressiveRackBuilder(settings), loader)
        else:
            rack = create_rack_from_config(settings, n_stacks=2, vocab_size=V)
            found = ArchitectureTrainer(settings).train_architecture(rack, loader)
    assert found["steps"] == 3
    assert found["flops"] == pytest.approx(counter.flops, rel=2e-3)
