"""Replacing a file so that a reader, or a kill, meets the old content or the new one and nothing between."""

import json
import os
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` with `text` in UTF-8."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Put `content` in place of `path`, by way of a hidden neighbour and one rename; synced to the disk first."""
    neighbour = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with neighbour.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        neighbour.replace(path)
    finally:
        neighbour.unlink(missing_ok=True)


def replace_json(path: Path, value: Any) -> None:
    """`replace_text` with `value` as indented JSON."""
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
