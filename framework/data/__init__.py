"""F2: from files to rows. `framework.data.read(path)` iterates over the samples of a file or folder.

Left out: the tokenizer, which the stage hands in, and everything that happens to a batch.
"""

from typing import Any

__all__ = ["read"]


def __getattr__(name: str) -> Any:
    if name == "read":
        from framework.data.sources import read

        return read
    raise AttributeError(f"module 'framework.data' has no attribute {name!r}")
