import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest

from stackwise.config.data import DataConfig
from stackwise.data import corpus, store
from stackwise.data import files as file_corpora
from stackwise.data import records as file_records
from stackwise.data.store import encode_files, prepare
from stackwise.data.tokenizers import ByteTokenizer
from stackwise.errors import RunError, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("STACKWISE_CACHE", str(folder))
    return folder


def config(path, kind="bytes", vocab_size=277, **settings) -> DataConfig:
    tokenizer = {"kind": kind, "vocab_size": vocab_size}
    return DataConfig.model_validate({"source": "files", "path": str(path), "tokenizer": tokenizer, **settings})


def records(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def documents(n=53) -> list[str]:
    words = ["stack", "rack", "block", "trunk", "phase", "ü", "🦜", "\n"]
    return [" ".join(words[(i * k) % 8] for k in range(i % 13 + 1)) + f" {i}" for i in range(n)]


def decoded(tokens, tokenizer) -> list[str]:
    """The documents of a token array; checks that each ends with the end token."""
    assert tokens[-1] == tokenizer.end_id
    ends = np.flatnonzero(tokens == tokenizer.end_id)
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(tokens[start:end]) for start, end in zip(starts, ends)]


def listing(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def counted(monkeypatch, name) -> list:
    """The calls of a function of the store, which goes on working."""
    calls, original = [], getattr(store, name)
    monkeypatch.setattr(store, name, lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    return calls


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_both_sides_together_are_the_documents_each_with_its_end(tmp_path, kind) -> None:
    texts = documents()
    data = prepare(config(records(tmp_path / "a.jsonl", texts), kind))
    train, validation = decoded(data.train, data.tokenizer), decoded(data.validation, data.tokenizer)
    assert sorted(train + validation) == sorted(texts)
    assert [text for text in texts if text in set(train)] == train
    assert [text for text in texts if text in set(validation)] == validation
    assert data.split == "documents" and data.n_documents == 53
    assert data.train_bytes == sum(len(text.encode()) for text in train)
    assert data.validation_bytes == sum(len(text.encode()) for text in validation)
    assert data.bytes_per_token == data.validation_bytes / len(data.validation)
    assert data.tokenizer.kind == kind and data.train.dtype == np.uint16
    assert isinstance(data.train, np.memmap) and not data.train.flags.writeable


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.03])
def test_the_share_of_the_validation_documents_is_about_the_fraction(tmp_path, fraction) -> None:
    path = records(tmp_path / "a.jsonl", [f"document {i} " * (i % 7 + 1) for i in range(2003)])
    data = prepare(config(path, validation_fraction=fraction))
    assert data.validation_bytes / (data.train_bytes + data.validation_bytes) == pytest.approx(fraction, abs=0.002)


def test_equal_documents_land_on_one_side_and_order_does_not_matter(tmp_path) -> None:
    texts = documents(31)
    a = prepare(config(records(tmp_path / "a.jsonl", texts), validation_fraction=0.3))
    side = set(decoded(a.validation, a.tokenizer))
    assert not side & set(decoded(a.train, a.tokenizer))
    b = prepare(
        config(records(tmp_path / "b.jsonl", [t for t in reversed(texts) for _ in range(3)]), validation_fraction=0.3)
    )
    assert set(decoded(b.validation, b.tokenizer)) == side
    assert len(decoded(b.validation, b.tokenizer)) == 3 * len(side)
    assert b.key != a.key


def test_both_sides_have_a_document_however_small_the_fraction(tmp_path) -> None:
    path = records(tmp_path / "a.jsonl", ["a" * 1009, "b" * 1013])
    for fraction in (0.001, 0.999):
        data = prepare(config(path, validation_split="documents", validation_fraction=fraction))
        assert {len(data.train), len(data.validation)} == {1010, 1014}


def test_documents_that_cannot_be_parted_are_refused(tmp_path) -> None:
    for texts, problem in ((["same"] * 23, "but all 23 are equal"), (["one"], "there is only one")):
        with pytest.raises(UserError, match=rf"^data\.validation_split: documents needs .* {problem}; set it to tail$"):
            prepare(config(records(tmp_path / "a.jsonl", texts), validation_split="documents"))


