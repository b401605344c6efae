"""Growth through the loop: every trunk strategy, storage and place, fed from the cache, streamed from disk, resumed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.growth.curricula import build_phases
from stackwise.growth.phases import Adapter, Growth, Phase, Schedule
from stackwise.growth.preparation import insert_stacks, make_stacks, prepare_phase
from stackwise.growth.recipes import RECIPES, apply_recipe
from stackwise.kinds import STORAGES
from stackwise.model.architecture import create_rack_from_config
from stackwise.model.linear import linears
from stackwise.objectives import CausalObjective
from stackwise.planning.flops import Flops
from stackwise.planning.plan import Planned
from stackwise.runs.build import create_loop
from stackwise.store.checkpoints import CheckpointStore
from stackwise.store.objects import weights_sha256
from stackwise.store.rundir import RunDir
from stackwise.store.structure import rack_of_checkpoint
from stackwise.training.memory import PeakMemory
from stackwise.training.progress import SilentReporter
from stackwise.training.sources import ProgressiveDataLoader, TokenSource

V, B, T, STEPS = 37, 6, 11, 3
TOKENS = np.random.default_rng(0).integers(0, V, 1009) // 3 * 3
CONSTANT = Schedule(0, "linear", STEPS, STEPS, 1.0)


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
                "max_steps": 9,
                "device": "cpu",
                "optimizer": {"lr": 0.01},
                "schedule": {"kind": "constant", "warmup_steps": 0, "rewarmup_steps": 0},
                "checkpoint": {"every_steps": 1, "keep_last": 2},
            },
        },
        overrides,
    )


def grown(at="right", trunk="frozen", precision="full", cached=False, enters=False, lora=False, joint=False):
    """The phases of three Stacks that join one after another, the later ones as the identity."""
    phases, order = [], ()
    for k in range(3):
        before, place = order, {"right": len(order), "left": 0, "middle": (len(order) + 1) // 2}[at]
        order = (*order[:place], k, *order[place:])
        moving = order if trunk == "trainable" else (k,)
        embedding = ("embedding",) if k == 0 or trunk == "trainable" or at == "left" else ()
        adapters = [Adapter(j, "stack", 2 + j, 3.0, 0.0, j == k or trunk == "qlora") for j in sorted(order) if lora]
        adapters += [Adapter(j, "progressive", 2, 5.0, 0.0, trunk == "qlora") for j in sorted(before) if lora]
        inside = (cached or enters) and k > 0
        phases.append(
            Phase(
                f"stack {k}",
                order,
                (*embedding, *(f"stack.{j}" for j in order if j in moving), "norm", "head"),
                STEPS,
                CONSTANT,
                "clm",
                (Growth(k, "identity" if k else "random"),),
                precision=tuple((j, precision) for j in sorted(before) if precision != "full"),
                adapters=tuple(adapters),
                cached=cached and k > 0,
                enters=k if inside else 0,
                examples=(1, 2) if cached or enters else None,
            )
        )
    if joint:
        trains = ("embedding", *(f"stack.{j}" for j in order), "norm", "head")
        adapters = tuple(Adapter(a.stack, a.kind, a.rank, a.alpha) for a in phases[-1].adapters)
        phases.append(Phase("joint", order, trains, STEPS, CONSTANT, "clm", adapters=adapters))
    return phases


def dropping(phases, rate=0.3):
    """The phases with dropout of what their adapters read, and none anywhere else."""
    return [replace(p, adapters=tuple(replace(a, dropout=rate) for a in p.adapters)) for p in phases]


class Stop(Exception):
    pass


class Recorder(SilentReporter):
    """All tensors at the start and the end of each phase, and a way to stop in the middle."""

    def __init__(self, stop_after=None, stop_in_cache=None):
        self.loop, self.starts, self.ends, self.steps = None, [], [], 0
        self.stop_after, self.stop_in_cache, self.worked = stop_after, stop_in_cache, 0

    def tensors(self):
        return {f"{part}/{name}": t.detach().clone() for part, name, t in self.loop.context.rack.part_tensors()}

    def phase(self, text, total_steps, done):
        self.starts.append(self.tensors())

    def step(self, done, metrics):
        self.steps += 1

    def work(self, description, done, total):
        self.worked += 1
        if self.worked == self.stop_in_cache:
            raise Stop

    def note(self, text):
        self.ends.append(self.tensors())


CPU = torch.device("cpu")


def planned(phases):
    """A step takes 3 FLOPs, and filling the cache from the boundary before 2 · 3.5."""
    costs = [SimpleNamespace(flops=3.0, kinds=Flops(forward=3.0), roll_flops=(3.5,) * phase.enters) for phase in phases]
    return Planned(phases, costs, CPU, None, V)


def trained(phases, *overrides, run=None, checkpoint=None, recorder=None, validate=None, settings=None):
    settings = settings or config(*overrides)
    if checkpoint is None:
        n_stacks = 0 if phases[0].growth else len(phases[0].stacks)
        rack = create_rack_from_config(settings, n_stacks=n_stacks, vocab_size=V)
    else:
        phase = phases[min(checkpoint.state["run"]["phase"], len(phases) - 1)]
        offloaded = phase.offloaded(settings.training.offload) & set(checkpoint.state["stacks"])
        rack = rack_of_checkpoint(checkpoint, settings, V, offloaded)
    recorder = recorder or Recorder()
    objective = CausalObjective()
    source = TokenSource(ProgressiveDataLoader(TOKENS, settings), objective)
    loop = create_loop(
        settings, rack, planned(phases), source, {"clm": objective}, recorder, PeakMemory(CPU),
        validate=validate, run=run, checkpoint=checkpoint,
    )  # fmt: skip
    recorder.loop = loop
    loop.train()
    return loop, recorder


def result(loop):
    records = [(r.name, r.first_loss, r.last_loss, r.flops, r.tokens) for r in loop.state.records]
    return loop.context.placement.weights_sha256(), records


def new_run(path):
    return RunDir.create(path, "model: {}\n")


FROM_DISK = ("training.progressive.trunk_strategy=frozen", "training.offload=disk")
WAYS = [
    ("right", "frozen", False), ("right", "qlora", True), ("right", "trainable", False),
    ("left", "frozen", False), ("left", "qlora", True), ("left", "trainable", False),
    ("middle", "frozen", True), ("middle", "qlora", True), ("middle", "trainable", True),
]  # fmt: skip


WAYS_AND_PRECISIONS = [
    pytest.param(at, trunk, lora, precision, id=f"{at}-{trunk}-{precision}")
    for at, trunk, lora in WAYS
    for precision in (("full",) if trunk == "trainable" else STORAGES)
]


@pytest.mark.parametrize("at, trunk, lora, precision", WAYS_AND_PRECISIONS)
def test_what_is_frozen_stays_bit_identical_and_what_trains_moves(at, trunk, lora, precision):
    phases = grown(at, trunk, precision, lora=lora, joint=True)
    _, recorder = trained(phases)
    assert len(recorder.starts) == len(recorder.ends) == 4
    for phase, start, end in zip(phases, recorder.starts, recorder.ends):
        assert start.keys() == end.keys()
        kinds = {(a.stack, a.kind) for a in phase.adapters if a.trains}
        for name in start:
            part, _, rest = name.partition("/")
            if part.startswith("adapters."):
                moves = (int(part[9:]), rest.split(".adapters.")[1].split(".")[0]) in kinds
            else:
                moves = part in phase.trains
            assert torch.equal(start[name], end[name]) != moves, (phase.name, name)


@pytest.mark.parametrize("at, trunk, lora, precision", WAYS_AND_PRECISIONS)
def test_growth_as_the_identity_leaves_the_logits_bit_identical(at, trunk, lora, precision):
    settings, ids = config(), torch.from_numpy(TOKENS[:44]).view(4, 11)
    rack, before = create_rack_from_config(settings, n_stacks=0, vocab_size=V), None
    for phase in grown(at, trunk, precision, lora=lora, joint=True):
        seen = []
        prepare_phase(rack, phase, settings, lambda rack=rack, seen=seen: seen.append(rack.eval()(ids)))
        after = rack.eval()(ids)
        if before is not None:
            # Storing in fewer bits changes logits; what joins, and its adapters, do not.
            assert torch.equal(after, seen[0] if seen else before)
            assert bool(seen) == (precision != "full")
        with torch.no_grad():  # as if it had trained
            for _, _, p in rack.part_parameters():
                if p.requires_grad:
                    p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        before = rack.eval()(ids)


@pytest.mark.parametrize("precision", STORAGES)
def test_a_new_stack_as_the_identity_may_be_stored_in_any_precision(precision):
    settings, ids = config(), torch.from_numpy(TOKENS[:44]).view(4, 11)
    rack = create_rack_from_config(settings, n_stacks=1, vocab_size=V)
    before = rack.eval()(ids)
    made = make_stacks(rack, [Growth(1, "identity")], settings)
    for _, layer in linears(made[0]):
        layer.store(precision)
    insert_stacks(rack, made, [0, 1])
    assert torch.equal(rack.eval()(ids), before)


def test_compiled_phases_train_the_same_parts(monkeypatch):
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_(self, backend="aot_eager", **options)
    )
    plain, _ = trained(grown("left", "qlora", "nf4", lora=True))
    compiled, recorder = trained(grown("left", "qlora", "nf4", lora=True), "training.compile=true")
    for a, b in zip(plain.state.records, compiled.state.records):
        assert b.last_loss == pytest.approx(a.last_loss, rel=1e-4)
    start, end = recorder.starts[-1], recorder.ends[-1]
    assert all(torch.equal(start[n], end[n]) for n in start if n.startswith("stack.0/"))
    assert not any(torch.equal(start[n], end[n]) for n in start if n.startswith("stack.2/"))


def of_the_whole(*trains):
    """Phases of a Rack that is there."""
    return [Phase(f"phase {i}", (0, 1, 2), parts, STEPS, CONSTANT, "clm") for i, parts in enumerate(trains)]


COURSES = {
    "append": lambda: grown("right", "frozen"),
    "append nf4": lambda: grown("right", "frozen", "nf4"),
    "prepend": lambda: grown("left", "frozen"),
    "middle": lambda: grown("middle", "frozen", "int8", joint=True),
    "qlora": lambda: grown("right", "qlora", "nf4", lora=True),
    "block": lambda: of_the_whole(("stack.1/blocks.1", "norm", "head")),
    "sweep": lambda: of_the_whole(("embedding", "stack.0", "norm", "head"), ("stack.1", "norm", "head"), ("head",)),
}
SLOW = [pytest.param(course, marks=pytest.mark.slow) for course in COURSES if course not in ("append", "block")]


def assert_compiled_takes_the_same_steps(monkeypatch, course, backend):
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_(self, backend=backend, **options))
    phases = dropping(COURSES[course](), 0.3 if backend == "aot_eager" else 0.0)  # compiled code draws other numbers
    blocks = 2 if course in ("block", "sweep") else 1
    settings = (f"model.architecture.blocks_per_stack={blocks}", "training.activation_checkpointing=true")
    plain, before = trained(phases, *settings)
    compiled, after = trained(phases, *settings, "training.compile=true")
    for a, b in zip(plain.state.records, compiled.state.records):
        assert (b.first_loss, b.last_loss) == pytest.approx((a.first_loss, a.last_loss), rel=1e-4)
    for phase, *ends in zip(phases, before.starts, before.ends, after.starts, after.ends):
        for name in ends[0]:
            moved = [not torch.equal(start[name], end[name]) for start, end in (ends[:2], ends[2:])]
            assert moved == [moves(phase, name)] * 2, (phase.name, name)


@pytest.mark.parametrize("course", ["append", "block", *SLOW])
def test_compiled_stacks_that_are_recomputed_train_through_every_phase(monkeypatch, course):
    """A Stack without a gradient has nothing to recompute; the compiler cannot trace the attempt."""
    assert_compiled_takes_the_same_steps(monkeypatch, course, "aot_eager")


def test_every_stack_is_compiled_however_they_differ(monkeypatch):
    """The compiler's limit is of graphs of the same code; beyond it Stacks would run as they are written."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **o: compile_(self, backend="aot_eager", **o))
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        trained(of_the_whole(("stack.2", "norm", "head")), "training.compile=true")  # one trains, two do not
        assert torch._dynamo.config.recompile_limit == 1


