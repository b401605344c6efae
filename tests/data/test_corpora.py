import json
import os
import sys
import sysconfig
import time
import types
from pathlib import Path

import pytest

from stackwise.config.data import DataConfig
from stackwise.data import files as file_corpora
from stackwise.data import library
from stackwise.data.corpora import open_corpus
from stackwise.data.corpus import PIECE, Corpus
from stackwise.errors import RunError, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path / "cache"))


def files(path, **settings) -> Corpus:
    path = [str(p) for p in path] if isinstance(path, list) else str(path)
    return open_corpus(DataConfig.model_validate({"source": "files", "path": path, **settings}))


def texts(corpus) -> list[str]:
    return ["".join(document) for document in corpus.documents()]


def error_of(action) -> str:
    """The one line of the user's error."""
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    return message


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_file_is_one_document_kept_exactly(tmp_path) -> None:
    text = "\ufeffone\r\ntwo\rthree\n\n\u2028🦜 no newline at the end"
    assert texts(files(write(tmp_path / "a.text", text))) == [text]
    assert texts(files(write(tmp_path / "no_suffix", text))) == [text]


def test_a_folder_gives_its_text_files_sorted_and_leaves_hidden_and_other_files(tmp_path) -> None:
    folder = tmp_path / "f"
    for name in ("b.txt", "a/z.md", "a/y.py", "c.TXT", "r.jsonl", "x.png", ".hidden/t.txt", "a/.t.txt", "empty.txt"):
        write(folder / name, json.dumps({"text": "record"}) if name == "r.jsonl" else "" if "empty" in name else name)
    assert texts(files(folder)) == ["a/y.py", "a/z.md", "b.txt", "c.TXT", "record"]


