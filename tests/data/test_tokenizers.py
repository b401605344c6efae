import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from stackwise.data.tokenizers import (
    BUILT_IN_SPECIALS,
    ByteTokenizer,
    CharacterTokenizer,
    load_tokenizer,
    open_pretrained,
    train_bpe,
)
from stackwise.errors import RunError, UserError

ODD = (
    "plain\n",
    "",
    " leading and trailing  ",
    "\ttabs\r\nand\rreturns\x00\x7f",
    "ü ß ﬁ ǆ e\u0301 \u00a0 \u200b \u2028",
    "漢字とかな한글 עברית العربية",
    "🦜👩‍👩‍👧‍👦🏳️‍🌈 \U0010ffff \ufffe \ufeff",
    "a <|endoftext|> b <|mask|><|pad|> </s> [MASK]",
    "x" * 301,
)
CORPUS = ["def f(x):\n    return x + 1\n", "the quick brown fox; the lazy dog <|endoftext|> the end\n" * 7]


def bpe(vocab_size: int = 277):
    return train_bpe(iter(CORPUS), vocab_size)


TOKENIZERS = {"bytes": ByteTokenizer, "characters": lambda: CharacterTokenizer("".join(ODD)), "bpe": bpe}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("text", ODD)
def test_decoding_an_encoding_gives_the_text(tokenizer, text) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_text_gives_a_special_token(tokenizer) -> None:
    for text in (*ODD, *BUILT_IN_SPECIALS):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64 and ids.ndim == 1
        assert not set(ids.tolist()) & tokenizer.special_ids
        assert not len(ids) or ids.max() < tokenizer.vocab_size


def test_encoding_many_equals_encoding_each(tokenizer) -> None:
    many = tokenizer.encode_many(ODD)
    assert [ids.tolist() for ids in many] == [tokenizer.encode(text).tolist() for text in ODD]


