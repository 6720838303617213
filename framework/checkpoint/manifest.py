"""One committed checkpoint: its manifest, whether all of it is still as it was written, and the way to its tensors."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from framework.checkpoint.format import PartReader, merge, read_indices
from framework.checkpoint.integrity import file_sha256
from framework.core.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. `reader("model")("model/head.weight", ((0, 16), (0, 8)))` reads a box of it."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Raises CheckpointError where it is absent, cut short or altered."""
        return read_manifest(self.folder)

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def state(self) -> dict[str, Any]:
        """What the run remembers besides tensors, as it was saved."""
        return dict(self.manifest["state"])

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self.manifest["metrics"])

    def hashes(self, part: str) -> dict[str, str]:
        """The sharding-independent hash of each tensor of `part`, by logical name."""
        return {name: entry["hash"] for name, entry in self.manifest["parts"][part].items()}

    def reader(self, part: str) -> PartReader:
        """The `ReadBox` of a part. Workers elsewhere make their own: PartReader(folder, part)."""
        return PartReader(self.folder, part)

    def problems(self, rank: int = 0, world_size: int = 1) -> list[str]:
        """What is wrong, one sentence each; [] when all verifies. Each of `world_size` ranks hashes its share."""
        try:
            files = sorted(self.manifest["files"].items())
        except CheckpointError as error:
            return [str(error)]
        return [text for name, want in files[rank::world_size] if (text := self._problem(name, want))]

    def _problem(self, name: str, want: Mapping[str, Any]) -> str:
        path = self.folder / name
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != want["bytes"]:
            return f"{path} has {size:,} bytes, the manifest says {want['bytes']:,}"
        return "" if file_sha256(path) == want["sha256"] else f"{path} was altered: its sha256 is not the manifest's"


def render_manifest(content: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest, ending in a sha256 of the rest: any changed byte shows."""
    text = json.dumps(content, indent=1)
    return json.dumps({**content, "sha256": sha256(text.encode()).hexdigest()}, indent=1).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, verified against its own sha256."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        content = json.loads(raw)
    except ValueError:
        raise CheckpointError(f"{path} is cut short or altered: it is not JSON") from None
    if not isinstance(content, dict) or content.pop("sha256", None) is None or render_manifest(content) != raw:
        raise CheckpointError(f"{path} was altered: it does not match its own sha256")
    if content["format"] != _FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}; this version reads format {_FORMAT}")
    return content


def describe(staging: Path, step: int, state: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """The manifest of a staged folder. Raises CheckpointError where a rank, a file or a part of a tensor is missing."""
    indices = read_indices(staging)
    parts = sorted({name.rpartition("-")[0] for name in indices})
    merged = {part: merge(staging, part, indices) for part in parts}
    return {
        "format": _FORMAT,
        "step": step,
        "state": dict(state),
        "metrics": dict(metrics),
        "files": _files(staging, indices),
        "parts": {p: {n: asdict(entry) for n, entry in sorted(merged[p].items())} for p in parts},
    }


def _files(staging: Path, indices: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file; the writers hashed the large ones while writing."""
    files = {}
    for name, index in indices.items():
        data = Path(name).with_suffix(".safetensors").name
        files[data] = {"bytes": index["bytes"], "sha256": index["sha256"]}
        if not (staging / data).is_file() or (staging / data).stat().st_size != index["bytes"]:
            raise CheckpointError(f"{data} is missing or incomplete in {staging}")
        files[name] = {"bytes": (staging / name).stat().st_size, "sha256": file_sha256(staging / name)}
    return dict(sorted(files.items()))
