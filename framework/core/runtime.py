"""Where a process stands: rank, device, threads, determinism, process group. No other page speaks to torch.cuda."""

import contextlib
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from framework.core import driver
from framework.core.deadline import deadline, unwatch, watch
from framework.core.errors import DeadlineError, Interrupted, UsageError
from framework.core.signals import StopRequest

_CPU = torch.device("cpu")
_ASKED = "asked to stop"  # in the store: an exit code
_store: dist.Store | None = None  # where the ranks of the world met
_MEET_S = 300.0  # for all ranks to come up
_NCCL_S = 60.0  # beyond the deadline: its own limit ends the process without a word, ours must come first
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
    without it torchrun's MASTER_ADDR and MASTER_PORT are used. `deadline_s`: how long a rank may stand in one phase.
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
    if _store is not None:
        watch(_store, rank, world_size, deadline_s)
    return Runtime(rank, world_size, local_rank, place, exact)


def ensure_group(device: torch.device) -> None:
    """A process group of this process alone, where it belongs to none: some libraries do not work without."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)


def stop() -> None:
    """Leave the process group, if there is one."""
    global _store
    _store = None
    unwatch()
    if dist.is_initialized():
        dist.destroy_process_group()


def agreed(number: int) -> int:
    """The largest `number` of any rank of the world, the same answer on all of them. Collective."""
    return int(largest(torch.tensor([number]), "the question whether to stop").item())


def largest(x: Tensor, what: str) -> Tensor:
    """The elementwise largest of every rank's `x` [...], on the CPU, over the world. `what` names it in errors.
    Collective."""
    if not dist.is_initialized():
        return x
    found = x.clone()
    with deadline(what):
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def heed(stop: StopRequest, where: str) -> None:
    """A safe point that all ranks reach together: Interrupted on all of them once any was asked. Collective."""
    if exit_code := agreed(stop.exit_code):
        raise stop.error(where, exit_code)


@contextlib.contextmanager
def apart(stop: StopRequest, where: str) -> Iterator[Callable[[], None]]:
    """A stretch in which ranks work each for itself, or wait for one another outside of any collective. Gives its safe
    point, which hears of other ranks' wishes without waiting for them; at the end all ranks meet, and leave together
    once any was asked. Collective."""

    def point() -> None:
        if exit_code := _heard(stop.exit_code):
            raise stop.error(where, exit_code)

    try:
        with deadline(where.removeprefix("while "), patient=True):
            yield point
    except Interrupted as error:
        agreed(error.exit_code)
        raise
    _heard(stop.exit_code)  # the others may still be at work
    heed(stop, where)


def _heard(exit_code: int) -> int:
    """This rank's exit code, or the one that another rank has told; 0 = none so far."""
    if _store is None:
        return exit_code
    if exit_code:
        _store.set(_ASKED, str(exit_code))
    return int(_store.get(_ASKED)) if _store.check([_ASKED]) else 0


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device a name asks for. `auto` is the GPU where torch can use one, else the CPU; never a silent CPU fallback
    on a machine that has a GPU which this torch cannot use."""
    if device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if device == "cuda" or driver.has_gpu():
        why = driver.why_unusable(torch.__version__, torch.version.cuda, _cuda_error())
        raise UsageError(f"device={device}: no GPU can be used: {why}, or say device=cpu to train on the CPU")
    return torch.device("cpu")


def _cuda_error() -> str:
    """Why CUDA does not start, in torch's words; "" where it does."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return ""


def num_gpus() -> int:
    """GPUs that torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def places(device: str, count: int) -> list[str]:
    """Where ranks 0.. of this machine would stand: "cpu", or "cuda:1 (NVIDIA H100 80GB HBM3)"."""
    check_devices(device, count)
    return [_called(choose_device(device, rank)) for rank in range(count)]


def standing(here: Runtime) -> dict[str, dict[int, str]]:
    """Node -> rank -> its device, "cuda:1 (NVIDIA H100 80GB HBM3)", for the whole world; empty on other ranks than 0.
    After `start`."""
    if _store is None:
        return {node(): {0: _called(here.device)}}
    _store.set(f"standing/{here.rank}", json.dumps([node(), _called(here.device)]))
    found: dict[str, dict[int, str]] = {}
    for rank in range(here.world_size if here.is_main else 0):
        where, device = json.loads(_store.get(f"standing/{rank}"))
        found.setdefault(where, {})[rank] = device
    return found


def _called(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def check_devices(device: str, ranks: int) -> None:
    """UsageError where `ranks` of this machine would have to share its GPUs."""
    gpus = num_gpus()
    if choose_device(device).type == "cuda" and ranks > gpus:
        raise UsageError(
            f"{ranks} ranks on {node()}, which has {gpus} GPU{'s' if gpus > 1 else ''}: a rank needs one of its own; "
            f"choose at most {gpus} (cluster.workers, or the processes of torchrun), or device=cpu"
        )


def node() -> str:
    """What this machine is called: by Slurm where it runs the job."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def meet(deadline_s: float) -> dist.Store:
    """The store where torchrun's ranks meet, without waiting for all of them as `start` does. DeadlineError where its
    host, rank 0 or torchrun, does not answer."""
    is_host = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        timeout = timedelta(seconds=deadline_s)
        return dist.TCPStore(host, port, is_master=is_host, timeout=timeout, wait_for_workers=False)
    except RuntimeError:
        raise DeadlineError(f"rank 0 never came: nobody answers at {host}:{port} within {deadline_s:g} s") from None


def in_world() -> bool:
    """Whether torchrun, or whoever else sets its variables, started this process as one of several ranks."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def peak_flops(device: torch.device) -> float | None:
    """The card's dense bf16 FLOP/s by data sheet, None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in _PEAK_FLOPS.items() if card in name), None)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most bytes ever held by torch's allocator on `device`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def copy_to_host(tensor: Tensor, memory: Tensor | None = None) -> Tensor:
    """A copy of `tensor` in the memory of the host, done when this returns: in `memory`, that of an earlier copy, where
    dtype and shape fit. New memory is page-locked for a GPU's tensors, so that no second buffer stands between."""
    if memory is None or (memory.dtype, memory.shape) != (tensor.dtype, tensor.shape):
        memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return memory.copy_(tensor)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago; below those that systems give to outgoing
    connections, one of which could take it before it is used."""
    for port in random.SystemRandom().sample(range(10000, 20000), 64):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UsageError("no free TCP port from 10000 to 19999 was found in 64 tries; other programs hold them")


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
    global _store
    timeout = timedelta(seconds=deadline_s + (_NCCL_S if device.type == "cuda" else 0.0))
    meet = timedelta(seconds=max(deadline_s, _MEET_S))
    meeting = dist.rendezvous(f"tcp://{address}" if address else "env://", rank, world_size, timeout=meet)
    _store, rank, world_size = next(meeting)
    # Groups made later, those of a mesh among them, take no notice of the first one's limit.
    groups = dist.distributed_c10d
    groups.default_pg_timeout = groups.default_pg_nccl_timeout = timeout
    dist.init_process_group(_backend(device), store=_store, rank=rank, world_size=world_size, timeout=timeout)


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
