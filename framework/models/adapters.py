"""Adapters as PEFT writes them: a folder of adapter_config.json and adapter_model.safetensors, beside a base elsewhere.

What PEFT calls base_model.model.X.lora_A.weight is our A of the matrix that the family's table places at X. Where a
family joins matrices W_1, W_2, ... of ours in one (GPT-2's c_attn, BLOOM's query_key_value, GLM's gate_up_proj), theirs
has A = [A_1; A_2; ...], and B holds B_k in the rows of W_k and the columns of A_k, zero elsewhere: the same product, of
a rank that PEFT's rank_pattern tells. Read, each of ours takes its rows of B and all of A. Left out: experts.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from framework.core.errors import CheckpointError, UsageError
from framework.core.records import Box, ReadBox
from framework.models.config import LoraConfig
from framework.models.families.tensors import Piece, Place, Stack, joined, parts_of
from framework.models.lora import plus

_CONFIG, _FILE, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "lora_m": "lora_magnitude_vector"}
# Settings of PEFT under which a stored adapter is not W + scale B A.
_PLAIN = {"bias": "none", "lora_bias": False}


@dataclass(frozen=True)
class LowRank:
    """What a folder adds to one of their matrices, read as [outputs, inputs]: scale b[O,r] a[r,I]; with DoRA, how long
    the rows are then [O]."""

    a: Tensor
    b: Tensor
    scale: float
    lengths: Tensor | None = None

    def to(self, weight: Tensor, piece: Piece, row: int) -> Tensor:
        """Whole rows of ours, [n,I] from `row` on, with it."""
        runs = [slice(start, start + length) for start, length in piece.runs(row, len(weight))]
        b = torch.cat([self.b[run] for run in runs])
        lengths = None if self.lengths is None else torch.cat([self.lengths[run] for run in runs])
        return plus(weight, self.a, b, self.scale, lengths)


@dataclass(frozen=True)
class Adapter:
    """What a folder holds. `low_rank`: their path of a matrix -> what is added; `whole`: tensors that take the place of
    the base's, by their name."""

    base: str
    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, Tensor]

    def over(self, read: ReadBox, pieces: Mapping[str, Place], folder: Path) -> ReadBox:
        """`read` of the base with the adapter merged in, box by box. CheckpointError where it is for another base."""
        self._refuse_experts(pieces, folder)
        places = {name: place for name, place in pieces.items() if isinstance(place, Piece)}
        here = {name: self.low_rank[_path(place)] for name, place in places.items() if self._adapts(place.theirs)}
        self._check({name: (places[name], added) for name, added in here.items()}, pieces, folder)

        def merged(name: str, box: Box) -> Tensor:
            if name in places and places[name].theirs in self.whole:
                return places[name].read(self.whole[places[name].theirs], box)
            if name not in here:
                return read(name, box)
            (row, rows), (column, columns) = box
            weight = read(name, ((row, rows), (0, here[name].a.shape[1])))
            return here[name].to(weight, places[name], row)[:, column : column + columns]

        return merged

    def _adapts(self, their: str) -> bool:
        return their.endswith(".weight") and their[: -len(".weight")] in self.low_rank

    def _refuse_experts(self, pieces: Mapping[str, Place], folder: Path) -> None:
        for piece in (piece for place in pieces.values() if isinstance(place, Stack) for piece in place.parts):
            if self._adapts(piece.theirs) or piece.theirs in self.whole:
                raise UsageError(f"{folder} adapts {piece.theirs}, an expert's: merge it with PEFT")

    def _check(self, here: Mapping[str, tuple[Piece, LowRank]], pieces: Mapping[str, Place], folder: Path) -> None:
        known = {piece.theirs for place in pieces.values() for piece in parts_of(place)}
        strange = [path for path in self.low_rank if f"{path}.weight" not in known]
        strange += [name for name in self.whole if name not in known]
        if strange:
            raise CheckpointError(f"{folder} is for another base than {self.base}, which has no {strange[0]}")
        for piece, added in here.values():
            shape, made = _outputs_inputs(piece), (len(added.b), added.a.shape[1])
            if made != shape:
                raise CheckpointError(
                    f"{folder} is for another base than {self.base}: its adapter of {piece.theirs} makes "
                    f"{list(made)}, the base has {list(shape)}"
                )


def is_adapter(folder: Path) -> bool:
    """Whether a folder is PEFT's."""
    return (folder / _CONFIG).is_file()


def open_adapter(folder: Path) -> Adapter:
    """Read a folder of PEFT's; UsageError for what is no plain low-rank adapter."""
    theirs = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if theirs.get("peft_type") != "LORA":
        raise UsageError(f"{folder} holds an adapter of type {theirs.get('peft_type')}; only LORA is read here")
    for key, plain in _PLAIN.items():
        if theirs.get(key, plain) not in (plain, None):
            raise UsageError(f"{folder}: {_CONFIG} says {key}={theirs[key]}, which is not computed here")
    if not (folder / _FILE).is_file():
        raise UsageError(f"{folder} has no {_FILE}; a pickle is not read: save it again as safetensors")
    tensors = {name.removeprefix(_PREFIX): x for name, x in load_file(folder / _FILE).items()}
    ends = [f".{leaf}" for leaf in _LEAVES.values()]
    paths = dict.fromkeys(name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0]))
    low_rank = {}
    for path in paths:
        a, b = tensors.pop(path + ends[0]), tensors.pop(path + ends[1])
        alpha = _pattern(theirs.get("alpha_pattern") or {}, path, theirs["lora_alpha"])
        scale = LoraConfig(len(a), alpha, theirs.get("use_rslora", False)).scale
        low_rank[path] = LowRank(a, b, scale, tensors.pop(f"{path}.{_LEAVES['lora_m']}", None))
    return Adapter(theirs["base_model_name_or_path"], low_rank, tensors)


