"""Where a process stands: device choice and its refusals, threads, ports, a process group of two."""

import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from framework.core import driver, runtime
from framework.core.driver import Driver
from framework.core.errors import Interrupted, UsageError
from framework.core.runtime import choose_device, free_port, num_gpus, num_threads, peak_flops, peak_memory_bytes
from framework.core.signals import StopRequest
from tests.distributed import run_ranks

CPU = torch.device("cpu")


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(driver, "has_gpu", lambda: False)
    monkeypatch.setattr(driver, "find_driver", lambda: None)


@pytest.mark.usefixtures("_no_gpu")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert choose_device("auto") == CPU
    assert choose_device("cpu") == CPU
    assert num_gpus() == 0


@pytest.mark.usefixtures("_no_gpu")
def test_cuda_without_a_gpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match=r"device=cuda: .* torch .* no NVIDIA driver was found.*device=cpu"):
        choose_device("cuda")


def test_a_gpu_that_torch_cannot_use_is_never_passed_over_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(driver, "find_driver", lambda: Driver("550.54.15", "12.4"))
    with pytest.raises(UsageError, match=r"device=auto: .*without CUDA, driver 550.*12\.4.*a torch built for CUDA 12"):
        choose_device("auto")
    assert choose_device("cpu") == CPU


def test_ranks_share_out_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [choose_device("auto", rank).index for rank in range(6)] == [0, 1, 2, 3, 0, 1]
    assert choose_device("cpu", 2) == CPU


def test_peaks_are_known_of_known_cards_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda", 0)) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card of Next Year")
    assert peak_flops(torch.device("cuda", 0)) is None
    assert peak_flops(CPU) is None
    assert peak_memory_bytes(CPU) is None


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))


def test_threads_are_restored_even_after_an_error() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with num_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise ValueError("in between")

    with pytest.raises(ValueError, match="in between"):
        fail()
    assert torch.get_num_threads() == before


PROCESS = """
import sys, torch
from framework.core import runtime
rank, address = int(sys.argv[1]), sys.argv[2]
here = runtime.start("cpu", threads=1, rank=rank, world_size=2, address=address, deadline_s=60)
total = torch.tensor([float(rank + 1)])
torch.distributed.all_reduce(total)
print(here.rank, here.world_size, here.is_main, here.device, here.deterministic, torch.get_num_threads(), total.item())
runtime.stop()
assert not torch.distributed.is_initialized()
"""


def test_two_processes_meet_at_an_address() -> None:
    address = f"127.0.0.1:{free_port()}"
    root = Path(runtime.__file__).resolve().parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), address], stdout=subprocess.PIPE, text=True, cwd=root
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=120)[0].split() for worker in workers]
    assert said == [["0", "2", "True", "cpu", "True", "1", "3.0"], ["1", "2", "False", "cpu", "True", "1", "3.0"]]


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        here = runtime.start("cpu")
        assert (here.rank, here.world_size, here.is_main, here.deterministic) == (0, 1, True, True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.distributed.is_initialized()
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _meet_apart(here: runtime.Runtime, asked: int | None) -> str | None:
    """Rank 0 works piece by piece, rank 1 has nothing to do; `asked` is the rank that was asked to stop."""
    stop = StopRequest()
    if here.rank == asked:
        stop.ask(signal.SIGINT)
    try:
        with runtime.apart(stop, "at work") as point:
            while here.rank == 0 and asked is not None:  # ends only by what it hears
                point()
    except Interrupted as error:
        return f"{error.exit_code} {error}"
    return None


@pytest.mark.parametrize("asked", [None, 0, 1])
def test_a_wish_is_heard_where_ranks_work_apart(asked: int | None) -> None:
    said = None if asked is None else "130 stopped at work; the same command continues from here"
    assert run_ranks(_meet_apart, 2, asked) == [said, said]


def _heed_together(here: runtime.Runtime) -> int:
    stop = StopRequest()
    if here.rank == 1:
        stop.ask(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after step 3") as caught:
        runtime.heed(stop, "after step 3")
    return caught.value.exit_code


def test_ranks_leave_together_with_one_exit_code() -> None:
    assert run_ranks(_heed_together, 2) == [130, 130]


def test_an_interruption_keeps_its_code_when_pickled() -> None:
    error = pickle.loads(pickle.dumps(Interrupted("stopped after step 3", 143)))
    assert (str(error), error.exit_code) == ("stopped after step 3", 143)
