"""Hugging Face folders as runs: ``stackwise import DIR RUN``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import Tokenizer, open_pretrained
from stackwise.errors import UserError, allowed
from stackwise.files import require_free
from stackwise.interop.families import FAMILIES
from stackwise.interop.family import Family, Settings
from stackwise.model.architecture import Rack, rack_spec_from_config
from stackwise.reading import read_object
from stackwise.runs.run import write_untrained_run
from stackwise.signals import stop_if_asked
from stackwise.store.origin import signature


def read_settings(folder: str | Path) -> Settings:
    """``config.json`` of a Hugging Face folder. UserError in one line when there is none that can be read."""
    file = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    if not file.is_file():
        raise UserError(f"{folder}: not a Hugging Face folder: it has no config.json")
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def family_of(settings: Settings, folder: str | Path) -> Family:
    """The family that ``config.json`` names. UserError with the ones there are."""
    kind = settings.get("model_type")
    quantised = settings.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(f"{folder}: quantization_config: {method!r} weights cannot be imported; use full ones")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{folder}: model_type: {kind!r} cannot be imported; {allowed(kind, FAMILIES)}")
    return FAMILIES[kind]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. UserError when there are none: pickles are never read."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = {Path(name).name for name in read_object(index)["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: cannot be read ({error})") from None
        files = [folder / name for name in sorted(names)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{folder}: {missing[0]} is missing, which {index.name} names")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UserError(
            f"{folder}: its weights are pickles, which are never loaded; save them with safe_serialization=True"
        )
    raise UserError(f"{folder}: it has no model.safetensors")


class StoredTensors:
    """The tensors of safetensors files, each read when it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._places: dict[str, tuple[Path, str]] = {}
        for file in files:
            with self._open(file) as content:
                self._places |= {name: (file, name) for name in content.keys()}  # noqa: SIM118 (not a dict)

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: not a readable safetensors file: {error}") from None

    def complete_names(self, prefix: str, known: Set[str]) -> None:
        """Gives tensors their full names where ``prefix`` was left out."""
        whole = {name if name in known or prefix + name not in known else prefix + name: name for name in self}
        self._places = {name: self._places[stored] for name, stored in whole.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self._places[name]
        with self._open(file) as content:
            return tuple(content.get_slice(stored).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        """In fp32. UserError for whole numbers, which are quantised weights, and for NaN and infinity."""
        stop_if_asked()
        file, stored = self._places[name]
        with self._open(file) as content:
            tensor: Tensor = content.get_tensor(stored)
        if not tensor.is_floating_point():
            raise UserError(f"{file}: {stored} has the type {tensor.dtype}; weights must be floating-point numbers")
        values = tensor.float()
        odd = values.numel() - int(torch.isfinite(values).sum())
        if odd:
            raise UserError(f"{file}: {stored} holds {odd:,} values that are NaN or infinite in fp32")
        return values


_HEADS = ("lm_head.weight", "decoder.weight")
"""Names under which tied checkpoints may hold the embedding once more."""


def check_names_and_shapes(rack: Rack, family: Family, stored: StoredTensors, folder: str | Path) -> None:
    """Whether ``stored`` holds ``rack``, which may be on the meta device, and nothing else.

    Raises:
        UserError: for what is missing, left over or of another shape.
    """
    shapes = {name: tensor.shape for name, tensor in rack.state_dict().items()}
    entries = list(family.entries(rack.spec))
    assert {name for entry in entries for name in entry.ours} == set(shapes), "the family's table names every tensor"
    names = {entry.theirs for entry in entries} | (set(_HEADS) if rack.tied else set())
    stored.complete_names(family.prefix, names)
    missing = [entry.theirs for entry in entries if entry.theirs not in stored]
    if missing:
        raise UserError(f"{folder}: the weights of {missing[0]} are missing ({len(missing)} in all)")
    odd = [name for name in stored if name not in names and not name.endswith(family.ignored or "\0")]
    if odd:
        raise UserError(
            f"{folder}: the tensor {odd[0]} has no counterpart in a Rack ({len(odd)} such tensors); the layers "
            f"differ from those of {family.architecture}"
        )
    for entry in entries:
        there, expected = stored.shape(entry.theirs), entry.shape(shapes)
        if there != expected:
            raise UserError(f"{folder}: {entry.theirs} has the shape {there}; config.json says {expected}")


def load_weights_into(rack: Rack, family: Family, stored: StoredTensors, folder: str | Path) -> None:
    """Copies their weights, which ``check_names_and_shapes`` has passed, into ``rack``."""
    own = rack.state_dict()
    shapes = {name: tensor.shape for name, tensor in own.items()}
    for entry in family.entries(rack.spec):
        for name, tensor in entry.split(stored[entry.theirs], shapes).items():
            own[name].copy_(tensor)
    for name in _HEADS:
        if rack.tied and name in stored and not torch.equal(stored[name], rack.embedding.weight):
            raise UserError(f"{folder}: config.json ties the embeddings, but {name} is another matrix")


def rack_from_folder(folder: str | Path, n_stacks: int = 1) -> Rack:
    """The model in a Hugging Face folder, as a Rack of ``n_stacks`` Stacks with values in fp32."""
    return _load(Path(folder), n_stacks, {})[0]


def _load(folder: Path, n_stacks: int, extra: dict[str, Any]) -> tuple[Rack, StackWiseConfig]:
    settings = read_settings(folder)
    family = family_of(settings, folder)
    n = family.n_blocks(settings)
    if not 1 <= n_stacks <= n:
        raise UserError(
            f"--stacks: {n_stacks} is out of range; must be at least 1 and at most {n}, the number of layers"
        )
    config = family.config(settings, n_stacks, extra)
    stored = StoredTensors(weight_files(folder))
    if n > len(stored):
        raise UserError(f"{folder}: config.json says {n} layers, but there are no more than {len(stored)} tensors")
    assert config.model.vocab_size is not None
    spec = rack_spec_from_config(config, range(n_stacks), config.model.vocab_size)
    with torch.device("meta"):
        try:
            rack = Rack(spec)
        except (ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"{folder}: config.json describes no model: {error}") from None
    check_names_and_shapes(rack, family, stored, folder)
    rack.to_empty(device="cpu")
    load_weights_into(rack, family, stored, folder)
    return rack.requires_grad_(True).eval(), config


def import_folder(folder: str | Path, out: str | Path, n_stacks: int = 1) -> dict[str, Any]:
    """Writes the model in ``folder`` as the new run ``out``, whole or not at all.

    Returns: {"family", "stacks", "blocks", "parameters"}.

    Raises:
        UserError: the folder cannot be expressed as a Rack, or ``out`` exists and is not empty.
        RunError: ``out`` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    require_free(out)
    family = family_of(read_settings(folder), folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: it has no tokenizer.json, the only form in which tokenizers are read")
    tokenizer: Tokenizer = open_pretrained(folder)
    extra = {"data": {"tokenizer": {"kind": "pretrained", "path": str(folder.resolve())}}}
    rack, config = _load(folder, n_stacks, extra)
    if tokenizer.vocab_size > rack.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size:,} tokens, but its embedding "
            f"only {rack.vocab_size:,} rows"
        )
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in rack.parts()}
    for part, name, tensor in rack.part_tensors():
        parts[part][name] = tensor.detach()
    write_untrained_run(out, config, tokenizer, parts, list(range(n_stacks)), origin=signature(config))
    return {
        "family": family.architecture,
        "stacks": n_stacks,
        "blocks": len(rack.blocks()),
        "parameters": sum(p.numel() for p in rack.parameters()),
    }