@pytest.mark.parametrize("kind", ["bytes", "characters"])
@pytest.mark.parametrize("n", [2, 10, 1009, 3 * corpus.PIECE + 7])
def test_tail_of_one_document_is_exactly_its_last_tenth(tmp_path, n, kind) -> None:
    text = "".join(chr(97 + i % 23) if i % 61 else "\n" for i in range(n))
    (tmp_path / "a.txt").write_text(text)
    data = prepare(config(tmp_path / "a.txt", kind))
    assert data.split == "tail"
    assert decoded(data.train, data.tokenizer) == [text[: int(n * 0.9)]]
    assert decoded(data.validation, data.tokenizer) == [text[int(n * 0.9) :]]


def test_tail_is_cut_between_characters_of_every_document(tmp_path) -> None:
    texts = ["ü" * 10, "🦜" * 23, "a"]
    data = prepare(config(records(tmp_path / "a.jsonl", texts), validation_fraction=0.3))
    assert decoded(data.train, data.tokenizer) == ["ü" * 7, "🦜" * 16]
    assert decoded(data.validation, data.tokenizer) == ["ü" * 3, "🦜" * 7, "a"]
    assert (data.train_bytes, data.validation_bytes) == (78, 35)


@pytest.mark.parametrize(("n", "split"), [(19, "tail"), (20, "documents")])
def test_auto_splits_by_documents_from_twenty_on(tmp_path, n, split) -> None:
    assert prepare(config(records(tmp_path / "a.jsonl", documents(n)))).split == split


