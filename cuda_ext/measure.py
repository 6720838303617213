"""How long kernels take on a card, beside their rivals in the same minutes, as a share of what the card can move.

`benchmark.py` of each op says what to compare (`cases`); `python -m cuda_ext benchmark OP` measures it. Every lap
starts with a cold cache: a buffer larger than it is written first. Ops and rivals take turns. Left out: comparing
cards and dates (`launch/gpu`).
"""

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Rivals = Mapping[str, Callable[..., Any]]
_COLD = 256 << 20  # bytes, more than any card's cache
_WARM_UP, _LAPS = 5, 50


@dataclass(frozen=True)
class Case:
    """One size of an op. `moved` is the least that memory must carry, in bytes; `flops` what must be computed."""

    name: str
    ours: Callable[[], object]
    rivals: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    moved: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Row:
    """What one side of a case took: microseconds, the median and the 10th and 90th percentile."""

    case: Case
    side: str
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        rate = [f"{self.case.moved / self.median / 1e3:,.0f} GB/s"] if self.case.moved else []
        rate += [f"{self.case.flops / self.median / 1e6:,.0f} TFLOP/s"] if self.case.flops else []
        return f"{self.case.name:<40} {self.side:<16} {self.median:>9,.1f} ({self.low:,.1f}-{self.high:,.1f}) us  " + (
            ", ".join(rate)
        )


def cases_of(op: str, device: str) -> Iterator[Case]:
    """What `op`'s benchmark.py compares, with tensors on `device`."""
    yield from importlib.import_module(f"cuda_ext.{op}.benchmark").cases(device)


def measure(case: Case, device: str = "cuda", laps: int = _LAPS) -> Iterator[Row]:
    """Ours first, then each rival; their laps alternate."""
    sides = {"ours": case.ours, **case.rivals}
    cold = torch.empty(_COLD if device == "cuda" else 0, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for lap in range(_WARM_UP + laps):
        for side, call in sides.items():
            cold.zero_()
            taken = _lap(call, device)
            if lap >= _WARM_UP:
                times[side].append(taken)
    for side, taken_by in times.items():
        deciles = statistics.quantiles(taken_by, n=10) if len(taken_by) > 1 else [taken_by[0]] * 9
        yield Row(case, side, statistics.median(taken_by), deciles[0], deciles[-1])


def copy_case(device: str, gigabytes: float = 1.0) -> Case:
    """What a card moves when it does nothing else: the measure of all others."""
    source = torch.empty(int(gigabytes * 2**30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Case(f"copy of {gigabytes:g} GiB", lambda: target.copy_(source), moved=2 * source.numel())


def rival(name: str, module: str, make: Callable[[Any], Callable[..., Any]]) -> Rivals:
    """{name: what `make` makes of another library's module}; nothing where that is not installed, or cannot be used."""
    try:
        return {name: make(importlib.import_module(module))}
    except (ImportError, OSError, AttributeError):  # OSError: a library that it opens; AttributeError: an older one
        return {}


def beside_torch(
    name: str,
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    inputs: tuple[Any, ...],
    moved: int = 0,
    flops: int = 0,
    others: Rivals | None = None,
) -> Case:
    """`ours` beside the same in torch's own words, eager and compiled: the rivals that cost nothing to write; and
    `others`."""
    fast: Callable[..., Any] = torch.compile(eager, fullgraph=True)
    sides = {"eager": eager, "compile": fast, **(others or {})}
    rivals = {side: functools.partial(call, *inputs) for side, call in sides.items()}
    return Case(name, functools.partial(ours, *inputs), rivals, moved, flops)


def backward(
    name: str,
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    moved: int = 0,
    flops: int = 0,
    others: Rivals | None = None,
) -> Case:
    """The backward passes alone, all from `gradients` of the outputs: each graph is made once and kept."""
    sides = {"ours": ours, "eager": eager, "compile": torch.compile(eager, fullgraph=True), **(others or {})}
    return backward_of(name, sides, inputs, gradients, moved, flops)


def backward_of(
    name: str, sides: Rivals, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], moved: int = 0, flops: int = 0
) -> Case:
    """The backward passes of `sides`, one of which is "ours"."""
    graphs = {side: _backward(call, inputs, gradients) for side, call in sides.items()}
    return Case(name, graphs.pop("ours"), graphs, moved, flops)


def _backward(
    call: Callable[..., Any], inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> Callable[[], object]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in inputs]
    outputs = call(*leaves)
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


def _lap(call: Callable[[], object], device: str) -> float:
    """Microseconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)
    begin, end = (torch.Event(device=device, enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)
