"""What the rest of the code uses of a Rack: ``forward``, what the head makes of its result, its parts and its spec."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from torch import nn

import stackwise
from stackwise.model.rack import Rack

SOURCE = Path(stackwise.__file__).parent
COMPUTES = {"logits", "cross_entropy", "cross_entropy_terms"}
PARTS = {
    "embedding", "stacks", "norm", "head", "blocks", "parts", "part_module", "part_of", "part_parameters",
    "part_tensors", "tensors_by_part",
}  # fmt: skip
FACTS = {"spec", "vocab_size", "d_model", "tied", "device"}
SETTINGS = {"set_attention_mode", "checkpoint_activations", "make_cache", "extend_vocabulary"}


def name_of(node: ast.expr) -> str:
    """The last name of what ``node`` says: ``stack`` of ``self.rack.stacks[0]`` and of ``stack``."""
    match node:
        case ast.Name(name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(value):
            return name_of(value).removesuffix("s")
    return ""


def outside() -> Iterator[tuple[str, ast.AST]]:
    """(file and line, node) of all code outside ``model/``."""
    for path in sorted(SOURCE.rglob("*.py")):
        where = path.relative_to(SOURCE)
        if where.parts[0] != "model":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                yield f"{where}:{getattr(node, 'lineno', 0)}", node


def test_nothing_else_of_a_rack_is_used():
    allowed = COMPUTES | PARTS | FACTS | SETTINGS | set(dir(nn.Module)) - {"forward"}
    used = {
        (where, node.attr)
        for where, node in outside()
        if isinstance(node, ast.Attribute) and name_of(node.value) in ("rack", "_rack")
    }
    assert len(used) > 100
    assert not sorted((where, name) for where, name in used if name not in allowed)


def test_no_part_of_a_rack_is_called_by_itself():
    """A part that runs outside ``forward`` would run unseen by what wraps the Rack."""
    parts = {"embedding", "stack", "block", "head"}
    libraries = {"torch.stack", "np.stack", "F.embedding"}
    calls = [(where, ast.unparse(node.func)) for where, node in outside()
             if isinstance(node, ast.Call) and name_of(node.func) in parts]  # fmt: skip
    assert not [call for call in calls if call[1] not in libraries]


def test_a_rack_shows_nothing_more():
    known = COMPUTES | PARTS | FACTS | SETTINGS | {"forward"}
    assert {name for name in vars(Rack) if not name.startswith("_")} <= known
