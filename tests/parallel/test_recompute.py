"""Blocks that several ranks compute together: the same gradients, bit for bit, when backward computes them again."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # imported once, before the ranks are forked

from framework.core.runtime import Runtime
from framework.parallel.config import ContextForm, ParallelConfig, Recompute
from tests.distributed import run_ranks
from tests.engine.cases import build, gradients, language_loss, packed
from tests.engine.lattice import MODEL

LAYOUTS = {
    "tp": ParallelConfig("tp", tensor=0),
    "ring": ParallelConfig("cp", context=0),
    "exchange": ParallelConfig("cp", context=0, context_form=ContextForm.EXCHANGE),
}
AGAIN = [Recompute.SELECTIVE, Recompute.FULL]


def _same(runtime: Runtime) -> dict[tuple[str, Recompute], bool]:
    def computed(parallel: ParallelConfig) -> dict[str, torch.Tensor]:
        engine: Any = build(runtime, parallel, model=MODEL)
        engine.forward_backward(packed(2), language_loss)
        return gradients(engine)

    found = {}
    for name, parallel in LAYOUTS.items():
        plain = computed(parallel)
        for how in AGAIN:
            again = computed(replace(parallel, recompute=how))
            found[name, how] = all(torch.equal(plain[parameter], again[parameter]) for parameter in plain)
    return found


@pytest.fixture(scope="module")
def same() -> list[dict[tuple[str, Recompute], bool]]:
    return run_ranks(_same, 2)


@pytest.mark.parametrize("how", AGAIN, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_again(same: Any, layout: str, how: Recompute) -> None:
    assert all(rank[layout, how] for rank in same)
