import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from stackwise.config import StackWiseConfig
from stackwise.errors import RunError
from stackwise.growth.curricula import build_phases
from stackwise.growth.preparation import zero_residual_outputs
from stackwise.model.architecture import create_rack_from_config, create_stack_from_config
from stackwise.model.reading import Reading
from stackwise.objectives import CausalObjective, Example
from stackwise.ops.losses import IGNORE
from stackwise.planning.flops import Flops
from stackwise.planning.plan import Planned
from stackwise.runs.build import create_loop
from stackwise.training.memory import PeakMemory
from stackwise.training.progress import SilentReporter
from stackwise.training.schedules import lr_ratio
from stackwise.training.sources import ProgressiveDataLoader, TokenSource

V, B, T = 37, 6, 11
TOKENS = np.random.default_rng(0).integers(0, V, 1009) // 3 * 3  # a third of the ids: there is something to learn


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
                "optimizer": {"lr": 0.01, "weight_decay": 0.0},
                "schedule": {"kind": "constant", "warmup_steps": 0, "rewarmup_steps": 0},
                "logging": {"every_steps": 1},
            },
        },
        overrides,
    )


END_TO_END = "training.strategy=end_to_end"


class Recorder(SilentReporter):
    """Metrics of each step, and the weights at the start and the end of each phase."""

    def __init__(self):
        self.loop = None
        self.metrics, self.starts, self.ends = [], [], []

    def weights(self):
        return {f"{part}/{name}": p.detach().clone() for part, name, p in self.loop.context.rack.part_parameters()}

    def phase(self, text, total_steps, done):
        self.starts.append(self.weights())

    def note(self, text):
        self.ends.append(self.weights())

    def step(self, done, metrics):
        self.metrics.append(metrics)

    def __getitem__(self, key):
        return [metrics[key] for metrics in self.metrics]


class Examples:
    """The same examples again and again."""

    def __init__(self, *examples):
        self.examples = examples

    def during(self, objective):
        return self

    def example(self, step):
        return self.examples[step % len(self.examples)]


def a_loop(settings, *, rack=None, source=None, present=()):
    phases = build_phases(settings, step_flops=lambda phase: 1.0, present=present)
    if rack is None:
        rack = create_rack_from_config(settings, n_stacks=0)
        if not phases[0].growth:
            rack.stacks.extend(create_stack_from_config(k, settings) for k in phases[0].stacks)
    objective = CausalObjective()
    recorder = Recorder()
    cpu = torch.device("cpu")
    planned = Planned(phases, [SimpleNamespace(flops=1.0, kinds=Flops(forward=1.0))] * len(phases), cpu, None, V)
    source = source or TokenSource(ProgressiveDataLoader(TOKENS, settings), objective)
    loop = create_loop(settings, rack, planned, source, {"clm": objective}, recorder, PeakMemory(cpu))
    recorder.loop = loop
    return loop, recorder


def trained(*overrides, **kwargs):
    loop, recorder = a_loop(config(*overrides), **kwargs)
    loop.train()
    return loop, recorder


@pytest.fixture
def at_updates():
    """Calls what is appended to .before and .after with the optimizer around each update."""

    class Hooks:
        before, after = [], []

    hooks = Hooks()
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: [f(optimizer) for f in hooks.before] and None),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: [f(optimizer) for f in hooks.after] and None),
    ]
    yield hooks
    hooks.before.clear()
    hooks.after.clear()
    for handle in handles:
        handle.remove()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- one step


