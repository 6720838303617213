"""How our tensors lie in theirs: one table a family, read both ways.

An entry names one module of theirs and the modules of ours that make it up, one after another, or head by head; its
weight and its bias follow the same entry. So a tensor of ours is some runs of rows of one of theirs (`Piece`), and the
pieces of one of theirs cover its rows once; or it is several of theirs one upon another, the experts of a layer
(`Stack`). torch is imported where tensors move, so that the families can be listed without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from framework.core.records import Box

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Their module and ours; "{}" stands for the number of a layer, a second one of theirs for that of an expert.

    Example, GPT-2: Entry("transformer.h.{}.attn.c_attn", ("layers.{}.attention.q", "...k", "...v"), transposed=True).
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # they hold matrices as [inputs, outputs]
    by_head: bool = False  # q, k and v of one head, then those of the next (BLOOM)


@dataclass(frozen=True)
class Piece:
    """Where a tensor of ours lies: in `theirs` of shape `shape`, in runs of `run` rows, each `stride` after the last.

    Example, k of two heads of size 3 in BLOOM's query_key_value [18, D]: Piece("...", (18, D), 3, 3, 9, False).
    """

    theirs: str
    shape: Shape
    first: int
    run: int
    stride: int
    transposed: bool

    def runs(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """(start, length) in their rows of our rows `start` to `start + length`."""
        end = start + length
        while start < end:
            number, inside = divmod(start, self.run)
            here = min(self.run - inside, end - start)
            yield self.first + number * self.stride + inside, here
            start += here

    def read(self, stored: Any, box: Box) -> Tensor:
        """Our box out of `stored`, a safetensors slice of theirs, and nothing else of it."""
        import torch

        (row, rows), *more = box
        columns = tuple(slice(start, start + length) for start, length in more)
        parts = []
        for start, length in self.runs(row, rows):
            place = (slice(start, start + length), *columns)
            parts.append(stored[place[::-1]].mT if self._turned else stored[place])
        return torch.cat(parts) if len(parts) != 1 else parts[0].contiguous()

    def write(self, theirs: Tensor, ours: Tensor) -> None:
        """Put all of ours where it lies."""
        rows, done = theirs.mT if self._turned else theirs, 0
        for start, length in self.runs(0, len(ours)):
            rows[start : start + length] = ours[done : done + length]
            done += length

    @property
    def _turned(self) -> bool:
        return self.transposed and len(self.shape) == 2


@dataclass(frozen=True)
class Stack:
    """A tensor of ours [E,...] whose first index counts tensors of theirs. Example: Stack((Piece(...), Piece(...)))"""

    parts: tuple[Piece, ...]

    def read(self, find: Callable[[str], Any], box: Box) -> Tensor:
        """Our box out of those of theirs that it touches; `find` gives a safetensors slice by their name."""
        import torch

        (first, count), *inner = box
        return torch.stack([p.read(find(p.theirs), tuple(inner)) for p in self.parts[first : first + count]])


Place = Piece | Stack


def parts_of(place: Place) -> tuple[Piece, ...]:
    """The pieces of a place, one for each tensor of theirs."""
    return place.parts if isinstance(place, Stack) else (place,)


def pieces(table: Iterable[Entry], shapes: Mapping[str, Shape], heads: int) -> dict[str, Place]:
    """Where each parameter of ours lies, by its name; `shapes` are ours. KeyError: the table has no place for one."""
    places = {module: (entry, index) for entry in table for index, module in enumerate(entry.ours)}
    return {name: _piece(name, places, shapes, heads) for name in shapes}


def _piece(name: str, places: Mapping[str, tuple[Entry, int]], shapes: Mapping[str, Shape], heads: int) -> Place:
    module, _, leaf = name.rpartition(".")
    number = re.search(r"\d+", module)
    entry, index = places[re.sub(r"\d+", "{}", module)]
    layer = number[0] if number else ""
    if entry.theirs.count("{}") == 2:
        count, *shape_of_one = shapes[name]
        names = [f"{entry.theirs.format(layer, expert)}.{leaf}" for expert in range(count)]
        return Stack(tuple(_all_of(theirs, tuple(shape_of_one)) for theirs in names))
    sizes = [shapes[f"{ours.format(layer)}.{leaf}"][0] for ours in entry.ours]
    shape = (sum(sizes), *shapes[name][1:])
    groups = heads if entry.by_head else 1
    return Piece(
        theirs=f"{entry.theirs.format(layer)}.{leaf}",
        shape=shape[::-1] if entry.transposed else shape,
        first=sum(sizes[:index]) // groups,
        run=sizes[index] // groups,
        stride=sum(sizes) // groups,
        transposed=entry.transposed,
    )


def _all_of(theirs: str, shape: Shape) -> Piece:
    return Piece(theirs, shape, first=0, run=shape[0], stride=shape[0], transposed=False)


def joined(weights: Iterable[tuple[str, Tensor]], place_of: Callable[[str], Place]) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) pairs -> (their name, tensor): each of theirs as soon as all of it is there."""
    import torch

    begun: dict[str, tuple[Tensor, int]] = {}
    for piece, ours in _taken_apart(weights, place_of):
        theirs, missing = begun.pop(piece.theirs, (None, 0))
        if theirs is None:
            theirs = torch.empty(piece.shape, dtype=ours.dtype)
            missing = theirs.numel()
        piece.write(theirs, ours.detach().cpu())
        if missing == ours.numel():
            yield piece.theirs, theirs
        else:
            begun[piece.theirs] = (theirs, missing - ours.numel())
    if begun:
        raise ValueError(f"parts of {', '.join(begun)} were not given")


def _taken_apart(
    weights: Iterable[tuple[str, Tensor]], place_of: Callable[[str], Place]
) -> Iterator[tuple[Piece, Tensor]]:
    for name, ours in weights:
        place = place_of(name)
        yield from zip(parts_of(place), ours if isinstance(place, Stack) else (ours,), strict=True)
