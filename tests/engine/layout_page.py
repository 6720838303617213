"""docs/layouts.md: one row a layout, with what was measured.

python -m tests.engine.layout_page        runs all layouts of up to four ranks and writes it (some minutes)
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from framework.engine.config import Precision
from tests.distributed import run_ranks
from tests.engine.lattice import (
    LAYOUTS,
    MODEL,
    PLACES,
    PRETRAINING,
    ROWS,
    STEPS,
    WORLDS,
    ZERO,
    Course,
    Deviation,
    Found,
    Layout,
    Question,
    alone,
    bound,
    questions,
    refused,
    save_one,
    visit,
    worst,
)

DOC = Path(__file__).resolve().parents[2] / "docs/layouts.md"


@dataclass(frozen=True)
class Row:
    """One layout of the page."""

    layout: Layout
    deviations: Mapping[Question, Deviation]
    collectives: int
    bytes: int

    def __str__(self) -> str:
        by = {name: found for (name, precision), found in self.deviations.items() if name != PRETRAINING}
        other, second = next(iter(by.items()))
        fp64 = self.deviations.get((PRETRAINING, Precision.FP64))
        fp32, bf16 = (self.deviations[PRETRAINING, p] for p in (Precision.FP32, Precision.BF16))
        exact = f"{max(fp64.gradient, fp64.after):.0e}" if fp64 else ""
        shown = " | ".join([exact, *(f"{figure:.0e}" for figure in (fp32.gradient, fp32.after, bf16.gradient))])
        also = f"{other} {max(second.gradient, second.after):.0e}"
        return f"| {self.fixed} | {shown} | {also} | equal |"

    @property
    def fixed(self) -> str:
        """What is the same on every machine."""
        return f"{self.layout.name} | {self.layout.world} | {self.collectives} | {self.bytes:,}"


def row_of(layout: Layout, found: Sequence[Found]) -> Row:
    """From what its ranks found."""
    deviations = {question: worst(found, question) for question in found[0].deviations}
    return Row(layout, deviations, found[0].collectives, found[0].bytes)


def render(rows: Sequence[Row]) -> str:
    """The whole page."""
    no = [f"| {layout.name} | {layout.world} | {line} |" for world in WORLDS for layout, line in refused(world)]
    return "\n".join([HEAD, *map(str, rows), REFUSED, *no]) + "\n"


HEAD = f"""# Every layout, one answer

Written by `python -m tests.engine.layout_page`; `tests/engine/test_lattice.py` does the same in CI, holds every figure
to its bound, and refuses a page whose layouts, collectives or bytes are not those found.

A tiny model of awkward sizes ({MODEL.num_layers} layers, hidden {MODEL.hidden_size}, {MODEL.num_heads} heads of
{MODEL.head_size} on {MODEL.kv_heads} key heads, {MODEL.vocab_size} tokens, tied embeddings, biases; rows of {PLACES}
places with two documents and padding, and last rows without any label) takes {STEPS} AdamW steps under every layout of
two to four ranks, on CPUs by gloo. Its losses, every gradient and the weights at the end are held against one process's
by the measure of law Layout: max|Δ| ≤ tol × max(max|x|, RMS of all), per tensor, worst rank. Bounds:

- fp64: {bound(Precision.FP64):.0e} for everything.
- fp32: {bound(Precision.FP32):.1e} for the first gradient, a sum over {ROWS * PLACES} tokens in another order after the
  roundings before it; {100 * bound(Precision.FP32):.1e} for later gradients and the weights, since AdamW divides by
  |g| + 1e-5.
- bf16: {bound(Precision.BF16):.1e} for the first gradient by the same model, 5e-3 for losses.

*Another update* is that of SFT, of the reward model, of the actor (clipped, with an entropy bonus) or of the critic, in
turn, in fp64. Under every layout a checkpoint of one process is read and written again, too: each tensor keeps its
hash, optimizer states included. *Collectives* and *bytes* are what rank 0 takes part in and hands over in one fp32 step
of all {ROWS} rows, four to a micro-batch; at such sizes they say how layouts compare, not what a real model sends.

*replicate* and *shard* ranks take rows of their own and hold copies or shards of the parameters (`parallel=ddp`,
`fsdp`, `hsdp`); *context* ranks share out a row's places, by a ring or by an exchange of heads; *tensor* ranks every
matrix; *pipeline* ranks the layers. The zero rows, of two and four ranks, are DeepSpeed's
([layouts](architecture.md#layouts)): its masters are fp32 whatever computes, so the other update is in fp32, too, and
of its gradients the first alone can be had.

| layout | ranks | collectives | bytes | fp64 | fp32, first | fp32, later | bf16, first | another update | status |
|---|---|---|---|---|---|---|---|---|---|"""

REFUSED = """
## Refused by name, before anything starts

These do not fit the model above.

| layout | ranks | what is said |
|---|---|---|"""


def measured(folder: Path) -> Iterator[Row]:
    """Row after row, each said as it comes."""
    one: dict[Question, Course] = {}
    save_one(folder)
    for index, layout in enumerate([*LAYOUTS, *ZERO]):
        asked = questions(index)
        one |= {question: alone(*question) for question in asked if question not in one}
        answers = {question: one[question] for question in asked}
        yield (row := row_of(layout, run_ranks(visit, layout.world, layout, answers, folder, timeout_s=240)))
        print(row, file=sys.stderr, flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        DOC.write_text(render(list(measured(Path(place)))), encoding="utf-8")
