"""The reader of JSON: what it refuses, and that every file that holds JSON is read by it."""

import ast
from pathlib import Path

import pytest

from stackwise.data.files import open_files
from stackwise.data.tokenizers import ByteTokenizer, load_tokenizer, open_pretrained
from stackwise.errors import RunError, UserError
from stackwise.growth.adapters import load_adapters
from stackwise.interop.importing import read_settings, weight_files
from stackwise.model.architecture import create_simple_rack
from stackwise.reading import MAX_BYTES, JSONError, parse_json, read_json, read_object
from stackwise.store.checkpoints import CheckpointError, CheckpointStore
from stackwise.store.rundir import RunDir

DEEP = '{"text": ' + "[" * 50_000 + "]" * 50_000 + "}"
SOURCES = Path(__file__).parents[1] / "src" / "stackwise"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not JSON: Expecting value at column 1"),
        ('{"a": 1,\n "b"}', "not JSON: Expecting ':' delimiter at line 2, column 5"),
        (b'{"a": "\xff"}', "not UTF-8 text: the byte 0xff at offset 7"),
        (DEEP, "nested too deeply (more than 64 lists and objects inside each other)"),
        ("[" * 65 + "1" + "]" * 65, "nested too deeply (more than 64 lists and objects inside each other)"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": [1e999]}', "a number in it is out of range"),
        (f'{{"a": {10**40}}}', "a whole number in it is out of range: its size must be below 2**64"),
        (f'{{"a": {"7" * 5_000}}}', "a number in it has too many digits"),
        ('{"a": "\\ud800"}', "text in it holds half of a surrogate pair"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_is_no_json_is_answered_by_one_line(text: str | bytes, problem: str) -> None:
    with pytest.raises(JSONError) as raised:
        parse_json(text)
    assert str(raised.value) == problem


def test_json_within_the_limits_is_read_as_it_is() -> None:
    assert parse_json("[" * 64 + "]" * 64) == eval("[" * 64 + "]" * 64)
    assert parse_json(b'{"a": [18446744073709551615, -0.5, true, null, "\\ud83d\\ude00"]}') == {
        "a": [2**64 - 1, -0.5, True, None, "\U0001f600"]
    }
    assert parse_json(f'{{"id": {10**30}, "score": Infinity, "text": "x"}}', foreign_fields=True)["text"] == "x"


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    with open(file, "wb") as out:
        out.truncate(MAX_BYTES + 1)
    with pytest.raises(JSONError, match="larger than"):
        read_json(file)
    file.write_text("[1]")
    with pytest.raises(JSONError, match="not an object but a list"):
        read_object(file)


def _rundir_summary(folder: Path) -> None:
    (folder / "summary.json").write_text(DEEP)
    RunDir(folder).read_summary()


def _manifest(folder: Path) -> None:
    (folder / "step-00000001.json").write_text(DEEP)
    CheckpointStore(folder).load()


def _tokenizer(folder: Path) -> None:
    (folder / "stackwise_tokenizer.json").write_text(DEEP)
    load_tokenizer(folder)


def _tokenizer_config(folder: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers.models import BPE

    Library(BPE()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(DEEP)
    open_pretrained(folder)


def _settings(folder: Path) -> None:
    (folder / "config.json").write_text(DEEP)
    read_settings(folder)


def _index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(DEEP)
    weight_files(folder)


def _adapters(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(DEEP)
    rack = create_simple_rack(n_stacks=1, blocks_per_stack=1, d_model=8, d_ff=8, n_heads=2, vocab_size=11)
    load_adapters(rack, folder)


def _records(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "one"}\n' + DEEP + "\n")
    for document in open_files([str(folder)], "text").documents():
        "".join(document)


@pytest.mark.parametrize(
    "read",
    [_rundir_summary, _manifest, _tokenizer, _tokenizer_config, _settings, _index, _adapters, _records],
    ids=lambda read: read.__name__,
)
def test_every_reader_answers_deeply_nested_json_by_one_line(tmp_path: Path, read: object) -> None:
    with pytest.raises((UserError, RunError, CheckpointError)) as raised:
        read(tmp_path)  # type: ignore[operator]
    assert "nested too deeply" in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
    assert str(tmp_path) in str(raised.value)


def test_metrics_lines_of_nonsense_are_damaged_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(DEEP + '\n{"step": 1}\n')
    with pytest.raises(RunError, match="line 1 is damaged"):
        RunDir(tmp_path).read_metrics()


def test_a_tokenizer_written_by_save_is_read(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").kind == "bytes"


def test_no_other_module_reads_json_or_yaml_itself() -> None:
    allowed = {("reading.py", "json"), ("config/yaml_io.py", "yaml"), ("data/tokenizers.py", "json")}
    found = set()
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("load", "loads", "safe_load")
                and isinstance(node.value, ast.Name)
                and node.value.id in ("json", "yaml")
            ):
                found.add((str(file.relative_to(SOURCES)), node.value.id))
    # The tokenizers' own description of itself comes from the library, not from a file.
    assert found == allowed
