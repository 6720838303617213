"""Where samples come from: files, folders, datasets of a dataset_info.json, the Hugging Face hub; and reading them.

A path is a file, a folder (its data files, sorted by name), FOLDER/NAME with an entry of LLaMA-Factory's
FOLDER/dataset_info.json (`dataset_info`), or `hub:OWNER/NAME[:SUBSET][@SPLIT]`. Left out: what a record means
(`formats`).
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.core.errors import DataError, blamed
from framework.core.records import Sample
from framework.core.registry import lookup
from framework.data import dataset_info, files, formats, hub
from framework.data.dataset_info import Adapt, Entry
from framework.data.fields import present
from framework.data.files import Raw

Report = Callable[[DataError], None]


@dataclass(frozen=True)
class Source:
    """One file and how its records are read. Example: Source("a.jsonl", "alpaca")."""

    path: str
    format: str  # a registered data_format
    adapt: Adapt | None = field(default=None, compare=False)  # spells a record in a format of ours first
    limit: int | None = None  # samples read; None = all
    origin: str = ""  # the words of a dataset_info entry, which decide what is read as much as the file does


@dataclass(frozen=True)
class Located:
    """A sample and where it stands: source number `file` of those read, its path, line, and bytes read with it."""

    sample: Sample
    file: int
    path: str
    line: int
    offset: int


def read(path: str, format: str = "auto") -> Iterator[Sample]:
    """The samples of a path, streaming. Errors are DataErrors that name file and line."""
    return (located.sample for located in read_located(open_sources([path], format)))


def read_located(sources: list[Source], report: Report | None = None) -> Iterator[Located]:
    """The samples of several sources, with places. With `report`, a bad record is reported and passed over."""
    for number, source in enumerate(sources):
        samples = _read_source(number, source, report)
        yield from samples if source.limit is None else itertools.islice(samples, source.limit)


def open_sources(paths: list[str], format: str = "auto", report: Report | None = None) -> list[Source]:
    """The sources behind paths, in order. DataError for a path that leads nowhere, and for a file of no known format;
    with `report`, such a file is reported and left out."""
    return [source for path in paths for source in _open(path, format, report)]


def described(sources: list[Source]) -> str:
    """What a path holds, for a person: "format alpaca", "3 files, format alpaca, messages"."""
    formats = ", ".join(sorted({source.format for source in sources}))
    return f"{len(sources)} files, format {formats}" if len(sources) > 1 else f"format {formats}"


def recognise(path: str) -> str:
    """The format of a data file, from its first record."""
    if Path(path).suffix == ".txt":
        return "text" if files.has_paragraphs(path) else "lines"
    first = next(files.records(path), None)
    if first is None:
        raise DataError("the file holds no record", path)
    if first.error is not None:
        raise first.error
    try:
        return formats.format_of(_record(first))
    except DataError as error:
        raise DataError(str(error), path, first.line) from None


def _open(path: str, format: str, report: Report | None) -> Iterator[Source]:
    if entry := dataset_info.find(path):
        yield from _entry_sources(entry)
        return
    if known := dataset_info.names(path):
        raise DataError(f"holds a {dataset_info.FILE}; name one of its datasets, e.g. {path}/{known[0]}", path)
    for file in files.expand(hub.fetch(path) if path.startswith(hub.SCHEME) else path):
        try:
            yield Source(file, recognise(file) if format == "auto" else format)
        except DataError as error:
            if report is None:
                raise
            report(error)


def _entry_sources(entry: Entry) -> list[Source]:
    place = entry.file or hub.fetch_parts(*entry.hub)
    words = json.dumps(entry.words, sort_keys=True)
    name = f"{entry.name} of {dataset_info.FILE}"
    return [Source(file, name, entry.adapt, entry.limit, words) for file in files.expand(place)]


def _read_source(number: int, source: Source, report: Report | None) -> Iterator[Located]:
    if source.adapt is None and Path(source.path).suffix == ".txt" and source.format not in ("text", "lines"):
        raise DataError(
            f"a .txt file holds plain text; format {source.format} needs .jsonl, .json or .parquet", source.path
        )
    parse = _parser(source)
    raw = None
    for raw in files.records(source.path, paragraphs=source.format != "lines"):
        try:
            sample = parse(_record(raw))
        except Exception as error:  # an extension's format raises what it likes
            said = str(error) if isinstance(error, DataError) else f"format {source.format}: {blamed(error)}"
            placed = raw.error or DataError(said, source.path, raw.line)
            if report is None:
                raise placed from None
            report(placed)
        else:
            yield Located(sample, number, source.path, raw.line, raw.offset)
    if raw is None:
        raise DataError("the file holds no record", source.path)


def _parser(source: Source) -> formats.Format:
    adapt = source.adapt
    if adapt is None:
        parse: formats.Format = lookup("data_format", source.format)
        return parse

    def parse_adapted(record: dict[str, Any]) -> Sample:
        name, spelled = adapt(record)
        sample: Sample = lookup("data_format", name)(spelled)
        return sample

    return parse_adapted


def _record(raw: Raw) -> dict[str, Any]:
    if raw.error is not None:
        raise raw.error
    return present(raw.record)
