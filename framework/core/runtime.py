"""Where a process stands: rank, device, threads, determinism, process group. No other page speaks to torch.cuda."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

from framework.core.errors import Interrupted, UsageError

_CPU = torch.device("cpu")
# Dense bf16 peak of one card in FLOP/s, from the vendor's data sheets; MFU needs it.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


@dataclass(frozen=True)
class Runtime:
    """One process's place in the run. Example: Runtime(rank=1, world_size=4, local_rank=1, device=cuda:1)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = _CPU
    deterministic: bool = True

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(
    device: str = "auto",
    threads: int | None = None,
    deterministic: bool | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    address: str | None = None,
    deadline_s: float = 600.0,
) -> Runtime:
    """Settle this process: device, threads, determinism, and the process group where the world is larger than one.

    Rank and world come from the arguments (Ray workers) or from torchrun's environment. `address` is "host:port";
    without it torchrun's MASTER_ADDR and MASTER_PORT are used.
    """
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    place = choose_device(device, local_rank)
    exact = place.type == "cpu" if deterministic is None else deterministic
    if threads is not None:
        torch.set_num_threads(threads)
    if exact:  # cuBLAS reads this at its first call, and without it refuses to be deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(exact, warn_only=False)
    # It would write every new tensor once more, and nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size > 1 and not dist.is_initialized():
        _join(rank, world_size, address, place, deadline_s)
    return Runtime(rank, world_size, local_rank, place, exact)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def agreed(flag: bool) -> bool:
    """Whether `flag` is up on any rank of the world, the same answer on all of them. Collective."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


class StopRequest:
    """Ctrl-C, SIGTERM and SIGUSR1 (what a queue sends before it kills) become a wish, granted between two steps.

        with StopRequest() as stop:
            for step in ...:
                if agreed(stop.requested):
                    save(); raise stop.error(f"after step {step}")

    A second signal does not wait: it raises Interrupted where the program stands, and a third one kills. Handlers can
    only be installed in a process's main thread; elsewhere (a Ray worker's) the object is there but never asked.
    """

    _EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}  # noqa: RUF012

    def __init__(self) -> None:
        self.exit_code = 0  # 130 or 143 once asked
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.exit_code != 0

    def error(self, where: str) -> Interrupted:
        """What to raise once all is saved. A rank that was not asked itself goes with those that were."""
        code = self.exit_code or self._EXIT_CODES[signal.SIGTERM]
        return Interrupted(f"stopped {where}; the same command continues from here", code)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self._EXIT_CODES}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        first, self.exit_code = not self.requested, self._EXIT_CODES[number]
        if first:
            return
        for other in self._EXIT_CODES:
            signal.signal(other, signal.SIG_DFL)
        raise Interrupted("stopped at once, without saving", self.exit_code)


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device a name asks for. `auto` is the GPU where torch can use one, else the CPU; never a silent CPU fallback
    on a machine that has a GPU which this torch cannot use."""
    if device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if device == "cuda" or os.path.exists("/dev/nvidia0"):
        raise UsageError(
            f"device={device}: torch {torch.__version__} cannot use a GPU here; install a CUDA build of torch that "
            "fits the driver, or say device=cpu to train on the CPU"
        )
    return torch.device("cpu")


def num_gpus() -> int:
    """GPUs that torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def peak_flops(device: torch.device) -> float | None:
    """The card's dense bf16 FLOP/s by data sheet, None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in _PEAK_FLOPS.items() if card in name), None)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most bytes ever held by torch's allocator on `device`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Run with `count` torch threads, then restore."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _join(rank: int, world_size: int, address: str | None, device: torch.device, deadline_s: float) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"tcp://{address}" if address else "env://",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=deadline_s),
    )
