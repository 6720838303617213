"""What each kernel takes beside its rivals, and what share of the card's own copy or product that is.

A card's ceilings are measured first, in the same minutes: a copy of 1 GiB and a product of two bf16 matrices. An op is
bound by memory where its operations a byte lie below the ridge, ceiling of products / ceiling of copies. Left out:
theoretical peaks, which no program reaches; where the lines go (`table`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cuda_ext.measure import Case, Row, cases_of, copy_case, measure
from cuda_ext.table import Line, Table


@dataclass(frozen=True)
class Ceilings:
    """Bytes and operations a second, measured."""

    copy: float
    product: float

    @property
    def ridge(self) -> float:
        """Operations a byte above which products bound an op."""
        return self.product / self.copy

    def least(self, case: Case) -> float:
        """Seconds that the card needs at least."""
        return max(case.moved / self.copy, case.flops / self.product)

    def facts(self) -> dict[str, float | str]:
        """For the head of a table."""
        import torch

        return {
            "torch": torch.__version__,
            "copies in GB/s": self.copy / 1e9,
            "products in TFLOP/s": self.product / 1e12,
            "ridge in operations a byte": self.ridge,
        }


def ceilings(device: str, size: int = 8192, gigabytes: float = 1.0) -> Ceilings:
    """By a copy, and by one product of two square bf16 matrices."""
    import torch

    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = Case(f"product of {size} x {size} bf16", lambda: a @ b, flops=2 * size**3)
    copy = copy_case(device, gigabytes)
    took = {case.name: next(measure(case, device)).median * 1e-6 for case in (copy, product)}
    return Ceilings(copy.moved / took[copy.name], product.flops / took[product.name])


def lines(op: str, rows: Iterable[Row], limits: Ceilings) -> Iterator[Line]:
    """Rows of a measurement beside the card's limits."""
    for row in rows:
        seconds, case = row.median * 1e-6, row.case
        figures = {
            "GB/s": case.moved / seconds / 1e9,
            "TFLOP/s": case.flops / seconds / 1e12,
            "% of the card": 100 * limits.least(case) / seconds,
        }
        yield Line(op, case.name, row.side, row.median, row.low, row.high, "us", figures)


def run(ops: list[str], device: str, card: str, folder: Path, limits: Ceilings, laps: int = 50) -> Path:
    """Measure `ops`, print their lines, add them to the card's table of today in `folder`. Returns the table's path."""
    table = Table(folder, card, limits.facts())
    print(f"{card}: copies {limits.copy / 1e9:,.0f} GB/s, products {limits.product / 1e12:,.1f} TFLOP/s, ", end="")
    print(f"ridge at {limits.ridge:,.0f} operations a byte")
    for op in ops:
        for case in cases_of(op, device):
            for line in lines(op, measure(case, device, laps), limits):
                table.add(line)
    return table.path
