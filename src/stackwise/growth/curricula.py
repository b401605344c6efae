"""Curricula: rules that turn a config into a list of phases.

Each makes drafts (what trains, and which share of the budget); ``build_phases`` turns shares into steps and gives every
phase its learning-rate schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stackwise.config.base import StackWiseConfig
from stackwise.config.growth import PrecisionName
from stackwise.config.objectives import ObjectiveName
from stackwise.config.optimization import ScheduleConfig
from stackwise.errors import UserError
from stackwise.growth.phases import Adapter, AdapterKind, Growth, Init, Phase, Schedule
from stackwise.growth.places import Place, placed
from stackwise.kinds import CURRICULA, OBJECTIVES, STORAGES
from stackwise.objectives.depth import Interval, intervals_of, levels_of
from stackwise.ops.boundary import largest_count

StepFlops = Callable[[Phase], float]
"""True FLOPs of one optimizer step of a phase."""

MAX_PHASES = 1000
"""Of a run; more cannot be planned in a time that anybody waits."""
_UNSCHEDULED = Schedule(0, "linear", 0, 0, 1.0)


@dataclass(frozen=True)
class Draft:
    """A phase without its steps, and the share of the budget it gets."""

    phase: Phase
    share: float


Trunk = Literal["frozen", "qlora", "trainable"]
_PLACES: dict[str, Place] = {"append": "right", "prepend": "left", "interleave": "between"}


class Course:
    """The Rack as one phase after another leaves it, and the phases so far."""

    def __init__(self, config: StackWiseConfig, present: tuple[int, ...]) -> None:
        self.config, self.stacks = config, present
        self.objective: ObjectiveName = config.training.objective
        self.drafts: list[Draft] = []
        self._cycles = 0
        self._precision: dict[int, PrecisionName] = {}
        self._adapters: dict[tuple[int, AdapterKind], Adapter] = {}
        if config.training.qlora.varies and any(k >= config.target_stacks for k in present):
            raise UserError(
                f"training.progressive.target_stacks: {config.target_stacks} is too low: the Rack has a Stack with id "
                f"{max(present)}, and training.qlora.rank_pattern and alpha_pattern count all Stacks; "
                f"set at least {max(present) + 1}"
            )
        for k in present:
            self._give_stack_adapter(k)

    def add(
        self,
        group: list[int],
        share: float,
        *,
        at: Place,
        trunk: Trunk,
        init: Init,
        precision: PrecisionName,
        new_precision: PrecisionName,
    ) -> None:
        """The Stacks of ``group`` join and train; ``precision`` is that of a trunk that is frozen (or qlora)."""
        settings = self.config.training.progressive
        before, (self.stacks, left_of) = self.stacks, placed(self.stacks, group, at)
        growth = tuple(
            Growth(new, init if left_of[new] is not None else "random", left_of[new] if init == "copy" else None)
            for new in group
        )
        for k in before:
            self._precision[k] = "full" if trunk == "trainable" else precision
            self._give_progressive_adapter(k)
        for k in group:
            self._precision[k] = new_precision
            self._give_stack_adapter(k)
        moving = [k for k in group if STORAGES[new_precision].trains]
        everything = trunk == "trainable" or not before
        trained = [k for k in self.stacks if k in moving or (everything and k in before)]
        # A trunk reads the embedding, but when the new Stacks stand between them; a tied head is the embedding.
        embedding = everything or (at == "left" and not self.config.model.tie_embeddings)
        cached = settings.cache_activations and bool(before) and trunk == "frozen" and at == "right"
        adapting = set(group) | (set(before) if trunk != "frozen" else set())
        name = f"stack {group[0]}" if len(group) == 1 else f"stacks {group[0]}–{group[-1]}"
        self._draft(name, trained, embedding, adapting, share, growth, len(before) if cached else 0)

    def train(self, name: str, trained: Sequence[str], embedding: bool, share: float) -> None:
        """Stacks that are there train (``stack.<id>``, or one Block of it), in full precision from here on."""
        ids = {int(part.split("/")[0].removeprefix("stack.")) for part in trained}
        for k in ids:
            self._precision[k] = "full"
        self._draft(name, trained, embedding, ids, share)

    def train_adapters(self, name: str, share: float) -> None:
        """The adapters of all Stacks train, beside their frozen weights, which are stored as a frozen trunk's are."""
        for k in self.stacks:
            self._precision[k] = self.config.training.progressive.trunk_precision
        self._draft(name, (), False, set(self.stacks), share)

    def train_all(self, name: str, share: float) -> None:
        self.train(name, [f"stack.{k}" for k in self.stacks], True, share)

    def sweep(
        self, share: float, *, rightwards: bool, cycles: int, unit: Literal["stack", "block"], group: int
    ) -> None:
        """Every Stack (``group`` neighbours together) or Block in turn, the rest frozen, ``cycles`` times."""
        units: list[tuple[str, list[str], bool]] = []
        if unit == "block":
            for i, k in enumerate(self.stacks):
                for j in range(self.config.model.architecture.blocks_of(k)):
                    units.append((f"stack {k} block {j}", [f"stack.{k}/blocks.{j}"], i == j == 0))
        else:
            for i in range(0, len(self.stacks), group):
                ids = self.stacks[i : i + group]
                name = f"stack {ids[0]}" if len(ids) == 1 else "stacks " + ", ".join(map(str, ids))
                units.append((name, [f"stack.{k}" for k in ids], i == 0))
        for _ in range(cycles):
            self._cycles += 1
            for name, trained, leftmost in units if rightwards else units[::-1]:
                # The embedding has its turn with the leftmost unit, which reads it.
                self.train(f"sweep {self._cycles}, {name}", trained, leftmost, share / (cycles * len(units)))

    def unfreeze(self, share: float, *, rightwards: bool) -> None:
        """First the last Stack (or the first one) trains, then one more in each phase, in the end everything."""
        order = self.stacks if rightwards else self.stacks[::-1]
        for n in range(1, len(order) + 1):
            chosen = set(order[:n])
            trained = [f"stack.{k}" for k in self.stacks if k in chosen]
            embedding = n == len(order) or (rightwards and not self.config.model.tie_embeddings)
            self.train(f"unfreeze {n} of {len(order)}", trained, embedding, share / len(order))

    def _draft(
        self,
        name: str,
        trained: Sequence[int | str],
        embedding: bool,
        adapting: set[int],
        share: float,
        growth: tuple[Growth, ...] = (),
        enters: int = 0,
    ) -> None:
        config = self.config
        if len(self.drafts) == MAX_PHASES:
            raise UserError(f"the curriculum has more than {MAX_PHASES:,} phases; reduce the cycles, Stacks or Blocks")
        before = [draft.phase.name for draft in self.drafts]
        times = 1 + sum(other == name or other.startswith(f"{name} (") for other in before)
        parts = [part if isinstance(part, str) else f"stack.{part}" for part in trained]
        trains = (*(("embedding",) if embedding else ()), *parts, "norm", *(("head",) if config.model.has_head else ()))
        phase = Phase(
            name if times == 1 else f"{name} ({times})",
            self.stacks,
            trains,
            0,
            _UNSCHEDULED,
            self.objective,
            growth,
            config.training.progressive.optimizer_state,
            tuple((k, self._precision[k]) for k in sorted(self._precision) if self._precision[k] != "full"),
            tuple(
                replace(self._adapters[key], trains=key[0] in adapting)
                for key in sorted(self._adapters, key=lambda key: (key[0], key[1] != "stack"))
            ),
            enters > 0,
            enters,
            noise=self._rates(growth),
            attention=config.mode_of(self.objective) if len(config.training.objectives) > 1 else None,
        )
        self.drafts.append(Draft(phase, share))

    def _rates(self, growth: tuple[Growth, ...]) -> tuple[Interval, ...]:
        """The masking rates of mlm: those of the config, or of the Stack that is new, where Stacks have their own."""
        masking = self.config.training.masking
        if not OBJECTIVES[self.objective].masks:
            return ()
        low, high = masking.rate, masking.max_rate or masking.rate
        if masking.stack_rates is not None and growth:
            low = high = masking.stack_rates[growth[-1].stack]
        return (Interval(low, high, 0, len(self.stacks)),)

    def _give_stack_adapter(self, stack: int) -> None:
        qlora = self.config.training.qlora
        if qlora.enabled:
            rank, alpha = qlora.stack_adapter(stack, self.config.target_stacks)
            self._adapters[stack, "stack"] = Adapter(stack, "stack", rank, alpha, qlora.dropout)

    def _give_progressive_adapter(self, stack: int) -> None:
        qlora = self.config.training.qlora
        if qlora.progressive_enabled and (stack, "progressive") not in self._adapters:
            rank, alpha = qlora.progressive_rank, qlora.progressive_alpha
            self._adapters[stack, "progressive"] = Adapter(stack, "progressive", rank, alpha, qlora.dropout)


