"""Every rung beside the library's product (cuBLAS), in fp32 without TF32 and in bf16."""

from collections.abc import Iterator

import torch

from cuda_ext.matmul.op import RUNGS, matmul
from cuda_ext.measure import Case


def hopper(device: str) -> bool:
    """Whether wgmma and TMA are there; the emulator has them."""
    return device == "cpu" or torch.get_device_module(device).get_device_capability() == (9, 0)


def cases(device: str, sizes: tuple[int, ...] = (4096,)) -> Iterator[Case]:
    """Square matrices."""
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            for rung in RUNGS[:5] if dtype == torch.float32 else RUNGS[: 8 if hopper(device) else 6]:
                yield Case(
                    f"{rung} {size} {str(dtype)[6:]}",
                    lambda a=a, b=b, rung=rung: matmul(a, b, rung),  # type: ignore[misc]
                    {"cuBLAS": lambda a=a, b=b: a @ b},  # type: ignore[misc]
                    moved=3 * a.numel() * a.element_size(),
                    flops=2 * size**3,
                )
