"""A run folder on object storage, by fsspec: its spool on the local disk is fetched once and uploaded at each flush.

    remote = Remote("s3://bucket/runs/sft", spool)
    remote.fetch(); attempt = remote.take()
    ...; remote.flush(attempt)

An attempt is a marker object made by a conditional put (If-None-Match), so of two processes one has the newer number,
and the other's next flush fails before it writes anything. A checkpoint's manifest is uploaded behind its other files
and deleted before them, so what has a manifest is whole. Left out: a run over several machines, which share no spool.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from framework.core.errors import FrameworkError, UsageError
from framework.core.places import is_url, local
from framework.tracking.atomic import replace_json

_MARKER = ".attempt-"
_SENT = ".sent.json"  # in the spool: the attempt that it belongs to, and size and time of each file as last uploaded
_HEAVY = {"checkpoints", "model", "critic"}
_LAST = ("manifest.json", "summary.json", "status.json")  # what makes other files count


class Unreachable(FrameworkError):
    """The storage gives no answer, or an error."""


class Remote:
    """One run folder. Every method raises Unreachable where the storage cannot be reached."""

    def __init__(self, url: str, spool: Path):
        self.url, self.spool = url.rstrip("/"), spool
        try:
            import fsspec

            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url}: {error}") from None
        self._root: str = root.rstrip("/")

    def fetch(self) -> None:
        """Bring the spool to what lies there. A spool that the newest attempt left on this machine is ahead and stays;
        any other is thrown away first."""
        with self._reaching():
            there = self._objects()
            newest = max(_attempts(there), default=0)
            if self._sent().get("attempt") != newest:
                self._clear()
            for name in _whole(_own(there)):
                if not (self.spool / name).exists():
                    self._bring(name)

    def look(self, *, heavy: bool) -> None:
        """Bring what is newer there than in the spool; without `heavy` neither models nor checkpoints."""
        with self._reaching():
            for name in _whole(self._objects()):
                if (heavy or not _HEAVY.intersection(name.split("/"))) and self._is_newer(name):
                    self._bring(name)

    def take(self) -> int:
        """Become the newest attempt, and say which: 1, 2, ..."""
        with self._reaching():
            known = _attempts(self._objects())
            number = max(known, default=0) + 1
            while not self._claim(number):
                number += 1
            for older in known:
                self._fs.rm_file(self._marker(older))
        self.spool.mkdir(parents=True, exist_ok=True)
        replace_json(self.spool / _SENT, {**self._sent(), "attempt": number})
        return number

    def flush(self, attempt: int) -> None:
        """Upload what changed, delete checkpoints that are gone. FrameworkError where a newer attempt has the run."""
        with self._reaching():
            sent = self._sent().get("files", {})
            now = {name: _stamp(self.spool / name) for name in self._files()}
            for name in sorted((name for name in now if now[name] != sent.get(name)), key=_order):
                self._require(attempt)
                self._fs.put_file(str(self.spool / name), f"{self._root}/{name}")
            gone = [name for name in sent if name not in now]
            for name in sorted(gone, key=_order, reverse=True):
                self._require(attempt)
                self._fs.rm_file(f"{self._root}/{name}")
        replace_json(self.spool / _SENT, {"attempt": attempt, "files": now})

    def _bring(self, name: str) -> None:
        place = self.spool / name
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.{os.getpid()}")
        self._fs.get_file(f"{self._root}/{name}", str(partial))
        partial.replace(place)

    def _is_newer(self, name: str) -> bool:
        place, there = self.spool / name, f"{self._root}/{name}"
        if not place.exists() or place.stat().st_size != self._fs.size(there):
            return True
        changed: float = self._fs.modified(there).timestamp()
        return changed > place.stat().st_mtime

    def _clear(self) -> None:
        """Empty the spool, except for the logs that this attempt's ranks are writing already, and for runs within."""
        for entry in self.spool.iterdir() if self.spool.exists() else ():
            if entry.is_dir() and entry.name != "logs" and not (entry / _SENT).exists():
                shutil.rmtree(entry)
            elif entry.is_file():
                entry.unlink()

    def _claim(self, number: int) -> bool:
        try:
            self._fs.pipe_file(self._marker(number), b"", mode="create")
        except FileExistsError:
            return False
        return True

    def _require(self, attempt: int) -> None:
        self._fs.invalidate_cache()
        if not self._fs.exists(self._marker(attempt)):
            raise FrameworkError(
                f"{self.url}: attempt {attempt} is over, a newer one has taken the run; this process must end"
            )

    def _marker(self, number: int) -> str:
        return f"{self._root}/{_MARKER}{number:06d}"

    def _objects(self) -> list[str]:
        """Names below the root; none where there is nothing yet."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._root)
        except FileNotFoundError:
            return []
        return [name[len(self._root) + 1 :] for name in found]

    def _files(self) -> list[str]:
        """Files of the spool that belong to the run: not what is half-written, nor what is ours, nor a stage's own."""
        found = [path.relative_to(self.spool) for path in self.spool.rglob("*") if path.is_file()]
        inner = {path.parent for path in found if path.name == _SENT} - {Path(".")}
        return [
            path.as_posix()
            for path in found
            if not any(part.startswith(".") for part in path.parts) and not inner.intersection(path.parents)
        ]

    def _sent(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((self.spool / _SENT).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return content

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except FrameworkError:
            raise
        except Exception as error:  # every storage's library has its own
            what = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise Unreachable(f"{self.url} cannot be reached: {what}") from error


def brought(folder: str) -> Path:
    """A model's or tokenizer's folder; from object storage it is fetched first."""
    if is_url(folder):
        Remote(folder, local(folder)).look(heavy=True)
    return local(folder)


def _attempts(names: list[str]) -> list[int]:
    return [int(name.removeprefix(_MARKER)) for name in names if name.startswith(_MARKER)]


def _whole(names: list[str]) -> list[str]:
    """Names less markers, and less checkpoints that have no manifest (yet, or any more)."""
    known = set(names)
    files = [name for name in names if not name.rpartition("/")[2].startswith(_MARKER)]
    return [
        name
        for name in files
        if not name.startswith("checkpoints/") or "/".join([*name.split("/")[:2], "manifest.json"]) in known
    ]


def _own(names: list[str]) -> list[str]:
    """Names less those of runs within: the stages of a pipeline, which have attempts of their own."""
    inner = {folder for folder, _, file in (name.rpartition("/") for name in names) if file.startswith(_MARKER)} - {""}
    return [name for name in names if not any(name.startswith(f"{folder}/") for folder in inner)]


def _order(name: str) -> tuple[bool, str]:
    return name.rpartition("/")[2] in _LAST, name


def _stamp(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]
