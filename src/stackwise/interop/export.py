"""Runs as Hugging Face folders: ``stackwise export RUN DIR``."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import RunError, UserError
from stackwise.files import new_folder, require_free
from stackwise.growth.adapters import adapters_of, plain_rack
from stackwise.growth.precision import PrecisionManager
from stackwise.interop.card import Loading, card
from stackwise.interop.classes import Classes, classes_of
from stackwise.interop.families import choose_family
from stackwise.interop.family import Entry
from stackwise.interop.remote_code import remote_sources
from stackwise.interop.tokenizer_files import special_ids, write_tokenizer
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec
from stackwise.runs.run import LoadedRun, load
from stackwise.signals import stop_if_asked
from stackwise.store.state import StepName

SHARD_BYTES = 5 * 10**9
"""Weights in one file at most, as transformers writes them."""


def export_run(
    run: str | Path, out: str | Path, step: StepName | None = None, max_tokens: int | None = None
) -> dict[str, Any]:
    """Writes a trained run as a folder that ``transformers`` loads, whole or not at all.

    Args:
        max_tokens: the longest sequence that the folder declares; default ``training.seq_len``.

    Returns: {"architecture", "remote_code", "auto_class", "parameters"}.

    Raises:
        UserError: ``out`` exists and is not empty, ``max_tokens`` is not the number of learned positions, or how the
            model runs depends on noise levels or blocks.
    """
    out = Path(out)
    require_free(out)
    loaded = load(run, step)
    training = loaded.config.training
    for key, value in (
        ("training.progressive.time_interpretation", training.progressive.time_interpretation),
        ("training.diffusion.block_length", training.diffusion.block_length),
    ):
        if value is not None:
            raise UserError(
                f"{run}: {key} is {value}, but a transformers model always runs all its layers once, in order"
            )
    rows = loaded.rack.spec.learned_positions
    if max_tokens is not None and rows is not None and max_tokens != rows:
        raise UserError(
            f"--max-tokens: {max_tokens} differs from the {rows} learned positions of the model; leave it out"
        )
    return export_rack(loaded.rack, loaded.known_tokenizer, out, max_tokens or loaded.config.training.seq_len, loaded)


def export_rack(
    rack: Rack, tokenizer: Tokenizer | None, out: str | Path, max_tokens: int, run: LoadedRun | None = None
) -> dict[str, Any]:
    """As ``export_run``, for a Rack at hand; adapters are merged and matrices written in fp32, in a copy of it.

    Args:
        run: the run that it is from, for the model card, and for its classes where it tells classes apart.
    """
    out = Path(out)
    require_free(out)
    if adapters_of(rack) or PrecisionManager().described(rack):
        rack = plain_rack(copy.deepcopy(rack))
    # Adapted embeddings are one table to whoever reads the model.
    spec = replace(rack.spec, embedding_dim=None, adapter_hidden_dim=None, freeze_embeddings=False)
    max_tokens = spec.learned_positions or max_tokens
    own: dict[str, Tensor] = {
        name: tensor for name, tensor in rack.state_dict().items() if not name.startswith("embedding.adapter_")
    }
    own["embedding.weight"] = rack.embedding.table().detach()
    ids = special_ids(tokenizer)
    classes = None if run is None else classes_of(run)
    form = _form_of(spec, own, max_tokens, classes, own_pad=ids["pad_token_id"] not in (None, ids["eos_token_id"]))
    causal, sources = form.causal, form.sources
    ids.pop("mask_token_id", None)  # the model never asks for it
    if not causal:
        ids = {"cls_token_id": ids["bos_token_id"], "sep_token_id": ids["eos_token_id"], **ids}
    settings = {**form.settings, "dtype": "float32", "torch_dtype": "float32", **ids}
    with new_folder(out) as scratch:
        _write_json(scratch / "config.json", settings)
        if form.auto_class == "AutoModelForCausalLM":
            generation = {key: value for key, value in ids.items() if value is not None}
            _write_json(scratch / "generation_config.json", generation | ({"use_cache": False} if sources else {}))
        try:
            _write_weights(scratch, form.entries, own)
        except SafetensorError as error:
            raise RunError(f"{out}: cannot be written: {error}") from error
        if tokenizer is not None:
            write_tokenizer(tokenizer, scratch, max_tokens)
        for name, text in sources.items():
            (scratch / name).write_text(text, encoding="utf-8")
        loading = Loading(form.architecture, form.auto_class, bool(sources))
        (scratch / "README.md").write_text(card(rack, max_tokens, loading, scratch, run), encoding="utf-8")
    return {
        "architecture": form.architecture,
        "remote_code": bool(sources),
        "auto_class": form.auto_class,
        "parameters": sum(p.numel() for p in rack.parameters()),
    }


@dataclass(frozen=True)
class _Form:
    """What a Rack is exported as: a class of transformers, or remote code (``sources``) where none is equal."""

    causal: bool
    architecture: str
    auto_class: str
    settings: dict[str, Any]
    entries: list[Entry]
    sources: dict[str, str]


def _form_of(
    spec: RackSpec, own: dict[str, Tensor], max_tokens: int, classes: Classes | None, *, own_pad: bool
) -> _Form:
    """The form of a Rack whose tensors are ``own``, to which the rows that score ``classes`` are added.

    ``own_pad``: whether padding has a token of its own, by which transformers' classifiers find a sequence's last one.
    """
    causal = {block.attention.attention_mode for block in spec.blocks} == {"causal"}
    task = "ForSequenceClassification" if classes else "ForCausalLM" if causal else "ForMaskedLM"
    about = classes.settings() if classes else {}
    family = choose_family(spec, max_tokens)
    if (
        family is not None
        and classes is not None
        and (family.classifier is None or classes.pooling != "last" or not own_pad)
    ):
        family = None
    if family is not None:
        name, entries = family.architecture, list(family.entries(spec))
        if classes is not None:
            assert family.classifier is not None
            name, entries = family.classifier, [entry for entry in entries if entry.ours != ("head.weight",)]
            own["score"] = own["embedding.weight" if spec.tie_embeddings else "head.weight"][
                : len(classes.names)
            ].clone()
            entries.append(Entry("score.weight", ("score",)))
        settings = {"architectures": [name], "model_type": family.model_type, **about}
        return _Form(causal, name, f"AutoModel{task}", settings | family.settings(spec, max_tokens), entries, {})
    name = f"StackWise{task}"
    settings = {
        "architectures": [name],
        "model_type": "stackwise",
        "auto_map": {
            "AutoConfig": "configuration_stackwise.StackWiseModelConfig",
            "AutoModel": "modeling_stackwise.StackWiseModel",
            f"AutoModel{task}": f"modeling_stackwise.{name}",
        },
        "max_position_embeddings": max_tokens,
        "use_cache": False,
        "rack": spec.to_dict(),
        **about,
    }
    entries = [Entry(f"rack.{tensor}", (tensor,)) for tensor in own]
    return _Form(causal, name, f"AutoModel{task}", settings, entries, remote_sources())


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _shards(entries: list[Entry], own: dict[str, Tensor]) -> Iterator[list[Entry]]:
    """Runs of entries of at most ``SHARD_BYTES``."""
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        bytes_ = sum(own[name].numel() * own[name].element_size() for name in entry.ours)
        if shard and size + bytes_ > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += bytes_
    yield shard


def _write_weights(folder: Path, entries: list[Entry], own: dict[str, Tensor]) -> None:
    shards = list(_shards(entries, own))
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file({entry.theirs: entry.join(own) for entry in entries}, folder / "model.safetensors", metadata)
        return
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        stop_if_asked()
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({entry.theirs: entry.join(own) for entry in shard}, folder / name, metadata)
        places |= {entry.theirs: name for entry in shard}
    total = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))},
    )