def _pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that is the end of a path, as PEFT finds it (ranks the tensors tell)."""
    return next((value for end, value in patterns.items() if re.fullmatch(rf"(.*\.)?({end})", path)), default)


def save_adapter(
    folder: Path,
    base: str,
    lora: LoraConfig,
    low_rank: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    pieces: Mapping[str, Place],
    task: str,
) -> None:
    """Write a folder that `peft` loads over `base`. `low_rank` by our names (...lora_a, ...lora_b), `whole` what
    learned in full, `task` PEFT's word. UsageError where the family joins what learned in full with what did not."""
    added = _by_their_path(low_rank, pieces)
    saved = _in_full(whole, pieces)
    tensors = {f"{path}.{_LEAVES[leaf]}": tensor for path, parts in added.items() for leaf, tensor in parts.items()}
    names = _ends(added, pieces)
    ranks = {names[path]: len(parts["lora_a"]) for path, parts in added.items() if len(parts["lora_a"]) != lora.rank}
    theirs: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": ranks,
        "alpha_pattern": {end: lora.scale * (rank**0.5 if lora.rslora else rank) for end, rank in ranks.items()},
        "lora_dropout": lora.dropout,
        "use_dora": lora.dora,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": any(piece.transposed for place in pieces.values() for piece in parts_of(place)),
        "target_modules": sorted(set(names.values())),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}) or None,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    stored = {_PREFIX + name: x.contiguous() for name, x in (tensors | saved).items()}
    save_file(stored, folder / _FILE, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")


def _by_their_path(low_rank: Mapping[str, Tensor], pieces: Mapping[str, Place]) -> dict[str, dict[str, Tensor]]:
    """Their path of each adapted matrix -> what `_LEAVES` names, of all parts of it that are ours."""
    parts: dict[str, list[tuple[Piece, dict[str, Tensor]]]] = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in low_rank):
        piece = _one(pieces[f"{path}.weight"])
        ours = {leaf: low_rank[f"{path}.{leaf}"] for leaf in _LEAVES if f"{path}.{leaf}" in low_rank}
        parts.setdefault(_path(piece), []).append((piece, ours))
    return {path: _side_by_side(some) for path, some in parts.items()}


def _side_by_side(parts: list[tuple[Piece, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """One adapter that does what those of the parts do: see the module. UsageError where a row would have no length."""
    a = torch.cat([ours["lora_a"] for _, ours in parts])
    rows = _outputs_inputs(parts[0][0])[0]
    theirs, done = {"lora_a": a, "lora_b": a.new_zeros(rows, len(a))}, 0
    if "lora_m" in parts[0][1]:
        if sum(len(ours["lora_m"]) for _, ours in parts) < rows:
            raise UsageError(f"lora.dora adapts some of the matrices that are one in {parts[0][0].theirs}; adapt all")
        theirs["lora_m"] = a.new_zeros(rows)
    for piece, ours in parts:
        piece, rank = replace(piece, transposed=False), len(ours["lora_a"])
        piece.write(theirs["lora_b"][:, done : done + rank], ours["lora_b"])
        if "lora_m" in ours:
            piece.write(theirs["lora_m"], ours["lora_m"])
        done += rank
    return theirs


def _in_full(whole: Mapping[str, Tensor], pieces: Mapping[str, Place]) -> dict[str, Tensor]:
    try:
        return dict(joined(whole.items(), lambda name: _one(pieces[name])))
    except ValueError as error:
        raise UsageError(f"lora.also names a part of what the family holds as one: {error}") from None


def _ends(adapted: Collection[str], pieces: Mapping[str, Place]) -> dict[str, str]:
    """Path -> the shortest end of it ("q_proj", "attn.c_proj") that names no module without an adapter."""
    known = {_path(piece) for place in pieces.values() for piece in parts_of(place)}
    deepest = max((path.count(".") for path in adapted), default=0) + 1
    for depth in range(1, deepest + 1):
        ends = {path: ".".join(path.split(".")[-depth:]) for path in known}
        if not {ends[path] for path in adapted} & {ends[path] for path in known - set(adapted)}:
            break
    return {path: ends[path] for path in adapted}


def _one(place: Place) -> Piece:
    """The place of what is no expert's; `lora` adapts no other."""
    if isinstance(place, Stack):
        raise UsageError(f"{place.parts[0].theirs} and its like, experts, have no place in an adapter's folder")
    return place


def _path(piece: Piece) -> str:
    """Their module."""
    return piece.theirs.rpartition(".")[0]


def _outputs_inputs(piece: Piece) -> tuple[int, ...]:
    """[O,I] of all of their matrix."""
    return piece.shape[::-1] if piece.transposed else piece.shape
