"""A job over several nodes with the stand-in Slurm and shell commands for work: who is missing is named, one failure
ends all, signals reach all once, a job that was asked to stop is requeued, and nothing is left."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from framework.cluster import slurm
from framework.core.errors import FrameworkError, UsageError
from tests.slurm import job_environment

ROOT = Path(__file__).resolve().parents[2]
LEADER = """
import sys
from framework.cluster import slurm
from framework.core.errors import FrameworkError

_, deadline, *scripts = sys.argv
def work(job):
    print("ports", *job.ports, flush=True)
    return job.run({name: ["bash", "-c", script] for name, script in zip(job.names, scripts)})
slurm._GRACE_S = 2.0
try:
    code = slurm.run_job(work, float(deadline))
except FrameworkError as error:
    print(error, file=sys.stderr)
    code = error.exit_code
sys.exit(code)
"""


class Batch:
    """A job whose nodes each run a shell script."""

    def __init__(self, cluster: Path, *scripts: str, number: int = 7, deadline_s: float = 60) -> None:
        self.cluster = cluster
        self.names = [f"127.0.0.{node + 1}" for node in range(len(scripts))]
        environment = os.environ | job_environment(cluster, number, len(scripts)) | {"TMPDIR": str(cluster)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LEADER, str(deadline_s), *scripts],
            env=environment | {"SLURMD_NODENAME": "127.0.0.1", "PYTHONPATH": str(ROOT)},
            cwd=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """(exit code, stderr)."""
        _, errors = self.process.communicate(timeout=100)
        return self.process.returncode, errors

    def wait_for(self, *names: str) -> None:
        wait_until(lambda: all((self.cluster / name).exists() for name in names))

    def signal_nodes(self, *names: str) -> None:
        """As Slurm signals what srun started."""
        for name in names or self.names:
            os.kill(int((self.cluster / f"{name}.pid").read_text()), signal.SIGTERM)

    @property
    def requeued(self) -> bool:
        return (self.cluster / "requeued").exists()


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    return tmp_path


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


WAIT = "touch $SLURMD_NODENAME.up; trap 'sleep 0.5; exit 143' TERM; while :; do sleep 0.05; done"


def test_every_node_runs_its_order_in_a_folder_of_its_own(cluster: Path) -> None:
    batch = Batch(cluster, *["echo $TMPDIR > $SLURMD_NODENAME.folder; env > $SLURMD_NODENAME.env"] * 3)
    assert batch.end() == (0, "")
    folders = {(cluster / f"{name}.folder").read_text().strip() for name in batch.names}
    assert len(folders) == 3
    assert all(len(folder) < 40 and not Path(folder).exists() for folder in folders)
    assert slurm.TOKEN not in (cluster / "127.0.0.1.env").read_text(), "the token stays with the nodes"
    assert not batch.requeued


def test_nodes_that_never_come_are_named(cluster: Path) -> None:
    for name in ("127.0.0.2", "127.0.0.4"):
        (cluster / f"{name}.absent").touch()
    batch = Batch(cluster, *["touch began"] * 4, deadline_s=2)
    assert batch.end() == (
        1, "nodes 127.0.0.2, 127.0.0.4 did not come within 2 s, 2 of 4 did; if they are only slow, raise "
        "cluster.start_deadline_s\n"
    )  # fmt: skip
    assert not (cluster / "began").exists()
    assert not batch.requeued, "srun's own code is 137 or 143 here"
    assert not any(is_alive(int((cluster / f"{name}.pid").read_text())) for name in batch.names)


def test_the_first_node_that_fails_is_named_and_the_others_end(cluster: Path) -> None:
    script = "[ $SLURMD_NODENAME != 127.0.0.2 ] || exit 3; sleep 1; exit 143"
    batch = Batch(cluster, *[script] * 3)
    assert batch.end() == (3, "slurm: node 127.0.0.2 left with exit code 3; the others end\n")
    assert not batch.requeued


def test_a_node_that_is_lost_is_named(cluster: Path) -> None:
    batch = Batch(cluster, WAIT, WAIT)
    batch.wait_for("127.0.0.1.up", "127.0.0.2.up")
    os.kill(int((cluster / "127.0.0.2.pid").read_text()), signal.SIGKILL)
    code, errors = batch.end()
    assert (code, errors) == (1, "slurm: node 127.0.0.2 was lost; the others end\n")


@pytest.mark.parametrize("whom", ["all nodes", "one node", "the batch script"])
def test_asked_to_stop_all_save_once_and_the_job_is_requeued(cluster: Path, whom: str) -> None:
    batch = Batch(cluster, WAIT, WAIT)
    batch.wait_for("127.0.0.1.up", "127.0.0.2.up")
    if whom == "the batch script":
        batch.process.send_signal(signal.SIGTERM)
    else:
        batch.signal_nodes(*([] if whom == "all nodes" else ["127.0.0.2"]))
    assert batch.end() == (143, "slurm: job 7 goes back into the queue\n")
    assert (cluster / "requeued").read_text() == "7\n"


def test_a_cancelled_job_saves_and_is_not_requeued(cluster: Path) -> None:
    (cluster / "state").write_text("COMPLETING")
    batch = Batch(cluster, WAIT, WAIT)
    batch.wait_for("127.0.0.1.up", "127.0.0.2.up")
    batch.signal_nodes()
    assert batch.end() == (143, "")
    assert not batch.requeued


def test_a_second_signal_leaves_at_once(cluster: Path) -> None:
    stubborn = "touch $SLURMD_NODENAME.up; trap 'touch asked' TERM; while :; do sleep 0.05; done"
    batch = Batch(cluster, stubborn, stubborn)
    batch.wait_for("127.0.0.1.up", "127.0.0.2.up")
    batch.signal_nodes()
    batch.wait_for("asked")
    time.sleep(slurm._ECHO_S)
    batch.signal_nodes()
    code, errors = batch.end()
    assert code == 143
    assert errors.startswith("slurm: stopped at once, without saving\n")
    assert not any(is_alive(int((cluster / f"{name}.pid").read_text())) for name in batch.names)


def test_a_node_dies_with_the_job_that_it_belongs_to(cluster: Path) -> None:
    batch = Batch(cluster, *["echo $$ > $SLURMD_NODENAME.work; touch $SLURMD_NODENAME.up; sleep 100"] * 2)
    batch.wait_for("127.0.0.1.up", "127.0.0.2.up")
    batch.process.kill()
    pids = [int((cluster / f"{name}.{what}").read_text()) for name in batch.names for what in ("pid", "work")]
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    batch.process.communicate()


def test_two_jobs_at_once_have_ports_and_folders_of_their_own(cluster: Path) -> None:
    batches = [Batch(cluster / name, WAIT, WAIT, number=number) for name, number in (("a", 7), ("b", 8))]
    for batch in batches:
        batch.wait_for("127.0.0.1.up", "127.0.0.2.up")
    batches[0].signal_nodes()
    assert batches[0].end()[0] == 143
    batches[1].signal_nodes()
    assert batches[1].end()[0] == 143
    assert [batch.requeued for batch in batches] == [True, True]


def test_who_does_not_know_the_token_is_not_heard(cluster: Path) -> None:
    batch = Batch(cluster, WAIT)
    batch.wait_for("127.0.0.1.up")
    assert batch.process.stdout is not None
    port = int(batch.process.stdout.readline().split()[1])
    with pytest.raises(Exception, match="digest sent was rejected"):
        Client(("127.0.0.1", port), authkey=b"guess")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((outer_address(), port))  # a job of one node listens on the loopback interface alone
    batch.signal_nodes()
    assert batch.end()[0] == 143


def outer_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.connect(("192.0.2.1", 9))
        return str(line.getsockname()[0])


def test_ports_that_are_taken_are_passed_over() -> None:
    first = slurm.free_ports(3, 4)
    assert len(set(first)) == 4
    assert not set(first) & set(slurm.free_ports(4, 4))
    with socket.socket() as server:
        server.bind(("", first[1]))
        server.listen()
        assert slurm.free_ports(3, 4) == [first[0], *first[2:], first[3] + 1]


def test_outside_of_slurm_it_says_how_to_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UsageError, match="SLURM_JOB_ID is not set: this is no job of Slurm's; submit one: sbatch"):
        slurm.run_job(lambda job: 0, 1)


def test_what_slurm_answers_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in job_environment(tmp_path, 7, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FrameworkError, match="scontrol hold 7: scontrol: hold 7 is not known here"):
        slurm._ask("scontrol", "hold", "7")


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