@pytest.mark.slow  # the compiler takes minutes
@pytest.mark.parametrize("course", COURSES)
def test_stacks_compiled_to_code_that_are_recomputed_train_through_every_phase(monkeypatch, course):
    assert_compiled_takes_the_same_steps(monkeypatch, course, "inductor")


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_cached_equals_recomputed_bitwise_on_disk_and_in_memory(tmp_path, dtype, micro):
    settings = [f"training.cache.dtype={dtype}"]
    settings += [] if micro is None else [f"training.micro_batch_size={micro}"]
    cached = grown("right", "frozen", "nf4", cached=True, joint=True)
    on_disk, _ = trained(cached, *settings, run=new_run(tmp_path / "run"))
    in_memory, _ = trained(cached, *settings)
    recomputed, _ = trained(grown("right", "frozen", "nf4", enters=True, joint=True), *settings)
    assert (
        on_disk.context.placement.weights_sha256()
        == in_memory.context.placement.weights_sha256()
        == recomputed.context.placement.weights_sha256()
    )
    losses = [[(r.first_loss, r.last_loss) for r in loop.state.records] for loop in (on_disk, in_memory, recomputed)]
    assert losses[0] == losses[1] == losses[2]
    assert not list((tmp_path / "run" / "cache").glob("boundary-*"))  # it goes when no phase needs it
    assert [r.flops for r in on_disk.state.records] == [9.0, 16.0, 16.0, 9.0]


