"""A distributed framework for pretraining and RLHF. `framework.run(stage, overrides)` is the command from Python.

`framework.register(kind, name)` enters code of one's own under a name that recipes may use. Importing this package
imports nothing heavy: these two and the rooms below load when they are first touched.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "register", "run"]

_PLACE = {"run": "framework.main", "register": "framework.core.registry"}
_ROOMS = ("data", "models", "objectives", "tasks")


def __getattr__(name: str) -> Any:
    if name in _PLACE:
        return getattr(importlib.import_module(_PLACE[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"framework.{name}")
    raise AttributeError(f"module 'framework' has no attribute {name!r}")
