"""Which implementation of each operator runs here, and why. Free of torch; the choice itself stands in each `op.py`."""

import logging
from dataclasses import dataclass

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)  # compared by identity: `announce` looks at each call
class Implementation:
    """What runs for an operator. Example: Implementation("reference", "no kernel is built for it")."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


REFERENCE = Implementation("reference", "no kernel is built for it")
STRICT = Implementation("reference", "strict mode: bits that do not depend on the batch")
ONE_QUERY = Implementation("two products and a softmax", "one query a row on a CPU: quicker than a fused kernel")
SDPA = Implementation("torch scaled_dot_product_attention", "the library's own fused kernels")

_standing = {
    "adamw": REFERENCE,
    "attention": SDPA,
    "gae": REFERENCE,
    "linear_log_probs": REFERENCE,
    "rms_norm": REFERENCE,
    "rotary": REFERENCE,
    "swiglu": REFERENCE,
}
_announced: set[tuple[str, Implementation]] = set()


def explain() -> str:
    """One line an operator: what runs here, and why."""
    return "\n".join(f"{op}: {implementation}" for op, implementation in sorted(_standing.items()))


def announce(op: str, implementation: Implementation) -> None:
    """Say once in the log of a process which implementation of `op` ran. Silent while torch.compile traces: a log line
    would cut the graph."""
    import torch

    if not torch.compiler.is_compiling() and (op, implementation) not in _announced:
        _announced.add((op, implementation))
        _log.info("%s runs as %s", op, implementation)