def test_the_trunk_is_not_in_memory_while_a_stack_trains_from_the_cache(tmp_path):
    loop, recorder = trained(grown("right", "frozen", "int8", cached=True), run=new_run(tmp_path / "run"))
    for start, trunk in zip(recorder.starts, ((), (0,), (0, 1))):
        for name, tensor in start.items():
            assert tensor.is_meta == any(name.startswith(f"stack.{k}/") for k in trunk), name
    assert loop.context.placement.offload.offloaded == {0, 1}


@pytest.mark.parametrize("extra", [(), ("model.dropout=0.3",), ("training.activation_checkpointing=true",)])
@pytest.mark.parametrize("at, trunk, lora", [("left", "frozen", False), ("right", "qlora", True)])
def test_stacks_streamed_from_disk_train_bit_identically(tmp_path, at, trunk, lora, extra):
    phases = grown(at, trunk, "nvfp4", lora=lora)
    resident, _ = trained(phases, *extra)
    streamed, recorder = trained(phases, *FROM_DISK, *extra, run=new_run(tmp_path / "run"))
    assert result(streamed) == result(resident)
    assert all(t.is_meta for n, t in recorder.starts[-1].items() if n.startswith("stack.0/"))


@pytest.mark.parametrize("at", ["left", "right"])
def test_adapters_drop_the_same_when_they_are_recomputed_streamed_or_trained_again(tmp_path, at):
    phases = dropping(grown(at, "qlora", "int8", lora=True))
    plain, _ = trained(phases)
    torch.randn(13)  # whatever else draws from the global generator
    again, _ = trained(phases)
    recomputed, _ = trained(phases, "training.activation_checkpointing=true")
    streamed, recorder = trained(phases, *FROM_DISK, run=new_run(tmp_path / "run"))
    assert result(again) == result(recomputed) == result(streamed) == result(plain)
    assert all(t.is_meta for n, t in recorder.starts[-1].items() if n.startswith("stack.0/"))
    undropped, _ = trained(dropping(phases, 0.0))
    assert abs(undropped.state.records[-1].last_loss - plain.state.records[-1].last_loss) > 1e-4


