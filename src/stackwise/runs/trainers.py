"""The two front doors of the loop for people with a data loader of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import Tokenizer
from stackwise.model.architecture import Rack
from stackwise.objectives import Objective, create_objective
from stackwise.ops.precision import resolve_device
from stackwise.planning.plan import plan_phases
from stackwise.runs.build import create_loop
from stackwise.runs.builder import ProgressiveRackBuilder
from stackwise.training.memory import PeakMemory, return_freed_memory
from stackwise.training.progress import Reporter, SilentReporter
from stackwise.training.sources import IterableSource, ProgressiveDataLoader, TokenSource, peek_shape


class _Trainer:
    """What both share.

    Args:
        config: ``training`` is what is read; shapes come from the Rack (or its builder), batches from the data loader.
        tokenizer: needed by mlm, which must know the mask token.
        reporter: what is shown; default nothing.
    """

    def __init__(
        self, config: StackWiseConfig, *, tokenizer: Tokenizer | None = None, reporter: Reporter | None = None
    ) -> None:
        self.config, self.reporter = config, reporter or SilentReporter()
        self.objective: Objective = create_objective(config, tokenizer)

    def _train(
        self, config: StackWiseConfig, rack: Rack, dataloader: ProgressiveDataLoader | Iterable[Any]
    ) -> dict[str, Any]:
        if isinstance(dataloader, ProgressiveDataLoader):
            source: TokenSource | IterableSource = TokenSource(dataloader, self.objective)
            shape = dataloader.batches.batch_size, dataloader.batches.seq_len
        else:
            source = IterableSource(dataloader, self.objective)
            shape = peek_shape(dataloader)
        config = config.changed({"training.batch_size": shape[0], "training.seq_len": shape[1]})
        device = resolve_device(config.training.device)
        if device.type == "cpu" and config.tight_allocator:
            return_freed_memory()
        memory = PeakMemory(device)
        present = tuple(stack.stack_id for stack in rack.stacks)
        planned = plan_phases(config, rack.vocab_size, present, rack=rack)
        objectives = {config.training.objective: self.objective}
        loop = create_loop(config, rack, planned, source, objectives, self.reporter, memory)
        try:
            state = loop.train()
        finally:
            self.reporter.close()
        return {
            "phases": [asdict(record) for record in state.records],
            "steps": state.step,
            "tokens": state.tokens,
            "flops": state.flops,
            "final_loss": state.records[-1].last_loss,
        }


class ProgressiveTrainer(_Trainer):
    """Grows a Rack Stack by Stack, as ``training.progressive`` says."""

    def train_rack(
        self,
        rack_builder: ProgressiveRackBuilder,
        dataloader: ProgressiveDataLoader | Iterable[Any],
        target_stacks: int | None = None,
    ) -> dict[str, Any]:
        """Adds and trains Stacks until ``rack_builder.rack`` has ``target_stacks`` (default: the config's).

        Stacks that the builder has already are the first trunk. The budget (``training.max_steps`` …) is that of the
        whole call. Returns {"phases", "steps", "tokens", "flops", "final_loss", "rack"}.
        """
        target = target_stacks or self.config.target_stacks
        config = self.config.changed(
            {
                "training.strategy": "progressive",
                "training.progressive.target_stacks": target,
                "training.progressive.building_mode": rack_builder.building_mode,
            }
        )
        config = StackWiseConfig.from_dict({**config.to_dict(), "model": rack_builder.config.to_dict()["model"]})
        results = self._train(config, rack_builder.rack, dataloader)
        return {**results, "rack": rack_builder.get_rack_info()}


class ArchitectureTrainer(_Trainer):
    """Trains all of a given Rack, end to end."""

    def train_architecture(self, rack: Rack, dataloader: ProgressiveDataLoader | Iterable[Any]) -> dict[str, Any]:
        """Trains all of ``rack`` for the budget. Returns {"phases", "steps", "tokens", "flops", "final_loss"}."""
        config = self.config.changed({"training.strategy": "end_to_end", "model.tie_embeddings": rack.tied})
        return self._train(config, rack, dataloader)