def end_to_end(config: StackWiseConfig, present: tuple[int, ...] = ()) -> list[Draft]:
    """The whole Rack from the start, the loss at its end: all of it trains, or one Stack or Block after another."""
    course = Course(config, present or tuple(range(config.model.architecture.n_stacks)))
    match config.training.end_to_end_scope:
        case "rackwise":
            course.train_all("end-to-end", 1.0)
        case "stackwise":
            course.sweep(1.0, rightwards=True, cycles=1, unit="stack", group=1)
        case "blockwise":
            course.sweep(1.0, rightwards=True, cycles=1, unit="block", group=1)
    return course.drafts


def grow(config: StackWiseConfig, present: tuple[int, ...] = ()) -> list[Draft]:
    """Stacks join the Rack, then a joint phase if asked. Stacks that are ``present`` already are the first trunk.

    Appended Stacks go to the right, prepended ones to the left, one a phase. Interleaved ones (block expansion, LLaMA
    Pro 2401.02415) join all at once, spread evenly between those that are present.

    With a frozen trunk the new Stacks, the final norm and the head (if it is not the embedding's) train; the embedding
    trains beside the first Stack, since later the trunk reads it (append), and with every new Stack when prepending,
    where nothing trained reads it directly but the new Stack.
    """
    settings = config.training.progressive
    target = config.target_stacks
    joint = settings.joint_fraction if target > 1 else 0.0
    course = Course(config, present)
    waiting = _waiting(config, present)
    interleave = settings.building_mode == "interleave"
    assert present or not interleave, "the config asks for model.initial"
    shares = settings.phase_fractions or (1.0,) * target
    total = sum(shares[k] for k in waiting) / (1.0 - joint)
    if total == 0.0:
        raise UserError(
            f"training.progressive.phase_fractions: the Stacks that are still to be added ({waiting[0]} and "
            "above) have no share"
        )
    for group in [waiting] if interleave else [[new] for new in waiting]:
        course.add(
            group,
            sum(shares[new] for new in group) / total,
            at=_PLACES[settings.building_mode],
            trunk=settings.trunk_strategy,
            init=settings.new_stack_init,
            precision=settings.trunk_precision,
            new_precision=settings.new_stack_precision,
        )
    if joint:
        course.train_all("joint", joint)
    return course.drafts


