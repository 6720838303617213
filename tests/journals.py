"""What wandb and swanlab wrote beside a run, read back by their own record types. Left out: everything but the reading.

Both write logs in LevelDB's format: blocks of 32 KiB, each record or piece of one behind a header of checksum, length
and kind (1 whole, 2 first, 3 middle, 4 last).
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7
_WHOLE, _LAST = 1, 4


@dataclass
class Attempt:
    """One file: who it says it belongs to, and (step, name, value) in the order of writing."""

    run_id: str = ""
    group: str = ""
    points: list[tuple[int, str, float]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)  # metrics (or a pattern of them) -> their step axis
    summary: dict[str, Any] = field(default_factory=dict)


def wandb_attempts(folder: Path) -> list[Attempt]:
    """The attempts under `folder`/wandb, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        attempt = Attempt()
        for record in map(Record.FromString, _records(path)):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                attempt.run_id, attempt.group = record.run.run_id, record.run.run_group
            elif kind == "metric" and record.metric.step_metric:
                attempt.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            elif kind == "history":
                line = _items(record.history.item)
                step = line.pop("step")
                attempt.points += [(step, n, v) for n, v in sorted(line.items()) if not n.startswith("_")]
                attempt.summary |= line
            elif kind == "summary":
                attempt.summary |= _items(record.summary.update)
        found.append(attempt)
    return found


def swanlab_attempts(folder: Path) -> list[Attempt]:
    """The attempts under `folder`/swanlab, oldest first."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    found = []
    for path in sorted(folder.glob("swanlab/run-*/run-*.swanlab")):
        attempt = Attempt()
        for record in map(Record.FromString, _records(path)):
            if record.HasField("start"):
                attempt.run_id, attempt.group = record.start.id, record.start.group
            elif record.HasField("scalar"):
                attempt.points.append((record.scalar.step, record.scalar.key, record.scalar.value.number))
        found.append(attempt)
    return found


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(path: Path) -> Iterator[bytes]:
    data, at, held = path.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        held += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (_WHOLE, _LAST):
            yield held
            held = b""
