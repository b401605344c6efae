"""The hostile cases: what people, programs and disks do to configs, texts, runs, checkpoints and model folders."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostile.judge import Case, stackwise

CONFIG = """\
model: {d_model: 16, n_heads: 2, d_ff: 24, architecture: {n_stacks: 2, blocks_per_stack: 1}}
training:
  batch_size: 2
  seq_len: 16
  max_steps: 8
  device: cpu
  schedule: {warmup_steps: 2, rewarmup_steps: 1}
  checkpoint: {every_steps: 3}
  evaluation: {max_tokens: 100}
  logging: {every_steps: 1}
data: {source: files, path: texts, cache_dir: cache, tokenizer: {kind: bytes}}
"""
GENERATE = ("generate", "run", "--prompt", "the ", "--tokens", "7", "--json")
EVALUATE = ("eval", "run", "--json")
RESUME = ("resume", "half", "--json")
EXPORT = ("export", "run", "hf_again", "--json")
IMPORT = ("import", "hf", "imported", "--json")
TRAIN = ("train", "c.yaml", "--out", "made", "--json")
PLAN = ("plan", "c.yaml", "--json")

Damage = Callable[[Path], None]
Result = Callable[[Path, str], str]


# Results that are compared: what must not differ between two runs of one command.


def of_scores(inside: Path, output: str) -> str:
    return json.dumps({k: v for k, v in json.loads(output).items() if "seconds" not in k}, sort_keys=True)


def of_text(inside: Path, output: str) -> str:
    return output


def of_training(inside: Path, output: str) -> str:
    return str(json.loads(output)["weights_sha256"])


def of_export(inside: Path, output: str) -> str:
    return hashlib.sha256((inside / "hf_again" / "model.safetensors").read_bytes()).hexdigest()


def of_plan(inside: Path, output: str) -> str:
    plan = json.loads(output)
    return json.dumps([[p["name"], p["steps"], p["memory_bytes"]] for p in plan["phases"]], sort_keys=True)


RESULTS: dict[tuple[str, ...], Result] = {
    EVALUATE: of_scores,
    GENERATE: of_text,
    RESUME: of_training,
    EXPORT: of_export,
    TRAIN: of_training,
    PLAN: of_plan,
}


@dataclass(frozen=True)
class Base:
    """A folder with texts, a finished run, one that stopped, and a model folder; and what commands say of them."""

    folder: Path
    results: dict[tuple[str, ...], str]

    def copy(self, inside: Path, *names: str) -> None:
        for name in names:
            source = self.folder / name
            if source.is_dir():
                shutil.copytree(source, inside / name, symlinks=True)
            else:
                shutil.copy2(source, inside / name)


def prepare(folder: Path) -> Base:
    """Makes the undamaged files in ``folder``, and the results that are right.

    All cases have the key of the user who made them, so that the runs are that user's own.
    """
    os.environ["XDG_CONFIG_HOME"] = str(folder / "config")
    draw = random.Random(5)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(150)]
    (folder / "texts").mkdir(parents=True)
    for i in range(23):
        (folder / "texts" / f"{i:02}.txt").write_text(" ".join(draw.choices(words, k=40)) + "\n")
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "more.txt").write_text(" ".join(draw.choices(words, k=120)) + "\n")
    log = folder / "log"
    log.mkdir()

    def go(*arguments: str) -> str:
        code, _, _ = stackwise(arguments, folder, log, limits=False)
        if code != 0:
            raise AssertionError(f"{arguments}: exit {code}: {(log / 'err').read_text()}")
        return (log / "out").read_text()

    go("train", "c.yaml", "--out", "run", "--json")
    shutil.copytree(folder / "run", folder / "half")
    (folder / "half" / "summary.json").unlink()
    newest = max((folder / "half" / "checkpoints").glob("step-*.json"))
    newest.unlink()
    (folder / "half" / "checkpoints" / "newest").write_text("6\n")
    metrics = folder / "half" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= 6))
    go("export", "run", "hf", "--json")
    results = {}
    for command, result in RESULTS.items():
        if command == RESUME:
            shutil.copytree(folder / "half", folder / "spare")
        results[command] = result(folder, go(*command))
        if command == RESUME:
            shutil.rmtree(folder / "half")
            (folder / "spare").rename(folder / "half")
    shutil.rmtree(folder / "hf_again")
    shutil.rmtree(folder / "made")
    return Base(folder, results)


# Values and texts that somebody may write where another was meant.

VALUES: list[str] = [
    "null", "~", "true", "no", "0", "1", "-1", "2", "3", "7", "010", "1:30", "1e-3", "1e9", "1e18", "1e40", "-1e18",
    "0.5", "-0.0", "1.0000001", ".nan", ".inf", "-.inf", "1e400", "1e-400", "1000000", "100000000", "2147483648",
    "9223372036854775807", "9223372036854775808", "123456789012345678901234567890", "[]", "{}", "[0]", "[1, 2]",
    "[[[[1]]]]", "{a: 1}", "{a: {b: {c: 1}}}", "''", "' '", "banana", "'1'", "'é'", "~nosuchuser", "~nosuchuser/x",
    "/", "/dev/null", "/nonexistent/x", "../outside", ".", "'*'", "'**/*'", "'['", '"\\0"', '"a\\nb"', "'a/b/c'",
    "!!bool banana", "!!int x", "!!binary eA==", "*nothing", "2020-01-01", "0x10", "0o17", "1_000", "cpu", "cuda",
    "'cuda:99'", "mps", "meta", "clm", "mlm", "diffusion", "custom", "full", "int8", "nf4", "[a, b, c]", "[null]",
    "[1, 1, 1, 1, 1, 1, 1, 1]", "[true]", "[.nan]", "[-1]", "[1e18]", "disk", "memory", "1GB", "all", "each",
]  # fmt: skip
"""As written after a key in YAML."""

NONSENSE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, "", "banana", "\x00", "é" * 300,
    "../outside/thesis.txt", [], [1], [[]], [None], ["a"] * 50, {}, {"a": 1}, {"": None}, [{}],
]  # fmt: skip
"""As JSON has them."""

RAW: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("a zero byte", b"\0"),
    ("zeros", b"\0" * 4096),
    ("deep", b"[" * 100_000),
    ("deep and closed", b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    ("not UTF-8", b"\xff\xfe{}"),
    ("a list", b"[]"),
    ("null", b"null"),
    ("a number", b"7"),
    ("text", b'"x"'),
    ("an empty object", b"{}"),
    ("not finite", b'{"a": NaN, "b": Infinity}'),
    ("many digits", b'{"a": ' + b"9" * 6000 + b"}"),
    ("a large exponent", b'{"a": 1e999}'),
    ("half a surrogate", b'{"a": "\\ud800"}'),
    ("twice", b"{}{}"),
]


def _keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    from stackwise.config.section import Section

    for name, info in schema.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield f"{prefix}{name}", annotation
            yield from _keys(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", annotation


def _options(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return [str(option) for option in typing.get_args(annotation)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [option for part in typing.get_args(annotation) for option in _options(part)]
    return []


def config_cases(base: Base, draw: random.Random, n: int) -> Iterator[Case]:
    """A key with any value, two keys at once, in the file or on the command line."""
    from stackwise.config.base import StackWiseConfig

    keys = list(_keys(StackWiseConfig))
    for i in range(n):
        chosen = []
        for _ in range(1 + (i % 3 == 0)):
            key, annotation = keys[i % len(keys)] if not chosen else draw.choice(keys)
            value = draw.choice(_options(annotation) or VALUES) if draw.random() < 0.25 else draw.choice(VALUES)
            chosen.append(f"{key}={value}")
        if draw.random() < 0.3 and not any(item.startswith("data.path") for item in chosen):
            arguments = (*TRAIN, *chosen)
        else:
            arguments = (*PLAN, *chosen)
        # Training for a long time is no failure; planning it is enough.
        if arguments[0] == "train" and not _short(chosen):
            arguments = (*PLAN, *chosen)
        yield Case(
            " ".join(chosen), "config", _with(base, "c.yaml", "texts"),
            tuple(arguments), frozenset((0, 1, 2)),
        )  # fmt: skip


def _short(chosen: list[str]) -> bool:
    """Whether a run with these settings is as short as the undamaged one, unless it is refused."""
    long = (
        "max_", "steps", "seq_len", "batch", "d_model", "d_ff", "n_", "blocks", "vocab", "cycles", "dim", "rank",
        "draws", "fraction", "mla", "positions", "cache", "seconds", "source", "length",
    )  # fmt: skip
    return not any(part in item.partition("=")[0] for item in chosen for part in long)


def _with(base: Base, *names: str, then: Damage | None = None) -> Damage:
    def build(inside: Path) -> None:
        base.copy(inside, *names)
        if then is not None:
            then(inside)

    return build


def _write(path: str, content: bytes) -> Damage:
    def damage(inside: Path) -> None:
        target = inside / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    return damage


def yaml_cases(base: Base, draw: random.Random, n: int) -> Iterator[Case]:
    """Whole texts: bombs, nesting, tags, anchors, control characters, damaged copies, and other spellings."""
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    texts: list[tuple[str, bytes]] = [(name, content) for name, content in RAW]
    texts += [
        ("bomb", bomb.encode()),
        ("bomb in a key", f"model: {{d_model: &a [x, x]}}\n{bomb}".encode()),
        ("bomb as data.path", (bomb + "data: {path: *a11}\n").encode()),
        ("small bomb as data.path", (bomb.replace("a6", "b6")[:180] + "\ndata: {path: *a2}\n").encode()),
        ("deep", b"model: " + b"{a: " * 5000),
        ("deep list", b"model: " + b"- " * 20_000),
        ("itself", b"model: &a {d_model: *a}"),
        ("merge", b"a: &a {d_model: 8}\nmodel: {<<: *a}"),
        ("python", b"model: !!python/object/apply:os.system ['touch ../outside/owned']"),
        ("python name", b"model: !!python/name:os.system"),
        ("many keys", b"model: {" + b", ".join(b"k%d: 1" % i for i in range(20_000)) + b"}"),
        ("many wrong values", b"data: {path: [" + b"1, " * 30_000 + b"1]}"),
        ("many paths", b"data: {path: [" + b"x, " * 30_000 + b"x]}"),
        ("a million colons", b":" * 1_000_000),
        ("a long word", b"model: {attention_preset: " + b"a" * 900_000 + b"}"),
        ("3 MB", b"# x\n" * 800_000),
        ("two documents", b"model: {}\n---\nmodel: {}\n"),
        ("twice", b"model: {d_model: 16, d_model: 32}"),
        ("tabs", b"model:\n\td_model: 16\n"),
        ("utf-16", CONFIG.encode("utf-16")),
        ("utf-8 with a mark", b"\xef\xbb\xbf" + CONFIG.encode()),
        ("an endless quote", b'model: "' + b"x" * 10_000),
        ("many anchors", b"".join(b"k%d: &a%d 1\n" % (i, i) for i in range(20_000))),
        ("long key", b"? " + b"k" * 5000 + b"\n: 1\n"),
        ("list key", b"? [1, 2]\n: 3\n"),
        ("many phases", b"training: {phases: [" + b"{trains: all}, " * 3000 + b"]}"),
    ]  # fmt: skip
    for name, content in texts:
        yield Case(name, "yaml", _with(base, "texts", then=_write("c.yaml", content)), PLAN, frozenset((0, 2)))
    # Another spelling of the same number gives the same plan.
    for spelling in ("0016", "0o20", "0x10", "+16", "0b10000", "1.6e1", "16e0", "!!int 16", "!!int '16'", "&x 16"):
        text = CONFIG.replace("d_model: 16", f"d_model: {spelling}").encode()
        yield Case(
            f"d_model {spelling}", "yaml", _with(base, "texts", then=_write("c.yaml", text)), PLAN,
            frozenset((0,)), base.results[PLAN], of_plan,
        )  # fmt: skip
    for spelling in ("1:30", "16.5", "'16'", "!!str 16", "!!float 16.1", "16,0", "16 000", "1__6__x"):
        text = CONFIG.replace("d_model: 16", f"d_model: {spelling}").encode()
        yield Case(
            f"d_model {spelling}", "yaml", _with(base, "texts", then=_write("c.yaml", text)), PLAN, frozenset((2,))
        )
    for i in range(n):
        content = bytearray(CONFIG.encode())
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(content))
            match draw.randrange(3):
                case 0:
                    content[at] = draw.choice(b"\0\t\n {}[]:,&*!|>'\"%@`-?#\xff09azZ~<")
                case 1:
                    del content[at : at + draw.randint(1, 9)]
                case 2:
                    content[at:at] = draw.choice(VALUES).encode()
        yield Case(
            f"noise {i}",
            "yaml",
            _with(base, "texts", then=_write("c.yaml", bytes(content))),
            PLAN,
            frozenset((0, 1, 2)),
        )


LONG = b"word " * 200_000


def data_cases(base: Base, draw: random.Random, n: int) -> Iterator[Case]:
    """Files of text that are none, under names that are odd, to train on and to score."""
    record = json.dumps({"text": "one two three four five six seven eight"}).encode() + b"\n"
    contents: list[tuple[str, bytes]] = [
        *((f"raw {name}", content) for name, content in RAW),
        ("one character", b"x"),
        ("blank", b" \n" * 500),
        ("a long line", LONG),
        ("carriage returns", b"a\rb\r\n" * 300),
        ("a byte order mark", b"\xef\xbb\xbfsome text to read " * 20),
        ("cut in a character", "é".encode()[:1]),
        ("late nonsense", b"good text " * 40_000 + b"\xff"),
        ("special tokens", b"<|endoftext|><|pad|><|mask|> " * 50),
        ("all code points", "".join(map(chr, range(1, 0xD000))).encode()),
        ("records", record * 30),
        ("a record that is a list", record * 5 + b"[1]\n"),
        ("a record without text", record * 5 + b'{"txt": "x"}\n'),
        ("a record of a number", record * 5 + b'{"text": 7}\n'),
        ("deep record", record * 5 + b'{"text": ' + b"[" * 100_000 + b"\n"),
        ("record with a surrogate", record * 5 + b'{"text": "\\udc00"}\n'),
        ("record with foreign numbers", (b'{"id": 1' + b"0" * 30 + b', "s": NaN, "text": "some words here"}\n') * 30),
        ("torn record", record * 5 + record[:20]),
        ("parquet in name", b"PAR1" + b"\0" * 100 + b"PAR1"),
    ]
    suffixes = (".txt", ".jsonl", ".parquet", ".py", ".csv")
    kinds = ("bytes", "characters", "bpe")
    seen = 0
    for name, content in contents:
        for suffix in suffixes[:3]:
            if seen >= n * 2 // 3:
                break
            seen += 1
            if seen % 2:
                arguments: tuple[str, ...] = ("eval", "run", "--data", f"d/x{suffix}", "--json")
                build = _with(base, "run", "texts", then=_write(f"d/x{suffix}", content))
            else:
                kind = kinds[seen // 2 % 3]
                arguments = (*TRAIN, "data.path=d", f"data.tokenizer.kind={kind}", "training.max_steps=2")
                build = _with(base, "c.yaml", then=_write(f"d/x{suffix}", content))
            yield Case(f"{name} as {suffix}", "data", build, arguments, frozenset((0, 1, 2)))
    odd: list[tuple[str, Damage]] = [
        ("a link to nothing", lambda inside: os.symlink("nothing", inside / "texts" / "link.txt")),
        ("a link to itself", lambda inside: os.symlink("loop.txt", inside / "texts" / "loop.txt")),
        ("a folder named like a file", lambda inside: (inside / "texts" / "folder.txt").mkdir()),
        ("a folder that links to its parent", lambda inside: os.symlink("..", inside / "texts" / "up")),
        ("a pipe", lambda inside: os.mkfifo(inside / "texts" / "pipe.txt")),
        ("a name with a line break", _write("texts/a\nb.txt", b"some text here " * 9)),
        ("a name that is not UTF-8", _write(os.fsdecode(b"texts/\xff\xfe.txt"), b"some text here " * 9)),
        ("a long name", _write("texts/" + "n" * 240 + ".txt", b"some text here " * 9)),
        ("an empty file more", _write("texts/empty.txt", b"")),
        ("a hidden file", _write("texts/.hidden.txt", b"\xff")),
        ("a compiled file", _write("texts/x.pyc", b"\xff")),
        ("a deep folder", _write("texts/" + "d/" * 200 + "x.txt", b"some text here " * 9)),
    ]
    for name, damage in odd:
        for arguments in (TRAIN, ("eval", "run", "--data", "texts", "--json")):
            yield Case(
                name, "data", _with(base, "c.yaml", "texts", "run", then=damage), arguments, frozenset((0, 1, 2))
            )
    paths = (
        "", " ", "*", "[", "texts/*.nothing", "texts/../texts", "~", "~nosuchuser", "~nosuchuser/x", "/dev/null",
        "/dev/zero", "pipe", "a\nb", "x" * 300, "x/" * 2500, "c.yaml", "run", "texts/00.txt/x", "texts/**", "{a,b}",
    )  # fmt: skip
    for path in paths:
        pipe: Damage = lambda inside: os.mkfifo(inside / "pipe")
        build = _with(base, "c.yaml", "texts", "run", then=pipe)
        yield Case(f"data.path={path!r}", "data", build, (*TRAIN, f"data.path={path}"), frozenset((0, 1, 2)))
        if path.strip():
            yield Case(f"--data {path!r}", "data", build, ("eval", "run", "--data", path), frozenset((0, 1, 2)))
            yield Case(f"config {path!r}", "data", build, ("plan", path), frozenset((0, 1, 2)))
            yield Case(f"run {path!r}", "data", build, ("eval", path), frozenset((0,) if path == "run" else (1, 2)))
            yield Case(f"--out {path!r}", "data", build, ("train", "c.yaml", "--out", path), frozenset((0, 1, 2)))
            yield Case(
                f"data.cache_dir={path!r}", "data", build, (*TRAIN, f"data.cache_dir={path}"), frozenset((0, 1, 2)),
                base.results[TRAIN], of_training,
            )  # fmt: skip
    numbers = ["-1", "0", "1", "010", "1e9", "1" + "0" * 18, "1" + "0" * 40, "x", "", "nan", "inf", "-inf", "1.5"]
    for number in numbers:
        for option in ("--tokens", "--seed", "--temperature", "--top-k", "--top-p", "--min-p", "--step"):
            if option == "--tokens" and number in ("1e9", "1" + "0" * 18):
                continue  # that many tokens are a long wait and no error
            arguments = ("generate", "run", "--prompt", "the ", "--tokens", "3", option, number)
            yield Case(f"{option} {number}", "data", _with(base, "run"), arguments, frozenset((0, 1, 2)))


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) + 1)])


def _extend(path: Path, draw: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(draw.randbytes(draw.randint(1, 40)))


def _zero(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = draw.randrange(max(1, len(content)))
    content[at : at + 64] = bytes(len(content[at : at + 64]))
    path.write_bytes(content)


def _raw(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.choice(RAW)[1])


def _remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def _folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _swap(path: Path, draw: random.Random) -> None:
    """The content of a neighbour under this name."""
    others = [other for other in sorted(path.parent.iterdir()) if other.is_file() and other != path]
    if others:
        path.write_bytes(draw.choice(others).read_bytes())


DAMAGES = (_flip, _truncate, _extend, _zero, _raw, _remove, _folder, _swap)


def run_cases(base: Base, draw: random.Random, n: int) -> Iterator[Case]:
    """One file of a run, or of the token store behind it, damaged; and a command that needs it."""
    commands = (EVALUATE, GENERATE, RESUME, EXPORT)
    for i in range(n):
        command = commands[i % 4]
        folder = command[1]
        files = sorted(
            str(path.relative_to(base.folder)) for path in (base.folder / folder).rglob("*") if path.is_file()
        )
        if command in (EVALUATE, RESUME) and i % 5 == 0:
            files = sorted(str(path.relative_to(base.folder)) for path in (base.folder / "cache").rglob("*.*"))
        weights = [3.0 if "step-" in name or "config" in name else 1.0 for name in files]
        name = draw.choices(files, weights)[0]
        damage = draw.choice(DAMAGES)
        seed = draw.randrange(2**30)

        def then(inside: Path, name: str = name, damage: Any = damage, seed: int = seed) -> None:
            damage(inside / name, random.Random(seed))

        # A config that reads as another one is another run: what it says is then right.
        exact = not name.endswith("config.yaml")
        yield Case(
            f"{damage.__name__.strip('_')} {name}", "run", _with(base, folder, "texts", "cache", then=then), command,
            frozenset((0, 1, 2)), base.results[command] if exact else None, RESULTS[command] if exact else None,
        )  # fmt: skip


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _paths(child, (*at, key))
    elif isinstance(value, list):
        for i, child in enumerate(value[:2]):
            yield from _paths(child, (*at, i))


def _changed(value: Any, at: tuple[Any, ...], put: Any) -> Any:
    """A copy with ``put`` at ``at``; without what is there where ``put`` is ``_changed``."""
    copy = json.loads(json.dumps(value))
    node = copy
    for part in at[:-1]:
        node = node[part]
    if put is _changed:
        del node[at[-1]]
    else:
        node[at[-1]] = put
    return copy


def signed(manifest: dict[str, Any]) -> bytes:
    """A manifest with the digest that belongs to what it says."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def manifest_cases(base: Base, draw: random.Random, n: int) -> Iterator[Case]:
    """Manifests, and other JSON of a run, that say nonsense under a right digest."""
    commands = (RESUME, EVALUATE, GENERATE, EXPORT)
    for i in range(n):
        command = commands[i % 4]
        path = max((base.folder / command[1] / "checkpoints").glob("step-*.json"))
        manifest = json.loads(path.read_text())
        places = list(_paths(manifest))
        at = places[(i // 4) % len(places)]
        put = _changed if draw.random() < 0.15 else draw.choice(NONSENSE)
        content = signed(_changed(manifest, at, put)) if at != ("sha256",) else b"{}"
        name = str(path.relative_to(base.folder))
        what = "nothing" if put is _changed else ascii(put)[:40]
        yield Case(
            f"{'.'.join(map(str, at))} = {what}", "manifest",
            _with(base, command[1], "texts", "cache", then=_write(name, content)), command, frozenset((0, 1, 2)),
        )  # fmt: skip
    for name in ("summary.json", "tokenizer/stackwise_tokenizer.json"):
        data = json.loads((base.folder / "run" / name).read_text())
        for i, at in enumerate(_paths(data)):
            put = NONSENSE[i * 7 % len(NONSENSE)]
            content = json.dumps(_changed(data, at, put)).encode()
            arguments = ("resume", "run") if name == "summary.json" else EVALUATE
            yield Case(
                f"{name}: {'.'.join(map(str, at))} = {ascii(put)[:40]}", "manifest",
                _with(base, "run", "texts", "cache", then=_write(f"run/{name}", content)), arguments,
                frozenset((0, 1, 2)),
            )  # fmt: skip


def header_cases(base: Base, draw: random.Random, n: int) -> Iterator[Case]:
    """safetensors files whose header lies, as a model to import and as an object whose name is its hash."""
    file = base.folder / "hf" / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    places = [at for at in _paths(header) if at[0] != "__metadata__"]
    for i in range(n):
        at = draw.choice(places)
        put = (
            _changed if draw.random() < 0.2 else draw.choice([*NONSENSE, [2**62, 2**62], [-1, 4], "F64", "I8", "BOOL"])
        )
        text = json.dumps(_changed(header, at, put)).encode()
        changed = struct.pack("<Q", len(text)) + text + body
        if i % 7 == 0:
            changed = struct.pack("<Q", draw.choice([0, 1, 2**31, 2**62, 2**64 - 1])) + text + body
        yield Case(
            f"header {'.'.join(map(str, at))} = {'nothing' if put is _changed else ascii(put)[:40]}", "import",
            _with(base, "hf", then=_write("hf/model.safetensors", changed)), IMPORT, frozenset((0, 2)),
        )  # fmt: skip


def import_cases(base: Base, draw: random.Random, n: int) -> Iterator[Case]:
    """Model folders of others: settings, tokenizers and indexes with nonsense in any place."""
    settings = json.loads((base.folder / "hf" / "config.json").read_text())
    tokenizer = json.loads((base.folder / "hf" / "tokenizer.json").read_text())
    beside = json.loads((base.folder / "hf" / "tokenizer_config.json").read_text())
    large = [10**18, 10**40, 2**31, 2**62, -(10**18), 1e300]
    places = list(_paths(settings))
    for i in range(n // 2):
        at = places[i % len(places)]
        put = _changed if draw.random() < 0.1 else draw.choice([*NONSENSE, *large, *large])
        content = json.dumps(_changed(settings, at, put)).encode()
        yield Case(
            f"config.json: {'.'.join(map(str, at))} = {'nothing' if put is _changed else ascii(put)[:40]}", "import",
            _with(base, "hf", then=_write("hf/config.json", content)), IMPORT, frozenset((0, 1, 2)),
        )  # fmt: skip
    for kind in ("llama", "qwen3", "gpt2", "modernbert", "deepseek_v3", "nonsense", None, 7, []):
        content = json.dumps({**settings, "model_type": kind}).encode()
        yield Case(
            f"model_type {kind}", "import", _with(base, "hf", then=_write("hf/config.json", content)), IMPORT,
            frozenset((0, 2)),
        )  # fmt: skip
    places = list(_paths(tokenizer))
    for i in range(n // 3):
        at = places[i % len(places)] if i % 2 else draw.choice(places)
        put = _changed if draw.random() < 0.1 else draw.choice([*NONSENSE, 2**31, 2**32 - 1, 2**31 - 5])
        content = json.dumps(_changed(tokenizer, at, put)).encode()
        arguments: tuple[str, ...] = IMPORT if i % 3 else (
            *TRAIN, "data.tokenizer.kind=pretrained", "data.tokenizer.path=hf", "training.max_steps=2"
        )  # fmt: skip
        yield Case(
            f"tokenizer.json: {'.'.join(map(str, at))} = {'nothing' if put is _changed else ascii(put)[:40]}", "import",
            _with(base, "hf", "c.yaml", "texts", then=_write("hf/tokenizer.json", content)), arguments,
            frozenset((0, 1, 2)),
        )  # fmt: skip
    for at in _paths(beside):
        for put in draw.sample(NONSENSE, 3):
            content = json.dumps(_changed(beside, at, put)).encode()
            yield Case(
                f"tokenizer_config.json: {'.'.join(map(str, at))} = {ascii(put)[:40]}", "import",
                _with(base, "hf", then=_write("hf/tokenizer_config.json", content)), IMPORT, frozenset((0, 1, 2)),
            )  # fmt: skip
    for name in (
        "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json",
        "model.safetensors.index.json", "special_tokens_map.json",
    ):  # fmt: skip
        for what, content in RAW:
            yield Case(
                f"{name}: {what}", "import", _with(base, "hf", then=_write(f"hf/{name}", content)), IMPORT,
                frozenset((0, 1, 2)),
            )  # fmt: skip
    for entry in ({}, [], None, {"a": "../../outside/thesis.txt"}, {"a": 7}, {"a": "model.safetensors"}, {"a": ""}):
        content = json.dumps({"weight_map": entry}).encode()
        build = _with(base, "hf", then=_write("hf/model.safetensors.index.json", content))
        yield Case(f"weight_map {entry}", "import", build, IMPORT, frozenset((0, 2)))
    for put in ("0", "3", str(10**18), str(10**40), "-1", "x"):
        yield Case(f"--stacks {put}", "import", _with(base, "hf"), (*IMPORT, "--stacks", put), frozenset((2,)))
    yield Case("as it is", "import", _with(base, "hf"), IMPORT, frozenset((0,)))


def link_cases(base: Base) -> Iterator[Case]:
    """A run of which one name is a link to another user's files; nothing there may change."""
    names = (
        ".lock", "config.yaml", "metrics.jsonl", "summary.json", "tokenizer", "tokenizer/stackwise_tokenizer.json",
        "checkpoints", "checkpoints/objects", "checkpoints/object", "checkpoints/manifest", "cache", "",
    )  # fmt: skip
    targets = ("../outside/thesis.txt", "../outside/folder", "../outside/nothing")
    commands = (RESUME, EVALUATE, EXPORT, ("train", "c.yaml", "--out", "half"), IMPORT)
    for name in names:
        for target in targets:
            for command in commands:
                place = {RESUME: "half", EVALUATE: "run", EXPORT: "run"}.get(command, "half")
                if command == IMPORT:
                    place = "imported"
                    if name:
                        continue

                def then(inside: Path, name: str = name, target: str = target, place: str = place) -> None:
                    path = inside / place / name if name else inside / place
                    if name == "checkpoints/object":
                        path = min((inside / place / "checkpoints" / "objects").iterdir())
                    elif name == "checkpoints/manifest":
                        path = max((inside / place / "checkpoints").glob("step-*.json"))
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
                    os.symlink(os.path.relpath(inside / target, path.parent), path)

                yield Case(
                    f"{place}/{name} -> {target}", "link",
                    _with(base, "run", "half", "texts", "cache", "c.yaml", "hf", then=then), command,
                    frozenset((0, 1, 2)),
                )  # fmt: skip


def size_cases(base: Base) -> Iterator[Case]:
    """Sizes far from any that is meant, each of which must be planned or refused in time."""
    settings = [
        "model.architecture.n_stacks=1000000",
        "model.architecture.blocks_per_stack=1000000",
        "training.progressive.target_stacks=1000000",
        "training.phases=[{sweep: left_to_right, cycles: 1000000}]",
        "training.seq_len=100000000",
        "training.batch_size=1000000000",
        "model.d_model=1000000000000000000",
        "model.d_ff=1000000000000000000",
        "model.vocab_size=1000000000000000000",
        "model.vocab_size=2000000000",
        "model.n_heads=1000000000000000000",
        "model.head_dim=1000000000000000000",
        "model.learned_positions=1000000000000",
        "training.max_steps=1000000000000000000",
        "training.max_tokens=9000000000000000000",
        "training.micro_batch_size=1000000000",
        "training.diffusion.time_dim=1000000000000",
        "training.evaluation.draws=1000000000000",
        "training.evaluation.max_tokens=1000000000000000000",
        "training.checkpoint.every_steps=1000000000000000000",
        "training.checkpoint.keep_last=1000000000000000000",
        "training.qlora.rank=1000000000000",
        "training.qlora.progressive_rank=1000000000000",
        "data.tokenizer.vocab_size=1000000000000",
        "training.schedule.warmup_steps=1000000000000000000",
        "training.progressive.phase_fractions=[1e-300, 1]",
        "training.seed=9223372036854775807",
    ]
    extra = {
        "training.phases": ("training.strategy=progressive",),
        "training.diffusion.time_dim": ("training.progressive.training_objective=diffusion",),
        "training.evaluation.draws": ("training.progressive.training_objective=diffusion",),
        "training.qlora.rank": ("training.qlora.enabled=true", "training.progressive.trunk_strategy=qlora"),
    }
    for setting in settings:
        more = extra.get(setting.partition("=")[0], ())
        for command in (PLAN, TRAIN):
            if command == TRAIN and "max_steps" not in setting and "max_tokens=9" not in setting:
                arguments = (*command, "training.max_steps=2", *more, setting)
            elif command == PLAN:
                arguments = (*command, *more, setting)
            else:
                continue  # a training that is asked to be endless is
            yield Case(setting, "size", _with(base, "c.yaml", "texts"), arguments, frozenset((0, 1, 2)))
    stacks = "model.architecture.n_stacks=1000"
    for scope in ("blockwise", "stackwise", "rackwise"):
        arguments = (*PLAN, "training.strategy=end_to_end", f"training.end_to_end_scope={scope}", stacks)
        yield Case(f"1000 Stacks, {scope}", "size", _with(base, "c.yaml", "texts"), arguments, frozenset((0, 2)))
    long = b"abcdefgh" * 700_000
    for kind in ("bpe", "bytes"):
        arguments = (*TRAIN, "data.path=d", f"data.tokenizer.kind={kind}", "training.max_steps=2")
        build = _with(base, "c.yaml", then=_write("d/x.txt", long))
        yield Case(f"one line of {len(long)} bytes, {kind}", "size", build, arguments, frozenset((0, 2)))


def control_cases(base: Base) -> Iterator[Case]:
    """Each command on undamaged files: were it refused, its damaged cases would say nothing."""
    everything = _with(base, "c.yaml", "texts", "run", "half", "hf")
    for command, result in RESULTS.items():
        yield Case(command[0], "control", everything, command, frozenset((0,)), base.results[command], result)
    yield Case("import", "control", everything, IMPORT, frozenset((0,)))


def all_cases(base: Base, seed: int) -> list[Case]:
    draw = random.Random(seed)
    groups = (
        control_cases(base),
        config_cases(base, draw, 700),
        yaml_cases(base, draw, 120),
        data_cases(base, draw, 80),
        run_cases(base, draw, 320),
        manifest_cases(base, draw, 260),
        header_cases(base, draw, 60),
        import_cases(base, draw, 180),
        link_cases(base),
        size_cases(base),
    )
    return [case for group in groups for case in group]
