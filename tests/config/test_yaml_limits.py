"""YAML: numbers as people read them, and what is beyond a config's size, depth or number of values."""

import time

import pytest

from stackwise.config import StackWiseConfig, yaml_io
from stackwise.errors import ConfigError

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("08", 8), ("-007", -7), ("0o17", 15), ("0x1F", 31), ("-0b101", -5), ("1_000", 1000),
        ("1e-3", 0.001), ("1e9", 1_000_000_000), ("1.", 1.0), (".5", 0.5), ("1:30", "1:30"), ("1:30.5", "1:30.5"),
        ("2020-01-01", "2020-01-01"), ("0x", "0x"), ("+-9", "+-9"), ("yes", True), ("!!bool no", False),
        ("!!int 010", 10), ("!!float 3", 3.0), ("!!str 5", "5"),
    ],
)  # fmt: skip
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    read = yaml_io.parse(f"a: {text}", "f")["a"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", ["010", "1:30", "0o7", "08", "1e3", "-", "0x", "1:30.5", "<<", "=", "1_0"])
def test_text_that_looks_like_a_number_to_any_reader_is_written_back_as_text(text: str) -> None:
    assert yaml_io.parse(yaml_io.dump({"a": text}), "f") == {"a": text}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: !!bool banana", "f: line 1: 'banana' is not true or false"),
        ("a: !!int ''", "f: line 1: '' is not a whole number"),
        ("a:\n  !!float []", "f: line 2: '' is not a number"),
        ("a: !!null x", "f: line 1: 'x' is not null"),
        ("a: !!map x", "f: line 1: 'x' is not a section of keys"),
        ("a: &x {b: *x}", "f: line 1: the alias *x stands inside the value that it repeats"),
        ("a: " + "9" * 30, f"f: line 1: {'9' * 30} is out of range; whole numbers are below 2**63"),
        ("a: " + "9" * 5000, f"f: line 1: {'9' * 40} is out of range; whole numbers are below 2**63"),
        ("\n" + "[" * 100_000, "f: line 2: nested too deeply (more than 32 levels)"),
        ("a: " + "{b: " * 33 + "}" * 33, "f: line 1: nested too deeply (more than 32 levels)"),
        (BOMB, "f: line 6: more than 100,000 values, counting those that aliases repeat"),
        ("#" * (1 << 20) + "#", "f: larger than 1,048,576 bytes, the limit for a config"),
    ],
    ids=lambda value: ascii(value)[:30],
)  # fmt: skip
def test_what_is_no_config_is_answered_by_one_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        yaml_io.parse(text, "f")
    assert str(raised.value) == problem


def test_aliases_that_stay_small_are_read() -> None:
    assert yaml_io.parse("a: &x [1, &y 2]\nb: [*x, *x, *y]", "f") == {"a": [1, 2], "b": [[1, 2], [1, 2], 2]}


def test_a_thousand_wrong_keys_are_answered_as_fast_as_one() -> None:
    text = "model: {" + ", ".join(f"wrong_{i}: [[1, 2], {i}]" for i in range(9_973)) + "}"
    data = yaml_io.parse(text, "f")
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"^model\.wrong_0: unknown key; .* \(and at least 99 more problems\)$"):
        StackWiseConfig.from_dict(data)
    assert time.process_time() - start < 3.0
