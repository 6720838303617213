"""F2: what a model is asked and how its answer is judged, as text. `get(name)` returns a Task.

A Task is one truth: SFT rows, the reward in RL, evaluation and batch labelling use the same object.
"""

import importlib
from typing import Any

__all__ = ["get"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.task"), name)
