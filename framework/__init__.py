"""A distributed framework for pretraining and RLHF. `framework.run(stage, overrides)` is the command from Python.

Importing this package imports nothing heavy: `run` and the rooms below load when they are first touched.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "run"]

_ROOMS = ("data", "models", "objectives", "tasks")


def __getattr__(name: str) -> Any:
    if name == "run":
        return importlib.import_module("framework.main").run
    if name in _ROOMS:
        return importlib.import_module(f"framework.{name}")
    raise AttributeError(f"module 'framework' has no attribute {name!r}")
