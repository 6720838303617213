"""Choices, flattening, digests and differences of recipes."""

import subprocess
import sys
from pathlib import Path

import pytest

from framework.core import config
from framework.core.config import Choice, differences, digest, find_file, flatten, recipes_folder, require, without
from framework.core.errors import UsageError


class Colour(Choice):
    RED = "red"
    DARK_BLUE = "dark-blue"


def test_a_choice_answers_to_its_value_and_to_its_name() -> None:
    assert Colour["dark-blue"] is Colour.DARK_BLUE
    assert Colour["DARK_BLUE"] is Colour.DARK_BLUE
    assert Colour("red") is Colour.RED
    assert str(Colour.DARK_BLUE) == "dark-blue"
    with pytest.raises(KeyError):
        Colour["green"]


def test_require_refuses_with_the_message() -> None:
    require(True, "never seen")
    with pytest.raises(UsageError, match=r"^batch\.size=0 must be at least 1$"):
        require(False, "batch.size=0 must be at least 1")


def test_flatten_gives_dotted_keys_and_keeps_lists() -> None:
    tree = {"batch": {"size": 8, "deep": {"er": None}}, "data": ["a", "b"]}
    assert flatten(tree) == {"batch.size": 8, "batch.deep.er": None, "data": ["a", "b"]}


def test_without_drops_keys_and_all_below_them_and_no_others() -> None:
    flat = {"run.dir": 1, "run": 2, "running": 3, "batch.micro_size": 4, "batch.size": 5}
    assert without(flat, ["run", "batch.micro_size"]) == {"running": 3, "batch.size": 5}


def test_a_digest_is_of_the_value_not_of_its_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
    assert len(digest("x")) == 16


def test_a_digest_is_the_same_in_another_process() -> None:
    """Python's own hash is salted; ours must not be."""
    code = "from framework.core.config import digest; print(digest({'a': 1.5, 'b': [None, True, '春']}))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=recipes_folder().parent
    )
    assert other.stdout.strip() == digest({"b": [None, True, "春"], "a": 1.5})


def test_differences_show_both_values_and_missing_keys() -> None:
    assert differences({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 6}) == {
        "b": (2, 5),
        "c": (3, None),
        "d": (None, 6),
    }


def test_corpora_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "recipes"
    (shipped / "corpora").mkdir(parents=True)
    (shipped / "corpora/a.txt").write_text("shipped")
    monkeypatch.setattr(config, "recipes_folder", lambda: shipped)
    monkeypatch.chdir(tmp_path)
    assert find_file("corpora/a.txt") == str(shipped / "corpora/a.txt")
    assert find_file("corpora/missing.txt") == "corpora/missing.txt"
    assert find_file("a.txt") == "a.txt"
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora/a.txt").write_text("the user's own")
    assert find_file("corpora/a.txt") == "corpora/a.txt"
