"""Ray for one run: a private one on this machine, or the cluster at `cluster.address`.

The private one listens on the loopback interface only, asks every caller for a random token, keeps its files in a short
temporary folder of its own, reports nothing to anyone, and is gone when the block ends, whichever way it ends.
"""

import contextlib
import functools
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from framework.core.errors import UsageError, WorkerError

# A socket path holds 107 bytes, and Ray appends about 65 to its folder.
_LONGEST_FOLDER = 40


@contextlib.contextmanager
def local_ray(cpus: float, gpus: int = 0) -> Iterator[None]:
    """A Ray of our own. `cpus` are logical: how many the workers claim together, whatever the machine has."""
    folder = _folder()
    try:
        with _environment(_settings()):
            import ray

            _silence_driver()
            try:
                ray.init(
                    address="local",
                    num_cpus=int(-(-cpus // 1)),
                    num_gpus=gpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    _temp_dir=str(folder),
                    _node_ip_address="127.0.0.1",
                    # No idle workers in stock: each takes 65 MB, and all of ours are actors.
                    _system_config={"prestart_worker_first_driver": False, "enable_worker_prestart": False},
                )
                yield
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def joined_ray(address: str) -> Iterator[None]:
    """The running Ray at `address` ("host:port", "auto", or "ray://..."); workers import the code from our paths."""
    import ray

    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            runtime_env={"env_vars": {"PYTHONPATH": _python_path()}},
        )
    except ConnectionError as error:
        raise UsageError(
            f"cluster.address={address}: no Ray answers there ({error}); leave it empty to start one on this machine"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _settings() -> dict[str, str | None]:
    """The environment that the private Ray starts in; None removes a variable."""
    return {
        "RAY_ADDRESS": None,  # never a stranger's
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray turns 127.0.0.1 into the machine's own address, and then listens on every interface, unless clusters of
        # several machines are switched off by this variable (made for Windows and OSX, heard on Linux too).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _token(),
        "RAY_DEDUP_LOGS": "0",
        "PYTHONPATH": _python_path(),
    }


@functools.cache
def _token() -> str:
    """One for the life of this process: Ray's library reads it once."""
    return secrets.token_hex(32)


def _folder() -> Path:
    """Its name carries our process id, so that the next run can clear away what a killed one left behind."""
    parent = tempfile.gettempdir()
    parent = parent if len(parent) <= _LONGEST_FOLDER - 20 else "/tmp"
    for old in Path(parent).glob("fw-*-*"):
        owner = old.name.split("-")[1]
        if owner.isdigit() and _ended(int(owner)):
            shutil.rmtree(old, ignore_errors=True)  # fails quietly on another user's
    return Path(tempfile.mkdtemp(prefix=f"fw-{os.getpid()}-", dir=parent))


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _python_path() -> str:
    """Where this process imports from, so that workers import the same code."""
    return os.pathsep.join(dict.fromkeys(entry or os.getcwd() for entry in sys.path))


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
