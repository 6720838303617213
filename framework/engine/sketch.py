"""What is written down of an engine's weights and gradients, so that two runs can be compared tensor by tensor.

Each rank takes the hashes, squares and projections of the parts that it holds; on one of them they become a
`tracking.divergence.Trace`. Nothing is gathered but these few numbers. Left out: what is made of them (there).
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.checkpoint.integrity import tensor_hash
from framework.checkpoint.manager import gather_objects
from framework.core import random
from framework.core.config import digest
from framework.core.deadline import deadline
from framework.core.records import Box, whole
from framework.engine.protocol import Engine, Piece
from framework.tracking.divergence import GRADIENTS, WEIGHTS, Sketch, Trace

_AT_ONCE = 1 << 18  # elements; a dozen int64 buffers of them are held
_SMALL = 1 << 14  # elements of a part whose signs are kept


@dataclass(frozen=True)
class Share:
    """What a rank says of one piece. `sums`: its squares and projections, where it speaks for the piece."""

    name: str
    size: int  # of the whole tensor
    box: Box
    bits: str  # 16 hex digits
    sums: tuple[float, ...] = ()


class Tracer:
    """Writes a trace every so many steps (0 = never), of weights and of the gradients that made them. Collective."""

    def __init__(self, engine: Engine, write: Callable[[int, Trace], None], every: int):
        self._engine, self._write, self._every = engine, write, every
        self._gradients: list[Share] = []
        self.tokens = 0.0  # of the step

    def look(self, step: int) -> None:
        """Take the gradients of `step`, before they are clipped."""
        self._gradients = take(self._engine.pieces(gradients=True)) if self._is_due(step) else []

    def write(self, step: int) -> None:
        """Take the weights after `step`, and write down what all ranks have taken."""
        if self._is_due(step):
            with deadline("the gathering of sketches"):
                said = gather_objects((self._gradients, take(self._engine.pieces())))
            self._write(step, trace([mine for mine, _ in said], [mine for _, mine in said], self.tokens))

    def _is_due(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0


def take(pieces: Iterable[Piece]) -> list[Share]:
    """Of all pieces that this rank holds."""
    shares = []
    for piece in pieces:
        tensor = piece.tensor.detach()
        bits = f"{tensor_hash(tensor, piece.box, piece.shape):016x}"
        sums = tuple(project(piece).tolist()) if piece.speaks else ()
        shares.append(Share(piece.name, torch.Size(piece.shape).numel(), piece.box, bits, sums))
    return shares


def trace(gradients: Sequence[Sequence[Share]], weights: Sequence[Sequence[Share]], tokens: float = 0.0) -> Trace:
    """Of all ranks' shares, by rank; a step's gradients may be missing."""
    layout = digest([[(share.name, share.box) for share in shares] for shares in weights])
    return Trace(layout, int(tokens), {GRADIENTS: _sketches(gradients), WEIGHTS: _sketches(weights)})


def project(piece: Piece) -> Tensor:
    """[5] float64: the sum of squares of a piece, and of its elements times the random signs of their places in the
    whole: four independent rows. Sums over pieces are those of the whole, however it is cut."""
    total, flat = torch.zeros(5, dtype=torch.float64), piece.tensor.detach().reshape(-1)
    signs = _kept_signs if flat.numel() <= _SMALL else _signs
    for start in range(0, flat.numel(), _AT_ONCE):
        x = flat[start : start + _AT_ONCE].double()
        drawn = signs(piece.name, piece.shape, piece.box, start, len(x), x.device)
        total += torch.cat([x.square().sum().reshape(1), drawn.double() @ x]).cpu()
    return total


def _signs(name: str, shape: tuple[int, ...], box: Box, start: int, count: int, device: torch.device) -> Tensor:
    """[4, count] int8 of -1 and 1, from element `start` of the part on."""
    places = _places(shape, box, torch.arange(start, start + count, device=device))
    return random.signs(random.key(0, f"projection:{name}"), places)


_kept_signs = functools.lru_cache(maxsize=512)(_signs)  # to draw a few signs takes as long as to draw many


def _places(shape: tuple[int, ...], box: Box, index: Tensor) -> Tensor:
    """Row-major numbers in the whole tensor of the elements numbered `index` in the part."""
    if box[1:] == whole(shape)[1:]:
        return index + box[0][0] * math.prod(shape[1:]) if box else index
    place, stride = torch.zeros_like(index), 1
    for (offset, length), size in zip(reversed(box), reversed(shape)):
        place += (index % length + offset) * stride
        index, stride = index // length, stride * size
    return place


def _sketches(ranks: Sequence[Sequence[Share]]) -> dict[str, Sketch]:
    found: dict[str, list[tuple[int, Share]]] = {}
    for rank, shares in enumerate(ranks):
        for share in shares:
            found.setdefault(share.name, []).append((rank, share))
    return {name: _sketch(held) for name, held in found.items()}


def _sketch(held: Sequence[tuple[int, Share]]) -> Sketch:
    sums = [sum(column) for column in zip(*(share.sums for _, share in held if share.sums), strict=True)]
    square, *projections = [x if math.isfinite(x) else None for x in sums]
    hashes: dict[str, str] = {}
    first: dict[Box, str] = {}
    torn = []
    for rank, share in held:
        hashes[str(rank)] = hashes.get(str(rank), "") + share.bits
        if first.setdefault(share.box, share.bits) != share.bits:
            torn.append(rank)
    return Sketch(held[0][1].size, hashes, None if square is None else math.sqrt(square), projections, torn)