def free(config: StackWiseConfig, present: tuple[int, ...] = ()) -> list[Draft]:
    """The phases that ``training.phases`` lists, in order."""
    settings = config.training.progressive
    course = Course(config, present)
    entries = config.training.phases
    given = [entry.share for entry in entries]
    if None in given and sum(share or 0.0 for share in given) >= 1.0:
        raise UserError(
            f"training.phases[{given.index(None)}].share: null is an equal part of what the other entries leave of "
            "the budget, but they leave nothing; set a share here, or reduce theirs"
        )
    missing = max(0.0, 1.0 - sum(share or 0.0 for share in given)) / max(1, given.count(None))
    shares = [missing if share is None else share for share in given]
    for i, (entry, part) in enumerate(zip(entries, shares)):
        share, where = part / sum(shares), f"training.phases[{i}]"
        course.objective = entry.objective or config.training.progressive.training_objective
        if entry.add is None and not course.stacks:
            raise UserError(f"{where}: the Rack has no Stack yet; the first entry must add one")
        if entry.at == "between" and not course.stacks:
            raise UserError(f"{where}.at: 'between' requires existing Stacks; allowed here: right, left, middle")
        if entry.add is not None:
            waiting = _waiting(config, course.stacks, where)
            count = len(waiting) if isinstance(entry.add, str) else entry.add
            if count > len(waiting):
                raise UserError(
                    f"{where}.add: {count} is too many: only {len(waiting)} of the "
                    f"{config.target_stacks} Stacks are left to add"
                )
            groups = [[k] for k in waiting] if entry.add == "each" else [waiting[:count]]
            for group in groups:
                course.add(
                    group,
                    share / len(groups),
                    at=entry.at,
                    trunk=entry.trunk or settings.trunk_strategy,
                    init=entry.init or settings.new_stack_init,
                    precision=entry.precision or settings.trunk_precision,
                    new_precision=settings.new_stack_precision,
                )
        elif entry.sweep is not None:
            rightwards = entry.sweep == "left_to_right"
            course.sweep(share, rightwards=rightwards, cycles=entry.cycles, unit=entry.unit, group=entry.group)
        elif entry.unfreeze is not None:
            course.unfreeze(share, rightwards=entry.unfreeze == "left_to_right")
        elif entry.trains == "all":
            course.train_all("joint" if i == len(entries) - 1 else f"all, entry {i}", share)
        elif entry.trains == "adapters":
            course.train_adapters("adapters", share)
        else:
            assert isinstance(entry.trains, tuple)
            lacking = [k for k in entry.trains if isinstance(k, int) and k not in course.stacks]
            if lacking:
                raise UserError(
                    f"{where}.trains: the Rack has no Stack {lacking[0]} in this phase; it has {list(course.stacks)}"
                )
            ids = [k for k in course.stacks if k in entry.trains]
            name = f"entry {i}: " + (", ".join(f"stack {k}" for k in ids) or "no stack")
            course.train(name, [f"stack.{k}" for k in ids], "embedding" in entry.trains, share)
    return course.drafts


