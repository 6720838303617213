"""Kernels on the emulator, or with CUDA_EXT_DEVICE=cuda on a card: how tests call them, and the measures that all of
them are held to.

A result is held to one rounding of the exact value (worked out in fp64 from the same, already rounded inputs) plus the
error of sums in fp32; and to 1.1 times the error of eager torch in the same dtype.
"""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cuda_ext import dispatch, library

DEVICE = os.environ.get("CUDA_EXT_DEVICE", "cpu")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
SCHEDULES = (0, 1, 2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NORESERVE = 0x4000  # Linux: memory is not promised, so that more than there is can be mapped
# Half a unit in the last place, relative to the value.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 0.0}


@contextlib.contextmanager
def emulated(seed: int = 0, first_block: int = 0, last_block: int = (1 << 63) - 1) -> Iterator[None]:
    """Within: ops run their kernels on the CPU, threads in the order of `seed`, blocks first to last of each grid. On a
    card they simply run."""
    if DEVICE != "cpu":
        with dispatch.use("cuda"):
            yield
        return
    library.emulate(seed, first_block, last_block)
    try:
        with dispatch.use("emulator"):
            yield
    finally:
        library.emulate()


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return drawn.to(DEVICE, dtype)


def chance(*shape: int, seed: int = 0) -> Tensor:
    """Numbers from 0 to 1, each as likely as any other."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE)


def whole_numbers(below: int, count: int, seed: int = 0) -> Tensor:
    """[count] int64, from 0 on."""
    return torch.randint(below, (count,), generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE)


def rounded_once(got: Tensor, exact: Tensor, sums: float = 4 * 2.0**-24) -> None:
    """`got` is `exact`, rounded; `sums` is the error before that, relative to the largest number of the tensor."""
    assert got.shape == exact.shape
    allowed = 1.01 * ROUNDING[got.dtype] * exact.abs() + sums * exact.abs().max() + _least(got.dtype)
    assert ((got.double() - exact).abs() <= allowed).all(), float(((got.double() - exact).abs() / allowed).max())


def no_worse_than(theirs: Tensor, got: Tensor, exact: Tensor, times: float = 1.1) -> None:
    """The largest error is at most `times` that of eager torch, or below a rounding of fp32."""
    ours, rival = ((x.double() - exact).abs().max() for x in (got, theirs))
    assert ours <= times * rival + 4 * 2.0**-24 * exact.abs().max(), (float(ours), float(rival))


def same_bits(call: Callable[[], tuple[Tensor, ...]]) -> None:
    """Every schedule of threads and blocks gives the same bits."""
    results = []
    for seed in SCHEDULES:
        with emulated(seed):
            results.append([x.clone() for x in call()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "the result depends on the schedule"


def shifted(x: Tensor) -> Tensor:
    """The same numbers, one element away from where 16 bytes could be moved at once."""
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return moved.copy_(x)


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros without memory until they are written: tensors of more elements than the machine could hold."""
    if DEVICE != "cpu":
        return torch.zeros(shape, dtype=dtype)
    numel = torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype).view(shape)


def _least(dtype: torch.dtype) -> float:
    """The rounding of numbers near zero, where a unit in the last place does not shrink any more."""
    return float(torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
