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
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from framework.checkpoint.integrity import MODULUS, tensor_hash, tensor_hashes
from framework.core.errors import CheckpointError, nearest
from framework.core.records import Box

Shards = Iterable[tuple[str, Box, Tensor]]

# https://huggingface.co/docs/safetensors, section "Format"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_CHUNK = 1 << 24  # bytes that are written and hashed at a time
_BEHIND = 64  # of these, hashing may be behind the writing: the disk need not wait for a processor
_TOGETHER = 16  # tensors that are fingerprinted together: one that is not contiguous is copied for it


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
class Piece:
    """One box on its way into a file, the `number`-th that its rank holds."""

    number: int
    name: str
    box: Box
    tensor: Tensor

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.number}:{self.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor as far as this box reaches."""
        return tuple(offset + length for offset, length in self.box)

    def content(self) -> memoryview:
        """Its bytes, on the CPU."""
        return self.tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    def described(self, fingerprint: int) -> dict[str, Any]:
        """Its entry in the index file."""
        dtype, hash_ = _DTYPES[self.tensor.dtype], f"{fingerprint:016x}"
        return {"name": self.name, "key": self.key, "box": self.box, "dtype": dtype, "shape": self.shape, "hash": hash_}


@dataclass(frozen=True)
class Entry:
    """A whole tensor of a checkpoint, by logical name."""

    shape: tuple[int, ...]
    dtype: str
    hash: str


def write_part(
    folder: Path,
    part: str,
    rank: int,
    shards: Shards,
    world_size: int = 1,
    point: Callable[[], None] = lambda: None,
) -> None:
    """Write what this rank of `part` holds into the staging `folder`; any process that sees the folder may call it.

    `shards`: (logical name, box, tensor), without overlap between ranks; a name may come several times. Tensors are
    moved to the CPU one at a time. The index file comes last, by a rename: where it stands, the part is whole. `point`
    is called every few megabytes and may raise to give up. Raises OSError as it comes (a full disk); the caller then
    drops the folder.
    """
    folder = Path(folder)
    held = [Piece(n, name, box, tensor.detach()) for n, (name, box, tensor) in enumerate(shards) if tensor.numel()]
    file = f"{part}-{rank:05d}"
    digest, size, hashes = _write_safetensors(folder / f"{file}.safetensors", held, point)
    index = {
        "world_size": world_size,
        "bytes": size,
        "sha256": digest,
        "boxes": [piece.described(hashes[piece.key]) for piece in held],
    }
    partial = folder / f"{file}.partial"
    write_bytes(partial, json.dumps(index).encode())
    partial.rename(folder / f"{file}.json")


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


def _write_safetensors(path: Path, held: Sequence[Piece], point: Callable[[], None]) -> tuple[str, int, dict[str, int]]:
    """Sha256 and size of the file written, and the hash of each tensor by key. The safetensors library would want all
    tensors on the CPU at once, unshared, and the file read again for its hash; here one tensor after another is moved.
    Writing comes first, for the disk works alone: sha256 follows in a thread, the tensors' hashes while the disk syncs.
    All of them work without Python's lock."""
    digest, groups, behind = sha256(), _alike(held), deque[Future[None]]()
    with path.open("wb") as stream, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as other:

        def put(content: bytes | memoryview) -> None:
            point()
            behind.append(hasher.submit(digest.update, content))
            stream.write(content)
            if len(behind) > _BEHIND:
                behind.popleft().result()

        put(_header([piece for group in groups for piece in group]))
        for piece in (piece for group in groups for piece in group):
            content = piece.content()
            for start in range(0, len(content), _CHUNK):
                put(content[start : start + _CHUNK])
        fingerprints = [other.submit(_fingerprints, group) for group in groups]
        stream.flush()
        os.fsync(stream.fileno())
        hashes = {key: hash_ for found in fingerprints for key, hash_ in found.result().items()}
        for hashed in behind:
            hashed.result()
        return digest.hexdigest(), stream.tell(), hashes


def _alike(held: Sequence[Piece]) -> list[list[Piece]]:
    """In the order of the file: wide dtypes first, so that every tensor is aligned to its elements, and together what
    can be fingerprinted together."""
    found: dict[Any, list[Piece]] = {}
    for piece in sorted(held, key=lambda piece: -piece.tensor.element_size()):
        found.setdefault((piece.tensor.element_size(), piece.box, piece.tensor.device), []).append(piece)
    return [group[n : n + _TOGETHER] for group in found.values() for n in range(0, len(group), _TOGETHER)]


def _fingerprints(group: Sequence[Piece]) -> dict[str, int]:
    """By key."""
    hashes = tensor_hashes([piece.tensor for piece in group], group[0].box, group[0].shape)
    return {piece.key: hash_ for piece, hash_ in zip(group, hashes, strict=True)}


def _header(ordered: Sequence[Piece]) -> bytes:
    """The first bytes of a safetensors file that holds these tensors in this order."""
    header: dict[str, Any] = {}
    end = 0
    for piece in ordered:
        start, end = end, end + piece.tensor.nbytes
        shape = list(piece.tensor.shape)
        header[piece.key] = {"dtype": _DTYPES[piece.tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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
