"""GAE over rows of one length beside the definition's loop in eager torch: no library has a kernel for it, and
torch.compile would unroll thousands of steps."""

from collections.abc import Iterator
from functools import partial

import torch

from cuda_ext.gae import reference
from cuda_ext.gae.op import gae
from cuda_ext.measure import Case

_SIZES = [(512, 4096), (1024, 1024), (64, 8192)]


def cases(device: str, sizes: list[tuple[int, int]] = _SIZES) -> Iterator[Case]:
    """Rows x positions, three of four counting. Moved: rewards, values and a mask in bytes, two results."""
    for rows, length in sizes:
        rewards, values = (torch.randn(rows, length, device=device) for _ in range(2))
        mask = torch.rand(rows, length, device=device) < 0.75
        ours, theirs = (partial(call, rewards, values, mask, 0.99, 0.95) for call in (gae, reference.gae))
        yield Case(f"{rows} x {length}", ours, {"eager": theirs}, 17 * rewards.numel())
