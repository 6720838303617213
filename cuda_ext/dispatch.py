"""Which implementation of each operator runs, and why: a kernel where one is built and fits, else the reference.

CUDA_EXT=auto|cuda|emulator|reference (`use` within a process) forces one; what is forced and cannot run is an error.
Importing this needs no torch. Left out: what fits an op beyond its tensors' device and dtypes; that stands in `op.py`.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cuda_ext import library

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)  # compared by identity: `announce` looks at each call
class Implementation:
    """What runs for an operator. Example: Implementation("reference", "no kernel is built for it")."""

    name: str
    reason: str
    kernel: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


REFERENCE = Implementation("reference", "no kernel is built for it")
STRICT = Implementation("reference", "strict mode: bits that do not depend on the batch")
ONE_QUERY = Implementation("two products and a softmax", "one query a row on a CPU: quicker than a fused kernel")
SDPA = Implementation("torch scaled_dot_product_attention", "the library's own fused kernels")
FORCED = Implementation("reference", "CUDA_EXT=reference")
ON_CPU = Implementation("reference", "on a CPU: CUDA_EXT=emulator runs the kernel, slowly")
NO_DTYPE = Implementation("reference", "the kernel takes float32, bfloat16 and float16")
EMULATED = Implementation("kernel", "on the CPU, by the emulator", kernel=True)

MODES = ("auto", "cuda", "emulator", "reference")
_OTHER = {"attention": SDPA}  # ops that are another library's
_mode = os.environ.get("CUDA_EXT", "auto")
_announced: set[tuple[str, Implementation]] = set()
_on_cards: dict[int, Implementation] = {}


@contextlib.contextmanager
def use(mode: str) -> Iterator[None]:
    """Within: as CUDA_EXT=`mode`."""
    global _mode
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def choose(op: str, *tensors: "Tensor") -> Implementation:
    """What runs `op`, which has a kernel, for these tensors; said once in the log."""
    implementation = _choice(op, tensors)
    announce(op, implementation)
    return implementation


def explain() -> str:
    """One line an operator: what runs here, and why."""
    ops = sorted(path.parent.name for path in library.ROOT.glob("*/op.py"))
    kernels = library.kernels()
    lines = {op: _OTHER.get(op, _anywhere() if op in kernels else REFERENCE) for op in ops}
    return "\n".join(f"{op}: {implementation}" for op, implementation in lines.items())


def announce(op: str, implementation: Implementation) -> None:
    """Say once in the log of a process which implementation of `op` ran. Silent while torch.compile traces: a log line
    would cut the graph."""
    import torch

    if not torch.compiler.is_compiling() and (op, implementation) not in _announced:
        _announced.add((op, implementation))
        _log.info("%s runs as %s", op, implementation)


def _choice(op: str, tensors: "tuple[Tensor, ...]") -> Implementation:
    if _mode not in MODES:
        raise ValueError(f"CUDA_EXT={_mode} is unknown: choose one of {', '.join(MODES)}")
    if _mode == "reference":
        return FORCED
    if any(not tensor.is_floating_point() or tensor.element_size() not in (2, 4) for tensor in tensors):
        return _or_refused(op, NO_DTYPE)
    if tensors[0].device.type == "cuda":
        return _or_refused(op, _on_card(tensors[0].device.index))
    if _mode == "emulator":
        return EMULATED
    return _or_refused(op, ON_CPU)


def _or_refused(op: str, implementation: Implementation) -> Implementation:
    if _mode == "cuda" and not implementation.kernel:
        raise RuntimeError(f"CUDA_EXT=cuda, but {op} would run as {implementation}")
    return implementation


def _on_card(index: int) -> Implementation:
    if index not in _on_cards:
        reason = library.why_not(index)
        if reason:
            _log.warning("cuda_ext: %s", reason)
        _on_cards[index] = Implementation("reference", reason) if reason else Implementation("kernel", "CUDA", True)
    return _on_cards[index]


_on_card._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as assume_constant_result, before torch is here


def _anywhere() -> Implementation:
    """For `explain`, which has no tensors."""
    if _mode == "reference":
        return FORCED
    if _mode == "emulator":
        return EMULATED
    reason = library.why_not(0)
    return Implementation("reference", reason) if reason else Implementation("kernel", "CUDA", True)
