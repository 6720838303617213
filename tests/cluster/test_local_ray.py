"""The private Ray: alone, on the loopback interface, and gone afterwards, whichever way its block ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from framework.cluster import local_ray
from framework.core.errors import UsageError, WorkerError

# Opens a private Ray, reports itself, then does what it is told. The actor spins, so that nothing ends by politeness.
SCRIPT = """
import os, signal, sys
from framework.cluster.local_ray import local_ray

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
signal.signal(signal.SIGTERM, lambda *_: None)
ours = signal.getsignal(signal.SIGTERM)
with local_ray(cpus=2):
    import ray

    assert signal.getsignal(signal.SIGTERM) is ours, "Ray took our handler"
    assert "PYTHONBREAKPOINT" not in os.environ, "Ray took our debugger"

    @ray.remote
    class Spinner:
        def spin(self):
            while True: pass

    spinner = Spinner.options(name="spinner", namespace="shared").remote()
    busy = spinner.spin.remote()
    seen = len(ray.nodes()), len(ray.util.list_named_actors(all_namespaces=True))
    here = ray.get_runtime_context().gcs_address
    print(ray._private.worker._global_node.get_temp_dir_path(), here, *seen, flush=True)
    word = sys.stdin.readline().strip()
    if word == "raise":
        raise RuntimeError("told to")
"""


class Controller:
    """A process that holds a private Ray."""

    def __init__(self, temporary: Path, script: str = SCRIPT, **variables: str) -> None:
        strangers = {"RAY_ADDRESS": "192.0.2.1:6379", "TMPDIR": str(temporary)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | strangers | variables,
            start_new_session=True,
        )

    def wait_until_up(self) -> None:
        assert self.process.stdout is not None
        folder, self.address, self.nodes, self.actors = self.process.stdout.readline().split()
        self.folder = Path(folder)
        self.pids = [self.process.pid, *descendants(self.process.pid)]

    def end(self, how: str) -> tuple[int, str]:
        """(exit code, stderr)."""
        if how == "interrupt":
            os.killpg(self.process.pid, signal.SIGINT)  # as a terminal's Ctrl-C does: to all of them
        elif how == "kill":
            self.process.kill()
        _, stderr = self.process.communicate(how + "\n" if how in ("raise", "end") else None, timeout=60)
        return self.process.returncode, stderr


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a name short enough for sockets."""
    folder = Path(f"/tmp/t{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        new = children.get(todo.pop(), [])
        found += new
        todo += new
    return found


def open_files(pid: int) -> list[str]:
    """What a process holds open; less what it closes while we look, nothing where it has ended."""
    targets = []
    with suppress(FileNotFoundError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                targets.append(os.readlink(entry))
    return targets


def listening_addresses(pids: list[int]) -> set[str]:
    """Hexadecimal IPv4 and IPv6 addresses on which any of `pids` waits for connections."""
    targets = [target for pid in pids for target in open_files(pid)]
    inodes = {target[8:-1] for target in targets if target.startswith("socket:[")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def alive(pids: list[int]) -> list[str]:
    """Those still running after at most ten seconds, by command line; a zombie does not run."""

    def left() -> list[str]:
        lines = [Path(f"/proc/{pid}/cmdline") for pid in pids]
        texts = [line.read_text().replace("\0", " ") if line.exists() else "" for line in lines]
        return [text for text in texts if text]

    until = time.monotonic() + 10
    while left() and time.monotonic() < until:
        time.sleep(0.1)
    return left()


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_two_at_once_do_not_meet_and_both_leave_nothing(temporary: Path) -> None:
    first, second = Controller(temporary), Controller(temporary)
    for controller in (first, second):
        controller.wait_until_up()
        assert (controller.nodes, controller.actors) == ("1", "1")
        assert len(controller.pids) > 4
        assert listening_addresses(controller.pids) <= LOOPBACK
    assert first.folder != second.folder
    code, stderr = first.end("interrupt")
    assert code == -signal.SIGINT, stderr
    assert stderr.strip().endswith("KeyboardInterrupt")
    assert alive(first.pids) == []
    code, stderr = second.end("raise")
    assert code == 1
    assert stderr.strip().endswith("RuntimeError: told to")
    assert alive(second.pids) == []
    assert list(temporary.iterdir()) == []


def test_after_a_kill_nothing_is_left_either(temporary: Path) -> None:
    controller = Controller(temporary)
    controller.wait_until_up()
    controller.end("kill")
    assert alive(controller.pids) == []
    assert not controller.folder.exists()


# Stands for the second driver of a cluster that somebody keeps running: it needs that cluster's address and token.
JOINER = """
import sys
from pathlib import Path
from stand_in import StandIn, prompts
from framework.cluster.config import ClusterConfig, ClusterKind
from framework.cluster.session import open_cluster

config = ClusterConfig(kind=ClusterKind.RAY, address=sys.stdin.readline().strip())
with open_cluster(config, {"actor": 1}, logs=Path(sys.stdin.readline().strip()), device="cpu") as cluster:
    print(cluster.group("actor", StandIn).seen(prompts(4)).result().tolist())
"""


def test_a_running_ray_is_joined_by_its_address_and_left_running(temporary: Path, tmp_path: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    host = Controller(temporary, SCRIPT.replace("with local_ray", f"{_OPEN_TOKEN}\nwith local_ray", 1))
    host.wait_until_up()
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    joiner = Controller(temporary, JOINER, PYTHONPATH=paths, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", **token)
    out, err = joiner.process.communicate(f"{host.address}\n{tmp_path}\n", timeout=120)
    assert out == "[0, 0, 0, 0]\n", err
    assert (tmp_path / "actor-0.log").exists()
    assert host.process.poll() is None
    code, stderr = host.end("end")
    assert code == 0, stderr
    assert alive(host.pids) == []


_OPEN_TOKEN = "import framework.cluster.local_ray as module; module.secrets.token_hex = lambda size: '0' * 64"

# As in a notebook. A stranger's Ray that is joined before and after would need what the environment says then.
IMPORTED_BEFORE = """
import ray
from ray._raylet import AuthenticationMode, get_authentication_mode
from framework.cluster.local_ray import local_ray

for number in range(2):
    with local_ray(cpus=1):
        print(ray.get(ray.put(number)))
    assert get_authentication_mode() == AuthenticationMode.DISABLED
"""


def test_it_opens_where_ray_was_imported_before_and_twice(temporary: Path) -> None:
    code, stderr = Controller(temporary, IMPORTED_BEFORE).end("end")
    assert code == 0, stderr


def test_the_environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with local_ray._environment(local_ray._settings("/tmp/x")):
        assert "RAY_ADDRESS" not in os.environ
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_ADDRESS"] == "192.0.2.1:6379"
    assert "RAY_AUTH_MODE" not in os.environ


def test_a_long_temporary_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    monkeypatch.setattr(local_ray.tempfile, "tempdir", str(deep))
    with local_ray.private_folder() as folder:
        assert Path(folder).parent == Path("/tmp")
        assert Path(folder).is_dir()
    assert not Path(folder).exists()


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_slow(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nSee the logs.")

    monkeypatch.setattr("ray.init", too_slow)
    line = r"Ray did not start on this machine: The current node timed out during startup\. The run goes on"
    with pytest.raises(WorkerError, match=line), local_ray.local_ray(1):
        raise AssertionError("it has started")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_an_address_where_no_ray_answers_is_refused(address: str) -> None:
    message = f"cluster.address={address}: no Ray answers there"
    with pytest.raises(UsageError, match=message), local_ray.joined_ray(address):
        pass
