from pathlib import Path

import pytest

from stackwise.errors import allowed, nearest
from stackwise.growth.recipes import recipe_names
from stackwise.model.attention import AttentionPresets
from stackwise.ops.boundary import boundary_format
from stackwise.ops.storage import storage_of


def test_a_misspelt_name_is_answered_with_the_one_that_was_meant():
    known = ("append", "prepend", "interleave")
    assert allowed("prepand", known) == "allowed: append, prepend, interleave; did you mean prepend?"
    assert allowed("sideways", known) == "allowed: append, prepend, interleave"
    assert allowed(3, known) == "allowed: append, prepend, interleave"
    assert nearest("prepent", known) == "prepend"
    assert nearest("prepent", known, 0.95) is None


@pytest.mark.parametrize(
    ("look_up", "wrong", "meant"),
    [
        (storage_of, "nvpf4", "nvfp4"),
        (boundary_format, "float23", "float32"),
        (AttentionPresets.get, "bert_stile", "bert_style"),
        (recipe_names, "append-cacheed", "append-cached"),
    ],
)
def test_every_table_of_names_answers_alike(look_up, wrong, meant):
    with pytest.raises(ValueError, match=rf"'{wrong}'.*; allowed: .*{meant}.*; did you mean {meant}\?$"):
        look_up(wrong)


def test_likeness_is_measured_in_one_place():
    sources = Path(__file__).parents[1] / "src"
    users = [file.relative_to(sources).as_posix() for file in sources.rglob("*.py") if "difflib" in file.read_text()]
    assert users == ["stackwise/errors.py"]
