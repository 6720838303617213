"""A token of each row, beside the reference's sort: no filter, top-k, top-p, all at once."""

import functools
from collections.abc import Iterator

import torch

from cuda_ext.measure import Case
from cuda_ext.sampling import op, reference

_FILTERS = {"plain": (0, 1.0, 0.0), "top-k": (50, 1.0, 0.0), "top-p": (0, 0.9, 0.0), "all": (50, 0.9, 0.05)}


def cases(device: str, sizes: tuple[tuple[int, int], ...] = ((64, 32000), (256, 131072))) -> Iterator[Case]:
    """Rows x vocabulary. Moved: the logits, read once."""
    for rows, vocabulary in sizes:
        logits = (3 * torch.randn(rows, vocabulary, device=device)).bfloat16()
        uniforms = torch.rand(rows, dtype=torch.float64, device=device)
        for name, filters in _FILTERS.items():
            ours = functools.partial(op.sample, logits, uniforms, 0.8, *filters)
            eager = functools.partial(reference.sample, logits, uniforms, 0.8, *filters, False)
            moved = logits.numel() * logits.element_size()
            yield Case(f"{name} {rows} x {vocabulary}", ours, {"eager": eager}, moved)