CASES = {
    "cached": (lambda: grown("right", "frozen", "nf4", cached=True, joint=True), ()),
    "qlora": (lambda: grown("right", "qlora", "fp8", lora=True, joint=True), ()),
    "adapter dropout": (lambda: dropping(grown("left", "qlora", "int8", lora=True)), ()),
    "streamed": (lambda: grown("left", "qlora", "int8", lora=True), FROM_DISK),
    "trainable": (lambda: grown("middle", "trainable", joint=True), ()),
    "in backward": (
        lambda: grown("right", "trainable"),
        ("training.grad_clip=null", "training.optimizer={lr: 0.01, moments: int8, in_backward: true}"),
    ),
    "muon": (lambda: grown("left", "frozen", "nf4"), ("training.optimizer={lr: 0.01, optimizer_type: muon}",)),
}


@pytest.mark.parametrize("case", CASES)
def test_growth_then_resume_equals_no_interruption(tmp_path, case):
    phases, settings = CASES[case][0](), CASES[case][1]
    whole, _ = trained(phases, *settings, run=new_run(tmp_path / "whole"))

    class Interrupted(Recorder):
        def step(self, done, metrics):
            super().step(done, metrics)
            if self.steps > stop_after:
                raise Stop

    for stop_after in (1, 3, 5, 7):
        run = new_run(tmp_path / f"stopped after {stop_after}")
        with pytest.raises(Stop):
            trained(phases, *settings, run=run, recorder=Interrupted())
        checkpoint = CheckpointStore(run.checkpoints).load()
        assert checkpoint.step == stop_after
        resumed, _ = trained(phases, *settings, run=run, checkpoint=checkpoint)
        assert result(resumed) == result(whole), f"stopped after step {stop_after}"