def test_the_loop_equals_a_plain_loop_written_by_hand():
    settings = config(
        END_TO_END,
        "training.max_steps=13",
        "training.optimizer.weight_decay=0.1",
        "training.optimizer.lr=0.003",
        "training.schedule.kind=wsd",
        "training.schedule.warmup_steps=3",
        "training.grad_clip=1.1",
    )
    loop, recorder = a_loop(settings)
    loop.train()

    rack = create_rack_from_config(settings)
    batches = ProgressiveDataLoader(TOKENS, settings).batches
    matrices = [p for p in rack.parameters() if p.dim() > 1]
    vectors = [p for p in rack.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    norms = []
    for step in range(13):
        lr = 0.003 * min(1.0, (step + 1) / 3) * (1 - 0.9 * max(0, step - 9) / 3)  # 20 % of 13 steps decay: 3
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens = torch.from_numpy(batches.batch(step).tokens)
        loss = F.cross_entropy(rack(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(rack.parameters(), 1.1)
        optimizer.step()
        norms.append(float(norm))
        assert recorder["loss"][step] == pytest.approx(loss.item(), abs=1e-6)
        assert recorder["lr"][step] == pytest.approx(lr, rel=1e-9)
        assert recorder["grad_norm"][step] == pytest.approx(norm.item(), rel=1e-4)
    assert min(norms) < 1.1 < max(norms), norms
    for mine, theirs in zip(rack.parameters(), loop.context.rack.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert recorder["loss"][-1] < recorder["loss"][0]


def uneven_example():
    """Labels of which 1, 66 − 40 and 20 count in the three micro-batches."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(0, V, (2, B, T), generator=generator)
    targets = targets.clone()
    targets[:2] = IGNORE
    targets[0, 5] = 17
    targets[2:4, 3:] = IGNORE
    return Example(Reading(inputs), targets)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulation_equals_the_whole_batch_however_the_counting_tokens_are_spread(micro, at_updates):
    gradients = []
    at_updates.before.append(
        lambda optimizer: gradients.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])
    )
    settings = (END_TO_END, "training.max_steps=3", "training.optimizer.eps=0.001", "training.grad_clip=null")
    whole, whole_record = trained(*settings, source=Examples(uneven_example()))
    parts, parts_record = trained(*settings, f"training.micro_batch_size={micro}", source=Examples(uneven_example()))
    for a, b in zip(gradients[0], gradients[3]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-2
    assert parts_record["loss"] == pytest.approx(whole_record["loss"], abs=1e-6)
    for a, b in zip(whole.context.rack.parameters(), parts.context.rack.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_loss_is_the_mean_over_the_tokens_that_count():
    example = uneven_example()
    _, recorder = trained(END_TO_END, "training.micro_batch_size=2", "training.max_steps=1", source=Examples(example))
    rack = create_rack_from_config(config())
    terms = F.cross_entropy(rack(example.reading.ids).flatten(0, 1), example.targets.flatten(), reduction="none")
    counted = terms[example.targets.flatten() != IGNORE]
    assert recorder["loss"][0] == pytest.approx(counted.mean().item(), abs=1e-6)
    assert recorder["tokens"] == [B * T]


def test_gradients_above_the_limit_are_scaled_to_it_and_others_untouched(at_updates):
    norms = []
    at_updates.before.append(
        lambda o: norms.append(
            float(torch.nn.utils.get_total_norm([p.grad for g in o.param_groups for p in g["params"]]))
        )
    )
    _, free = trained(END_TO_END, "training.max_steps=1", "training.grad_clip=null")
    whole = norms[0]
    assert free["grad_norm"][0] == pytest.approx(whole)
    _, small = trained(END_TO_END, "training.max_steps=1", f"training.grad_clip={whole / 3}")
    _, large = trained(END_TO_END, "training.max_steps=1", f"training.grad_clip={whole * 3}")
    assert norms[1:] == pytest.approx([whole / 3, whole], rel=1e-4)
    assert small["grad_norm"] == large["grad_norm"] == free["grad_norm"]  # logged before clipping


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_or_a_gradient_that_is_not_finite_stops_before_the_update(broken):
    settings = config(END_TO_END, "training.max_steps=5")
    good = TokenSource(ProgressiveDataLoader(TOKENS, settings), CausalObjective())
    loop, recorder = a_loop(settings, source=good)
    kept = []

    class Breaks:
        def during(self, objective):
            return self

        def example(self, step):
            if step == 2:
                kept.append(recorder.weights())
                if broken == "loss":
                    with torch.no_grad():
                        loop.context.rack.head.weight[5, 3] = float("inf")
                    kept[0]["head/weight"] = loop.context.rack.head.weight.detach().clone()
                else:
                    loop.context.rack.norm.weight.register_hook(lambda grad: grad * float("inf"))
            return good.example(step)

    loop.context.source = Breaks()
    with pytest.raises(RunError, match=f"step 2: the {broken}.* nothing was updated"):
        loop.train()
    assert equal(recorder.weights(), kept[0])
    assert len(recorder.metrics) == 2


def test_a_batch_in_which_nothing_counts_is_an_error():
    example = uneven_example()
    with pytest.raises(RunError, match="no token"):
        trained(END_TO_END, source=Examples(Example(example.reading, torch.full_like(example.targets, IGNORE))))


def test_activation_checkpointing_changes_no_bit_even_with_dropout():
    settings = (END_TO_END, "model.dropout=0.3", "training.max_steps=3")
    plain, _ = trained(*settings)
    checkpointed, _ = trained(*settings, "training.activation_checkpointing=true")
    assert all(stack.activation_checkpointing for stack in checkpointed.context.rack.stacks)
    for a, b in zip(plain.context.rack.parameters(), checkpointed.context.rack.parameters()):
        assert torch.equal(a, b)


def test_the_learning_rate_of_each_step_is_its_phases_schedule():
    loop, recorder = trained("training.schedule.kind=cosine", "training.schedule.rewarmup_steps=2")
    expected = [0.01 * lr_ratio(phase.schedule, step) for phase in loop.phases for step in range(phase.steps)]
    assert recorder["lr"] == pytest.approx(expected)
    assert len(set(recorder["lr"])) > 5


# ---- what trains and what does not


COMBINATIONS = [
    (trunk, init, mode, tied)
    for trunk in ("frozen", "trainable")
    for init in ("random", "identity", "copy")
    for mode in ("append", "prepend")
    for tied in ((False, True) if trunk == "trainable" else (False,))
]


def assert_exactly_the_phases_parts_moved(loop, recorder, never=()):
    assert len(recorder.starts) == len(recorder.ends) == len(loop.phases)
    for phase, before, after in zip(loop.phases, recorder.starts, recorder.ends):
        assert before.keys() == after.keys()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        meant = {name for name in before if name.split("/")[0] in phase.trains and not name.endswith(tuple(never))}
        assert moved == meant
        assert {name.split("/")[0] for name in meant} <= set(phase.trains)
    # Between phases nothing changes: what one leaves is what the next one starts from.
    for after, before in zip(recorder.ends, recorder.starts[1:]):
        assert all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("trunk, init, mode, tied", COMBINATIONS)
def test_what_is_frozen_stays_bit_identical_and_everything_else_moves(trunk, init, mode, tied):
    loop, recorder = trained(
        f"training.progressive.trunk_strategy={trunk}",
        f"training.progressive.new_stack_init={init}",
        f"training.progressive.building_mode={mode}",
        f"model.tie_embeddings={str(tied).lower()}",
        "training.progressive.joint_fraction=0.25",
        "training.max_steps=12",
    )
    assert [p.name for p in loop.phases] == ["stack 0", "stack 1", "stack 2", "joint"]
    assert_exactly_the_phases_parts_moved(loop, recorder)


@pytest.mark.parametrize("strategy", ["end_to_end", "progressive"])
def test_frozen_up_projections_and_embeddings_never_move(strategy):
    loop, recorder = trained(
        f"training.strategy={strategy}",
        "model.freeze_up_proj=true",
        "model.tokenizer_embedding.freeze_embeddings=true",
        "training.optimizer.weight_decay=0.1",
    )
    never = ("ffn.up_proj.weight", "embedding/weight")
    assert_exactly_the_phases_parts_moved(loop, recorder, never)


def compiled(monkeypatch, mode, backend):
    """Grows a second Stack beside a trained first one, compiled and not."""
    overrides = (
        "training.progressive.trunk_strategy=frozen",
        "training.progressive.target_stacks=2",
        f"training.progressive.building_mode={mode}",
        "training.max_steps=2",
    )
    used = []

    def compile_with(module, **settings):
        used.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend, **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with)
    rack = create_rack_from_config(config(), n_stacks=1)
    loop, recorder = trained(*overrides, "training.compile=true", rack=rack, present=(0,))
    assert used == list(loop.context.rack.stacks)
    assert_exactly_the_phases_parts_moved(loop, recorder)
    _, eager = trained(*overrides, rack=create_rack_from_config(config(), n_stacks=1), present=(0,))
    assert recorder["loss"] == pytest.approx(eager["loss"], abs=1e-5)


@pytest.mark.parametrize("mode", ["append", "prepend"])
def test_a_frozen_trunk_stays_bit_identical_when_traced(monkeypatch, mode):
    compiled(monkeypatch, mode, "aot_eager")


@pytest.mark.slow  # the compiler takes most of a minute
@pytest.mark.parametrize("mode", ["append", "prepend"])
def test_a_frozen_trunk_stays_bit_identical_when_compiled(monkeypatch, mode):
    compiled(monkeypatch, mode, "inductor")


def test_compiled_stacks_follow_what_trains_from_phase_to_phase(monkeypatch):
    """A graph that was traced for a trained Stack must not serve once it is frozen, nor the other way about."""
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **settings: setattr(
            module, "_compiled_call_impl", torch.compile(module._call_impl, backend="aot_eager", **settings)
        ),
    )
    overrides = ("training.progressive.trunk_strategy=frozen", "training.progressive.joint_fraction=0.25")
    loop, recorder = trained(*overrides, "training.max_steps=8", "training.compile=true")
    assert_exactly_the_phases_parts_moved(loop, recorder)
    _, eager = trained(*overrides, "training.max_steps=8")
    assert recorder["loss"] == pytest.approx(eager["loss"], abs=1e-5)


def test_an_identity_stack_starts_a_phase_with_the_loss_that_the_trunk_had():
    example = uneven_example()
    _, recorder = trained(
        "training.progressive.new_stack_init=identity", "training.progressive.target_stacks=2",
        "training.max_steps=6", source=Examples(example),
    )  # fmt: skip
    assert not recorder.starts[1]["stack.1/blocks.0.ffn.down_proj.weight"].any()
    trunk_alone = create_rack_from_config(config("training.progressive.target_stacks=2"), n_stacks=1)
    with torch.no_grad():
        for part, name, p in trunk_alone.part_parameters():
            p.copy_(recorder.ends[0][f"{part}/{name}"])
        loss = CausalObjective().loss(trunk_alone, example, 1 / example.n_targets)
    assert recorder["loss"][3] == pytest.approx(loss.item(), abs=1e-7)


# ---- optimizer state at growth


def states_around_growth(at_updates, *overrides):
    """The optimizer state by name after each update of a run, and before the first update of its second phase."""
    before, after = [], []
    settings = config("training.progressive.target_stacks=2", "training.max_steps=6", *overrides)
    loop, _ = a_loop(settings)

    def named(optimizer):
        names = {p: f"{part}/{name}" for part, name, p in loop.context.rack.part_parameters()}
        return {names[p]: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}

    at_updates.before.append(lambda optimizer: before.append(named(optimizer)))
    at_updates.after.append(lambda optimizer: after.append(named(optimizer)))
    loop.train()
    return loop, before, after


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("mode", ["append", "prepend"])
def test_kept_state_goes_on_exactly_and_the_new_stack_starts_without(at_updates, mode):
    _, before, after = states_around_growth(at_updates, f"training.progressive.building_mode={mode}")
    assert before[0] == {}
    assert before[3].keys() == after[2].keys()
    assert all(same_state(before[3][name], after[2][name]) for name in after[2])
    assert float(after[3]["norm/weight"]["step"]) == 4
    assert float(after[3]["stack.1/blocks.0.ffn.up_proj.weight"]["step"]) == 1


def test_reset_state_is_gone(at_updates):
    _, before, after = states_around_growth(at_updates, "training.progressive.optimizer_state=reset")
    assert after[2] and before[3] == {}
    assert {float(state["step"]) for state in after[3].values()} == {1.0}


@pytest.mark.parametrize("trunk", ["frozen", "trainable"])
@pytest.mark.parametrize("mode", ["append", "prepend"])
def test_a_copied_stack_can_start_with_its_sources_state(at_updates, trunk, mode):
    _, before, after = states_around_growth(
        at_updates,
        "training.progressive.optimizer_state=copy",
        f"training.progressive.trunk_strategy={trunk}",
        f"training.progressive.building_mode={mode}",
    )
    names = [name.partition("/")[2] for name in after[2] if name.startswith("stack.0/")]
    assert len(names) == 9
    for name in names:
        assert same_state(before[3][f"stack.1/{name}"], after[2][f"stack.0/{name}"])
        assert (f"stack.0/{name}" in before[3]) == (trunk == "trainable")


def test_what_is_frozen_has_no_state(at_updates):
    _, before, after = states_around_growth(at_updates, "training.progressive.trunk_strategy=frozen")
    assert {name.split("/")[0] for name in before[3]} == {"norm", "head"}
    assert {name.split("/")[0] for name in after[5]} == {"stack.1", "norm", "head"}


# ---- repetition


def test_two_runs_are_bit_identical_and_another_seed_is_another_run():
    settings = ("model.dropout=0.3", "training.micro_batch_size=2")
    _, a = trained(*settings)
    torch.randn(13)  # whatever else draws from the global generator
    _, b = trained(*settings)
    _, c = trained(*settings, "training.seed=1")
    assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]
    assert equal(a.weights(), b.weights())
    assert a["loss"] != c["loss"]


def test_dropout_depends_on_the_seed_and_the_step_alone():
    """The same weights and the same tokens under another seed, or at another step, lose other activations."""
    inputs, targets = torch.randint(0, V, (2, B, T), generator=torch.Generator().manual_seed(2))
    example = Example(Reading(inputs), targets)

    def losses(seed):
        settings = config(END_TO_END, "model.dropout=0.3", f"training.seed={seed}", "training.optimizer.lr=1.0e-12")
        settings = settings.changed({"training.max_steps": 2})
        return trained_with(settings, example)

    def trained_with(settings, example):
        rack = create_rack_from_config(config("model.dropout=0.3"))
        loop, recorder = a_loop(settings, rack=rack, source=Examples(example))
        loop.train()
        return recorder["loss"]

    a, again, b = losses(0), losses(0), losses(1)
    assert a == again
    assert abs(a[0] - b[0]) > 1e-4
    assert abs(a[0] - a[1]) > 1e-4


def test_a_racks_own_dropout_is_seeded_whatever_the_config_says():
    def run():
        rack = create_rack_from_config(config("model.dropout=0.3"))
        return trained(END_TO_END, rack=rack)[1]["loss"]

    first = run()
    torch.randn(13)
    assert run() == first


def test_a_frozen_trunk_does_not_drop_anything():
    loop, _ = trained("model.dropout=0.3", "training.progressive.trunk_strategy=frozen")
    assert not any(m.training for m in loop.context.rack.stacks[0].modules())
    assert not loop.context.rack.embedding.training
    assert all(m.training for m in loop.context.rack.stacks[2].modules())


# ---- accounts


def test_records_add_up():
    loop, recorder = trained("training.progressive.joint_fraction=0.25", "training.max_steps=12")
    state = loop.state
    assert state.step == 12 and state.tokens == 12 * B * T and state.flops == 12.0
    assert [r.steps for r in state.records] == [p.steps for p in loop.phases]
    assert sum(r.tokens for r in state.records) == state.tokens
    assert recorder["step"] == list(range(1, 13))
    done = 0
    for record, phase in zip(state.records, loop.phases):
        losses = recorder["loss"][done : done + phase.steps]
        assert (record.first_loss, record.last_loss) == (losses[0], losses[-1])
        done += phase.steps
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in loop.context.rack.parts().items()}
    assert [r.trainable_parameters for r in state.records] == [
        sum(count[part] for part in phase.trains) for phase in loop.phases
    ]


def test_the_loss_of_random_weights_is_near_that_of_guessing():
    _, recorder = trained(END_TO_END, "training.max_steps=1")
    assert recorder["loss"][0] == pytest.approx(math.log(V), abs=0.1)


def test_zeroed_residual_outputs_make_a_stack_the_identity():
    stack = create_stack_from_config(1, config())
    zero_residual_outputs(stack)
    x = torch.randn(3, 7, 26, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stack(x), x)
