"""All ops of a card in one table: what each takes, what share of the card's own copy or product that is, and what has
become slower since the last table of the same card.

A card's ceilings are measured first, in the same minutes: a copy of 1 GiB and a product of two bf16 matrices. An op is
bound by memory where its operations a byte lie below the ridge, ceiling of products / ceiling of copies. Left out:
theoretical peaks, which no program reaches.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from cuda_ext.measure import Case, Row, cases_of, copy_case, measure

_SLOWER = 1.05
_RED, _PLAIN = "\033[31m", "\033[0m"


@dataclass(frozen=True)
class Line:
    """One side of one case. `share`: of what the card's ceiling allows."""

    op: str
    case: str
    side: str
    microseconds: float
    low: float
    high: float
    gigabytes: float
    teraflops: float
    share: float


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
        yield Line(
            op, case.name, row.side, row.median, row.low, row.high,
            case.moved / seconds / 1e9, case.flops / seconds / 1e12, limits.least(case) / seconds,
        )  # fmt: skip


def run(ops: list[str], device: str, card: str, folder: Path, limits: Ceilings, laps: int = 50) -> Path:
    """Measure `ops`, print their lines, write DATE-CARD.json and .md into `folder`. Returns the table's path."""
    before = _last(folder, card)
    done: list[Line] = []
    print(f"{card}: copies {limits.copy / 1e9:,.0f} GB/s, products {limits.product / 1e12:,.1f} TFLOP/s, ", end="")
    print(f"ridge at {limits.ridge:,.0f} operations a byte")
    for op in ops:
        for case in cases_of(op, device):
            for line in lines(op, measure(case, device, laps), limits):
                done.append(line)
                print(_shown(line, before), flush=True)
    return _write(folder, card, limits, done)


def _shown(line: Line, before: dict[tuple[str, str, str], float]) -> str:
    text = f"{line.op:<18} {line.case:<36} {line.side:<10} {line.microseconds:>10,.1f} us {line.share:>7.1%}"
    old = before.get((line.op, line.case, line.side))
    if old is None or line.microseconds <= _SLOWER * old:
        return text
    return f"{_RED}{text}, {line.microseconds / old:.2f} times the last table's{_PLAIN}"


def _last(folder: Path, card: str) -> dict[tuple[str, str, str], float]:
    """Microseconds by op, case and side in the newest table of this card."""
    tables = sorted(folder.glob(f"*-{_file_name(card)}.json"))
    content: dict[str, Any] = json.loads(tables[-1].read_text()) if tables else {"lines": []}
    return {(line["op"], line["case"], line["side"]): line["microseconds"] for line in content["lines"]}


def _write(folder: Path, card: str, limits: Ceilings, done: list[Line]) -> Path:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date.today().isoformat()}-{_file_name(card)}.json"
    facts = {"card": card, "torch": torch.__version__, "copy": limits.copy, "product": limits.product}
    path.write_text(json.dumps(facts | {"lines": [asdict(line) for line in done]}, indent=1))
    head = [
        f"{card}, torch {torch.__version__}, {date.today().isoformat()}: copies {limits.copy / 1e9:,.0f} GB/s,",
        f"products {limits.product / 1e12:,.1f} TFLOP/s, ridge at {limits.ridge:,.0f} operations a byte.",
        "Median of the laps, 10th and 90th percentile.",
        "",
        "| op | size | side | us | GB/s | TFLOP/s | of the card |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    table = path.with_suffix(".md")
    table.write_text("\n".join([*head, *map(_table_row, done)]) + "\n")
    return table


def _table_row(line: Line) -> str:
    return (
        f"| {line.op} | {line.case} | {line.side} | {line.microseconds:,.1f} ({line.low:,.1f}–{line.high:,.1f}) "
        f"| {line.gigabytes:,.0f} | {line.teraflops:,.1f} | {line.share:.1%} |"
    )


def _file_name(card: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in card.lower())
