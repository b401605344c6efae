"""The source of a Rack as a remote-code module: our own files, made to import each other from one flat folder."""

from __future__ import annotations

import ast
import re
from importlib.resources import files

from stackwise.kinds import ATTENTION_TYPES

_REMOTE = "stackwise.interop.remote."
_IMPORT = re.compile(r"^from (stackwise\.[\w.]+) import", re.MULTILINE)
_KIND = re.compile(r'(?<=Kind\(")[\w.]+(?=:)')
"""In ``kinds.py``: the module where something chosen by name lies."""
_MAIN = "modeling_stackwise.py"
_TYPE_CHECKING = re.compile(r"^if TYPE_CHECKING:\n(?:(?: {4}.*)?\n)+", re.MULTILINE)


def remote_sources() -> dict[str, str]:
    """File name → source, of the two modules that transformers loads and of all that they import."""
    sources: dict[str, str] = {}
    waiting = [_REMOTE + _MAIN.removesuffix(".py")]
    waiting += [f"stackwise.{kind.path.partition(':')[0]}" for kind in ATTENTION_TYPES.values()]
    while waiting:
        module = waiting.pop()
        name = f"{_flat(module)}.py"
        if name in sources:
            continue
        text = _TYPE_CHECKING.sub("", _source(module))
        ast.parse(text)
        waiting += _IMPORT.findall(text)
        text = _IMPORT.sub(lambda found: f"from .{_flat(found[1])} import", text)
        sources[name] = _KIND.sub(lambda found: found[0].replace(".", "_"), text)
    others = sorted(name.removesuffix(".py") for name in sources if name != _MAIN)
    imports = "".join(f"from .{name} import __name__ as _\n" for name in others)
    sources[_MAIN] += f"\n\n# Versions before 5 copy only those files that this one imports itself.\n{imports}"
    return sources


def _source(module: str) -> str:
    *path, name = module.split(".")[1:]
    return files("stackwise").joinpath(*path, f"{name}.py").read_text(encoding="utf-8")


def _flat(module: str) -> str:
    """``stackwise.ops.rope`` → ``stackwise_ops_rope``; the modules of this folder keep their names."""
    return module.removeprefix(_REMOTE) if module.startswith(_REMOTE) else module.replace(".", "_")
