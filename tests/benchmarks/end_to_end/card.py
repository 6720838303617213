"""The device that is measured: its memory, and seconds of work on it that end when it has ended there too."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cuda_ext.table import Line, Table
from framework.core import runtime
from framework.core.runtime import Runtime

_CPU_ROOM = 1 << 30  # bytes: what a test may take
_USABLE = 0.9  # of the free memory: the planner leaves out the allocator's slack


@dataclass(frozen=True)
class Bench:
    """Where to measure, and where the lines go. `product`: operations a second of the card's own matrix product."""

    here: Runtime
    table: Table
    product: float
    laps: int

    @property
    def is_card(self) -> bool:
        return self.here.device.type != "cpu"

    def room(self) -> int:
        """Bytes that may be filled, once what nothing holds any more is given back."""
        self.forget()
        if not self.is_card:
            return _CPU_ROOM
        free, _ = torch.get_device_module(self.here.device).mem_get_info(self.here.device)
        return int(_USABLE * free)

    def forget(self) -> None:
        """Give back what nothing holds any more, graphs of models that are gone with it: a compiler keeps only some."""
        gc.collect()
        if self.is_card:
            torch.compiler.reset()
            torch.get_device_module(self.here.device).empty_cache()

    def begin_record(self) -> None:
        """From here on `runtime.peak_memory_bytes` counts anew, from what is held now."""
        if self.is_card:
            torch.get_device_module(self.here.device).reset_peak_memory_stats(self.here.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Of `work`, to the end of the device's queue."""
        runtime.synchronize(self.here.device)
        began = time.perf_counter()
        work()
        runtime.synchronize(self.here.device)
        return time.perf_counter() - began

    def in_turns(self, sides: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each lap of each side; a first lap warms up and does not count."""
        times: dict[str, list[float]] = {side: [] for side in sides}
        for lap in range(self.laps + 1):
            for side, work in sides.items():
                taken = self.seconds(work)
                if lap:
                    times[side].append(taken)
        return times

    def add(
        self,
        what: str,
        case: str,
        side: str,
        amount: float,
        unit: str,
        seconds: Sequence[float],
        figures: Mapping[str, float],
    ) -> None:
        """A line of the table: `amount` of `unit` in each lap."""
        rates = [amount / taken for taken in seconds]
        deciles = statistics.quantiles(rates, n=10) if len(rates) > 1 else [rates[0]] * 9
        middle = statistics.median(rates)
        self.table.add(Line(what, case, side, middle, deciles[0], deciles[-1], f"{unit}/s", figures))

    def race(
        self,
        what: str,
        case: str,
        amount: float,
        unit: str,
        sides: Mapping[str, Callable[[], object]],
        figures: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Lines of `sides`, ours first, each beside the last one, which is the rival, and with `figures` of its own."""
        times = self.in_turns(sides)
        rival = list(sides)[-1]
        for side, taken in times.items():
            factor = statistics.median(b / a for a, b in zip(taken, times[rival], strict=True))
            self.add(what, case, side, amount, unit, taken, {f"% of {rival}'s": 100 * factor, **figures[side]})