def _waiting(config: StackWiseConfig, present: tuple[int, ...], where: str = "") -> list[int]:
    """The ids of the Stacks that are still to be grown."""
    first, target = max(present, default=-1) + 1, config.target_stacks
    if first >= target:
        key = "training.progressive.target_stacks"
        if not where:
            raise UserError(f"{key}: {target} leaves no Stack to add to the {len(present)} of the Rack; raise it")
        raise UserError(
            f"{where}: no Stack is left to add, because the Rack already has {len(present)} of {target} "
            f"Stacks; raise {key}"
        )
    return list(range(first, target))


def build_phases(
    config: StackWiseConfig,
    step_flops: StepFlops | None = None,
    present: tuple[int, ...] = (),
    preparation: Callable[[Sequence[Phase]], float] | None = None,
    given: Sequence[int] = (),
) -> list[Phase]:
    """The phases of the run that ``config`` describes.

    Args:
        step_flops: needed when the budget is in FLOPs.
        present: ids of the Stacks that the Rack has before the run, left to right.
        preparation: FLOPs of all phases before their first steps, which a budget in FLOPs pays for; default none.
        given: the steps of the first phases, where they are known: the others share what is left of the budget.

    Raises:
        UserError: the budget gives some phase no step.
    """
    drafts = _drafts(config, present)
    unit, budget = config.training.budget
    costs: list[float] = []
    for draft in drafts:
        if unit == "steps":
            costs.append(1.0)
        elif unit == "tokens":
            costs.append(config.training.batch_size * config.training.seq_len)
        else:
            if step_flops is None:
                raise ValueError("a budget in FLOPs needs step_flops")
            costs.append(step_flops(draft.phase))
    for_steps = budget
    while True:
        phases = _with_steps(drafts, costs, for_steps, unit, budget, given)
        if any(phase.cached for phase in phases):
            phases = _sharing_examples(phases, config)
        if unit != "flops" or preparation is None or len(given) == len(drafts):
            break
        total = sum(phase.steps * cost for phase, cost in zip(phases, costs)) + preparation(phases)
        if total <= budget:
            break
        # What comes before the steps grows with their number: fewer of them, until both fit.
        for_steps *= min(budget / total, 1.0 - 1e-3)
    return _with_schedules(phases, config.training.schedule)


def count_phases(config: StackWiseConfig, present: tuple[int, ...] = ()) -> int:
    """How many phases ``build_phases`` gives."""
    return len(_drafts(config, present))


def _drafts(config: StackWiseConfig, present: tuple[int, ...]) -> list[Draft]:
    return _over_time(CURRICULA[config.training.strategy].load()(config, present), config)


