"""Where two runs part: the first step, tensor and rank at which their weights or gradients differ, from digests.jsonl.

A line of it is a `Trace`: of every parameter's weights, and of its gradient before clipping, which bits each rank held,
and, however the parameter was laid out, its norm and four projections on fixed random signs. Equal layouts are held to
the bits. Others to the bound of law Layout: rounding changes no element of x by more than tolerance x scale, scale =
max(RMS of x, RMS of all tensors); then norm and projections, sums over n elements of independent errors, move by less
than four deviations of sqrt(n) x tolerance x scale. Left out: how they are measured (`engine.sketch`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite, nan, sqrt
from pathlib import Path
from typing import Any

from framework.tracking.journal import read_lines

FILE = "digests.jsonl"
GRADIENTS, WEIGHTS = "gradients", "weights"
_ORDER = (GRADIENTS, WEIGHTS)  # of a step: its gradients make its weights
_UNITS = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-8}  # the roundings of engine.precision
_ADAPTIVE = 3.0  # within a tensor: AdamW divides each element by its |g| + eps


@dataclass(frozen=True)
class Sketch:
    """Of one tensor. Example: Sketch(600, {"0": "9f...", "1": "03..."}, 2.5, (0.3, -1.2, 4.0, 0.8), ())"""

    size: int
    hashes: Mapping[str, str]  # rank -> of the bits of the part that it holds
    norm: float | None  # L2; None: not finite
    projections: Sequence[float | None]
    torn: Sequence[int] = ()  # ranks whose copy of a part differs from the first rank's that holds it too


@dataclass(frozen=True)
class Trace:
    """One step. `layout` names which rank holds which part; `tokens` are those of the step."""

    layout: str
    tokens: int
    tensors: Mapping[str, Mapping[str, Sketch]]  # gradients, weights -> name -> its sketch

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Trace":
        """The inverse of `record`."""
        tensors = {
            kind: {name: Sketch(**sketch) for name, sketch in named.items()}
            for kind, named in record["tensors"].items()
        }
        return cls(record["layout"], record["tokens"], tensors)


def read_traces(folder: Path) -> dict[int, Trace]:
    """By step; of several lines of one the last counts."""
    found = {}
    for line in read_lines(folder / FILE):
        try:
            found[int(line["step"])] = Trace.of(line)
        except (KeyError, TypeError, AttributeError):
            continue
    return found


def same_layout(left: Mapping[int, Trace], right: Mapping[int, Trace]) -> bool:
    """Whether every rank held the same parts at every common step."""
    return all(left[step].layout == right[step].layout for step in left.keys() & right.keys())


def by_bits(left: Mapping[int, Trace], right: Mapping[int, Trace]) -> str:
    """One sentence, for runs that should hold the same bits."""
    steps = sorted(left.keys() & right.keys())
    for step in steps:
        for kind in _ORDER:
            ours, theirs = _both(left[step], right[step], kind)
            found = [name for name in ours if ours[name].hashes != theirs[name].hashes]
            if found:
                scale = _Scale(ours)
                name = max(found, key=lambda each: scale.deviation(ours[each], theirs[each]))
                ranks = [r for r, bits in ours[name].hashes.items() if theirs[name].hashes.get(r) != bits]
                rest = f", most of {len(found)} tensors there" if len(found) > 1 else ""
                return f"first differ at step {step} in {_place(kind, name)}, on {_ranks(ranks)}{rest}"
    return f"the same bits in every tensor on every rank at all {len(steps)} common steps"


def by_bound(left: Mapping[int, Trace], right: Mapping[int, Trace], precision: str, lr: float) -> str:
    """One sentence, for runs whose layouts differ. `precision` and `lr` are the recipe's."""
    steps, model = sorted(left.keys() & right.keys()), _Bound(precision, left, right)
    closest = _Finding(-1.0, 1.0, "")
    reach: dict[str, float] = {}
    for step in steps:
        for kind in _ORDER:
            found = _findings(left[step], right[step], kind, model.at(step), lr, reach)
            most = max(found, key=lambda each: each.ratio, default=closest)
            where = f"at step {step} in {_place(kind, most.name)}"
            if most.ratio > 1:
                beyond = sum(each.ratio > 1 for each in found)
                rest = f", most of {beyond} tensors there" if beyond > 1 else ""
                return f"differ by more than rounding, first {where}{rest}: {most}, the bound there ({model})"
            if most.ratio > closest.ratio:
                closest = _Finding(most.deviation, most.limit, where)
    return (
        f"equal within the bound over {len(steps)} common steps (largest deviation, for its bound: {closest} "
        f"{closest.name}; the bound is {model})"
    )


