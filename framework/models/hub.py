"""Model folders in the Hugging Face format: config.json and safetensors, read lazily through a memory map, and written.

Only safetensors and JSON are opened, so a folder cannot run code (law Files). Tokenizers stand in their own room.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from framework.core.errors import CheckpointError, UsageError, nearest
from framework.core.places import local
from framework.core.records import Box, ReadBox
from framework.core.registry import lookup, names
from framework.models.adapters import is_adapter, open_adapter
from framework.models.config import ModelConfig
from framework.models.families.family import Family
from framework.models.families.tensors import Place, Stack, joined, parts_of
from framework.models.init import fill, head_shapes, parameter_shapes
from framework.models.transformer import HEAD_PARTS, Transformer

Shapes = dict[str, tuple[int, ...]]
_FILE = "model.safetensors"
_HEAD = "lm_head.weight"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # an absent one would be the published model's
_SHARD_BYTES = 4 << 30


def load(folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Transformer:
    """The model of a folder, in its stored dtype unless told. A classifier's head is left behind; untied, the model has
    no language head then."""
    config, read, shapes = read_folder(folder)
    with torch.device("meta"):
        model = Transformer(config)
    if "class_head.weight" in shapes:
        model.drop_head()
    return fill(model, read, dtype, device)


def save(model: Transformer, folder: str | Path) -> None:
    """Write the format back: the same bits, names and dtype that `load` reads."""
    save_weights(model.config, model.named_parameters(), folder)


def read_folder(folder: str | Path) -> tuple[ModelConfig, ReadBox, Shapes]:
    """(architecture, weights by logical name and box, shape of each name). Opens the files and reads no weight.

    A classifier's head answers to class_head.weight; where it has one class also to value_head.weight, so that a
    critic can start from a reward model. Tensors that are missing, unknown or of another shape than config.json says
    are a CheckpointError that names them.
    """
    path = locate(folder)
    if is_adapter(path):
        return _read_adapted(path)
    config, family = read_architecture(path)
    files = _open_files(path, family)
    if config.tied:
        files.pop(_HEAD, None)  # some writers store the tied matrix twice
    shapes = _shapes(config, family, files)
    pieces = family.pieces(shapes, config.num_heads)
    _check(path, pieces, files)
    if shapes.get("class_head.weight", (0,))[0] == 1:
        pieces["value_head.weight"] = pieces["class_head.weight"]
        shapes["value_head.weight"] = shapes["class_head.weight"]

    def find(theirs: str) -> Any:
        file, stored = files[theirs]
        return file.get_slice(stored)

    def read(name: str, box: Box) -> Tensor:
        if name not in pieces:
            raise CheckpointError(f"{path} has no tensor '{name}': {nearest(name, pieces)}")
        place = pieces[name]
        return place.read(find, box) if isinstance(place, Stack) else place.read(find(place.theirs), box)

    return config, read, shapes


def _shapes(config: ModelConfig, family: Family, files: Mapping[str, tuple[Any, str]]) -> Shapes:
    """What a folder should hold: a classifier no language head, tied or not; a pooler where there is one."""
    shapes, score = dict(parameter_shapes(config)), f"{family.class_head}.weight"
    if score in files:
        file, stored = files[score]
        classes = head_shapes(config, file.get_slice(stored).get_shape()[0])
        return {name: shape for name, shape in shapes.items() if name.split(".")[0] not in HEAD_PARTS} | classes
    more = {name: shape for name, shape in head_shapes(config, 1).items() if not name.startswith("class_head")}
    places = family.pieces(shapes | more, config.num_heads)
    return shapes | {name: shape for name, shape in more.items() if parts_of(places[name])[0].theirs in files}


def _read_adapted(path: Path) -> tuple[ModelConfig, ReadBox, Shapes]:
    """The base that an adapter of PEFT's names, with the adapter merged in."""
    adapter = open_adapter(path)
    config, read, shapes = read_folder(adapter.base)
    family: Family = lookup("family", config.family)
    score = f"{family.class_head}.weight"
    if score in adapter.whole:
        shapes |= head_shapes(config, len(adapter.whole[score]))
    return config, adapter.over(read, family.pieces(shapes, config.num_heads), path), shapes


def read_architecture(path: Path) -> tuple[ModelConfig, Family]:
    """(architecture, family) by the config.json of a local folder (of an adapter: its base's)."""
    if is_adapter(path):
        path = locate(open_adapter(path).base)
    theirs = _read_config(path)
    family = _family(theirs, path)
    try:
        return family.config_from(theirs), family
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path / 'config.json'} does not describe a {family.model_type} model: {error}") from None


def read_start(folder: str | Path) -> int | None:
    """What a folder says its decoder begins with: `decoder_start_token_id` of generation_config.json, which is what
    transformers goes by, else of config.json; None where neither does."""
    path = locate(folder)
    path = locate(open_adapter(path).base) if is_adapter(path) else path
    for file in (path / "generation_config.json", path / "config.json"):
        found = _read_object(file).get("decoder_start_token_id") if file.is_file() else None
        if isinstance(found, int):
            return found
    return None