def test_specials_take_the_first_ids_and_decode_to_nothing(tokenizer) -> None:
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.mask_id) == (0, 1, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    ids = tokenizer.encode("plain")
    assert tokenizer.decode([0, *ids[:2], 2, *ids[2:], 1]) == "plain"


def test_a_saved_tokenizer_loads_the_same(tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "a" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "a" / "tokenizer")
    for name in ("kind", "vocab_size", "end_id", "pad_id", "mask_id", "special_ids", "fingerprint"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    for text in ODD:
        assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert os.listdir(tmp_path / "a") == ["tokenizer"]


def test_saving_again_replaces_what_was_there(tmp_path) -> None:
    CharacterTokenizer("abc").save(tmp_path / "t")
    other = CharacterTokenizer("xyz")
    other.save(tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").fingerprint == other.fingerprint


def test_fingerprints_tell_tokenizers_apart() -> None:
    made = [ByteTokenizer(), CharacterTokenizer("ab"), CharacterTokenizer("abc"), bpe(), bpe(271)]
    assert len({t.fingerprint for t in made}) == len(made)
    assert all(len(t.fingerprint) == 64 and int(t.fingerprint, 16) for t in made)
    assert CharacterTokenizer("ba").fingerprint == CharacterTokenizer("abab").fingerprint


def test_bytes_are_shifted_by_the_specials() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("Aü").tolist() == [3 + b for b in "Aü".encode()]


def test_bytes_that_are_no_character_decode_to_a_replacement() -> None:
    assert ByteTokenizer().decode([3 + 0xC3]) == "\ufffd"


def test_characters_are_numbered_by_code_point() -> None:
    tokenizer = CharacterTokenizer("bac😀b")
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("abc😀").tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("text", ["abé", "ab\x01", "ab🦜", "ab\ud800"])
def test_an_unknown_character_is_named(text) -> None:
    with pytest.raises(UserError) as error:
        CharacterTokenizer("ab").encode(text)
    assert f"{text[2]!r} (U+{ord(text[2]):04X})" in str(error.value) and "\n" not in str(error.value)


def test_bpe_learns_the_frequent_words_and_keeps_to_its_size() -> None:
    assert bpe().vocab_size == 277
    tokenizer = bpe(307)
    assert tokenizer.vocab_size == 307
    assert len(tokenizer.encode(" lazy")) == 1
    assert len(tokenizer.encode("lazy")) > 1  # no space is put before the text


_TRAIN_AND_PRINT = """
from stackwise.data.tokenizers import train_bpe
texts = [" ".join(str(i * k % 1009) for i in range(500)) for k in range(1, 20)]
print(train_bpe(iter(texts), 400).fingerprint)
"""


def test_bpe_is_the_same_in_every_process_and_for_any_number_of_threads() -> None:
    def run(threads: str) -> str:
        settings = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        return subprocess.run(
            [sys.executable, "-c", _TRAIN_AND_PRINT], env=settings, capture_output=True, text=True, check=True
        ).stdout

    assert run("1") == run("3")


def test_an_error_in_the_texts_ends_the_training_with_that_error() -> None:
    def texts():
        yield "some text"
        raise UserError("file.txt: not UTF-8")

    with pytest.raises(UserError, match=r"^file\.txt: not UTF-8$"):
        train_bpe(texts(), 300)


@pytest.fixture
def pretrained(tmp_path):
    """Writes a tokenizer.json of a family and returns its folder."""

    def write(family: str, specials: list[str], config: dict | None = None):
        match family:
            case "byte-level":
                library = Library(models.BPE())
                library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
                library.decoder = decoders.ByteLevel()
                trainer = trainers.BpeTrainer(
                    vocab_size=300,
                    special_tokens=specials,
                    show_progress=False,
                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                )
            case "wordpiece":
                library = Library(models.WordPiece(unk_token="[UNK]"))
                library.normalizer = normalizers.BertNormalizer(lowercase=True)
                library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
                library.decoder = decoders.WordPiece()
                trainer = trainers.WordPieceTrainer(vocab_size=73, special_tokens=specials, show_progress=False)
            case "words":
                library = Library(models.WordLevel(unk_token="[UNK]"))
                library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
                trainer = trainers.WordLevelTrainer(special_tokens=specials, show_progress=False)
        library.train_from_iterator(CORPUS, trainer)
        if family == "wordpiece":
            library.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
        library.enable_truncation(5)
        library.enable_padding(length=50)
        folder = tmp_path / family
        folder.mkdir()
        library.save(str(folder / "tokenizer.json"))
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return write


BERT = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


def test_a_pretrained_tokenizer_encodes_plain_text_whole_and_adds_nothing(pretrained) -> None:
    tokenizer = open_pretrained(pretrained("wordpiece", BERT))
    text = "the quick brown fox [MASK] [SEP] the lazy dog the end"
    ids = tokenizer.encode(text)
    assert len(ids) > 5 and not set(ids.tolist()) & {1, 2, 3, 4}
    assert tokenizer.kind == "pretrained" and tokenizer.special_ids == {0, 1, 2, 3, 4}
    assert tokenizer.vocab_size == 73


def test_pretrained_specials_are_found_by_their_usual_names(pretrained) -> None:
    tokenizer = open_pretrained(pretrained("wordpiece", BERT) / "tokenizer.json")
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.mask_id) == (2, 3, 4)
    tokenizer = open_pretrained(pretrained("byte-level", ["<unk>", "</s>"]))
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.mask_id) == (1, None, None)


def test_tokenizer_config_names_the_specials_before_their_usual_names_count(pretrained) -> None:
    config = {"eos_token": {"content": "<stop>"}, "pad_token": "<fill>", "mask_token": None, "sep_token": "</s>"}
    folder = pretrained("byte-level", ["</s>", "<fill>", "<stop>"], config)
    tokenizer = open_pretrained(folder)
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.mask_id) == (2, 1, None)
    assert tokenizer.decode(tokenizer.encode("a<stop>b")) == "a<stop>b"


def test_an_end_token_that_was_no_special_becomes_one(pretrained) -> None:
    folder = pretrained("byte-level", [], {"eos_token": "the"})
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_tokens(["the"])
    library.save(str(folder / "tokenizer.json"))
    tokenizer = open_pretrained(folder)
    assert tokenizer.end_id in tokenizer.special_ids
    assert tokenizer.end_id == library.token_to_id("the")


