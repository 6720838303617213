"""Which implementation of each operator runs, and why: a kernel where one is built and fits, else the reference.

CUDA_EXT=auto|cuda|emulator|reference (`use` within a process) forces one; what is forced and cannot run is an error.
With auto, `prefer` says by the kind of an op which library's is wanted; a call that it cannot take runs as the
reference, and the log says so (`why_not` refuses before, where none could). Importing this needs no torch. Left out:
what fits an op beyond its tensors' device and dtypes; that stands in `op.py`.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cuda_ext import apex, library
from cuda_ext.attention import flash
from cuda_ext.implementation import Implementation

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)


REFERENCE = Implementation("reference", "no kernel is built for it")
STRICT = Implementation("reference", "strict mode: bits that do not depend on the batch")
ONE_QUERY = Implementation("two products and a softmax", "one query a row on a CPU: quicker than a fused kernel")
SDPA = Implementation("torch scaled_dot_product_attention", "the library's own fused kernels")
FORCED = Implementation("reference", "CUDA_EXT=reference")
ON_CPU = Implementation("reference", "on a CPU: CUDA_EXT=emulator runs the kernel, slowly")
NO_DTYPE = Implementation("reference", "the kernel takes float32, bfloat16 and float16")
EMULATED = Implementation("kernel", "on the CPU, by the emulator", kernel=True)
TORCH = Implementation("reference", "the recipe asks for torch's own")

MODES = ("auto", "cuda", "emulator", "reference")
CHOICES = {  # kind of op -> whose can be wanted
    "attention": ("auto", "torch", "flash", "reference"),
    "norm": ("auto", "kernel", "torch", "apex"),
    "optimizer": ("auto", "kernel", "torch", "apex"),
}
_KINDS = {"rms_norm": "norm", "layer_norm": "norm", "adamw": "optimizer"}
_wanted: dict[str, str] = {}
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


def prefer(**wanted: str) -> None:
    """From now on, in this process: whose implementation each kind of CHOICES takes; auto where nothing is said."""
    for kind, choice in wanted.items():
        if choice not in CHOICES[kind]:
            raise ValueError(f"ops.{kind}={choice} is unknown: choose one of {', '.join(CHOICES[kind])}")
    _wanted.clear()
    _wanted.update(wanted)


@contextlib.contextmanager
def preferring(**wanted: str) -> Iterator[None]:
    """Within: as after `prefer`."""
    before = dict(_wanted)
    prefer(**wanted)
    try:
        yield
    finally:
        prefer(**before)


def preferred(kind: str) -> str:
    """Whose implementation is wanted."""
    return _wanted.get(kind, "auto")


def choose(op: str, *tensors: "Tensor") -> Implementation:
    """What runs `op`, which has a kernel, for these tensors; said once in the log."""
    implementation = _choice(op, tensors)
    announce(op, implementation)
    return implementation


def explain() -> str:
    """One line an operator: what runs here, and why."""
    ops = sorted(path.parent.name for path in library.ROOT.glob("*/op.py"))
    return "\n".join(f"{op}: {explained(op)}" for op in ops)


def why_not(kind: str, choice: str, card: flash.Card | None) -> str:
    """Why a process on such a card (None: on a CPU) cannot have `choice` for `kind` of CHOICES; "" where it can."""
    if choice == "flash":
        return flash.why_not(card) if card else f"{flash.explain()}; it runs on GPUs, and this is a CPU"
    if choice not in ("kernel", "apex"):
        return ""
    if _mode == "reference" or (choice == "apex" and _mode != "auto"):
        return f"CUDA_EXT={_mode} leaves no choice"
    if choice == "apex":
        return apex.why_not(kind) or ("" if card else "NVIDIA apex runs on GPUs, and this is a CPU")
    return "" if _mode == "emulator" else library.why_not(0)


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
    if other := _of_the_recipe(op, tensors):
        return other
    if any(not tensor.is_floating_point() or tensor.element_size() not in (2, 4) for tensor in tensors):
        return _or_refused(op, NO_DTYPE)
    if tensors[0].device.type == "cuda":
        return _or_refused(op, _on_card(tensors[0].device.index))
    if _mode == "emulator":
        return EMULATED
    return _or_refused(op, ON_CPU)


def _of_the_recipe(op: str, tensors: "tuple[Tensor, ...]") -> Implementation | None:
    """What `prefer` said in place of a kernel."""
    kind = _KINDS.get(op, "")
    wanted = preferred(kind) if _mode == "auto" else "auto"
    if wanted == "apex":
        return apex.choice(kind, tensors)
    return TORCH if wanted == "torch" else None


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


def explained(op: str) -> Implementation:
    """What runs `op` where its tensors do not stand in the way: on card 0."""
    if op == "attention":
        return Implementation(SDPA.name, f"{SDPA.reason}; ops.attention={preferred(op)}; {flash.explain()}")
    if op not in library.kernels():
        return REFERENCE
    if other := _of_the_recipe(op, ()):
        return other
    if _mode == "reference":
        return FORCED
    if _mode == "emulator":
        return EMULATED
    reason = library.why_not(0)
    return Implementation("reference", reason) if reason else Implementation("kernel", "CUDA", True)
