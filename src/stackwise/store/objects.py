"""Objects of the checkpoint store: safetensors files named by their hash, and the hash of a set of tensors.

The file format is https://github.com/huggingface/safetensors#format. It is written and read here, one tensor at a time,
because the library's writer copies a whole part in memory first, and its reader returns tensors that still depend on
the file (a memory map) after the file's hash was compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackwise.reading import MAX_BYTES, parse_json

CHUNK_BYTES = 1 << 26
"""Tensors are hashed, written and read in pieces of this size, the most that is copied at once."""

# The names that safetensors gives to the dtypes.
DTYPE_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CODE_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class StoredObject:
    """What a manifest says about one part: the hash that names its file, and the file's size."""

    sha256: str
    bytes: int


def weights_sha256(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over the names, dtypes, shapes and bytes of tensors, in the order of their names.

    The tensors' device, strides and order do not count. A few MB are copied at a time. ValueError on a name twice.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in named_tensors:
        if name in tensors:
            raise ValueError(f"two tensors are named {name!r}")
        tensors[name] = tensor
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(json.dumps([name, _code(name, tensor), list(tensor.shape)]).encode() + b"\n")
        for chunk in _tensor_bytes(tensor):
            hasher.update(chunk)
    return hasher.hexdigest()


def _code(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in DTYPE_CODES:
        raise ValueError(f"{name}: tensors of {tensor.dtype} cannot be saved; {', '.join(map(str, DTYPE_CODES))} can")
    return DTYPE_CODES[tensor.dtype]


def _tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's elements in row-major order, in pieces; only a tensor that is not contiguous is copied whole."""
    flat = tensor.detach().contiguous().view(-1)
    for piece in flat.split(max(1, CHUNK_BYTES // flat.element_size())) if flat.numel() else ():
        yield piece.cpu().view(torch.uint8).numpy().data


def _ordered(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names by falling element size, then alphabetically: every tensor's bytes are then aligned to its elements."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def header_of(part: str, tensors: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """The length and header of a safetensors file, padded to 8 bytes, and the number of data bytes after it."""
    entries: dict[str, Any] = {}
    offset = 0
    for name in _ordered(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        code = _code(f"{part}.{name}", tensor)
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offset


def serialise(part: str, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: a function of the tensors' names, dtypes, shapes and values alone."""
    yield header_of(part, tensors)[0]
    for name in _ordered(tensors):
        yield from _tensor_bytes(tensors[name])


def hash_part(part: str, tensors: Mapping[str, Tensor]) -> StoredObject:
    hasher, size = hashlib.sha256(), 0
    for chunk in serialise(part, tensors):
        hasher.update(chunk)
        size += len(chunk)
    return StoredObject(hasher.hexdigest(), size)


def object_of(sha256: Any, size: Any) -> StoredObject:
    """What a manifest says of a part. ValueError unless that is a hash and a number of bytes."""
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256) or type(size) is not int:
        raise ValueError("a part in it has no hash or no size")
    return StoredObject(sha256, size)


def hash_file(path: Path) -> str | None:
    """The sha256 of a file, None when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def read_safetensors(path: Path, entry: StoredObject, check: bool = True) -> dict[str, Tensor]:
    """The tensors of an object in memory of their own, hashed as they are read. ValueError when it is damaged.

    ``check=False`` leaves the hash out, for an object that this process has read whole before.
    """
    hasher = hashlib.sha256()
    damaged = "its content does not match its sha256"
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if 8 + length > entry.bytes or length > MAX_BYTES:
            raise ValueError(damaged)
        header = file.read(length)
        hasher.update(prefix)
        hasher.update(header)
        try:
            layout = [
                (name, CODE_DTYPES[item["dtype"]], item["shape"], *item["data_offsets"])
                for name, item in parse_json(header).items()
            ]
            layout.sort(key=lambda item: item[3:])
            at = 0
            for _, dtype, shape, start, end in layout:
                if start != at or not isinstance(end, int) or end < start:
                    raise ValueError(damaged)
                if (
                    not all(type(n) is int and n >= 0 for n in shape)
                    or math.prod(shape) * dtype.itemsize != end - start
                ):
                    raise ValueError(damaged)
                at = end
            if 8 + length + at != entry.bytes:
                raise ValueError(damaged)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(damaged) from None
        buffers = []
        for _, _, _, start, end in layout:
            buffer = torch.empty(end - start, dtype=torch.uint8)
            view = buffer.numpy().data
            for first in range(0, len(view), CHUNK_BYTES):
                piece = view[first : first + CHUNK_BYTES]
                if file.readinto(piece) != len(piece):
                    raise ValueError("the file ends too early")
                if check:
                    hasher.update(piece)
            buffers.append(buffer)
    if check and hasher.hexdigest() != entry.sha256:
        raise ValueError(damaged)
    return {name: buffer.view(dtype).reshape(shape) for (name, dtype, shape, _, _), buffer in zip(layout, buffers)}
