"""Prepared rows on disk: flat arrays, memory-mapped, in a folder that exists only whole. How they get there: `prepare`.

ids.bin      all sequences one after another, uint16 or uint32
mask.bin     uint8 per id: is it trained; absent where everything is. Of classified texts: is it the second text's
ends.bin     int64 per sequence: where it ends in ids
margin.bin   float64 per pair: by how much it is preferred, NaN where the data do not say
label.bin    float64 per classified text: the number of its class, or what is to be predicted
piece_text.bin, piece_start.bin, row_offsets.bin, row_items.bin    the packing plan, int64
manifest.json   lengths and types of the above, and what was counted; written last
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from framework.core.errors import FrameworkError

Array = npt.NDArray[Any]
MANIFEST = "manifest.json"
LAYOUT = 1  # part of the folder's name: raise it when the meaning of a file changes
OVER_LENGTH = "over length"


@dataclass
class Counted:
    """What was seen while preparing. `read` counts samples of this part, kept or skipped."""

    read: int = 0
    sequences: int = 0
    num_ids: int = 0
    num_tokens: int = 0  # that are predicted and count
    num_bytes: int = 0  # of the text they stand for, UTF-8
    skipped: dict[str, int] = field(default_factory=dict)
    longest: int = 0  # max_tokens that the longest sample left out would have needed
    first_over: str = ""  # its place, file:line


class Shards:
    """Sequences by number. Opening maps the files and checks their sizes; nothing is read into memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = json.loads((folder / MANIFEST).read_text())
        self.counted = Counted(**manifest["counted"])
        self._arrays = {name: _map(folder, name, *shape) for name, shape in manifest["arrays"].items()}

    def __len__(self) -> int:
        return self.counted.sequences

    def array(self, name: str) -> Array:
        """One of the arrays above, by the first part of its file's name."""
        return self._arrays[name]

    def sequence(self, number: int) -> tuple[Array, Array]:
        """(ids int64 [n], mask bool [n]) of a sequence."""
        ends = self._arrays["ends"]
        return self.span(int(ends[number - 1]) if number else 0, int(ends[number]))

    def span(self, start: int, stop: int) -> tuple[Array, Array]:
        """(ids, mask) of a stretch of the whole stream of ids."""
        ids = self._arrays["ids"][start:stop].astype(np.int64)
        mask = self._arrays.get("mask")
        return ids, np.ones(len(ids), bool) if mask is None else mask[start:stop].astype(bool)


def file_of(folder: Path, name: str) -> Path:
    """Where an array stands."""
    return folder / f"{name}.bin"


def ids_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _map(folder: Path, name: str, dtype: str, length: int) -> Array:
    path = file_of(folder, name)
    expected = np.dtype(dtype).itemsize * length
    size = path.stat().st_size if path.exists() else -1
    if size != expected:
        state = "is missing" if size < 0 else f"has {size} bytes instead of {expected}"
        raise FrameworkError(f"prepared data are damaged: {path} {state}; delete {folder} and start again")
    return np.memmap(path, dtype, "r", shape=(length,)) if length else np.empty(0, dtype)