def test_text_that_is_its_special_token_is_refused_where_it_cannot_be_told_apart(pretrained) -> None:
    tokenizer = open_pretrained(pretrained("words", ["[UNK]", "[SEP]"], {"sep_token": "[SEP]"}))
    tokenizer.encode("the lazy dog unknown")
    with pytest.raises(UserError, match=r"contains '\[SEP\]'"):
        tokenizer.encode("the [SEP] dog")


def test_a_pretrained_tokenizer_saves_and_loads_the_same(pretrained, tmp_path) -> None:
    tokenizer = open_pretrained(pretrained("wordpiece", BERT))
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.mask_id == 4
    assert loaded.encode("the fox [MASK]").tolist() == tokenizer.encode("the fox [MASK]").tolist()
    assert open_pretrained(tmp_path / "saved").encode("the fox").tolist() == tokenizer.encode("the fox").tolist()


def test_a_pretrained_tokenizer_agrees_with_transformers(pretrained) -> None:
    transformers = pytest.importorskip("transformers")
    folder = pretrained("byte-level", ["<|endoftext|>"])
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    reference.backend_tokenizer.no_padding()
    text = "def f(x):\n  return the quick 🦜"
    assert open_pretrained(folder).encode(text).tolist() == reference.encode(text, add_special_tokens=False)


def test_bad_pretrained_paths_are_one_clear_line(pretrained, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"a": 1}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    no_end = pretrained("byte-level", ["<unk>"])
    broken = pretrained("words", ["[SEP]"])
    (broken / "tokenizer_config.json").write_text("{")
    for path, problem in (
        (tmp_path / "absent", "no such file or folder"),
        (tmp_path / "empty", "no tokenizer.json in this folder"),
        (tmp_path / "bad.json", "not a tokenizer.json"),
        (tmp_path / "binary.json", "not UTF-8"),
        (no_end, "it has no end-of-document token"),
        (broken, "tokenizer_config.json"),
    ):
        with pytest.raises(UserError) as error:
            open_pretrained(path)
        message = str(error.value)
        assert (
            message.startswith(f"data.tokenizer.path: {str(path)!r}: ") and problem in message and "\n" not in message
        )


def test_a_folder_without_a_tokenizer_is_the_users_error(tmp_path) -> None:
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "changed", "kind", "library"])
def test_a_damaged_tokenizer_is_refused(damage, tmp_path) -> None:
    bpe().save(tmp_path / "t")
    file = tmp_path / "t" / "stackwise_tokenizer.json"
    library = tmp_path / "t" / "tokenizer.json"
    match damage:
        case "truncated":
            file.write_text(file.read_text()[:-20])
        case "changed":
            library.write_text(library.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
        case "kind":
            file.write_text(file.read_text().replace('"bpe"', '"sentences"'))
        case "library":
            library.unlink()
    with pytest.raises(RunError) as error:
        load_tokenizer(tmp_path / "t")
    assert str(tmp_path / "t") in str(error.value) and "\n" not in str(error.value)


def test_a_line_without_a_space_is_learned_from_in_pieces() -> None:
    """The trainer is given words of at most a thousand characters, all of the text, and ordinary text as it is."""
    from stackwise.data import tokenizers

    ordinary = "the quick brown fox\n" * 400
    assert list(tokenizers._in_words(ordinary)) == [ordinary]
    mixed = "start " + "x" * 2503 + " middle " + "y" * 1001 + "\nend"
    pieces = list(tokenizers._in_words(mixed))
    assert "".join(pieces) == mixed
    assert max(len(word) for piece in pieces for word in piece.split()) == 1000
    long = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(300_007))
    start = time.process_time()
    learned = tokenizers.train_bpe(iter([long]), 307)
    assert time.process_time() - start < 5.0
    assert learned.decode(learned.encode(long[:1500])) == long[:1500]


@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_an_id_beyond_every_vocabulary_is_refused_before_the_library_makes_a_table_for_it(tmp_path, place):
    file = tmp_path / "tokenizer.json"
    Library(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a")).save(str(file))
    description = json.loads(file.read_text())
    if place == "vocab":
        description["model"]["vocab"]["a"] = 2**31
    else:
        description["added_tokens"] = [{"id": 2**31, "content": "b", "special": False}]
    file.write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"the id 2147483648; ids go up to 16777215"):
        open_pretrained(file)
