"""Runs on object storage, by real commands against a real S3-compatible server: killed here, continued elsewhere."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.storage import storage
from tests.test_stopping import ASK, STEP
from tests.tiny import WORDS, command, environment

STEPS = 8
URL = "s3://bucket/runs/pretrain"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """An empty bucket; every command that is started finds its way there."""
    with storage() as words:
        for name, value in words.items():
            monkeypatch.setenv(name, value)
        filesystem = fsspec.filesystem("s3", use_listings_cache=False)
        filesystem.mkdir("bucket")
        yield filesystem


def words(whole: Path, *more: str) -> list[str]:
    """The tiny pipeline's pretraining, by itself, on the storage."""
    own = [word.removeprefix("pretrain.") for word in WORDS if word.startswith("pretrain.")]
    shared = [word for word in WORDS if word.startswith(("device", "threads", "tracking"))]
    places = [f"run.dir={URL}", f"tokenizer={whole / 'tokenizer/model'}", f"data.cache={whole / 'prepared'}"]
    return ["pretrain", "experiment=quickstart/pretrain", *shared, *own, *places, f"extensions=[{ASK}]", *more]


def machine(folder: Path) -> dict[str, str]:
    """The environment of a machine with a disk of its own."""
    return environment() | {"FRAMEWORK_SPOOL": str(folder / "spool")}


def finish(folder: Path, *line: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        command(*line), cwd=folder, env=machine(folder), capture_output=True, text=True, timeout=250, check=False
    )


def begin(folder: Path, name: str, *line: str) -> "subprocess.Popen[str]":
    """A run that sends itself signal `name` in its sixth step, when the checkpoint of the second is in the storage."""
    folder.mkdir()
    env = machine(folder) | {"ASK": f"{name} {STEP} 6"}
    return subprocess.Popen(command(*line), cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def test_a_run_killed_on_one_machine_ends_on_another_in_the_same_bits(
    aws: fsspec.AbstractFileSystem, whole: Path, tmp_path: Path
) -> None:
    first = begin(tmp_path / "one", "SIGKILL", *words(whole))
    _, told = first.communicate(timeout=200)
    assert first.returncode == -signal.SIGKILL, told
    assert aws.exists("bucket/runs/pretrain/checkpoints/step_00000002/manifest.json")
    done = finish(tmp_path / "two", *words(whole))
    assert done.returncode == 0, done.stderr
    reference = (whole / "pretrain/model/model.safetensors").read_bytes()
    assert aws.cat("bucket/runs/pretrain/model/model.safetensors") == reference
    assert b'"state": "finished"' in aws.cat("bucket/runs/pretrain/status.json")

    told = finish(tmp_path / "three", "status", URL)
    assert "finished, step 8 of 8 (100%), attempt 2" in told.stdout
    assert not list((tmp_path / "three").rglob("*.safetensors"))
    again = finish(tmp_path / "four", *words(whole))
    assert again.returncode == 0, again.stderr
    raw = finish(tmp_path / "five", "generate", f"{URL}/model", "春風", "--raw", "--max-tokens", "4")
    assert raw.stdout.startswith("春風"), raw.stderr


@pytest.mark.parametrize("background", [False, True])
def test_a_process_left_over_on_another_machine_must_end(
    aws: fsspec.AbstractFileSystem, whole: Path, tmp_path: Path, background: bool
) -> None:
    """Saving in the background, it may stop in the middle of an upload, which nobody can call back: of a checkpoint,
    perhaps, that is gone by now."""
    line = words(whole, f"checkpoint.background={str(background).lower()}")
    first = begin(tmp_path / "one", "SIGSTOP", *line)
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    done = finish(tmp_path / "two", *line)
    assert done.returncode == 0, done.stderr
    before = {name: aws.cat(name) for name in aws.find("bucket/runs")}
    os.kill(first.pid, signal.SIGCONT)
    _, told = first.communicate(timeout=200)
    assert first.returncode == 1
    assert "a newer one has taken the run; this process must end" in told
    assert "Traceback" not in told
    after = {name: aws.cat(name) for name in aws.find("bucket/runs")}
    assert background or after.keys() == before.keys()
    changed = [name for name in after.keys() | before.keys() if after.get(name) != before.get(name)]
    assert len(changed) <= 1, "at most the one upload that was under way"
    assert set(after) >= set(before), "nothing is deleted"


def test_a_storage_that_is_not_there_is_one_line(aws: fsspec.AbstractFileSystem, whole: Path, tmp_path: Path) -> None:
    done = finish(tmp_path / "one", *words(whole), "run.dir=s3://no-such-bucket/a")
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("framework pretrain: s3://no-such-bucket/a cannot be reached")
    )
    assert "Traceback" not in done.stderr
