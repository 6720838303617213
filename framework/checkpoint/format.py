"""One checkpoint as files: who wrote which box of which tensor where, and reading any box back.

    step_00000012/
      model-00000.safetensors   the boxes that rank 0 of the part "model" held: data of the usual safetensors kind
      model-00000.json          which they are: {"name": "model/head.weight", "box": [[0, 16], [0, 8]], "key": ...}, ...
      model-00001.safetensors ...
      manifest.json             sha256 of each file, shape and hash of each tensor, state and metrics; written last

Tensors stand under logical names and are cut as their owner held them; nothing in here knows a mesh, so any layout
reads what any other has written. Left out: when to write and what to believe (`manager`).
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from framework.checkpoint.integrity import MODULUS, tensor_hash
from framework.core.errors import CheckpointError, nearest
from framework.core.records import Box

Shards = Iterable[tuple[str, Box, Tensor]]

# https://huggingface.co/docs/safetensors, section "Format"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One box in one file. `hash` adds up over the boxes of `name` if the whole tensor's shape ends like `shape`."""

    name: str
    file: str
    key: str
    box: Box
    dtype: str
    shape: tuple[int, ...]  # of the whole tensor as far as this box reaches
    hash: str  # hexadecimal

    @property
    def size(self) -> int:
        return prod(length for _, length in self.box)


@dataclass(frozen=True)
class Entry:
    """A whole tensor of a checkpoint, by logical name."""

    shape: tuple[int, ...]
    dtype: str
    hash: str


def write_part(folder: Path, part: str, rank: int, shards: Shards, world_size: int = 1) -> None:
    """Write what this rank of `part` holds into the staging `folder`; any process that sees the folder may call it.

    `shards`: (logical name, box, tensor), without overlap between ranks; a name may come several times. Tensors are
    moved to the CPU one at a time. Raises OSError as it comes (a full disk); the caller then drops the folder.
    """
    folder = Path(folder)
    held = [(name, box, tensor.detach()) for name, box, tensor in shards if tensor.numel()]
    file = f"{part}-{rank:05d}.safetensors"
    stored = [_describe(file, n, name, box, tensor) for n, (name, box, tensor) in enumerate(held)]
    digest, size = _write_safetensors(folder / file, {s.key: t for s, (_, _, t) in zip(stored, held)})
    index = {
        "world_size": world_size,
        "bytes": size,
        "sha256": digest,
        "boxes": [{k: v for k, v in asdict(entry).items() if k != "file"} for entry in stored],
    }
    write_bytes(folder / f"{part}-{rank:05d}.json", json.dumps(index).encode())


def read_indices(folder: Path) -> dict[str, dict[str, Any]]:
    """The index files of `folder` by file name, every part and rank; a rank without one is an error that names it."""
    indices = {path.name: _read_index(path) for path in sorted(folder.glob("*-[0-9]*.json"))}
    for name, index in indices.items():
        part = name.rpartition("-")[0]
        for rank in range(index["world_size"]):
            if f"{part}-{rank:05d}.json" not in indices:
                raise CheckpointError(f"{folder}: {part}-{rank:05d}.json is missing (rank {rank} of {part})")
    return indices


def merge(folder: Path, part: str, indices: Mapping[str, dict[str, Any]]) -> dict[str, Entry]:
    """The whole tensors of `part`; raises where boxes leave a hole, overlap, or disagree about a dtype."""
    entries = {}
    for name, boxes in _boxes_by_name(part, indices).items():
        shape = _whole_shape(boxes)
        dtypes = sorted({box.dtype for box in boxes})
        if len(dtypes) > 1:
            raise CheckpointError(f"{folder}: ranks disagree about the dtype of '{name}': {', '.join(dtypes)}")
        if (held := sum(box.size for box in boxes)) != prod(shape):
            raise CheckpointError(f"{folder}: '{name}' has shape {shape}, but its boxes hold {held} of {prod(shape)}")
        total = sum(_hash_within(folder, box, shape) for box in boxes) % MODULUS
        entries[name] = Entry(shape, dtypes[0], f"{total:016x}")
    return entries


