"""Two fingerprints: sha256 of a file, and a hash of a logical tensor that does not know how it was sharded.

    tensor_hash = sum over elements of odd_mix(row-major index in the whole tensor) * bits(element), modulo 2**64

Sums over disjoint boxes add up to the sum over the whole, so every rank hashes what it holds and nobody gathers. An odd
factor cannot map a changed element to an unchanged product: one wrong element always changes the hash, two swapped ones
practically always. Elements of 8 bytes count as two of 4: modulo 2**64 the signs of a float64 tensor would otherwise
weigh the same everywhere, and x and -x would look alike. This guards against accidents, not against a forger; sha256
stands beside it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from framework.core.records import Box, whole

MODULUS = 1 << 64
_CHUNK = 1 << 17  # elements: the two int64 buffers stay in the cache
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
# The odd constants of SplitMix64 (Steele et al., OOPSLA 2014), as int64.
_GOLDEN, _MULTIPLIER = 0x9E3779B97F4A7C15 - MODULUS, 0xBF58476D1CE4E5B9 - MODULUS


def tensor_hash(tensor: Tensor, box: Box | None = None, shape: Sequence[int] | None = None) -> int:
    """Hash of `tensor`, which is the part `box` of a logical tensor of `shape`; both default to the whole.

    Any dtype of 1 to 8 bytes, any device, any strides; equal bits give equal hashes (0.0 and -0.0 differ). Of `shape`
    only the dimensions after the first matter. The hashes of disjoint boxes add up modulo 2**64.
    """
    return tensor_hashes([tensor], box, shape)[0]


def tensor_hashes(tensors: Sequence[Tensor], box: Box | None = None, shape: Sequence[int] | None = None) -> list[int]:
    """`tensor_hash` of each of `tensors`, which fill the same `box`, with elements of one size, on one device. Two
    thirds of the work go into the factors, and these are the same for all."""
    first = tensors[0]
    shape = tuple(first.shape) if shape is None else tuple(shape)
    box = whole(shape) if box is None else box
    for tensor in tensors:
        if tuple(length for _, length in box) != tuple(tensor.shape):
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} cannot fill the box {box}")
    if first.element_size() == 8:
        box, shape = (*box, (0, 2)), (*shape, 2)
    integers = _INTEGERS[first.element_size()]
    bits = [tensor.detach().contiguous().reshape(-1).view(integers) for tensor in tensors]
    buffers = torch.empty(2, min(_CHUNK, max(1, bits[0].numel())), dtype=torch.int64, device=first.device)
    totals, done = [0] * len(tensors), 0
    for rows, columns in _spread_indices(box, shape, first.device):
        size = rows.numel() * columns.numel()
        factor, other = buffers[:, :size]
        torch.add(rows[:, None], columns, out=factor.view(rows.numel(), columns.numel()))
        _odd_mix(factor, other)
        for number, values in enumerate(bits):
            totals[number] += int(other.copy_(values[done : done + size]).mul_(factor).sum())
        done += size
    return [total % MODULUS for total in totals]


def signed(hash_: int) -> int:
    """A hash as an int64 holds it; sums of int64 wrap, which is the modulus."""
    return hash_ - MODULUS if hash_ >= MODULUS // 2 else hash_


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _odd_mix(spread: Tensor, spare: Tensor) -> None:
    """(index + 1) * _GOLDEN becomes an odd, well-mixed int64, in place. Products and sums wrap: that is the modulus."""
    spread.bitwise_xor_(torch.bitwise_right_shift(spread, 32, out=spare)).mul_(_MULTIPLIER)
    spread.bitwise_xor_(torch.bitwise_right_shift(spread, 29, out=spare)).bitwise_or_(1)


def _spread_indices(box: Box, shape: Sequence[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(index + 1) * _GOLDEN for the row-major index in the whole tensor of each of the box's elements, in the box's own
    order, as chunks rows[:, None] + columns[None, :]: the product distributes over the sum, so few are taken."""
    starts, run = _runs(box, shape, device)
    if run == 0 or starts.numel() == 0:
        return
    columns = torch.arange(min(run, _CHUNK), device=device) * _GOLDEN
    for rows in starts.split(max(1, _CHUNK // run)):
        for begin in range(0, run, _CHUNK):
            yield (rows + begin + 1) * _GOLDEN, columns[: run - begin]


def _runs(box: Box, shape: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
    """The box as stretches that are contiguous in the whole tensor: where each starts, and their common length."""
    run, stride, starts = 1, 1, torch.zeros(1, dtype=torch.int64, device=device)
    joined = True  # everything inside the current dimension is covered whole
    for (offset, length), size in zip(reversed(box), reversed(shape)):
        if joined:
            run *= length
            starts = starts + offset * stride
        else:
            here = (torch.arange(length, device=device) + offset) * stride
            starts = (here[:, None] + starts).reshape(-1)
        joined = joined and length == size
        stride *= size
    return starts, run