@pytest.mark.parametrize("at_batch", [1, 2, 3, 4])
def test_a_run_that_stops_while_it_fills_its_cache_ends_the_same(tmp_path, at_batch):
    phases = grown("right", "frozen", "nf4", cached=True)
    whole, _ = trained(phases, run=new_run(tmp_path / "whole"))
    run = new_run(tmp_path / "stopped")
    with pytest.raises(Stop):
        trained(phases, run=run, recorder=Recorder(stop_in_cache=at_batch))
    resumed, _ = trained(phases, run=run, checkpoint=CheckpointStore(run.checkpoints).load())
    assert result(resumed) == result(whole)


def test_a_cache_made_with_other_adapter_weights_is_not_read(tmp_path):
    """Stacks that are made in four bits: nothing of them trains but their adapters."""
    phases = [
        replace(
            phase,
            trains=tuple(part for part in phase.trains if not part.startswith("stack.")),
            precision=tuple((k, "nf4") for k in phase.stacks),
        )
        for phase in grown("right", "frozen", cached=True, lora=True)
    ]
    loop, _ = trained(phases[:2], run=new_run(tmp_path / "run"))
    ids = loop.context.caching.boundaries(phases[2])
    stacks = {stack.stack_id: stack for stack in loop.context.rack.stacks}
    for k, changed in ((1, [False, True]), (0, [True, True])):
        layer = next(layer for _, layer in linears(stacks[k]))
        with torch.no_grad():
            layer.low_rank()["stack"].B[0, 0] += 1e-3
        others = loop.context.caching.boundaries(phases[2])
        assert [a.key != b.key for a, b in zip(ids, others)] == changed
        ids = others


