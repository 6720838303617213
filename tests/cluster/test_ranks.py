"""Ranks of this machine as real processes: they meet, one failure is one error, a signal reaches all, none is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework.cluster.ranks import run_ranks
from framework.core.errors import UsageError, WorkerError
from tests.tiny import environment


def meet(folder: Path) -> None:
    rank = os.environ["RANK"]
    print(f"rank {rank} speaks", flush=True)
    (folder / rank).write_text(f"{os.environ['WORLD_SIZE']} {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")


def refuse(folder: Path) -> None:
    raise UsageError("data.train: no such file")


def fail_on_one(folder: Path) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1's own error")
    time.sleep(60)


def die_on_one(folder: Path) -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_ranks_have_torchruns_variables_and_all_but_the_first_a_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks("sft", meet, tmp_path, 3, tmp_path / "logs")
    said = {(tmp_path / str(rank)).read_text() for rank in range(3)}
    assert len(said) == 1
    assert said.pop().startswith("3 127.0.0.1:")
    assert capfd.readouterr().out == "rank 0 speaks\n"
    assert (tmp_path / "logs/sft-2.log").read_text() == "rank 2 speaks\n"


def test_what_all_ranks_say_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run_ranks("sft", refuse, tmp_path, 2, tmp_path / "logs")
    assert str(caught.value) == "data.train: no such file"


@pytest.mark.parametrize(
    ("work", "message"),
    [(fail_on_one, r"sft rank 1, run failed: ValueError: rank 1's own error"),
     (die_on_one, r"sft rank 1, run failed: its process ended by SIGKILL")],
)  # fmt: skip
def test_the_first_rank_that_fails_is_named_and_the_others_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: object, message: str
) -> None:
    monkeypatch.setattr("framework.cluster.ranks.GRACE_S", 0.2)
    began = time.monotonic()
    with pytest.raises(WorkerError, match=message):
        run_ranks("sft", work, tmp_path, 2, tmp_path / "logs")  # type: ignore[arg-type]
    assert time.monotonic() - began < 50, "the other rank was waited for"


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from framework.cluster.ranks import run_ranks\n"
        "from tests.cluster.test_ranks import note_and_wait\n"
        f"run_ranks('sft', note_and_wait, Path({str(tmp_path)!r}), 2, Path({str(tmp_path)!r}) / 'logs')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment(), cwd=Path(__file__).parents[2])
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    pids = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in pids))


def note_and_wait(folder: Path) -> None:
    beside = folder / f"{os.getpid()}.new"
    beside.write_text(str(os.getpid()))
    beside.rename(folder / f"{os.environ['RANK']}.pid")
    time.sleep(60)


def wait_for(condition: object) -> None:
    end = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
