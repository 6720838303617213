"""A replaced file is whole, and leaves no neighbour behind."""

import json
from pathlib import Path

import pytest

from framework.tracking.atomic import replace_json, replace_text


def test_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_text(path, "old")
    replace_json(path, {"詩": [1, 2.5]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"詩": [1, 2.5]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