def save_weights(
    config: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    classes: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write (logical name, full tensor) pairs as a model folder, one file of at most 4 GiB in memory at a time.

    With `classes` > 0 it is a *ForSequenceClassification whose score is class_head.weight or, for a critic,
    value_head.weight. `extra` goes into config.json: what the tokenizer knows (eos_token_id, pad_token_id, ...).
    config.json is written last: a folder that has one is whole.
    """
    path = Path(folder)
    family: Family = lookup("family", config.family)
    theirs, pieces = family.config_to(config, classes), pieces_of(config, classes)
    path.mkdir(parents=True, exist_ok=True)
    for stale in [path / "config.json", *path.glob("model*.safetensors"), *path.glob("model*.index.json")]:
        stale.unlink(missing_ok=True)
    heads = {"value_head.weight": "class_head.weight"}
    dtype = _write_files(path, joined(weights, lambda name: pieces[heads.get(name, name)]))
    theirs |= {"dtype": dtype, **dict.fromkeys(_TOKENS), **(extra or {})}
    (path / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")


def pieces_of(config: ModelConfig, classes: int = 0) -> dict[str, Place]:
    """Where each parameter lies in the tensors of the config's family, that of a class head with them."""
    shapes = parameter_shapes(config) | head_shapes(config, classes)
    family: Family = lookup("family", config.family)
    return family.pieces(shapes, config.num_heads)


def locate(folder: str | Path) -> Path:
    """The local folder: `folder` itself, or a hub name ("HuggingFaceTB/SmolLM2-135M") through huggingface_hub and its
    cache, offline and endpoint variables respected."""
    path = local(folder)
    if path.is_dir():
        return path
    if path.exists() or str(folder).count("/") != 1 or str(folder).startswith((".", "/", "~")):
        raise UsageError(f"there is no model folder {folder}")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
        return Path(snapshot_download(str(folder), allow_patterns=wanted))
    except Exception as error:
        raise UsageError(f"{folder} is neither a folder nor a model that the hub would give: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"{path} is no model folder: it has no config.json")
    return _read_object(file)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold an object, got {str(content)[:40]}")
    return content


def _family(theirs: dict[str, Any], path: Path) -> Family:
    kind = theirs.get("model_type", "")
    if kind not in names("family"):
        raise UsageError(f"{path} holds a model of type '{kind}': {nearest(kind, names('family'))}")
    family: Family = lookup("family", kind)
    return family


def _open_files(path: Path, family: Family) -> dict[str, tuple[Any, str]]:
    """Their tensor name as transformers writes it -> (open file, the name that it has there)."""
    index = path / f"{_FILE}.index.json"
    if (path / _FILE).is_file():
        files = {path / _FILE}
    elif index.is_file():
        files = {path / name for name in _parts(index)}
    else:
        pickles = sorted(file.name for file in path.glob("*.bin"))
        why = (
            f"only {pickles[0]}: a pickle can run code when it is read; save it again as safetensors" if pickles else ""
        )
        raise UsageError(f"{path} has no {_FILE}" + (f", {why}" if why else ""))
    opened: dict[str, tuple[Any, str]] = {}
    for file in sorted(files):
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
        stored = [name for name in handle.keys() if not family.is_derived(name)]  # noqa: SIM118  (no mapping)
        opened |= {family.canonical(name): (handle, name) for name in stored}
    return opened


def _parts(index: Path) -> list[str]:
    """The files that an index names: of its own folder, nowhere else."""
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} names no file: it has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UsageError(f"{index} names {name!r}, which is no file of its folder")
    return list(weight_map.values())


def _check(path: Path, pieces: Mapping[str, Place], files: Mapping[str, tuple[Any, str]]) -> None:
    expected = {piece.theirs: piece.shape for place in pieces.values() for piece in parts_of(place)}
    shapes = {name: tuple(file.get_slice(stored).get_shape()) for name, (file, stored) in files.items()}
    complaints = [f"unexpected tensor {files[name][1]}" for name in shapes if name not in expected]
    complaints += [f"missing tensor {name}" for name in expected if name not in shapes]
    complaints += [
        f"{name} has shape {list(shapes[name])}, config.json says {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if complaints:
        more = f", and {len(complaints) - 5} more" if len(complaints) > 5 else ""
        raise CheckpointError(f"{path} does not hold the model of its config.json: {'; '.join(complaints[:5])}{more}")


def _write_files(path: Path, weights: Iterable[tuple[str, Tensor]]) -> str:
    """Write tensors under their names; returns the dtype of the first, as config.json wants it."""
    shards: list[list[str]] = []
    part: dict[str, Tensor] = {}
    size, total, dtype = 0, 0, "float32"

    def flush() -> None:
        save_file(part, path / f"model-{len(shards) + 1:05d}.safetensors", metadata={"format": "pt"})
        shards.append(list(part))
        part.clear()

    for name, tensor in weights:
        if part and size + tensor.nbytes > _SHARD_BYTES:
            flush()
            size = 0
        if not total:
            dtype = str(tensor.dtype).removeprefix("torch.")
        part[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    _name_files(path, shards, total)
    return dtype


def _name_files(path: Path, shards: list[list[str]], total: int) -> None:
    """Rename to what transformers looks for: one model.safetensors, or numbered parts with an index."""
    if len(shards) == 1:
        (path / "model-00001.safetensors").rename(path / _FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names_in_it in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (path / f"model-{number:05d}.safetensors").rename(path / final)
        weight_map |= dict.fromkeys(names_in_it, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / f"{_FILE}.index.json").write_text(json.dumps(index, indent=2) + "\n")