def test_a_text_too_short_to_split_is_refused(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="1 bytes of text are too few for training and validation"):
        prepare(config(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="every document is empty"):
        prepare(config(records(tmp_path / "a.jsonl", ["", ""])))


def test_the_store_is_built_once(tmp_path, monkeypatch) -> None:
    builds = counted(monkeypatch, "_build")
    path = records(tmp_path / "a.jsonl", documents())
    for kind in ("bytes", "characters", "bpe"):
        first, again = prepare(config(path, kind)), prepare(config(path, kind))
        assert first.key == again.key and first.folder == again.folder
        assert np.array_equal(first.train, again.train) and np.array_equal(first.validation, again.validation)
        assert first.tokenizer.fingerprint == again.tokenizer.fingerprint
        assert (first.train_bytes, first.n_documents, first.split) == (
            again.train_bytes,
            again.n_documents,
            again.split,
        )
    assert len(builds) == 3


def test_the_same_text_at_another_place_has_the_same_store(tmp_path, monkeypatch) -> None:
    builds = counted(monkeypatch, "_build")
    keys = {prepare(config(records(tmp_path / f"{name}.jsonl", documents()), "bpe")).key for name in "ab"}
    assert len(keys) == 1 and len(builds) == 1


def test_the_key_follows_content_tokenizer_and_split(tmp_path) -> None:
    path = records(tmp_path / "a.jsonl", documents())
    other = records(tmp_path / "b.jsonl", [*documents()[:-1], "another end"])
    made = [
        config(path),
        config(other),
        config(path, "characters"),
        config(path, "bpe"),
        config(path, "bpe", vocab_size=269),
        config(path, validation_fraction=0.2),
        config(path, validation_split="tail"),
    ]
    stores = [prepare(settings) for settings in made]
    assert len({data.key for data in stores}) == len(made)
    assert stores[4].tokenizer.vocab_size == 269
    for settings, data in zip(made, stores):  # and none was taken for another
        assert np.array_equal(prepare(settings).train, data.train)


def test_a_file_that_changed_is_tokenized_again(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one text, ten characters and more")
    first = prepare(config(path))
    path.write_text("two text, ten characters and more")
    second = prepare(config(path))
    assert first.key != second.key and second.tokenizer.decode(second.train).startswith("two")


def test_bpe_learns_from_the_training_side_only(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("red green blue " * 90 + "xylophone " * 15)
    data = prepare(config(path, "bpe", 307, validation_fraction=0.1))
    assert "xylo" not in data.tokenizer.decode(data.train)
    assert len(data.tokenizer.encode(" green")) == 1 and len(data.tokenizer.encode(" xylophone")) == 10


def test_bpe_learns_from_an_even_sample_of_a_large_corpus(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(store, "BPE_TRAINING_BYTES", 1000)
    taken = []
    original = store.train_bpe

    def keep(texts, size):
        taken.extend(texts)
        return original(iter(taken), size)

    monkeypatch.setattr(store, "train_bpe", keep)
    prepare(config(records(tmp_path / "a.jsonl", [f"document {i:05}" for i in range(1009)]), "bpe"))
    numbers = [int(text.split()[1]) for text in taken]
    assert 1000 <= sum(map(len, taken)) < 1100
    assert numbers[0] < 30 and numbers[-1] > 980 and max(np.diff(numbers)) < 40


def test_characters_know_those_of_the_validation_side(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a" * 99 + "Ω")
    data = prepare(config(path, "characters"))
    assert data.tokenizer.characters == "aΩ" and "Ω" not in data.tokenizer.decode(data.train)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_ids_are_stored_in_two_bytes_where_they_fit_and_else_in_four(tmp_path, vocab_size, dtype) -> None:
    text = "".join(map(chr, range(0x20000, 0x20000 + vocab_size - 3)))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = prepare(config(tmp_path / "a.txt", "characters"))
    assert data.tokenizer.vocab_size == vocab_size and data.train.dtype == data.validation.dtype == dtype
    assert data.validation[-2] == vocab_size - 1
    assert "".join(decoded(data.train, data.tokenizer) + decoded(data.validation, data.tokenizer)) == text


def test_special_names_in_the_text_stay_text(tmp_path) -> None:
    text = "one <|endoftext|> two <|mask|>" * 7
    (tmp_path / "a.txt").write_text(text)
    for kind in ("bytes", "characters", "bpe"):
        data = prepare(config(tmp_path / "a.txt", kind))
        assert (np.concatenate((data.train, data.validation)) < 3).sum() == 2  # the two ends
        assert data.tokenizer.decode(data.train) + data.tokenizer.decode(data.validation) == text


def test_a_tokenizer_without_a_mask_is_given_one_where_it_is_needed(tmp_path) -> None:
    from tokenizers import Tokenizer, models

    library = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, " ": 3}, []))
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("abc cab bca " * 300)
    settings = config(tmp_path / "a.txt")
    tokenizer = {"kind": "pretrained", "path": str(tmp_path / "tokenizer.json")}
    settings = DataConfig.model_validate(settings.model_dump() | {"tokenizer": tokenizer})
    plain, masked = prepare(settings), prepare(settings, need_mask=True)
    assert plain.tokenizer.mask_id is None and not plain.mask_added
    assert masked.tokenizer.mask_id == plain.tokenizer.vocab_size == masked.tokenizer.vocab_size - 1
    assert masked.mask_added and masked.tokenizer.mask_id in masked.tokenizer.special_ids
    assert np.array_equal(plain.train, masked.train) and len(masked.train)
    masked.tokenizer.save(tmp_path / "saved")
    again = DataConfig.model_validate(
        settings.model_dump() | {"tokenizer": {**tokenizer, "path": str(tmp_path / "saved")}}
    )
    assert prepare(again, need_mask=True).key == masked.key and not prepare(again, need_mask=True).mask_added


def test_progress_is_told_in_bytes_and_ends_at_the_whole(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text, line by line\n" * 5003)
    for module, name in (
        (corpus, "PIECE"),
        (file_records, "PIECE"),
        (file_corpora, "_HASH_CHUNK"),
        (store, "_REPORT_BYTES"),
        (store, "_BATCH_CHARACTERS"),
    ):
        monkeypatch.setattr(module, name, 1 << 14)
    calls = []
    prepare(config(path, "bpe"), progress=lambda *call: calls.append(call))
    size = path.stat().st_size
    for work in ("checking the text", "reading the text", "learning the vocabulary", "tokenizing"):
        done = [call[1] for call in calls if call[0] == work]
        assert len(done) > 2 and done == sorted(done)
        last = [call for call in calls if call[0] == work][-1]
        assert last[1] == last[2] and (last[2] == size or work == "learning the vocabulary")


@pytest.mark.parametrize("change", [lambda data: data[:-2], lambda data: data + b"}}"], ids=["shorter", "longer"])
@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "meta.json"])
def test_a_damaged_store_is_refused_with_the_folder_to_delete(tmp_path, name, change) -> None:
    settings = config(records(tmp_path / "a.jsonl", documents()))
    data = prepare(settings)
    expected = data.train.tolist()
    file = data.folder / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(RunError) as error:
        prepare(settings)
    assert str(error.value).startswith(f"{data.folder} is damaged") and "delete this folder" in str(error.value)
    for path in data.folder.iterdir():
        path.unlink()
    data.folder.rmdir()
    assert prepare(settings).train.tolist() == expected


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("name", ["train.bin", "validation.bin"])
def test_a_flipped_bit_is_refused_in_one_line(tmp_path, monkeypatch, name, at_once) -> None:
    settings = config(records(tmp_path / "a.jsonl", documents()))
    file = prepare(settings).folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    if not at_once:
        monkeypatch.setattr(store, "VERIFIED_AT_ONCE_BYTES", 100)
    with pytest.raises(RunError) as error:
        prepare(settings).verify()
    assert str(error.value) == (
        f"{file.parent} is damaged: the content of {name} does not match its sha256; delete this folder and start again"
    )


def test_ids_beyond_the_vocabulary_are_refused_though_their_hash_is_right(tmp_path) -> None:
    settings = config(records(tmp_path / "a.jsonl", documents()))
    folder = prepare(settings).folder
    ids = np.fromfile(folder / "train.bin", dtype="<u2")
    ids[-1] = 60013
    ids.tofile(folder / "train.bin")
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"][0] = hashlib.sha256(ids.tobytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(RunError, match=r"train\.bin holds the id 60,013, and the vocabulary has 259; delete"):
        prepare(settings)


def test_the_hash_of_a_store_is_that_of_its_arrays(tmp_path) -> None:
    texts = documents()
    one, other = (prepare(config(records(tmp_path / f"{n}.jsonl", texts[:n]))) for n in (31, 37))
    assert len({one.sha256, other.sha256}) == 2
    hashes = "".join(hashlib.sha256((one.folder / f).read_bytes()).hexdigest() for f in ("train.bin", "validation.bin"))
    assert one.sha256 == hashlib.sha256(hashes.encode()).hexdigest()


def test_a_store_that_was_written_without_hashes_is_built_again(tmp_path, monkeypatch) -> None:
    settings = config(records(tmp_path / "a.jsonl", documents()))
    data = prepare(settings)
    expected = data.train.tolist()
    meta = json.loads((data.folder / "meta.json").read_text())
    del meta["sha256"]
    (data.folder / "meta.json").write_text(json.dumps(meta))
    (data.folder / "train.bin").write_bytes(bytes(2 * len(expected)))
    built = counted(monkeypatch, "_build")
    again = prepare(settings)
    assert again.train.tolist() == expected and again.key == data.key and again.sha256 == data.sha256
    assert len(built) == 1


def test_a_damaged_tokenizer_is_refused_with_the_folder_to_delete(tmp_path, cache) -> None:
    settings = config(records(tmp_path / "a.jsonl", documents()), "bpe")
    prepare(settings)
    (folder,) = (cache / "tokenizers").iterdir()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(RunError, match="delete this folder") as error:
        prepare(settings)
    assert str(folder) in str(error.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, cache) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text " * 100000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300000, hard))
    try:
        with pytest.raises(RunError) as error:
            prepare(config(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"{cache}: the token store cannot be written: the limit on the size of a file")
    assert "\n" not in str(error.value)
    assert listing(cache / "tokens") == set()
    assert prepare(config(path)).train_bytes == 900000


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the token store cannot be written: Not a directory"):
        prepare(config(tmp_path / "a.txt", cache_dir=str(tmp_path / "file")))


def test_an_error_while_building_leaves_nothing(tmp_path, cache, monkeypatch) -> None:
    def fail(self, texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(ByteTokenizer, "encode_many", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(records(tmp_path / "a.jsonl", documents())))
    assert listing(cache / "tokens") == set()


def test_what_a_process_killed_after_its_store_was_in_place_left_goes_when_the_store_is_opened(tmp_path, cache) -> None:
    text = config(records(tmp_path / "a.jsonl", documents()))
    prepare(text)
    whole = listing(cache / "tokens")
    left = cache / "tokens" / ".store.0123456789abcdef.tmp"
    (left / "content").mkdir(parents=True)
    (left / "owner.lock").touch()
    prepare(text)
    assert listing(cache / "tokens") == whole


def test_a_text_that_changes_while_it_is_tokenized_is_refused(tmp_path, cache, monkeypatch) -> None:
    path = records(tmp_path / "a.jsonl", documents())
    original = ByteTokenizer.encode_many

    def change(self, texts):
        with open(path, "a") as file:
            file.write('{"text": "more"}\n')
        return original(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_many", change)
    with pytest.raises(RunError, match="changed while it was read"):
        prepare(config(path))
    assert listing(cache / "tokens") == set()


_PREPARE = """
import os, signal, sys
from stackwise.config.data import DataConfig
from stackwise.data import store

settings = DataConfig.model_validate_json(sys.argv[1])
work, share = sys.argv[2], float(sys.argv[3])

def progress(description, done, total):
    if description == work and done >= share * total:
        os.kill(os.getpid(), signal.SIGKILL)

store._REPORT_BYTES = 1
store._BATCH_CHARACTERS = 500
print(store.prepare(settings, progress=progress).key)
"""


def in_process(settings, work="", share=0.0) -> subprocess.Popen:
    """Prepares in another process, which kills itself when it reports ``share`` of ``work`` as done."""
    command = [sys.executable, "-c", _PREPARE, settings.model_dump_json(), work, str(share)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_kill_at_any_instant_leaves_nothing_visible_and_the_next_call_cleans_up(tmp_path, cache) -> None:
    settings = config(records(tmp_path / "a.jsonl", documents()), "bpe")
    for work, share in (
        ("reading the text", 0.5),
        ("learning the vocabulary", 0.5),
        ("tokenizing", 0.5),
        ("tokenizing", 1.0),
    ):
        process = in_process(settings, work, share)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert sum(name.startswith(".store.") for name in os.listdir(cache / "tokens")) == 1
        assert all(name.startswith(".") for name in os.listdir(cache / "tokens"))
    data = prepare(settings)
    assert sorted(os.listdir(cache / "tokens")) == [data.key]
    assert set(os.listdir(data.folder)) == {"train.bin", "validation.bin", "meta.json"}
    fresh = prepare(settings, cache_dir=tmp_path / "fresh")
    assert fresh.key == data.key
    for name in ("train.bin", "validation.bin"):
        assert (fresh.folder / name).read_bytes() == (data.folder / name).read_bytes()


def test_processes_that_build_the_same_store_all_end_well(tmp_path, cache) -> None:
    settings = config(records(tmp_path / "a.jsonl", documents()), "bpe")
    processes = [in_process(settings) for _ in range(3)]
    printed = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0] and len(printed) == 1
    assert sorted(os.listdir(cache / "tokens")) == sorted(printed)


def test_work_in_progress_of_a_living_process_is_left_alone(tmp_path, cache, monkeypatch) -> None:
    one, other = (records(tmp_path / f"{n}.jsonl", documents(n)) for n in (29, 31))
    original, inside, results = ByteTokenizer.encode_many, threading.Event(), []
    go_on = threading.Event()

    def wait_once(self, texts):
        if not inside.is_set():
            inside.set()
            assert go_on.wait(20)
        return original(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_many", wait_once)
    thread = threading.Thread(target=lambda: results.append(prepare(config(one))))
    thread.start()
    assert inside.wait(20)
    prepare(config(other))
    assert sum(name.startswith(".store.") for name in os.listdir(cache / "tokens")) == 1
    go_on.set()
    thread.join()
    assert results[0].n_documents == 29


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, kind) -> None:
    line = "a line of text that is repeated over and over\n"
    peaks = []
    for megabytes in (6, 24):
        path = tmp_path / f"{megabytes}.txt"
        with open(path, "w") as file:
            for _ in range(megabytes):
                file.write(line * (1_000_000 // len(line)))
        tracemalloc.start()
        data = prepare(config(path, kind))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert data.train_bytes > 0.89e6 * megabytes
    assert peaks[1] < 1.1 * peaks[0] + 1e6


def test_the_cache_is_found_in_the_documented_order(tmp_path, monkeypatch) -> None:
    settings = config(records(tmp_path / "a.jsonl", documents()))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with_dir = settings.model_copy(update={"cache_dir": str(tmp_path / "configured")})
    assert prepare(with_dir, cache_dir=tmp_path / "given").folder.parents[1] == tmp_path / "given"
    assert prepare(with_dir).folder.parents[1] == tmp_path / "configured"
    assert prepare(settings).folder.parents[1] == tmp_path / "cache"
    monkeypatch.delenv("STACKWISE_CACHE")
    assert prepare(settings).folder.parents[1] == tmp_path / "xdg" / "stackwise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert prepare(settings).folder.parents[1] == tmp_path / "home" / ".cache" / "stackwise"


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_encoded_files_are_their_documents_and_bytes(tmp_path, kind) -> None:
    texts = documents(23)
    path = records(tmp_path / "a.jsonl", texts)
    tokenizer = prepare(config(path, kind)).tokenizer
    long = "a stack\n" * (corpus.PIECE // 4)
    (tmp_path / "b.txt").write_text(long)
    tokens, n_bytes = encode_files([str(path), str(tmp_path / "b.txt")], tokenizer, "text")
    assert decoded(tokens, tokenizer) == [*texts, long]
    assert n_bytes == sum(len(text.encode()) for text in [*texts, long]) and tokens.dtype == np.uint16


def test_files_to_encode_that_are_not_there_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"^--data: '.*absent.txt': no such file"):
        encode_files([str(tmp_path / "absent.txt")], ByteTokenizer(), "text")
