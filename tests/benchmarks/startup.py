"""Seconds to `--help` and to a refused recipe, beside what importing torch alone would take. That neither imports it is
asserted in tests/test_main.py.
"""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.contest import Laps, Run, compete, options, report

COMMANDS = {
    "framework --help": (0, "-m", "framework.main", "--help"),
    "framework sft --help": (0, "-m", "framework.main", "sft", "--help"),
    "framework sft optim.lrr=1 (refused)": (2, "-m", "framework.main", "sft", "optim.lrr=1"),
    "python -c 'import torch'": (0, "-c", "import torch"),
}


def start(place: Path, laps: Laps, name: str) -> None:
    """A fresh process a lap; its unit is one start."""
    code, *words = COMMANDS[name]
    laps.ready({"processes a lap": 1})
    while True:
        done = subprocess.run([sys.executable, *words], capture_output=True, check=False)
        assert done.returncode == code, done.stderr.decode()
        laps.done(1, 0)


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    args = options(__doc__ or "", argv, rounds=7)
    contestants: dict[str, Run] = {name: functools.partial(start, name=name) for name in COMMANDS}
    with tempfile.TemporaryDirectory() as scratch:
        report("Starting", compete(contestants, Path(scratch), args.rounds), {}, args.out, unit="starts")


if __name__ == "__main__":
    main()
