"""Records as they stand in a file, one at a time, each with its line: .jsonl, .json, .parquet, .txt.

No file is ever held in memory whole, so its size does not matter. Left out: what a record means (`formats`).
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from framework.core.errors import DataError, nearest

Record = dict[str, Any]
_SPACE = re.compile(r"\s*")
_CHUNK = 1 << 20
_LONGEST = 1 << 28  # bytes of one record: a forgotten quote or separator must not fill the memory


@dataclass(frozen=True)
class Raw:
    """One record. Example: Raw({"text": "春眠不覺曉"}, line=3, offset=120): it stands on line 3 (row 3 of a .parquet),
    and with it 120 bytes of the file are read. What is no object has an `error`, and reading can go on behind it."""

    record: Record
    line: int
    offset: int
    error: DataError | None = None


def expand(path: str) -> list[str]:
    """The data files behind a path: itself, or what a folder holds, sorted by name, hidden files left out."""
    place = Path(path)
    if place.is_file():
        return [path]
    if not place.exists():
        siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        hint = nearest(place.name, siblings).partition(" Choose")[0]
        raise DataError("no such file or folder" + (f"; {hint}" if hint.startswith("did you") else ""), path)
    inside = [p for p in sorted(place.rglob("*")) if p.is_file() and not _hidden(p.relative_to(place))]
    found = [str(p) for p in inside if p.suffix in _READERS]
    if not found:
        raise DataError(f"the folder holds no {_suffixes()} file", path)
    return found


def records(path: str, paragraphs: bool = True) -> Iterator[Raw]:
    """The records of one file. A .txt gives {"text": ...}: blocks between blank lines, without `paragraphs` lines."""
    suffix = Path(path).suffix
    if suffix == ".txt":
        return _text_blocks(path) if paragraphs else _text_lines(path)
    if suffix not in _READERS:
        raise DataError(f"cannot read '{suffix or 'a file without a suffix'}'; what can be read is {_suffixes()}", path)
    return _READERS[suffix](path)


def has_paragraphs(path: str) -> bool:
    """Whether a blank line stands between texts in the first megabyte of a .txt file."""
    with _open(path) as stream:
        lines = stream.read(_CHUNK).strip().splitlines()
    return any(not line.strip() for line in lines)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _suffixes() -> str:
    return ", ".join(sorted(_READERS))


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror}", path) from None


def _lines(path: str) -> Iterator[tuple[int, int, str]]:
    """(number, bytes read, line without its end); only a line feed ends a line, and a byte order mark is no text."""
    number = offset = 0
    with _open(path) as stream:
        while chunk := stream.readline(_LONGEST):
            number += 1
            if len(chunk) == _LONGEST:
                raise DataError(f"a line of more than {_LONGEST >> 20} MiB", path, number)
            offset += len(chunk)
            try:
                text = chunk.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(error, path, number) from None
            yield number, offset, text.rstrip("\r\n")


def _not_utf8(error: UnicodeDecodeError, path: str, line: int) -> DataError:
    byte = error.object[error.start]
    return DataError(f"not UTF-8: byte 0x{byte:02x}; convert the file, e.g. iconv -f GB18030 -t UTF-8", path, line)


def _json_lines(path: str) -> Iterator[Raw]:
    for number, offset, line in _lines(path):
        if not line.strip():
            continue
        try:
            yield _raw(json.loads(line), path, number, offset)
        except (ValueError, RecursionError) as error:
            yield Raw({}, number, offset, _not_json(error, path, number))


def _not_json(error: Exception, path: str, line: int) -> DataError:
    what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"malformed JSON: {what}", path, line)


def _raw(value: Any, path: str, line: int, offset: int) -> Raw:
    if isinstance(value, dict):
        return Raw(value, line, offset)
    message = f"a record is an object {{...}}, got {type(value).__name__} {str(value)[:40]!r}"
    return Raw({}, line, offset, DataError(message, path, line))


def _text_lines(path: str) -> Iterator[Raw]:
    for number, offset, line in _lines(path):
        if line.strip():
            yield Raw({"text": line}, number, offset)


def _text_blocks(path: str) -> Iterator[Raw]:
    block: list[str] = []
    first = offset = size = 0
    for number, offset, line in _lines(path):
        if line.strip():
            first = first if block else number
            block.append(line)
            size += len(line)
            if size > _LONGEST:
                raise DataError("a document this long: separate documents by blank lines, or data.format=lines", path)
        elif block:
            yield Raw({"text": "\n".join(block)}, first, offset)
            block, size = [], 0
    if block:
        yield Raw({"text": "\n".join(block)}, first, offset)


def _parquet(path: str) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows, size, number = file.metadata.num_rows, Path(path).stat().st_size, 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield Raw(record, number, size * number // rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable .parquet file: {str(error).splitlines()[0]}", path) from None


def _json(path: str) -> Iterator[Raw]:
    """An array of objects, or objects one after another (JSON lines under another name)."""
    with _open(path) as stream:
        window = _Window(stream, path)
        is_array = window.next_character() == "["
        if is_array:
            window.advance(window.start + 1)
        while (character := window.next_character()) not in ("", "]"):
            line = window.line
            yield _raw(window.value(), path, line, window.offset)
            character = window.next_character()
            if is_array and character == ",":
                window.advance(window.start + 1)
            elif is_array and character not in ("", "]"):
                raise window.error(f"expected ',' or ']' behind a record, got {character!r}")
        if is_array != (character == "]"):
            raise window.error("the file ends inside its array" if is_array else "']' without '['")
        window.advance(window.start + is_array)
        if rest := window.next_character():
            raise window.error(f"{rest!r} behind the array")


class _Window:
    """The part of a JSON text that is being decoded."""

    def __init__(self, stream: BinaryIO, path: str):
        self.stream, self.path = stream, path
        self.text, self.start, self.line, self.offset = "", 0, 1, 0
        self.ended = False
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode

    def next_character(self) -> str:
        """Skip white space; the character there, "" at the end of the file."""
        while True:
            self.advance(_SPACE.match(self.text, self.start).end())  # type: ignore[union-attr]
            if self.start < len(self.text) or self.ended:
                return self.text[self.start : self.start + 1]
            self._read()

    def value(self) -> Any:
        """Decode the value at `start` and step behind it."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.start)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 16
                if self.ended or not cut or len(self.text) - self.start > _LONGEST:
                    line = self.line + self.text.count("\n", self.start, error.pos)
                    raise DataError(f"malformed JSON: {error.msg}", self.path, line) from None
                self._read()
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from None
            else:
                self.advance(end)
                return value

    def advance(self, position: int) -> None:
        """Move on to `position`, counting the lines on the way."""
        self.line += self.text.count("\n", self.start, position)
        self.start = position

    def error(self, message: str) -> DataError:
        return DataError(f"malformed JSON: {message}", self.path, self.line)

    def _read(self) -> None:
        """Append as much as is held, so that a long record is decoded anew only a few times; drop what is done."""
        self.text = self.text[self.start :]
        self.start = 0
        data = self.stream.read(max(_CHUNK, len(self.text)))
        self.ended, self.offset = not data, self.offset + len(data)
        try:
            self.text += self._decode(data, self.ended)
        except UnicodeDecodeError as error:
            held = self.text.count("\n") + error.object[: error.start].count(b"\n")
            raise _not_utf8(error, self.path, self.line + held) from None


_READERS: dict[str, Callable[[str], Iterator[Raw]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _text_blocks,
}
