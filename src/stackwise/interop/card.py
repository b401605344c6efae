"""The model card of an exported folder: what it is, how to load it, how it was trained, planned against measured."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise import __version__
from stackwise.config.base import StackWiseConfig
from stackwise.model.rack import Rack
from stackwise.planning.plan import plan_phases
from stackwise.runs.run import LoadedRun
from stackwise.store.state import PhaseRecord, RunState
from stackwise.units import size

_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
}


@dataclass(frozen=True)
class Loading:
    """How transformers loads the folder: its class, the Auto class, and whether the class's source is in the folder."""

    architecture: str
    auto_class: str
    remote: bool


def card(rack: Rack, max_tokens: int, loading: Loading, folder: Path, run: LoadedRun | None) -> str:
    """The text of ``README.md``, beside the weights that ``folder`` holds already; ``run``: where ``rack`` is from."""
    parameters = sum(p.numel() for p in rack.parameters())
    about = (
        "a model that no class of transformers equals, so its own source is in this folder"
        if loading.remote
        else f"`{loading.architecture}` of transformers, exactly equal to the model as it was trained"
    )
    remote = ", trust_remote_code=True" if loading.remote else ""
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {_TASKS[loading.auto_class]}\ntags: [stackwise]\n---\n",
        "# A model trained with StackWise\n",
        f"{parameters:,} parameters in {len(rack.stacks)} Stacks with {len(rack.blocks())} Blocks, for sequences of up "
        f"to\n{max_tokens} tokens. It is {about}.\n",
        "## Loading\n",
        f"```python\nfrom transformers import AutoTokenizer, {loading.auto_class}\n\n"
        f'model = {loading.auto_class}.from_pretrained("."{remote})\n'
        f'tokenizer = AutoTokenizer.from_pretrained(".")\n```\n',
        "`AutoModel` gives the hidden states that the head reads.\n",
    ]
    if run is not None:
        parts += _training(run, rack.vocab_size)
    parts += ["## Files\n", "| file | sha256 |\n|---|---|"]
    parts += [f"| {file.name} | `{_sha256(file)}` |" for file in sorted(folder.glob("*.safetensors"))]
    return "\n".join(parts) + "\n"


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _training(run: LoadedRun, vocab_size: int) -> list[str]:
    """Sections on the data, the recipe, the phases and the scores."""
    config, training = run.config, run.config.training
    state = RunState.from_dict(run.checkpoint.state["run"])
    progressive = training.progressive
    how = {
        "progressive": f"Stack by Stack ({progressive.building_mode}), the trunk {progressive.trunk_strategy}, Stacks "
        f"beginning as {progressive.new_stack_init}",
        "end_to_end": f"end to end ({training.end_to_end_scope})",
    }.get(training.strategy, f"by the strategy {training.strategy}")
    facts = {
        "data": _data(config),
        "tokenizer": f"{config.data.tokenizer.kind}, {vocab_size:,} tokens",
        "objective": training.objective,
        "training": how,
        "batches": f"{training.batch_size} sequences of {training.seq_len} tokens, seed {training.seed}",
        "optimizer": f"{training.optimizer.optimizer_type}, rate {training.optimizer.lr:g}, {training.schedule.kind}",
        "spent": f"{state.step:,} steps, {state.tokens:,} tokens, {state.flops:.3g} true FLOPs, "
        f"{state.seconds / 60:.1f} minutes",
        "settings": f"fingerprint {run.checkpoint.state['fingerprint']}, StackWise {__version__}",
    }
    return [
        "## Training\n",
        "| | |\n|---|---|",
        *(f"| {name} | {_plain(value)} |" for name, value in facts.items()),
        "",
        *_phases(config, state.records, vocab_size),
    ]


def _data(config: StackWiseConfig) -> str:
    """The source of the text and the names of its files, without the folders of this machine."""
    named = []
    for entry in config.data.sources or (config.data,):
        paths = entry.path if isinstance(entry.path, tuple) else (entry.path or "",)
        shown = [path if entry.source == "huggingface" else Path(path).name for path in paths if path]
        named.append(f"{entry.source} {', '.join(shown)}".strip())
    return " + ".join(named)


def _phases(config: StackWiseConfig, records: list[PhaseRecord], vocab_size: int) -> list[str]:
    """A table of the phases. A run that starts from another is not planned: that one may not be there."""
    if not records:
        return []
    peaks: dict[str, int] = {}
    if config.model.initial is None:
        planned = plan_phases(config, vocab_size)
        peaks = {phase.name: cost.peak for phase, cost in zip(planned.phases, planned.costs)}
    rows = [
        [
            _plain(record.name), f"{record.steps:,}", f"{record.flops:.3g}", size(peaks.get(record.name)),
            size(record.peak_memory_bytes), _number(record.first_loss), _number(record.last_loss),
            _number(record.validation_loss), _number(record.bits_per_byte),
        ]
        for record in records
    ]  # fmt: skip
    heads = ["phase", "steps", "FLOPs", "memory planned", "measured", "first loss", "last loss", "validation loss",
             "bits per byte"]  # fmt: skip
    return [
        "Losses are nats for each predicted token. Memory is planned for the machine that exported the model.\n",
        f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _plain(value: Any) -> str:
    """Text that a table of Markdown shows as it is."""
    return re.sub(r"[\s|<>`\[\]\\]+", " ", str(value)).strip()