def test_a_checkpoint_restores_storage_and_adapters(tmp_path):
    run = new_run(tmp_path / "run")
    loop, _ = trained(grown("right", "qlora", "nf4", lora=True), run=run)
    rack = rack_of_checkpoint(CheckpointStore(run.checkpoints).load(), config(), V)
    assert weights_sha256((f"{part}/{name}", t.detach()) for part, name, t in rack.part_tensors()) == (
        loop.context.placement.weights_sha256()
    )
    ids = torch.from_numpy(TOKENS[:22]).view(2, 11)
    assert torch.equal(rack.eval()(ids), loop.context.rack.eval()(ids))


def test_what_storing_the_trunk_costs_is_measured(tmp_path):
    from stackwise.objectives.scoring import validate

    def score(rack, objective):
        return validate(
            rack, CausalObjective(), TOKENS[:200], seq_len=T, batch_size=4, bytes_per_token=1.0, max_tokens=None,
            compute_dtype=None,
        )  # fmt: skip

    loop, _ = trained(grown("right", "frozen", "nf4"), run=new_run(tmp_path / "run"), validate=score)
    first, second, third = loop.state.records
    assert first.storage is None
    assert second.storage["precision"] == {"0": "nf4"} and third.storage["precision"] == {"1": "nf4"}
    for before, after in ((first, second), (second, third)):
        assert after.storage["validation_loss_before"] == before.validation_loss
        assert 0 < abs(after.storage["validation_loss_after"] - before.validation_loss) < 0.1


def test_one_block_of_a_stack_trains_alone():
    phases = grown("right", "trainable")
    block = Phase("block", (0, 1, 2), ("stack.1/blocks.1", "norm", "head"), STEPS, CONSTANT, "clm")
    _, recorder = trained([*phases, block], "model.architecture.blocks_per_stack=2")
    start, end = recorder.starts[-1], recorder.ends[-1]
    wanted = {name for name in start if name.startswith(("stack.1/blocks.1.", "norm/", "head/"))}
    assert len(wanted) == 7 + 2 + 2
    assert {name for name in start if not torch.equal(start[name], end[name])} == wanted


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("micro", [None, 3])
def test_updating_inside_the_backward_pass_trains_the_same_run(kind, micro):
    settings = ["training.grad_clip=null"] + ([] if micro is None else [f"training.micro_batch_size={micro}"])
    phases = grown("right", "qlora", "fp8", lora=True)
    plain, _ = trained(phases, *settings, f"training.optimizer={{lr: 0.01, optimizer_type: {kind}}}")
    inside, _ = trained(
        phases, *settings, f"training.optimizer={{lr: 0.01, optimizer_type: {kind}, in_backward: true}}"
    )
    assert result(inside) == result(plain)


def test_a_new_stack_may_train_in_bfloat16():
    phases = [replace(p, precision=((i, "bfloat16"),)) for i, p in enumerate(grown("right", "frozen"))]
    loop, recorder = trained(phases, "training.progressive.new_stack_precision=bfloat16")
    start, end = recorder.starts[-1], recorder.ends[-1]
    moved = [n for n in start if n.startswith("stack.2/") and n.endswith("proj.weight")]
    assert len(moved) == 7 and all(start[n].dtype == torch.bfloat16 for n in moved)
    assert not any(torch.equal(start[n], end[n]) for n in moved)
    assert loop.state.records[-1].last_loss < loop.state.records[0].first_loss


def test_batches_that_cannot_be_taken_again_are_refused():
    from stackwise.errors import UserError
    from stackwise.training.sources import IterableSource

    phases = grown("right", "frozen", cached=True)
    objective = CausalObjective()
    source = IterableSource([torch.zeros(B, T, dtype=torch.int64)], objective)
    settings = config()
    rack = create_rack_from_config(settings, n_stacks=0, vocab_size=V)
    loop = create_loop(
        settings, rack, planned(phases), source, {"clm": objective}, SilentReporter(), PeakMemory(CPU)
    )  # fmt: skip
    with pytest.raises(UserError, match="batches that can be taken again"):
        loop.train()


