"""Paths become sources: what they are described as, what is passed over when bad records are only reported."""

from pathlib import Path

from framework.core.errors import DataError
from framework.core.records import TextSample
from framework.data.sources import described, open_sources, read_located
from tests.data.conftest import Write


def test_a_path_is_described_by_its_files_and_formats(write: Write, tmp_path: Path) -> None:
    file = write("a.jsonl", [{"text": "1"}])
    write("b.jsonl", [{"prompt": "p"}])
    assert described(open_sources([file])) == "format text"
    assert described(open_sources([str(tmp_path)])) == "2 files, format prompt, text"


def test_bad_records_are_reported_and_passed_over(write: Write) -> None:
    path = write("a.jsonl", [{"text": "1"}, '{"text": ', {"txt": "2"}, {"text": "3"}])
    errors: list[DataError] = []
    samples = [located.sample for located in read_located(open_sources([path]), errors.append)]
    assert samples == [TextSample("1"), TextSample("3")]
    assert [str(error).removeprefix(path) for error in errors] == [
        ":2: malformed JSON: Expecting value, column 10",
        ":3: needs the field 'text'; the record has txt",
    ]
