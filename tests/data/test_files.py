"""Files give their records and lines whatever the size, and every broken file is named with its line."""

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.core.errors import DataError
from framework.data import files
from framework.data.files import Raw, expand, has_paragraphs, records

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab{}[]",\\\n', max_size=3), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(st.text("ab", max_size=3), JSON, max_size=3), min_size=1, max_size=5)


def put(folder: Path, name: str, content: str | bytes) -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


def test_json_lines_with_gaps_marks_and_windows_ends(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "\xe2\x80\xa8"}')
    assert list(records(path)) == [Raw({"a": 1}, 1, 13), Raw({"a": "\u2028"}, 3, 27)]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_json_in_every_layout(tmp_path_factory: pytest.TempPathFactory, chunk: int) -> None:
    """Arrays and objects one after another, indented or not, cut into chunks anywhere: the same records and lines."""
    folder = tmp_path_factory.mktemp("json")

    @settings(max_examples=40, deadline=None)
    @given(RECORDS, st.sampled_from([None, 2]), st.booleans())
    def check(expected: list[dict[str, Any]], indent: int | None, array: bool) -> None:
        texts = [json.dumps(record, indent=indent, ensure_ascii=False) for record in expected]
        text = "\n[\n" + " ,\n".join(texts) + "]\n\n" if array else "\n\n" + "\n".join(texts)
        found = list(records(put(folder, "a.json", text)))
        assert [raw.record for raw in found] == expected
        starts = [text.index(texts[0])]
        for before, one in pairwise(texts):
            starts.append(text.index(one, starts[-1] + len(before)))
        assert [raw.line for raw in found] == [1 + text.count("\n", 0, start) for start in starts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK", chunk)
        check()


def test_text_blocks_and_lines(tmp_path: Path) -> None:
    path = put(tmp_path, "a.txt", "\n\none\r\n two \n \n\nthree\n")
    assert [(raw.record["text"], raw.line) for raw in records(path)] == [("one\n two ", 3), ("three", 7)]
    lines = [(raw.record["text"], raw.line) for raw in records(path, paragraphs=False)]
    assert lines == [("one", 3), (" two ", 4), ("three", 7)]
    assert has_paragraphs(path)
    assert not has_paragraphs(put(tmp_path, "b.txt", "\n\none\ntwo\n\n"))


def test_parquet_rows(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    rows = [{"text": f"t{n}", "meta": None if n % 2 else {"k": [n]}} for n in range(2500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = list(records(path))
    assert [raw.record for raw in found] == rows
    assert [raw.line for raw in found] == list(range(1, 2501))
    assert found[-1].offset == Path(path).stat().st_size


def test_folders_are_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    wanted = [put(tmp_path, name, "{}") for name in ("a.jsonl", "b.json", "sub/c.txt")]
    put(tmp_path, "README.md", "no data")
    put(tmp_path, ".hidden/d.jsonl", "{}")
    assert expand(str(tmp_path)) == wanted


BROKEN = [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: malformed JSON: Expecting value, column 10"),
    ("a.jsonl", b'{"a": 1}\n\n[1]\n', "a.jsonl:3: a record is an object {...}, got list '[1]'"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xb0\xa1"}\n', "a.jsonl:2: not UTF-8: byte 0xb0; convert the file"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1: malformed JSON: maximum recursion depth"),
    ("a.json", b'[{"a": 1},\n{"a" 2}]', "a.json:2: malformed JSON: Expecting ':' delimiter"),
    ("a.json", b'[{"a": 1}\n\n{"a": 2}]', "a.json:3: malformed JSON: expected ',' or ']' behind a record, got '{'"),
    ("a.json", b'[\n{"a": 1},\n{"a": ', "a.json:3: malformed JSON: Expecting value"),
    ("a.json", b'[{"a": 1}\n', "a.json:2: malformed JSON: the file ends inside its array"),
    ("a.json", b'[{"a": 1}]\n{"a": 1}', "a.json:2: malformed JSON: '{' behind the array"),
    ("a.json", b'{"a": 1}\n]', "a.json:2: malformed JSON: ']' without '['"),
    ("a.json", b'[{"a": 1},\n 5]', "a.json:2: a record is an object {...}, got int '5'"),
    ("a.json", b'[{"a": 1},\n\n {"a": "\xb0"}]', "a.json:3: not UTF-8: byte 0xb0"),
    ("a.json", b'[{"a": "\n"}]', "a.json:1: malformed JSON: Invalid control character at"),
    ("a.txt", b"ok\n\nok\n\xff\xfe", "a.txt:4: not UTF-8: byte 0xff"),
    ("a.parquet", b"PAR1 nothing", "a.parquet: not a readable .parquet file: "),
    ("a.csv", b"a,b\n", "a.csv: cannot read '.csv'; what can be read is .json, .jsonl, .parquet, .txt"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[message for *_, message in BROKEN])
def test_broken_files_are_named_with_their_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = put(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        raise next(filter(None, [raw.error for raw in records(path)]))
    assert str(caught.value).startswith(str(tmp_path / message))
    assert "\n" not in str(caught.value)


def test_reading_can_go_on_behind_a_line_that_is_no_record(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", '{"a": 1}\n{"a": \n[2]\n{"a": 3}\n')
    assert [(raw.record, raw.line, raw.error is None) for raw in records(path)] == [
        ({"a": 1}, 1, True),
        ({}, 2, False),
        ({}, 3, False),
        ({"a": 3}, 4, True),
    ]


def test_missing_files_and_empty_folders(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", "")
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file or folder; did you mean 'train\.jsonl'\?"):
        expand(str(tmp_path / "trian.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: the folder holds no \.json, \.jsonl, \.parquet, \.txt file"):
        expand(str(tmp_path / "empty"))


def test_a_record_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LONGEST", 100)
    monkeypatch.setattr(files, "_CHUNK", 10)
    with pytest.raises(DataError, match=r"a\.jsonl:1: a line of more than"):
        list(records(put(tmp_path, "a.jsonl", "x" * 200)))
    with pytest.raises(DataError, match=r"separate documents by blank lines, or data\.format=lines"):
        list(records(put(tmp_path, "a.txt", "line\n" * 100)))
    with pytest.raises(DataError, match=r"a\.json:1: malformed JSON: Unterminated string"):
        list(records(put(tmp_path, "a.json", '[{"a": "' + "x" * 1000)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_large_file_takes_little_memory(tmp_path: Path, name: str) -> None:
    """24 MB of records through at most 5 MB: the stand-in for a file larger than memory."""
    row = json.dumps({"text": "x" * 1000})
    separator = {"a.jsonl": "\n", "a.json": ",\n", "a.txt": "\n\n"}[name]
    with open(tmp_path / name, "w") as stream:
        stream.write("[" * (name == "a.json") + separator.join([row] * 24_000) + "]" * (name == "a.json"))
    tracemalloc.start()
    count = sum(1 for _ in records(str(tmp_path / name)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 24_000
    assert peak < 5 << 20