def _over_time(drafts: list[Draft], config: StackWiseConfig) -> list[Draft]:
    """The phases with their noise levels, where depth is time.

    What several levels share (embedding, norm, head) trains with the first Stack; beside a frozen trunk it is frozen
    too, or the levels of the trunk would be denoised by other weights than they were trained with.
    """
    variant = config.training.depth_variant
    if variant is None:
        return drafts
    levels, frozen = levels_of(config), config.training.progressive.trunk_strategy == "frozen"
    found = []
    for draft in _of_expert(drafts, config.training.diffusion.expert):
        phase, trains = draft.phase, draft.phase.trains
        if len(phase.stacks) > 1 and phase.growth and frozen:
            trains = tuple(f"stack.{k}" for k in phase.stacks if k in phase.trained_stacks)
        noise = tuple(
            replace(interval, trains=f"stack.{k}" in trains)
            for k, interval in zip(phase.stacks, intervals_of(variant, levels, phase.stacks))
        )
        training = [interval.width for interval in noise if interval.trains]
        if min(training) / sum(training) * config.training.batch_size < 1.0:
            narrowest = min(training) / sum(training)
            raise UserError(
                f"training.batch_size: {config.training.batch_size} leaves a Stack without a sequence in some "
                f"steps: the narrowest of the {len(training)} noise intervals gets {narrowest:.3g} of the batch; "
                "raise it, or choose other training.diffusion.levels"
            )
        found.append(replace(draft, phase=replace(phase, trains=trains, noise=noise)))
    return found


def _of_expert(drafts: list[Draft], expert: int | None) -> list[Draft]:
    """The phase of one expert, beside Stack 0 alone, with the whole budget; all phases where none is named."""
    if expert is None:
        return drafts
    (draft,) = [draft for draft in drafts if draft.phase.stacks[-1] == expert and draft.phase.growth]
    phase = draft.phase
    growth = tuple(replace(new, source=0 if new.source is not None else None) for new in phase.growth)
    stacks = (0, expert) if expert else (0,)
    precision = tuple((k, name) for k, name in phase.precision if k in stacks)
    return [Draft(replace(phase, stacks=stacks, growth=growth, precision=precision), 1.0)]


def _with_steps(
    drafts: Sequence[Draft], costs: Sequence[float], for_steps: float, unit: str, budget: float, given: Sequence[int]
) -> list[Phase]:
    """Whole steps, rounding each phase's end rather than its length, so that all is used up to the last step."""
    phases = [replace(draft.phase, steps=steps) for draft, steps in zip(drafts, given)]
    spent = due = sum(phase.steps * cost for phase, cost in zip(phases, costs))
    rest = drafts[len(given) :]
    # Shares of the whole are taken as they are: scaled by 1, their sums would be rounded in another way.
    room = (for_steps - spent) / sum(draft.share for draft in rest) if given and rest else for_steps
    for draft, cost in zip(rest, costs[len(given) :]):
        due = due + draft.share * room if draft is not drafts[-1] else for_steps
        steps = math.floor((due - spent) / cost + 1e-9)
        if steps < 1:
            raise UserError(
                f"the budget of {budget:g} {unit} gives the phase '{draft.phase.name}' no step; "
                f"raise training.max_{unit}"
            )
        spent += steps * cost
        phases.append(replace(draft.phase, steps=steps))
    return phases


def _sharing_examples(phases: list[Phase], config: StackWiseConfig) -> list[Phase]:
    """The same batches for all phases of a run with a cache: as many as the longest takes, and as the cache holds."""
    training = config.training
    count = max(phase.steps for phase in phases)
    if training.cache.max_bytes is not None:
        room = largest_count(
            training.batch_size, training.seq_len, config.model.d_model, training.cache.dtype, training.cache.max_bytes
        )
        if room < 1:
            raise UserError(
                f"training.cache.max_bytes: {training.cache.max_bytes} is too small for one batch of "
                f"{training.batch_size} × {training.seq_len} tokens of width {config.model.d_model}"
            )
        count = min(count, room)
    return [replace(phase, examples=(0, count)) for phase in phases]


def _with_schedules(phases: list[Phase], settings: ScheduleConfig) -> list[Phase]:
    """Gives each phase its piece of the run's schedule, or a schedule of its own (``span: phase``)."""
    total = sum(p.steps for p in phases)
    scheduled, done = [], 0
    for i, phase in enumerate(phases):
        start, length = (0, phase.steps) if settings.span == "phase" else (done, total)
        warmup = min(settings.warmup_steps if i == 0 else settings.rewarmup_steps, phase.steps)
        if settings.kind == "constant":
            schedule = Schedule(warmup, "linear", length - start, length - start, 1.0)
        elif settings.kind == "wsd":
            decay = round(settings.decay_fraction * length)
            schedule = Schedule(warmup, "linear", length - decay - start, length - start, settings.min_lr_ratio)
        else:
            first = settings.warmup_steps if settings.span == "run" else warmup
            schedule = Schedule(warmup, "cosine", min(first, length) - start, length - start, settings.min_lr_ratio)
        scheduled.append(replace(phase, schedule=schedule))
        done += phase.steps
    return scheduled
