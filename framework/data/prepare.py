"""Make the shards: read, render, count, write, once for all processes and all later runs.

The folder's name is a hash of everything that decides its content, so a change prepares anew and no change finds it
ready. A lock lets one process work while others wait. Work grows in a hidden folder with a journal of what is safely on
disk; whoever comes after a crash cuts the files back to the journal and goes on from that sample. The folder gets its
name when it is whole. Left out: removing what is no longer used; deleting a cache is always safe.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from framework.core.config import digest
from framework.core.errors import DataError, FrameworkError, UsageError
from framework.core.records import Sample, Tokenizer
from framework.core.registry import lookup
from framework.data import formats
from framework.data.shards import (
    LAYOUT,
    MANIFEST,
    OVER_LENGTH,
    Array,
    Counted,
    Shards,
    file_of,
    ids_type,
)
from framework.data.sources import Located, Source, open_sources, read_located

Progress = Callable[[int, int], None]  # (bytes read, bytes in all); (0, 0) while another process prepares the same

_JOURNAL = "journal.json"
_BATCH = 256  # samples rendered at once, or fewer where they are long
_BATCH_BYTES = 1 << 18
_LOCK_EVERY_S = 0.1  # between two tries for a lock that another process holds
JOURNAL_EVERY_S = 2.0  # between two syncs to disk; a crash costs at most this much work


@dataclass(frozen=True)
class Prepared:
    """What becomes of a sample. Example: Prepared((ids,), (mask,), num_tokens=4, num_bytes=6)."""

    sequences: tuple[Sequence[int], ...]
    masks: tuple[Sequence[bool], ...]  # () where everything is trained
    num_tokens: int
    num_bytes: int
    margin: float | None = None
    label: float | None = None  # of a classified text; its mask says which ids are the second text's


@dataclass(frozen=True)
class Skip:
    """Why a sample is left out; for OVER_LENGTH the max_tokens that it would need."""

    reason: str
    tokens: int = 0


@dataclass(frozen=True)
class Preparation:
    """All that decides the content of shards."""

    kind: str  # which render and finish: the stage's name
    paths: Sequence[str]
    format: str
    part: str  # "train" | "valid"
    valid_share: float  # of the samples, held out by content hash; 0 = this part is everything
    max_tokens: int
    packing: bool
    tokenizer: Tokenizer
    render: Callable[[list[Sample]], list[Prepared | Skip]]
    finish: Callable[[Array], dict[str, Array]]  # ends -> further arrays


def prepare(preparation: Preparation, cache: Path, progress: Progress | None = None) -> Shards:
    """The shards, found or made under `cache`."""
    sources = open_sources(list(preparation.paths), preparation.format)
    folder = cache / _name(preparation, sources)
    if (folder / MANIFEST).exists():
        return Shards(folder)
    try:
        with _locked(cache, folder.name, progress):
            if not (folder / MANIFEST).exists():
                _make(preparation, sources, folder, progress)
    except OSError as error:
        raise FrameworkError(f"cannot write prepared data to {folder}: {error.strerror}; see data.cache") from error
    return Shards(folder)


def _name(preparation: Preparation, sources: list[Source]) -> str:
    decides = {
        "layout": LAYOUT,
        "files": [[_sha256(source.path), Path(source.path).suffix, source.origin] for source in sources],
        "tokenizer": preparation.tokenizer.fingerprint,
    }
    if code := _code(preparation.format):
        decides["code"] = code
    plain = ("kind", "format", "part", "valid_share", "max_tokens", "packing")
    return digest(decides | {name: getattr(preparation, name) for name in plain})


def _code(format: str) -> str:
    """sha256 of the file that an extension's format comes from, so that a change prepares anew; ours go by LAYOUT."""
    parse = None if format == "auto" else lookup("data_format", format)
    source = inspect.getsourcefile(parse) if inspect.isfunction(parse) else None
    return "" if parse is None or parse.__module__ == formats.__name__ or not source else _sha256(source)


