"""How fast training goes: tokens a second and MFU, over the steps since the last question."""

import time
from types import TracebackType
from typing import Self

from framework.engine.flops import Work, utilisation


class Pace:
    """`with pace:` around a step's work, `pace.add(work)` after it, `pace.take()` at a logged step.

    Validation and saving stand outside and so do not count. `peak_flops`: a second's, of all ranks; None = no MFU.
    """

    def __init__(self, peak_flops: float | None):
        self._peak = peak_flops
        self._seconds, self._work, self._began = 0.0, Work(), 0.0

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds += time.perf_counter() - self._began

    def add(self, work: Work) -> None:
        self._work += work

    def take(self) -> dict[str, float]:
        """Figures since the last call."""
        seconds, work = max(self._seconds, 1e-9), self._work
        self._seconds, self._work = 0.0, Work()
        figures = {"tokens_per_second": work.tokens / seconds}
        if self._peak is not None:
            figures["mfu_parameters"] = utilisation(work.parameters, seconds, self._peak)
            figures["mfu_exact"] = utilisation(work.exact, seconds, self._peak)
        return figures
