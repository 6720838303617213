"""Ray for one run: a private one on this machine, or the cluster at `cluster.address`.

The private one listens on the loopback interface only, asks every caller for a random token, keeps its files in a short
temporary folder of its own, reports nothing to anyone, and is gone when the block ends, whichever way it ends.
"""

import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from framework.cluster import reaper
from framework.core.errors import UsageError, WorkerError

# A socket path holds 107 bytes; Ray appends about 65 to its folder, whose own name takes 12.
_LONGEST_PARENT = 28
_KNOCK_S = 10.0


@contextlib.contextmanager
def local_ray(cpus: float, gpus: int = 0) -> Iterator[None]:
    """A Ray of our own. `cpus` are logical: how many the workers claim together, whatever the machine has."""
    with private_folder() as folder:
        try:
            with _environment(_settings(folder)), _ours_kept(), signals_blocked():
                import ray

                _read_environment()
                _silence_driver()
                with _explained():
                    ray.init(
                        address="local",
                        num_cpus=math.ceil(cpus),
                        num_gpus=gpus,
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.CRITICAL,
                        _temp_dir=folder,
                        _node_ip_address="127.0.0.1",
                        # No idle workers in stock: each takes 65 MB, and all of ours are actors.
                        _system_config={"prestart_worker_first_driver": False, "enable_worker_prestart": False},
                    )
            yield
        finally:
            _shut_down()
            _read_environment()


@contextlib.contextmanager
def joined_ray(address: str) -> Iterator[None]:
    """The running Ray at `address`, "host:port"; its workers import the code from the paths of this process."""
    _knock(address)
    import ray

    try:
        with _ours_kept():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
            )
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Ray says that it could not start as a bare Exception."""
    try:
        yield
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise WorkerError(
            f"Ray did not start on this machine: {why} The run goes on from where it was with the same command, once "
            "fewer programs share the machine; cluster.kind=in_process needs no Ray"
        ) from error


def _knock(address: str) -> None:
    """Ray itself needs minutes to find that nobody is there."""
    host, _, port = address.rpartition(":")
    try:
        if not host or not port.isdigit():
            raise OSError("an address is host:port")
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()
    except OSError as error:
        raise UsageError(
            f"cluster.address={address}: no Ray answers there ({error}); leave it empty to start one on this machine"
        ) from None


@contextlib.contextmanager
def _ours_kept() -> Iterator[None]:
    """ray.init puts its own handler on SIGTERM, in place of ours that saves a checkpoint, and its own debugger behind
    breakpoint(), which would also stand there in later runs of this process."""
    ours = signal.getsignal(signal.SIGTERM)
    with _environment({"PYTHONBREAKPOINT": os.environ.get("PYTHONBREAKPOINT")}):
        yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """What starts in this block never hears a SIGTERM or SIGUSR1, and this process hears them afterwards: a queue, or
    `timeout`, signals every process of a job, and the run needs its Ray until it has saved."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shut_down() -> None:
    """Ray gives each of its processes a second to heed a SIGTERM; they do not hear it."""
    import ray
    import ray._private.worker as driver

    node: Any = driver._global_node
    for entries in node.all_processes.values() if node else ():
        for entry in entries:
            entry.process.terminate = entry.process.kill
    ray.shutdown()


def token_settings(token: str) -> dict[str, str | None]:
    """The environment that a Ray of ours, and whoever joins it, starts in; None removes a variable."""
    return {
        "RAY_ADDRESS": None,  # never a stranger's
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_DEDUP_LOGS": "0",
        "SPT_NOENV": "1",  # a process that changes its title must not overwrite the mark in /proc
    }


def _settings(folder: str) -> dict[str, str | None]:
    return {
        **token_settings(secrets.token_hex(32)),
        # Ray turns 127.0.0.1 into the machine's own address, and then listens on every interface, unless clusters of
        # several machines are switched off by this variable (made for Windows and OSX, heard on Linux too).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "PYTHONPATH": python_path(),
        reaper.MARK: folder,
    }


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """A folder that a reaper removes, with every process that was started under its mark, once this block or this
    process ends."""
    parent = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="fw-", dir=parent if len(parent) <= _LONGEST_PARENT else "/tmp")
    # Its own session: a Ctrl-C at the terminal is not for it.
    command = [sys.executable, "-I", "-S", reaper.__file__, folder]
    unmarked = {name: value for name, value in os.environ.items() if name != reaper.MARK}  # an outer one spares it
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=unmarked, start_new_session=True):
        yield folder


def python_path() -> str:
    """Where this process imports from, so that workers import the same code."""
    return os.pathsep.join(dict.fromkeys(entry or os.getcwd() for entry in sys.path))


def _read_environment() -> None:
    """Ray's library reads it once, when it is imported: by whoever imported it first, without our token."""
    import ray._raylet as library

    settings, tokens = (getattr(library, name) for name in ("Config", "AuthenticationTokenLoader"))  # no stubs
    settings.initialize("")
    tokens.instance().reset_cache()


def _silence_driver() -> None:
    """Ray prints a paragraph to the driver's output when a worker dies; our error says it in a line."""
    import ray._private.worker as driver

    if not hasattr(driver, "print_to_stdstream"):
        raise WorkerError("this Ray has no print_to_stdstream")
    driver.print_to_stdstream = lambda *_, **__: None


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    _apply(changes)
    try:
        yield
    finally:
        _apply(before)


def _apply(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
