import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.data import ColumnsConfig, DataConfig
from stackwise.data.labelled import LabelledBatches, prepare_labelled, training_names, truncate
from stackwise.data.tables import class_name, number, rows_of
from stackwise.errors import ConfigError, UserError

END, PAD = 0, 1  # of the bytes tokenizer; the byte b has the id b + 3


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **columns):
    return [(row.texts, row.label) for row in rows_of(path, ColumnsConfig(**columns))]


def ids(text):
    return [byte + 3 for byte in text.encode()]


def test_four_formats_give_the_same_rows(tmp_path):
    texts, labels = ['say "hi", then é', "two", "3"], ["good", "bad", "good"]
    plain = "".join(f"{text}\t{label}\n" for text, label in zip(texts, labels))
    write(tmp_path / "a.tsv", "sentence\tlabel\n" + plain)
    quoted = '"say ""hi"", then é",good\r\ntwo,bad\r\n3,good\r\n'
    write(tmp_path / "a.csv", "\ufeffsentence,label\r\n" + quoted)
    write(tmp_path / "a.jsonl", "".join(json.dumps({"label": b, "sentence": a}) + "\n" for a, b in zip(texts, labels)))
    pyarrow.parquet.write_table(pyarrow.table({"sentence": texts, "label": labels}), tmp_path / "a.parquet")
    expected = [((text,), label) for text, label in zip(texts, labels)]
    for suffix in ("tsv", "csv", "jsonl", "parquet"):
        assert read(tmp_path / f"a.{suffix}") == expected, suffix


@pytest.mark.parametrize(
    ("content", "texts", "label"),
    [
        ("sentence\tlabel\nfine film\t1\n", ("fine film",), "1"),  # SST-2
        ("gj04\t1\t\tOur friends won't buy it.\ngj04\t0\t*\tHim left.\n", ("Our friends won't buy it.",), "1"),  # CoLA
        (
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
            "0\tnews\tf\t2012\t1\tn\tn\tA plane.\tAn air plane.\t5.000\n",
            ("A plane.", "An air plane."), "5.000",
        ),  # STS-B
        (
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
            "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
            "0\t1\t1n\tgov\t( a )\t( b )\tA\tB\tOne.\tTwo.\tneutral\tentailment\n",
            ("One.", "Two."), "entailment",
        ),  # MNLI
        ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWho?\tHow?\t0\n", ("Who?", "How?"), "0"),
        ("premise\thypothesis\tlabel\tidx\nOne.\tTwo.\t2\t0\n", ("One.", "Two."), "2"),
    ],
)  # fmt: skip
def test_the_columns_of_glue_are_known(tmp_path, content, texts, label):
    assert read(write(tmp_path / "train.tsv", content))[0] == (texts, label)


def test_columns_can_be_named_and_a_misspelt_one_is_answered_with_the_nearest(tmp_path):
    path = write(tmp_path / "a.csv", "body,title,stars\nlong,short,4\n")
    assert read(path, text="title", pair="body", label="stars") == [(("short", "long"), "4")]
    with pytest.raises(UserError, match=r"no column 'titel' \(data.columns.text\); .*did you mean title\?"):
        read(path, text="titel", label="stars")
    with pytest.raises(UserError, match=r"no column of text is known by its name; .*'body', 'title', 'stars'"):
        read(path)
    with pytest.raises(ConfigError, match=r"data.columns.pair: 'body' is only used when columns.text is set"):
        StackWiseConfig.from_dict({"data": {"columns": {"pair": "body"}}})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "sentence\tlabel\nok\t1\none\ttwo\t3\n", "line 3: it has 3 columns, and the file 2"),
        ("a.csv", 'sentence,label\n"open,1\n', "line 2: unexpected end of data"),
        ("a.tsv", "sentence\tlabel\n", "it has no rows"),
        ("a.tsv", "", "it is empty"),
        ("a.tsv", "sentence\tlabel\tlabel\na\t1\t1\n", "two columns are called 'label'"),
        ("a.tsv", "sentence\tlabel\na\t\n", "line 2: it has no label"),
        ("a.tsv", "sentence\tlabel\n\t1\n", "line 2: the text is empty"),
        ("a.tsv", b"sentence\tlabel\n\xff\t1\n", "not UTF-8 text: the byte 0xff"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "line 1: a text is a number, not text"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2: no field 'label'; its fields: 'text'"),
        ("a.jsonl", '{"text": "a", "label": 1}\nnonsense\n', "line 2: not JSON"),
        ("a.txt", "a", "labelled rows come in .tsv, .csv, .jsonl, .ndjson, .parquet files; this name ends in '.txt'"),
    ],
)
def test_a_row_that_is_not_whole_is_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(UserError) as error:
        read(write(tmp_path / name, content))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_classes_are_text_whole_numbers_or_truth_and_numbers_are_finite(tmp_path):
    path = write(tmp_path / "a.jsonl", "".join(f'{{"text": "t", "label": {v}}}\n' for v in ("1", "true", '"x"', "2.5")))
    rows = list(rows_of(path, ColumnsConfig()))
    assert [class_name(row) for row in rows[:3]] == ["1", "true", "x"]
    with pytest.raises(UserError, match=r"line 4: the label 2.5 is no class"):
        class_name(rows[3])
    assert (number(rows[0]), number(rows[3])) == (1.0, 2.5)
    with pytest.raises(UserError, match="line 3: the label 'x' is not a finite number"):
        number(rows[2])