def torn(traces: Mapping[int, Trace]) -> str:
    """Where copies of a part that should be equal first are not; "" where none are."""
    for step in sorted(traces):
        for kind in _ORDER:
            for name, sketch in traces[step].tensors.get(kind, {}).items():
                if sketch.torn:
                    ranks = _ranks([str(rank) for rank in sketch.torn])
                    return f"copies differ from step {step} on in {_place(kind, name)}, on {ranks}"
    return ""


class _Scale:
    """What errors of the tensors of a step are measured by: the RMS of each, or of all where that is larger."""

    def __init__(self, tensors: Mapping[str, Sketch]):
        squares = sum((sketch.norm or 0.0) ** 2 for sketch in tensors.values())
        self._all = sqrt(squares / max(1, sum(sketch.size for sketch in tensors.values())))

    def floor(self, sketch: Sketch) -> float:
        """The norm that a tensor of its size would have at the RMS of all."""
        return sqrt(sketch.size) * self._all

    def rms(self, sketch: Sketch) -> float:
        """Of a tensor, or of all."""
        return max((sketch.norm or 0.0) / sqrt(max(1, sketch.size)), self._all)

    def deviation(self, ours: Sketch, theirs: Sketch) -> float:
        """The largest |difference| of norm and projections, over sqrt(size) x scale."""
        pairs = zip((ours.norm, *ours.projections), (theirs.norm, *theirs.projections), strict=True)
        most = max(abs(_number(a) - _number(b)) if a != b else 0.0 for a, b in pairs)
        scale = sqrt(ours.size) * self.rms(ours)
        return most / scale if isfinite(most) and scale else inf if most else 0.0


@dataclass(frozen=True)
class _Bound:
    """The error model: a gradient is a sum over a step's tokens in an order that the layout chooses, behind a few dozen
    roundings a layer; errors add up like a random walk, within a step and over steps."""

    precision: str
    left: Mapping[int, Trace]
    right: Mapping[int, Trace]

    def at(self, step: int) -> float:
        """The deviation that rounding explains after `step` updates."""
        return 4 * _UNITS.get(self.precision, _UNITS["fp32"]) * sqrt(self._terms) * 4 * _ADAPTIVE * sqrt(max(1, step))

    @property
    def _terms(self) -> float:
        traces = [*self.left.values(), *self.right.values()]
        names = {name for trace in traces for named in trace.tensors.values() for name in named}
        layers = {found[1] for name in names if (found := re.match(r"layers\.(\d+)\.", name))}
        return max(trace.tokens for trace in traces) + 32 * len(layers)

    def __str__(self) -> str:
        unit = {"fp64": "2^-53", "bf16": "2^-8"}.get(self.precision, "2^-24")
        return (
            f"4 x {unit} x sqrt(tokens + 32 x layers = {self._terms:g}) x {4 * _ADAPTIVE:g} x sqrt(step), for weights "
            "at least x optim.lr / RMS of weights x RMS of all gradients / RMS of theirs"
        )


@dataclass(frozen=True)
class _Finding:
    deviation: float
    limit: float
    name: str

    @property
    def ratio(self) -> float:
        return self.deviation / self.limit

    def __str__(self) -> str:
        return f"{self.deviation:.1e} of {self.limit:.1e}"


def _findings(left: Trace, right: Trace, kind: str, limit: float, lr: float, reach: dict[str, float]) -> list[_Finding]:
    """The deviation of every tensor. AdamW makes steps of about lr from small and large gradients alike, and so more
    of the same error where the gradient is smaller: `reach` keeps how much, by name."""
    ours, theirs = _both(left, right, kind)
    scale, found = _Scale(ours), []
    for name, sketch in ours.items():
        if kind == GRADIENTS and scale.floor(sketch):
            small = scale.floor(sketch) / sketch.norm if sketch.norm else inf
            reach[name] = max(reach.get(name, 1.0), small)
        wide = max(1.0, reach.get(name, 1.0) * lr / scale.rms(sketch)) if kind == WEIGHTS and sketch.norm else 1.0
        found.append(_Finding(scale.deviation(sketch, theirs[name]), limit * wide, name))
    return found


def _both(left: Trace, right: Trace, kind: str) -> tuple[dict[str, Sketch], dict[str, Sketch]]:
    """The tensors that both have."""
    ours, theirs = left.tensors.get(kind, {}), right.tensors.get(kind, {})
    names = [name for name in ours if name in theirs]
    return {name: ours[name] for name in names}, {name: theirs[name] for name in names}


def _place(kind: str, name: str) -> str:
    return f"the {'gradient' if kind == GRADIENTS else 'weights'} of {name}"


def _ranks(ranks: Sequence[str]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"


def _number(x: float | None) -> float:
    return nan if x is None else x