def _sha256(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(cache: Path, name: str, progress: Progress | None) -> Iterator[None]:
    """One process at a time. The kernel releases the lock with its holder, however that one ends; who ends well takes
    the file away, and whoever waited on it begins again with a new one."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f".{name}.lock"
    lock = filelock.FileLock(path)
    while not _taken(lock):
        if progress is not None:
            progress(0, 0)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # another one waits on a new file already; the folder is not empty
            path.unlink()
            cache.rmdir()
        lock.release()


def _taken(lock: filelock.BaseFileLock) -> bool:
    try:
        lock.acquire(timeout=_LOCK_EVERY_S)
    except filelock.Timeout:
        return False
    return True


def _make(preparation: Preparation, sources: list[Source], folder: Path, progress: Progress | None) -> None:
    """Fill a hidden folder, from its journal on, and give it its name."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        _fill(preparation, sources, partial, progress)
    except UsageError:  # it would come again; the corrected data will have another name
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _sync(folder.parent)


def _fill(preparation: Preparation, sources: list[Source], partial: Path, progress: Progress | None) -> None:
    writer = _Writer(partial, ids_type(preparation.tokenizer.vocab_size))
    sizes = [Path(source.path).stat().st_size for source in sources]
    for batch in _batches(read_located(sources), writer.journal.done):
        kept = [located for located in batch if _belongs(located.sample, preparation)]
        writer.add(kept, _rendered(preparation, kept), num_done=len(batch))
        if progress is not None:
            progress(sum(sizes[: batch[-1].file]) + batch[-1].offset, sum(sizes))
    writer.finish(preparation.finish)


def _batches(samples: Iterator[Located], done: int) -> Iterator[list[Located]]:
    """Samples from number `done` on, a bounded amount of text at a time."""
    batch: list[Located] = []
    file, before, size = 0, 0, 0
    for number, located in enumerate(samples):
        before = before if located.file == file else 0
        if number >= done:
            batch.append(located)
            size += located.offset - before
        file, before = located.file, located.offset
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _belongs(sample: Sample, preparation: Preparation) -> bool:
    """Whether a sample is in this part: a pure function of its content, so equal samples never stand on both sides."""
    if preparation.valid_share == 0:
        return True
    content = json.dumps(dataclasses.asdict(sample), sort_keys=True).encode()
    number = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    return (number < preparation.valid_share * 2**64) == (preparation.part == "valid")


def _rendered(preparation: Preparation, batch: list[Located]) -> list[Prepared | Skip]:
    """Render together; where that fails, one by one, to name the sample at fault."""
    try:
        return preparation.render([located.sample for located in batch])
    except UsageError:
        for located in batch:
            try:
                preparation.render([located.sample])
            except UsageError as error:
                raise DataError(str(error), located.path, located.line) from None
        raise


@dataclass
class _Journal:
    """What is safely on disk: samples done, bytes of each file, counts."""

    done: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    counted: Counted = field(default_factory=Counted)


class _Writer:
    """Appends to the arrays of a folder, starting where its journal ends."""

    def __init__(self, folder: Path, ids: np.dtype[Any]):
        self.folder = folder
        self.types = {"ids": ids, "mask": np.dtype(np.uint8), "ends": np.dtype(np.int64)}
        self.types |= dict.fromkeys(("margin", "label"), np.dtype(float))
        self.journal = _read_journal(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.streams = {name: open(file_of(folder, name), "ab") for name in self.types}  # noqa: SIM115
        for name, stream in self.streams.items():
            stream.truncate(self.journal.sizes.get(name, 0))
        self.synced = time.monotonic()

    def add(self, batch: list[Located], results: list[Prepared | Skip], num_done: int) -> None:
        """Take the results of a batch; `num_done` samples of the files are dealt with."""
        counted = self.journal.counted
        for located, result in zip(batch, results, strict=True):
            counted.read += 1
            if isinstance(result, Skip):
                self._count_skip(located, result)
            else:
                self._append(result)
        self.journal.done += num_done
        if time.monotonic() - self.synced >= JOURNAL_EVERY_S:
            self._write_journal()

    def finish(self, finish: Callable[[Array], dict[str, Array]]) -> None:
        """Add the arrays that need all lengths, drop those that stayed empty, and write the manifest last."""
        self._write_journal()
        for stream in self.streams.values():
            stream.close()
        lengths = {name: self.journal.sizes[name] // dtype.itemsize for name, dtype in self.types.items()}
        arrays = {name: (self.types[name].name, length) for name, length in lengths.items() if length}
        for name in self.types.keys() - arrays.keys():
            file_of(self.folder, name).unlink()
        ends = np.fromfile(file_of(self.folder, "ends"), np.int64) if "ends" in arrays else np.empty(0, np.int64)
        for name, array in finish(ends).items():
            array.tofile(file_of(self.folder, name))
            _sync(file_of(self.folder, name))
            arrays[name] = (array.dtype.name, len(array))
        _write(self.folder / MANIFEST, {"counted": dataclasses.asdict(self.journal.counted), "arrays": arrays})

    def _count_skip(self, located: Located, skip: Skip) -> None:
        counted = self.journal.counted
        counted.skipped[skip.reason] = counted.skipped.get(skip.reason, 0) + 1
        counted.longest = max(counted.longest, skip.tokens)
        if skip.reason == OVER_LENGTH and not counted.first_over:
            counted.first_over = f"{located.path}:{located.line}"

    def _append(self, prepared: Prepared) -> None:
        counted = self.journal.counted
        for ids in prepared.sequences:
            self._write("ids", ids)
            counted.num_ids += len(ids)
            counted.sequences += 1
            self._write("ends", [counted.num_ids])
        for mask in prepared.masks:
            self._write("mask", mask)
        if len(prepared.sequences) == 2:
            self._write("margin", [np.nan if prepared.margin is None else prepared.margin])
        if prepared.label is not None:
            self._write("label", [prepared.label])
        counted.num_tokens += prepared.num_tokens
        counted.num_bytes += prepared.num_bytes

    def _write(self, name: str, values: Sequence[Any]) -> None:
        self.streams[name].write(np.asarray(values, self.types[name]).tobytes())

    def _write_journal(self) -> None:
        for name, stream in self.streams.items():
            stream.flush()
            os.fsync(stream.fileno())
            self.journal.sizes[name] = stream.tell()
        _write(self.folder / _JOURNAL, dataclasses.asdict(self.journal))
        self.synced = time.monotonic()


def _read_journal(folder: Path) -> _Journal:
    """Where to go on; from nothing where there is no journal or the files are shorter than it says."""
    path = folder / _JOURNAL
    if path.exists():
        entries = json.loads(path.read_text())
        whole = all(_size(file_of(folder, name)) >= size for name, size in entries["sizes"].items())
        if whole:
            return _Journal(entries["done"], entries["sizes"], Counted(**entries["counted"]))
    shutil.rmtree(folder, ignore_errors=True)
    return _Journal()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _write(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one step, on disk when this returns."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(content, indent=2))
    _sync(beside)
    beside.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """What was written to a file, or which names a folder holds, survives a power failure from here on."""
    if os.name == "nt":  # no folder can be opened there, and no read-only file synced
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