class PartReader:
    """`ReadBox` of one part: reader(name, box) -> tensor on the CPU, from whatever boxes were stored; mapped lazily."""

    def __init__(self, folder: Path, part: str):
        self._folder, self._part = Path(folder), part
        self._files: dict[str, Any] = {}

    @cached_property
    def _boxes(self) -> dict[str, list[Stored]]:
        boxes = _boxes_by_name(self._part, read_indices(self._folder))
        if not boxes:
            parts = {path.name.rpartition("-")[0] for path in self._folder.glob("*-[0-9]*.json")}
            raise CheckpointError(f"{self._folder} has no part '{self._part}': {nearest(self._part, parts)}")
        return boxes

    @property
    def names(self) -> list[str]:
        """Logical names, sorted."""
        return sorted(self._boxes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return _whole_shape(self._named(name))

    def __call__(self, name: str, box: Box) -> Tensor:
        boxes, shape = self._named(name), self.shape(name)
        if len(box) != len(shape) or any(o < 0 or o + n > size for (o, n), size in zip(box, shape)):
            raise CheckpointError(f"{self._folder}: '{name}' has shape {shape}; the box {box} does not lie in it")
        overlaps = [(stored, common) for stored in boxes if (common := _overlap(stored.box, box)) is not None]
        if len(overlaps) == 1 and overlaps[0][1] == box:
            return self._read(overlaps[0][0], box)
        parts = [(common, self._read(stored, common)) for stored, common in overlaps]
        dtype = parts[0][1].dtype if parts else self._read(boxes[0], boxes[0].box).dtype
        result = torch.empty([length for _, length in box], dtype=dtype)
        for common, part in parts:
            result[_slices(common, box)] = part
        return result

    def _named(self, name: str) -> list[Stored]:
        if name not in self._boxes:
            raise CheckpointError(
                f"{self._folder}: part '{self._part}' has no tensor '{name}': {nearest(name, self._boxes)}"
            )
        return self._boxes[name]

    def _read(self, stored: Stored, box: Box) -> Tensor:
        if stored.file not in self._files:
            self._files[stored.file] = _open(self._folder / stored.file)
        file = self._files[stored.file]
        return file.get_slice(stored.key)[_slices(box, stored.box)] if box else file.get_tensor(stored.key)


def write_bytes(path: Path, content: bytes) -> None:
    """A new file that is on the disk when this returns."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _describe(file: str, number: int, name: str, box: Box, tensor: Tensor) -> Stored:
    shape = tuple(offset + length for offset, length in box)
    digest = tensor_hash(tensor, box, shape)
    return Stored(name, file, f"{number}:{name}", box, _DTYPES[tensor.dtype], shape, f"{digest:016x}")


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Sha256 and size of the file written. The safetensors library would want all tensors on the CPU at once, unshared,
    and the file read again for its hash; here one tensor at a time is moved, written and hashed."""
    digest, size = sha256(), 0
    with path.open("wb") as stream:
        for piece in _safetensors(tensors):
            digest.update(piece)
            size += stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest(), size


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file. Wide dtypes come first, so that every tensor is aligned to its elements."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {}
    end = 0
    for key, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
        boxes = [_stored(path.with_suffix(".safetensors").name, entry) for entry in index["boxes"]]
        return {**index, "boxes": boxes, "world_size": int(index["world_size"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {path}: {type(error).__name__}: {error}") from None


def _stored(file: str, entry: dict[str, Any]) -> Stored:
    box = tuple((int(offset), int(length)) for offset, length in entry["box"])
    return Stored(entry["name"], file, entry["key"], box, entry["dtype"], tuple(entry["shape"]), entry["hash"])


def _boxes_by_name(part: str, indices: Mapping[str, dict[str, Any]]) -> dict[str, list[Stored]]:
    found: dict[str, list[Stored]] = {}
    for file, index in indices.items():
        if file.rpartition("-")[0] == part:
            for stored in index["boxes"]:
                found.setdefault(stored.name, []).append(stored)
    return found


def _whole_shape(boxes: list[Stored]) -> tuple[int, ...]:
    return tuple(max(sizes) for sizes in zip(*(box.shape for box in boxes)))


def _hash_within(folder: Path, stored: Stored, shape: tuple[int, ...]) -> int:
    """The hash of a stored box in the whole tensor. A rank knows the whole shape only as far as its own box reaches;
    where a tensor is cut along a later dimension that was too little, and the box is hashed again from the file."""
    if stored.shape[1:] == shape[1:]:
        return int(stored.hash, 16)
    file = _open(folder / stored.file)
    return tensor_hash(file.get_tensor(stored.key), stored.box, shape)


def _overlap(a: Box, b: Box) -> Box | None:
    """The common box, None where it is empty."""
    starts = [max(x, y) for (x, _), (y, _) in zip(a, b)]
    ends = [min(x + m, y + n) for (x, m), (y, n) in zip(a, b)]
    return None if any(e <= s for s, e in zip(starts, ends)) else tuple((s, e - s) for s, e in zip(starts, ends))


def _slices(box: Box, within: Box) -> tuple[slice, ...]:
    return tuple(slice(o - base, o - base + n) for (o, n), (base, _) in zip(box, within))
