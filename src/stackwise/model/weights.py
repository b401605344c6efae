"""Weights in safetensors files, written whole or not at all, and put into modules without a copy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stackwise.errors import UserError
from stackwise.files import replacing
from stackwise.model.stack import ADAPTERS


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes ``tensors`` to ``path``, replacing it only once the new file is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, dict(metadata))


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of ``path``. Raises ``UserError`` when it is missing or not safetensors."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file of weights")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None


def drop_tensors(module: nn.Module) -> None:
    """Puts everything but adapters on the meta device."""
    for name, tensor in list(module.state_dict(keep_vars=True).items()):
        if ADAPTERS not in name:
            _set(module, name, tensor.detach().to("meta"), isinstance(tensor, nn.Parameter))


def fill_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives ``module`` these tensors in place of those of the same names, without a copy."""
    there = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        _set(module, name, tensor, isinstance(there[name], nn.Parameter))


def _set(module: nn.Module, name: str, tensor: Tensor, parameter: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if parameter:
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        owner.register_buffer(leaf, tensor)
