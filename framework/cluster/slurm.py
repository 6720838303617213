"""A job of Slurm's, led from its first node: srun starts a `node` on each, all are waited for, and told what to run.

The exit code is that of the first node to fail, however srun ends the others. Asked to stop by the scheduler, the job
goes back into the queue once all have saved. Left out: which stage is run how (`stages.slurm`).
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Empty
from typing import Any

from framework.cluster.local_ray import python_path
from framework.cluster.node import TOKEN
from framework.cluster.roll_call import ASKED, CAME, ENDED, LEAVE, LOST, RUN, SIGNAL, RollCall, Said
from framework.core.errors import DeadlineError, FrameworkError, Interrupted, LeftAtOnce, UsageError, WorkerError
from framework.core.signals import EXIT_CODES

TERMINATED = EXIT_CODES[signal.SIGTERM]
_ECHO_S = 2.0  # the scheduler signals every node, and each passes it on to here
_LOOK_S = 0.2
_GRACE_S = 10.0  # for the other nodes to end by themselves, once one has failed
_FOREVER = float("inf")
# Below the ports that systems give out by themselves (32768 and up), a block for each job.
_FIRST_PORT, _BLOCKS, _BLOCK = 20000, 1200, 10

Orders = Mapping[str, Sequence[str]]  # node -> command
Work = Callable[["Job"], int]


def run_job(work: Work, deadline_s: float) -> int:
    """`work` on the nodes of this job once all have come; its exit code. A job that was asked to stop is requeued."""
    try:
        with _opened(_names()) as job:
            job.wait_for_nodes(deadline_s)
            job.code = work(job)
            code = job.code
    except (Interrupted, LeftAtOnce) as error:
        print(f"slurm: {error}", file=sys.stderr)
        code = error.exit_code
    if code == TERMINATED:
        _requeue(os.environ["SLURM_JOB_ID"])
    return code


class Job:
    """The nodes of a job, by name, the leading one first."""

    def __init__(self, names: Sequence[str], ports: Sequence[int], calls: RollCall, srun: "subprocess.Popen[bytes]"):
        self.names, self.ports = names, ports
        self.places: dict[str, dict[str, str]] = {}  # what each node said of itself when it came
        self.code = 1  # what the nodes leave with
        self._calls, self._srun = calls, srun
        self._at_work: set[str] = set()
        self._asked, self._asked_at = 0, -_ECHO_S

    @property
    def address(self) -> str:
        """Where the other nodes find the first one."""
        return self.places[self.names[-1]]["first"]

    def wait_for_nodes(self, deadline_s: float) -> None:
        """Until every node has come; a DeadlineError names those that did not."""
        until = time.monotonic() + deadline_s
        while missing := [name for name in self.names if name not in self.places]:
            said = self._hear(until)
            if said is None:
                raise DeadlineError(
                    f"{_listed(missing)} did not come within {deadline_s:g} s, {len(self.places)} of {len(self.names)} "
                    "did; if they are only slow, raise cluster.start_deadline_s"
                )
            if said.what == CAME:
                self.places[said.node] = said.about
            elif said.what == LOST:
                raise WorkerError(f"node {said.node} left before {_listed(missing)} came")

    def start(self, what: str, orders: Orders, deadline_s: float) -> None:
        """Services: commands that end with 0 once `what` is up on their node."""
        self._order(orders, ray=True, service=True)
        waiting, until = set(orders), time.monotonic() + deadline_s
        while waiting:
            said = self._hear(until)
            if said is None:
                raise DeadlineError(
                    f"{_listed(sorted(waiting))}: {what} did not come up within {deadline_s:g} s "
                    "(cluster.start_deadline_s)"
                )
            if said.node in waiting and (code := _code(said)):
                raise WorkerError(f"node {said.node}: {what} did not come up: exit code {code}{said.about['printed']}")
            waiting.discard(said.node)

    def run(self, orders: Orders, ray: bool = False) -> int:
        """Commands, until all have ended, or one has failed and the others have had time to. The first exit code that
        is not 0."""
        self._order(orders, ray=ray, service=False)
        self._at_work, first, until = set(orders), 0, _FOREVER
        while self._at_work and (said := self._hear(until)):
            if said.node not in self._at_work:
                continue
            self._at_work.discard(said.node)
            first = first or _code(said)
            if first and not self._asked and until == _FOREVER:
                until = time.monotonic() + _GRACE_S
                if len(self.names) > 1:
                    how = "was lost" if said.what == LOST else f"left with exit code {first}"
                    print(f"slurm: node {said.node} {how}; the others end", file=sys.stderr)
        return first

    def _order(self, orders: Orders, **how: bool) -> None:
        for node, order in orders.items():
            self._calls.tell(node, RUN, order=list(order), **how)

    def _hear(self, until: float) -> Said | None:
        """What is said next, signals apart; None once the time is up."""
        while (left := until - time.monotonic()) > 0:
            try:
                said = self._calls.said.get(timeout=min(left, _LOOK_S))
            except Empty:
                if self._srun.poll() is not None and len(self.places) < len(self.names):
                    raise WorkerError(f"srun ended with exit code {self._srun.returncode}") from None
                continue
            if said.what != ASKED:
                return said
            self._pass_on(said.about["number"])
        return None

    def _pass_on(self, number: int) -> None:
        """A signal to this process, or to any node, is one wish; a second one ends all at once."""
        if time.monotonic() - self._asked_at < _ECHO_S:
            return
        self._asked_at = time.monotonic()
        if self._asked:
            raise LeftAtOnce(EXIT_CODES[number])
        self._asked = EXIT_CODES[number]
        if not self._at_work:
            raise Interrupted("stopped before it began", self._asked)
        for node in self._at_work:
            self._calls.tell(node, SIGNAL, number=signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


# --- what is run -----------------------------------------------------------------------------------------------------


def train(words: Sequence[str], processes: int | str, job: Job) -> int:
    """`framework WORDS` under one torchrun a node, `processes` ranks each ("auto": one a GPU)."""
    common = [f"--nnodes={len(job.names)}", f"--nproc-per-node={processes}", f"--master-addr={job.address}"]
    common += [f"--master-port={job.ports[1]}"]
    return job.run(
        {
            name: _python("framework.cluster.torchrun", f"--node-rank={rank}", *common, "-m", "framework.main", *words)
            for rank, name in enumerate(job.names)
        }
    )


def lead(words: Sequence[str], job: Job) -> int:
    """`framework WORDS` on the first node, while the others wait."""
    return job.run({job.names[0]: _python("framework.main", *words)})


def control(words: Sequence[str], section: str, deadline_s: float, job: Job) -> int:
    """`framework WORDS` on the first node, joined to a Ray over all nodes; `section` is where its words go, "cluster"
    or "ppo.cluster". One node alone needs no more than the private Ray that the command starts by itself."""
    words = [*words, f"{section}.kind=ray"]
    if len(job.names) == 1:
        return lead(words, job)
    first, *others = job.names
    address = f"{job.address}:{job.ports[2]}"
    head = ["--head", f"--port={job.ports[2]}", f"--ray-client-server-port={job.ports[3]}", "--include-dashboard=false"]
    head += ["--system-config", '{"prestart_worker_first_driver": false, "enable_worker_prestart": false}']
    job.start("Ray", {first: _ray(job.places[first], job.address, head)}, deadline_s)
    joining = {name: _ray(job.places[name], job.places[name]["own"], [f"--address={address}"]) for name in others}
    job.start("Ray", joining, deadline_s)
    return job.run({first: _python("framework.main", *words, f"{section}.address={address}")}, ray=True)


def _ray(place: Mapping[str, str], own: str, role: Sequence[str]) -> list[str]:
    """Ports that nobody else uses: 0 is any that is free."""
    ports = [f"--{name}-port=0" for name in ("min-worker", "max-worker", "dashboard-agent-listen")]
    own_words = [f"--node-ip-address={own}", f"--temp-dir={place['folder']}", "--disable-usage-stats"]
    cpus = [f"--num-cpus={place['cpus']}"] if place["cpus"] else []
    return _python("ray.scripts.scripts", "start", *role, *own_words, *ports, *cpus)


def _python(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


# --- Slurm -----------------------------------------------------------------------------------------------------------


def _names() -> list[str]:
    """The nodes of the job, this one first."""
    missing = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURMD_NODENAME") if name not in os.environ]
    if missing:
        raise UsageError(f"{missing[0]} is not set: this is no job of Slurm's; submit one: sbatch launch/slurm ...")
    names = _ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    own = os.environ["SLURMD_NODENAME"]
    return [own, *(name for name in names if name != own)]


@contextlib.contextmanager
def _opened(names: Sequence[str]) -> Iterator[Job]:
    ports, token = free_ports(int(os.environ["SLURM_JOB_ID"]), 4), secrets.token_hex(32)
    calls = RollCall(names, ports[0], token.encode())
    with _signals_to(calls), _srun(names, ports[0], token) as srun:
        job = Job(names, ports, calls, srun)
        try:
            yield job
        finally:
            for name in names:
                calls.tell(name, LEAVE, code=job.code)
            _end(srun, _GRACE_S if len(job.places) == len(names) else _LOOK_S)
            calls.close()


@contextlib.contextmanager
def _signals_to(calls: RollCall) -> Iterator[None]:
    """A signal to this process is said like everything else."""

    def say(number: int, _: Any) -> None:
        calls.said.put(Said("", ASKED, {"number": number}))

    before = {number: signal.signal(number, say) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _srun(names: Sequence[str], port: int, token: str) -> "subprocess.Popen[bytes]":
    """One `node` a node, free to use all CPUs that the job has there, and in a session of its own: a signal to the
    batch script's processes would make srun kill what it started."""
    host = "127.0.0.1" if len(names) == 1 else names[0]
    where = [f"--nodes={len(names)}", f"--ntasks={len(names)}", "--ntasks-per-node=1", "--cpu-bind=none"]
    environment = os.environ | {TOKEN: token, "PYTHONPATH": python_path()}
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        environment["SRUN_CPUS_PER_TASK"] = cpus  # srun no longer takes it from sbatch by itself
    command = ["srun", *where, *_python("framework.cluster.node", host, str(port))]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _end(srun: "subprocess.Popen[bytes]", patience_s: float) -> None:
    """The nodes leave by themselves; one that never came, or hangs, is ended by srun."""
    for ask in (srun.terminate, srun.kill):
        with contextlib.suppress(subprocess.TimeoutExpired):
            srun.wait(patience_s)
            return
        ask()
        patience_s = _GRACE_S


def _requeue(job: str) -> None:
    """Back into the queue, unless the job is being cancelled, or Slurm has begun to requeue it."""
    if "JobState=RUNNING" in _ask("scontrol", "show", "job", job):
        print(f"slurm: job {job} goes back into the queue", file=sys.stderr, flush=True)
        _ask("scontrol", "requeue", job)


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError(f"{command[0]} is not on PATH: this is no node of Slurm's") from None
    if done.returncode:
        raise FrameworkError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def free_ports(job: int, count: int) -> list[int]:
    """Ports of this machine that are free, looked for from the job's own block on."""
    found: list[int] = []
    for step in range(_BLOCKS * _BLOCK):
        port = _FIRST_PORT + (job % _BLOCKS * _BLOCK + step) % (_BLOCKS * _BLOCK)
        if len(found) < count and _is_free(port):
            found.append(port)
    if len(found) < count:
        raise FrameworkError(f"no {count} free ports from {_FIRST_PORT} on")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _code(said: Said) -> int:
    return int(said.about["code"]) if said.what == ENDED else 1


def _listed(names: Sequence[str]) -> str:
    return f"node{'s' if len(names) > 1 else ''} {', '.join(names)}"
