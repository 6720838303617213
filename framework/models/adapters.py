"""Adapters as PEFT writes them: a folder of adapter_config.json and adapter_model.safetensors, beside a base elsewhere.

What PEFT calls base_model.model.X.lora_A.weight is our A of the matrix that the family's table places at X. Left out:
matrices that a family joins with others (GPT-2's c_attn, GLM's gate_up_proj), whose adapters have another rank there;
experts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from framework.core.errors import CheckpointError, UsageError
from framework.core.records import Box, ReadBox
from framework.models.config import LoraConfig
from framework.models.families.tensors import Piece, Place, Stack, parts_of
from framework.models.lora import plus

_CONFIG, _FILE, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
# Settings of PEFT under which a stored adapter is not W + scale B A.
_PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False, "rank_pattern": {}, "alpha_pattern": {}}


@dataclass(frozen=True)
class Adapter:
    """What a folder holds. `low_rank`: their path of a matrix -> (A[r,I], B[O,r]); `whole`: tensors that take the place
    of the base's, by their name."""

    base: str
    scale: float
    low_rank: Mapping[str, tuple[Tensor, Tensor]]
    whole: Mapping[str, Tensor]

    def over(self, read: ReadBox, pieces: Mapping[str, Place], folder: Path) -> ReadBox:
        """`read` of the base with the adapter merged in, box by box. CheckpointError where it is for another base."""
        theirs = {name: place.theirs for name, place in pieces.items() if isinstance(place, Piece)}
        here = {name: self.low_rank[their[: -len(".weight")]] for name, their in theirs.items() if self._adapts(their)}
        self._refuse_experts(pieces, folder)
        self._check(here, pieces, folder)

        def merged(name: str, box: Box) -> Tensor:
            if theirs.get(name) in self.whole:
                return self.whole[theirs[name]][tuple(slice(start, start + length) for start, length in box)]
            weight = read(name, box)
            if name not in here:
                return weight
            (row, rows), (column, columns) = box
            a, b = here[name]
            return plus(weight, a[:, column : column + columns], b[row : row + rows], self.scale)

        return merged

    def _adapts(self, their: str) -> bool:
        return their.endswith(".weight") and their[: -len(".weight")] in self.low_rank

    def _refuse_experts(self, pieces: Mapping[str, Place], folder: Path) -> None:
        for piece in (piece for place in pieces.values() if isinstance(place, Stack) for piece in place.parts):
            if self._adapts(piece.theirs) or piece.theirs in self.whole:
                raise UsageError(f"{folder} adapts {piece.theirs}, an expert's: merge it with PEFT")

    def _check(self, here: Mapping[str, tuple[Tensor, Tensor]], pieces: Mapping[str, Place], folder: Path) -> None:
        known = {piece.theirs for place in pieces.values() for piece in parts_of(place)}
        strange = [path for path in self.low_rank if f"{path}.weight" not in known]
        strange += [name for name in self.whole if name not in known]
        if strange:
            raise CheckpointError(f"{folder} is for another base than {self.base}, which has no {strange[0]}")
        for name, (a, b) in here.items():
            piece = _one(pieces[name])
            shape = _whole_rows(piece)
            if shape is None:
                raise UsageError(f"{folder} adapts {piece.theirs}, several matrices in one: merge it with PEFT")
            if (b.shape[0], a.shape[1]) != shape:
                raise CheckpointError(
                    f"{folder} is for another base than {self.base}: its adapter of {piece.theirs} makes "
                    f"{[b.shape[0], a.shape[1]]}, the base has {list(shape)}"
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
    low_rank = {path: (tensors.pop(path + ends[0]), tensors.pop(path + ends[1])) for path in paths}
    lora = LoraConfig(theirs["r"], theirs["lora_alpha"], theirs.get("use_rslora", False))
    return Adapter(theirs["base_model_name_or_path"], lora.scale, low_rank, tensors)


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
    learned in full, `task` PEFT's word. UsageError where the family joins an adapted matrix with others."""
    tensors = {}
    for name, tensor in low_rank.items():
        path, _, leaf = name.rpartition(".")
        piece = _one(pieces[f"{path}.weight"])
        if _whole_rows(piece) is None:
            raise UsageError(f"an adapter of {path} has no place in {piece.theirs}, which holds several matrices")
        tensors[f"{_PREFIX}{piece.theirs.removesuffix('.weight')}.{_LEAVES[leaf]}"] = tensor
    saved = {_one(pieces[name]).theirs: tensor for name, tensor in whole.items()}
    tensors |= {_PREFIX + name: tensor for name, tensor in saved.items()}
    modules = {name.removeprefix(_PREFIX).rpartition(".lora_")[0].rpartition(".")[2] for name in tensors} - {""}
    theirs: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": any(piece.transposed for place in pieces.values() for piece in parts_of(place)),
        "target_modules": sorted(modules),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}) or None,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / _FILE, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")


def _one(place: Place) -> Piece:
    """The place of what is no expert's; `lora` adapts no other."""
    if isinstance(place, Stack):
        raise UsageError(f"{place.parts[0].theirs} and its like, experts, have no place in an adapter's folder")
    return place


def _whole_rows(piece: Piece) -> tuple[int, ...] | None:
    """[O,I] of a matrix that is all of one of theirs, None for a part."""
    shape = piece.shape[::-1] if piece.transposed else piece.shape
    return shape if piece.run == shape[0] else None