def test_a_glob_gives_whatever_it_matches_and_a_list_keeps_its_order(tmp_path) -> None:
    for name in ("b.log", "a.log", "sub/c.log", "d.txt"):
        write(tmp_path / "f" / name, name)
    assert texts(files(tmp_path / "f" / "*.log")) == ["a.log", "b.log"]
    assert texts(files(tmp_path / "f" / "**" / "*.log")) == ["a.log", "b.log", "sub/c.log"]
    listed = [tmp_path / "f" / "d.txt", tmp_path / "f" / "*.log"]
    assert texts(files(listed)) == ["d.txt", "a.log", "b.log"]


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*.txt", "l*/below/*.txt"])
@pytest.mark.parametrize("locked", ["locked", "locked/below"])
def test_a_folder_that_cannot_be_read_is_an_error_and_not_a_smaller_corpus(tmp_path, monkeypatch, pattern, locked):
    for name in ("a.txt", "open/b.txt", "locked/below/c.txt", ".hidden/d.txt"):
        write(tmp_path / "f" / name, name)
    original = os.scandir

    def scandir(path="."):
        if Path(path) in (tmp_path / "f" / locked, tmp_path / "f" / ".hidden"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    # Where nothing in the folder could match, or its name leads on, it need not be read.
    unread = {("*/*.txt", "locked/below"): ["open/b.txt"], ("l*/below/*.txt", "locked"): ["locked/below/c.txt"]}
    if (pattern, locked) in unread:
        assert texts(files(tmp_path / "f" / pattern)) == unread[pattern, locked]
    else:
        assert error_of(lambda: files(tmp_path / "f" / pattern)) == (
            f"{tmp_path / 'f' / locked}: cannot be read: Permission denied"
        )


def test_a_file_named_twice_is_read_once(tmp_path) -> None:
    path = write(tmp_path / "f" / "a.txt", "a")
    (tmp_path / "link.txt").symlink_to(path)
    assert texts(files([path, tmp_path / "f", tmp_path / "f" / "*.txt", tmp_path / "link.txt"])) == ["a"]


def test_a_file_whose_name_has_glob_characters_is_that_file(tmp_path) -> None:
    assert texts(files(write(tmp_path / "a[1].txt", "one"))) == ["one"]


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "JSONL"])
def test_json_lines_give_a_document_a_record(tmp_path, suffix) -> None:
    lines = [{"text": "one\ntwo"}, {"text": ""}, {"text": "dr\u00fci 🦜", "other": [1]}]
    content = "\n\n".join(json.dumps(line) for line in lines)
    assert texts(files(write(tmp_path / f"a.{suffix}", content))) == ["one\ntwo", "drüi 🦜"]


def test_the_text_field_can_be_named(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "no", "body": "yes"}')
    assert texts(files(path, text_field="body")) == ["yes"]


def parquet(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


def test_parquet_gives_a_document_a_row(tmp_path) -> None:
    rows = [f"row {i} ü\n" * (i % 3) for i in range(600)]
    path = parquet(tmp_path / "a.parquet", {"n": list(range(600)), "text": rows})
    assert texts(files(path)) == [row for row in rows if row]


def test_the_library_of_python_is_read_without_tests_and_packages() -> None:
    corpus = open_corpus(DataConfig())
    found = texts(corpus)
    assert sum("def namedtuple(" in text for text in found) == 1  # of collections
    assert len(found) > 300 and all(found)
    root = Path(sysconfig.get_path("stdlib"))
    folders = {part for source in corpus._sources for part in source.path.relative_to(root).parts[:-1]}
    assert "json" in folders and not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert "library of Python" in corpus.description


def test_library_files_that_are_not_utf8_are_left_out(tmp_path, monkeypatch) -> None:
    write(tmp_path / "lib" / "a.py", "a = 'ü'")
    write(tmp_path / "lib" / "b.py", "b = 'ü'".encode("latin-1"))
    write(tmp_path / "lib" / "pkg" / "tests" / "c.py", "c")
    write(tmp_path / "lib" / "B.py", "B")
    write(tmp_path / "lib" / "empty.py", "")
    monkeypatch.setattr(library.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    assert texts(open_corpus(DataConfig())) == ["B", "a = 'ü'"]


def test_a_python_without_its_sources_says_what_to_set(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(library.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "data.source=files" in error_of(lambda: open_corpus(DataConfig()))


@pytest.mark.parametrize("unit", ["line of text ü\n", "🦜", "a", "\n", "\r\n", "é" * 1000 + "\n"])
@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_long_documents_come_in_bounded_pieces_that_end_at_line_ends(tmp_path, unit, form) -> None:
    text = "x" + unit * (3 * PIECE // len(unit.encode())) + "end"
    path = write(tmp_path / f"a.{form}", text if form == "txt" else json.dumps({"text": text}))
    (document,) = files(path).documents()
    pieces = list(document)
    assert "".join(pieces) == text and len(pieces) > 2
    assert all(0 < len(piece.encode()) <= PIECE for piece in pieces)
    assert "\n" not in unit or all(piece.endswith("\n") for piece in pieces[:-1])


def test_invalid_utf8_is_named_by_file_and_offset(tmp_path) -> None:
    for offset in (0, 5, PIECE - 1, PIECE, PIECE + 3, 2 * PIECE + 11):
        path = write(tmp_path / "bad.txt", b"a" * offset + b"\xfcber")
        message = error_of(lambda path=path: texts(files(path)))
        assert message == f"{path}: not UTF-8 text: the byte 0xfc at offset {offset:,}"
    path = write(tmp_path / "cut.txt", "abcü".encode()[:-1])
    assert error_of(lambda: texts(files(path))).endswith("the byte 0xc3 at offset 3")


def test_bad_records_are_named_by_file_and_line(tmp_path) -> None:
    good = '{"text": "fine", "id": 3}\n'
    for bad, problem in (
        ("{'text': 1}", "not JSON: Expecting property name"),
        ('"text"', "not a record: it is text"),
        ("[1]", "not a record: it is a list"),
        ('{"body": "a", "id": 1}', "no field 'text' (data.text_field); its fields: 'body', 'id'"),
        ("{}", "its fields: none"),
        ('{"text": null}', "the field 'text' (data.text_field) is null, not text"),
        ('{"text": 7}', "is a number, not text"),
        ('{"text": {"a": 1}}', "is an object, not text"),
        ('{"text": "a\\ud800b"}', "half of a surrogate pair ('\\ud800')"),
        ("[" * 100000, "nested too deeply"),
    ):
        path = write(tmp_path / "r.jsonl", good + "\n" + bad + "\n" + good)
        message = error_of(lambda path=path: texts(files(path)))
        assert message.startswith(f"{path}, line 3: ") and problem in message
    path = write(tmp_path / "r.jsonl", good.encode() + b'{"text": "\xff"}')
    assert error_of(lambda: texts(files(path))).endswith(f"the byte 0xff at offset {len(good) + 10}")


def test_bad_parquet_is_named_by_file_and_row(tmp_path) -> None:
    path = parquet(tmp_path / "a.parquet", {"body": ["a"], "id": [1]})
    assert error_of(lambda: texts(files(path))).endswith("no field 'text' (data.text_field); its fields: 'body', 'id'")
    path = parquet(tmp_path / "b.parquet", {"text": ["a", None]})
    assert (
        error_of(lambda: texts(files(path))) == f"{path}, row 2: the field 'text' (data.text_field) is null, not text"
    )
    path = write(tmp_path / "c.parquet", "text")
    assert error_of(lambda: texts(files(path))).startswith(f"{path}: not a Parquet file that can be read (")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / "a.parquet", "x")
    assert "pip install 'stackwise[parquet]'" in error_of(lambda: texts(files(path)))


def test_paths_that_lead_nowhere_are_named(tmp_path) -> None:
    write(tmp_path / "pictures" / "a.png", "x")
    write(tmp_path / "nothing.txt", "")
    for name, problem in (
        ("absent.txt", "no such file or folder"),
        ("*.text", "no file matches"),
        ("pictures", "no text, .jsonl or .parquet file in this folder"),
        ("nothing.txt", "contains no text"),
    ):
        message = error_of(lambda name=name: files(tmp_path / name))
        assert message.startswith(f"data.path: {str(tmp_path / name)!r}: ") and problem in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path) -> None:
    path = write(tmp_path / "a.txt", "secret")
    path.chmod(0)
    assert error_of(lambda: texts(files(path))).startswith(f"{path}: cannot be read: ")


def test_a_file_that_vanishes_is_named(tmp_path) -> None:
    path = write(tmp_path / "a.txt", "text")
    corpus = files(path)
    path.unlink()
    assert error_of(corpus.fingerprint).startswith(f"{path}: cannot be read: ")


def test_fingerprint_follows_content_order_and_reading_and_no_names(tmp_path) -> None:
    a, b = write(tmp_path / "1" / "a.txt", "one"), write(tmp_path / "1" / "b.txt", "two")
    moved = [write(tmp_path / "2" / "x.txt", "one"), write(tmp_path / "2" / "y.txt", "two")]
    base = files([a, b]).fingerprint()
    assert base == files(moved).fingerprint()
    assert base != files([b, a]).fingerprint()
    assert base != files([a]).fingerprint()
    assert base != files([a, write(tmp_path / "3" / "b.txt", "tw0")]).fingerprint()
    record = '{"text": "a", "body": "b"}'
    asked = [write(tmp_path / "r.jsonl", record), write(tmp_path / "r.txt", record)]
    prints = {files(asked[0]).fingerprint(), files(asked[1]).fingerprint()}
    prints.add(files(asked[0], text_field="body").fingerprint())
    assert len(prints) == 3


def test_unchanged_files_are_hashed_once_and_changed_ones_again(tmp_path, monkeypatch) -> None:
    paths = [write(tmp_path / f"{name}.txt", name) for name in "abc"]
    monkeypatch.setattr(file_corpora, "_SETTLED_NS", -1)
    hashed = []
    original = file_corpora._hash_file
    monkeypatch.setattr(
        file_corpora, "_hash_file", lambda path, advance: hashed.append(path.name) or original(path, advance)
    )
    first = files(paths).fingerprint()
    assert files(paths).fingerprint() == first and hashed == ["a.txt", "b.txt", "c.txt"]
    write(paths[1], "B")
    assert files(paths).fingerprint() != first and hashed[3:] == ["b.txt"]


def test_the_hash_of_a_file_that_has_just_changed_is_not_remembered(tmp_path, monkeypatch) -> None:
    now = time.time_ns()
    monkeypatch.setattr(file_corpora, "_state", lambda path: [3, now, now])  # a clock that stands still
    path = write(tmp_path / "a.txt", "old")
    first = files(path).fingerprint()
    write(path, "new")
    assert files(path).fingerprint() != first


def test_a_damaged_memo_of_hashes_changes_nothing(tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(file_corpora, "_SETTLED_NS", -1)
    first = files(path).fingerprint()
    (memo,) = (tmp_path / "cache" / "hashes").iterdir()
    for content in ("{", "[]", "3", json.dumps({str(path): 7}), json.dumps({str(path): {}}), "\xff"):
        memo.write_text(content, encoding="latin-1")
        assert files(path).fingerprint() == first


def test_a_memo_that_a_killed_process_left_half_written_goes_with_the_next(tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(file_corpora, "_SETTLED_NS", -1)
    files(path).fingerprint()
    (memo,) = (tmp_path / "cache" / "hashes").iterdir()
    half = memo.with_name(f".{memo.name}.0123456789abcdef.tmp")
    memo.rename(half)
    files(path).fingerprint()
    assert list(memo.parent.iterdir()) == [memo]


def test_progress_of_the_fingerprint_ends_at_the_whole(tmp_path) -> None:
    calls = []
    write(tmp_path / "f" / "a.txt", "x" * (3 * file_corpora._HASH_CHUNK + 5))
    write(tmp_path / "f" / "b.txt", "y" * 7)
    files(tmp_path / "f").fingerprint(lambda *call: calls.append(call))
    total = 3 * file_corpora._HASH_CHUNK + 12
    assert calls[-1] == ("checking the text", total, total)
    assert len(calls) > 4 and [c[1] for c in calls] == sorted(c[1] for c in calls)


def test_a_change_during_the_work_is_noticed(tmp_path) -> None:
    path = write(tmp_path / "a.txt", "text")
    corpus = files(path)
    corpus.fingerprint()
    corpus.check_unchanged()
    write(path, "longer text")
    with pytest.raises(RunError, match=r"a\.txt: it changed while it was read"):
        corpus.check_unchanged()


class FakeRecords(list):
    column_names = ("id", "text")

    def select_columns(self, names):
        records = FakeRecords({name: record[name] for name in names} for record in self)
        records.column_names = tuple(names)
        return records


SHA = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the two libraries; ``hub.error`` is what the network does."""
    state = types.SimpleNamespace(error=None, calls=[], records=FakeRecords([{"id": 1, "text": "a"}]))

    def load_dataset(name, subset, *, split, revision, streaming):
        state.calls.append((name, subset, split, revision, streaming))
        if state.error:
            raise state.error
        return state.records

    def dataset_info(name, revision):
        if state.error:
            raise state.error
        return types.SimpleNamespace(sha=SHA if revision is None else "f" * 40)

    hub = types.SimpleNamespace(HfApi=lambda: types.SimpleNamespace(dataset_info=dataset_info))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return state


def hugging_face(**settings):
    return open_corpus(DataConfig(source="huggingface", **{"path": "someone/texts", **settings}))


def test_a_hugging_face_data_set_gives_a_document_a_record_of_its_revision(hub) -> None:
    hub.records = FakeRecords([{"id": 1, "text": "one"}, {"id": 2, "text": ""}, {"id": 3, "text": "two\nü"}])
    corpus = hugging_face(subset="english", split="test")
    assert texts(corpus) == ["one", "two\nü"] == texts(corpus)
    assert hub.calls == [("someone/texts", "english", "test", SHA, True)] * 2


def test_a_fingerprint_of_a_hugging_face_data_set_needs_no_text_and_follows_every_setting(hub) -> None:
    made = [{}, {"subset": "a"}, {"split": "test"}, {"text_field": "id"}, {"path": "x/y"}, {"path": "someone/texts@v2"}]
    assert len({hugging_face(**settings).fingerprint() for settings in made}) == len(made)
    assert hugging_face().fingerprint() == hugging_face(path=f"someone/texts@{SHA}").fingerprint()
    assert not hub.calls


def test_a_hugging_face_data_set_at_a_full_revision_needs_no_network_to_be_recognised(hub) -> None:
    fingerprint = hugging_face().fingerprint()
    hub.error = ConnectionError("offline")
    assert hugging_face(path=f"someone/texts@{SHA}").fingerprint() == fingerprint


def test_errors_of_hugging_face_data_sets_are_one_line(hub, tmp_path) -> None:
    message = error_of(lambda: texts(hugging_face(text_field="body")))
    assert message.endswith("no field 'body' (data.text_field); its fields: 'id', 'text'")
    hub.records = FakeRecords([{"id": 1, "text": "a"}, {"id": 2, "text": None}])
    assert "train, record 2: the field 'text' (data.text_field) is null" in error_of(lambda: texts(hugging_face()))
    for hub.error in (ConnectionError("no\nroute"), ValueError("Bad split"), FileNotFoundError("absent")):
        for action in (hugging_face, lambda: texts(hugging_face(path=f"someone/texts@{SHA}"))):
            message = error_of(action)
            assert message.startswith("data.path: 'someone/texts': cannot be read from the Hugging Face hub (")
            assert " ".join(str(hub.error).split()) in message and "data.split" in message
    assert "set data.source: files" in error_of(lambda: hugging_face(path=str(tmp_path)))


def test_hugging_face_without_its_library_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'stackwise[datasets]'" in error_of(hugging_face)