def data(tmp_path, train, validation=None, **settings):
    path = write(tmp_path / "train.tsv", "sentence\tlabel\n" + train)
    more = {}
    if validation is not None:
        more["validation_path"] = str(write(tmp_path / "validation.tsv", "sentence\tlabel\n" + validation))
    return DataConfig.model_validate(
        {"source": "labelled", "path": str(path), "tokenizer": {"kind": "bytes"}, **more, **settings}
    )


def test_names_are_sorted_by_value_where_they_are_whole_numbers(tmp_path):
    assert training_names(data(tmp_path, "a\t10\nb\t9\nc\t10\n")) == ("9", "10")
    assert training_names(data(tmp_path, "a\tyes\nb\tno\nc\t10\n")) == ("10", "no", "yes")


def test_a_validation_label_that_training_has_not_is_refused(tmp_path):
    config = data(tmp_path, "a\tgood\nb\tbad\n", "c\tgreat\n")
    with pytest.raises(UserError, match=r"validation.tsv, line 2: the label 'great' is not a class .* bad, good"):
        prepare_labelled(config, 11, names=training_names(config))


def test_rows_are_texts_with_ends_padded_and_masked(tmp_path):
    content = "sentence1\tsentence2\tlabel\nab\tcde\tx\nfghijklm\tn\ty\n"
    path = write(tmp_path / "p.tsv", content)
    config = DataConfig.model_validate(
        {"source": "labelled", "path": str(path), "validation_path": str(path), "tokenizer": {"kind": "bytes"}}
    )
    found = prepare_labelled(config, 7, names=("x", "y"))
    assert (len(found.train), found.train.truncated) == (2, 1)
    batch = found.train.batch(np.array([1, 0]), np.array([0, 0]))
    assert batch.tokens[:, :7].tolist() == [
        [*ids("fghi"), END, *ids("n"), END],  # 9 letters and two ends in 7: the longer text loses its end
        [*ids("ab"), END, *ids("cde"), END],
    ]
    assert batch.targets.tolist() == [1, 0] and batch.mask.all()
    wide = prepare_labelled(config, 13, names=("x", "y")).train.batch(np.array([0]), np.array([0]))
    assert wide.tokens[0, :13].tolist() == [*ids("ab"), END, *ids("cde"), END] + [PAD] * 6
    assert wide.mask[0].tolist() == [True] * 7 + [False] * 6


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [((5,), 3, (3,)), ((2, 9), 7, (2, 5)), ((9, 2), 7, (5, 2)), ((9, 9), 7, (4, 3)), ((3, 3), 6, (3, 3))],
)
def test_the_longer_text_is_cut_first(lengths, room, kept):
    parts = [np.arange(n) for n in lengths]
    assert [part.tolist() for part in truncate(parts, room)] == [list(range(n)) for n in kept]


def test_batches_are_a_function_of_seed_and_step_and_an_epoch_takes_each_row_once(tmp_path):
    config = data(tmp_path, "".join(f"{i}\t{i % 2}\n" for i in range(23)))
    rows = prepare_labelled(config, 5, names=("0", "1")).train
    n = len(rows)
    batches = LabelledBatches(rows, 3, seed=7)
    forward = [batches.batch(step) for step in range(2 * n)]  # six epochs
    for step in (11, 4, 2 * n - 1):
        again = LabelledBatches(rows, 3, seed=7).batch(step)
        for one, other in zip(vars(again).values(), vars(forward[step]).values()):
            np.testing.assert_array_equal(one, other)
    seen = np.concatenate([batch.sample for batch in forward]).reshape(6, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in seen.tolist()) and len({*map(tuple, seen.tolist())}) == 6
    assert LabelledBatches(rows, 3, seed=8).batch(0).sample.tolist() != forward[0].sample.tolist()


def test_without_validation_files_equal_texts_land_on_the_same_side_and_the_share_is_that_asked_for(tmp_path):
    config = data(tmp_path, "".join(f"t{i}\t0\nt{i}\t1\n" for i in range(1000)), validation_fraction=0.3)
    found = prepare_labelled(config, 11, names=("0", "1"))
    sides = []
    for side in (found.train, found.validation):
        texts = [tuple(side.ids[a:b]) for a, b in zip(side.starts, side.starts[1:])]
        assert all(texts.count(text) == 2 for text in texts[:20])
        sides.append(set(texts))
    assert not sides[0] & sides[1] and len(found.train) + len(found.validation) == 2000
    assert abs(len(found.validation) / 2000 - 0.3) < 0.06  # four standard errors of 1,000 texts


def test_the_hash_is_that_of_the_rows(tmp_path):
    one = prepare_labelled(data(tmp_path, "a\t0\nb\t1\n", "c\t1\n"), 5, names=("0", "1"))
    other = prepare_labelled(data(tmp_path, "a\t0\nb\t0\n", "c\t1\n"), 5, names=("0", "1"))
    assert one.sha256 != other.sha256 and one.key != other.key


def test_a_tokenizer_is_learnt_from_the_training_rows(tmp_path):
    config = data(tmp_path, "banana banana\t0\nbandana\t1\n", "cab\t1\n", tokenizer={"kind": "characters"})
    assert prepare_labelled(config, 31, names=("0", "1")).tokenizer.characters == " abcdn"