def phases_of(recipe, *overrides):
    """The phases of a recipe on the tiny Rack, two steps each at least, and its settings."""
    settings = apply_recipe(config("training.max_steps=60", "training.schedule.kind=constant"), recipe)
    settings = StackWiseConfig.from_dict(settings.to_dict(), overrides)
    fewest = min(phase.steps for phase in build_phases(settings))
    settings = settings.changed({"training.max_steps": -(-2 * 60 // fewest)})
    return build_phases(settings), settings


def moves(phase, name):
    """Whether the phase trains the tensor ``part/name``."""
    part, _, rest = name.partition("/")
    if part.startswith("adapters."):
        kind = rest.split(".adapters.")[1].split(".")[0]
        return (int(part[9:]), kind) in {(a.stack, a.kind) for a in phase.adapters if a.trains}
    return part in phase.trains or any(
        f"{name}.".startswith(f"{trained}.") for trained in phase.trains if "/" in trained
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_what_it_says_and_resumes_exactly(tmp_path, recipe):
    phases, settings = phases_of(recipe)
    whole, recorder = trained(phases, run=new_run(tmp_path / "whole"), settings=settings)
    for phase, start, end in zip(phases, recorder.starts, recorder.ends):
        for name in start:
            if not start[name].is_meta:
                assert torch.equal(start[name], end[name]) != moves(phase, name), (phase.name, name)
    total = sum(phase.steps for phase in phases)
    stop_after = total * 2 // 3

    class Interrupted(Recorder):
        def step(self, done, metrics):
            super().step(done, metrics)
            if self.steps > stop_after:
                raise Stop

    run = new_run(tmp_path / "stopped")
    with pytest.raises(Stop):
        trained(phases, run=run, recorder=Interrupted(), settings=settings)
    checkpoint = CheckpointStore(run.checkpoints).load()
    resumed, _ = trained(phases, run=run, checkpoint=checkpoint, settings=settings)
    assert checkpoint.step == stop_after and result(resumed) == result(whole)


FROZEN_RECIPES = [name for name, r in RECIPES.items() if r.training.get("progressive", {}).get("trunk_strategy") in
                  ("frozen", "qlora")]  # fmt: skip


@pytest.mark.parametrize("precision", [p for p in STORAGES if p != "full"])
@pytest.mark.parametrize("recipe", FROZEN_RECIPES)
def test_recipes_with_a_frozen_trunk_keep_it_bit_identical_in_every_storage(tmp_path, recipe, precision):
    phases, settings = phases_of(recipe, f"training.progressive.trunk_precision={precision}")
    _, recorder = trained(phases, run=new_run(tmp_path / "run"), settings=settings)
    for phase, start, end in zip(phases, recorder.starts, recorder.ends):
        assert all(torch.equal(start[n], end[n]) != moves(phase, n) for n in start if not start[n].is_meta)
    assert any(dict(phase.precision).get(0) == precision for phase in phases)


@pytest.mark.parametrize("cycles", [1, 3])
def test_block_coordinate_sweeps_over_one_stack_are_plain_training(cycles):
    one = ("model.architecture.n_stacks=1", "training.max_steps=9")
    plain = build_phases(config(*one, "training.strategy=end_to_end"))
    swept = config(*one).to_dict()
    swept["training"] |= {
        "strategy": "phases",
        "phases": [{"add": 1, "share": 1 / 3}, {"sweep": "left_to_right", "cycles": cycles, "share": 2 / 3}],
    }
    phases = build_phases(StackWiseConfig.from_dict(swept))
    assert len(phases) == 1 + cycles and sum(p.steps for p in phases) == plain[0].steps == 9
    a, _ = trained([replace(plain[0], growth=(Growth(0, "random"),))], *one)
    b, _ = trained(phases, *one)
    assert a.context.placement.weights_sha256() == b.context.placement.weights_sha256()
