"""Run folders on a real S3-compatible server: mirrored, fetched elsewhere, fenced by conditional puts."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from framework.core.errors import FrameworkError, UsageError
from framework.tracking.remote import Remote
from tests.storage import storage

URL = "s3://bucket/runs/sft"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """An empty bucket."""
    with storage() as words:
        for name, value in words.items():
            monkeypatch.setenv(name, value)
        filesystem = fsspec.filesystem("s3")
        filesystem.mkdir("bucket")
        yield filesystem


def put(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_what_is_flushed_is_fetched_on_another_machine(bucket: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    here, there = Remote(URL, tmp_path / "here"), Remote(URL, tmp_path / "there")
    here.fetch()
    attempt = here.take()
    put(here.spool, "metrics.jsonl", "1\n")
    put(here.spool, "checkpoints/step_00000001/manifest.json", "{}")
    put(here.spool, "checkpoints/step_00000001/trainer.safetensors", "weights")
    put(here.spool, "checkpoints/.step_00000002.partial/half", "not yet")
    here.flush(attempt)
    there.fetch()
    assert contents(there.spool) == {
        "metrics.jsonl": "1\n",
        "checkpoints/step_00000001/manifest.json": "{}",
        "checkpoints/step_00000001/trainer.safetensors": "weights",
    }
    assert attempt == 1


def test_only_what_changed_is_uploaded_and_what_is_gone_is_deleted(
    bucket: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote(URL, tmp_path / "here")
    attempt = remote.take()
    for step in (1, 2):
        put(remote.spool, f"checkpoints/step_{step:08d}/manifest.json", "{}")
        put(remote.spool, f"checkpoints/step_{step:08d}/part", "x")
    put(remote.spool, "status.json", "{}")
    remote.flush(attempt)
    calls: list[str] = []
    put_file, remove = remote._fs.put_file, remote._fs.rm_file
    monkeypatch.setattr(remote._fs, "put_file", lambda here, there: (calls.append(there), put_file(here, there)))
    monkeypatch.setattr(remote._fs, "rm_file", lambda there: (calls.append(there), remove(there)))
    for name in ("manifest.json", "part"):
        (remote.spool / f"checkpoints/step_00000001/{name}").unlink()
    put(remote.spool, "metrics.jsonl", "2\n")
    put(remote.spool, "status.json", "{ }")
    remote.flush(attempt)
    old = "bucket/runs/sft/checkpoints/step_00000001"
    ours = ["bucket/runs/sft/metrics.jsonl", "bucket/runs/sft/status.json"]
    assert calls == [*ours, f"{old}/manifest.json", f"{old}/part"]
    assert not bucket.find(old, refresh=True)


def test_a_checkpoint_without_its_manifest_is_not_fetched(bucket: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    bucket.pipe_file("bucket/runs/sft/checkpoints/step_00000003/part", b"torn upload")
    remote = Remote(URL, tmp_path / "here")
    remote.fetch()
    assert contents(remote.spool) == {}


def test_a_newer_attempt_fences_the_older_one_off(bucket: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    old, new = Remote(URL, tmp_path / "old"), Remote(URL, tmp_path / "new")
    first = old.take()
    put(old.spool, "metrics.jsonl", "1\n")
    old.flush(first)
    new.fetch()
    second = new.take()
    put(new.spool, "metrics.jsonl", "1\n2\n")
    new.flush(second)
    put(old.spool, "metrics.jsonl", "1\nleftover\n")
    with pytest.raises(FrameworkError, match="attempt 1 is over, a newer one has taken the run"):
        old.flush(first)
    assert bucket.cat("bucket/runs/sft/metrics.jsonl") == b"1\n2\n"
    assert (first, second) == (1, 2)


def test_of_two_that_start_at_once_each_has_its_own_number(bucket: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    one, other = Remote(URL, tmp_path / "one"), Remote(URL, tmp_path / "other")
    listing = one._objects()  # both have looked before either has taken
    one._objects = other._objects = lambda: listing  # type: ignore[method-assign]
    assert [one.take(), other.take()] == [1, 2]


def test_a_spool_that_is_ahead_stays_and_a_foreign_one_goes(bucket: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    here, there = Remote(URL, tmp_path / "here"), Remote(URL, tmp_path / "there")
    attempt = here.take()
    put(here.spool, "metrics.jsonl", "1\n")
    here.flush(attempt)
    put(here.spool, "metrics.jsonl", "1\n2\n")  # killed before the next flush
    here.fetch()
    assert contents(here.spool) == {"metrics.jsonl": "1\n2\n"}
    there.fetch()
    there.flush(there.take())
    here.fetch()
    assert contents(here.spool) == {"metrics.jsonl": "1\n"}


def test_errors_are_one_line(tmp_path: Path, bucket: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(UsageError, match="nosuch://a: Protocol not known: nosuch"):
        Remote("nosuch://a", tmp_path)
    with pytest.raises(FrameworkError, match=r"s3://missing/a cannot be reached: ") as caught:
        Remote("s3://missing/a", tmp_path).take()
    assert "\n" not in str(caught.value)
