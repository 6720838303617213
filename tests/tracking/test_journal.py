"""What a run wrote is read back, also where a kill has torn it."""

from pathlib import Path

from framework.tracking.journal import read_lines, read_object


def test_lines_with_a_step_are_read_and_torn_ones_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"step": 1, "a": 2.0}\n[3]\n{"a": 1}\n{"step": 2, "b": "春"}\n{"step": 3, "b": "春'.encode()[:-1])
    assert read_lines(path) == [{"step": 1, "a": 2.0}, {"step": 2, "b": "春"}]
    assert read_lines(tmp_path / "nothing") == []


def test_an_object_or_nothing(tmp_path: Path) -> None:
    for text, expected in (('{"a": 1}', {"a": 1}), ("[1]", None), ('{"a"', None)):
        (tmp_path / "summary.json").write_text(text)
        assert read_object(tmp_path / "summary.json") == expected
    assert read_object(tmp_path / "nothing") is None
