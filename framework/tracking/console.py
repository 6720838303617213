"""Where tables are printed: as wide as the terminal, or, into a file or a pipe, wide enough that nothing is cut."""

import os
import sys

from rich.console import Console

_WIDE, _HIGH = 200, 25


def console() -> Console:
    """Of stdout. Into a file, COLUMNS says how wide it is."""
    if sys.stdout.isatty():
        return Console()
    columns = os.environ.get("COLUMNS", "")
    # With a width alone rich still takes 80 where TERM=dumb meets FORCE_COLOR.
    return Console(width=int(columns) if columns.isdigit() else _WIDE, height=_HIGH)
