"""A trained model with an adapter as folders: the model that computes the same without, and the adapter as PEFT has it.

Left out: how either folder is written (`hub`, `adapters`), and tokenizers.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from framework.core.errors import UsageError
from framework.core.places import local
from framework.models.adapters import save_adapter
from framework.models.config import LoraConfig, ModelConfig
from framework.models.hub import pieces_of, save_weights
from framework.models.init import head_shapes, parameter_shapes
from framework.models.lora import merged, still, targets


def save_adapted(
    config: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    lora: LoraConfig,
    folder: Path,
    adapter: Path | None,
    base: str,
    classes: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Write `folder`, with the adapter merged in, and `adapter` beside the model `base` (a folder or a hub name) that
    training began with. Why there is no `adapter`, where its format has no place for this one; "" = there is."""
    low_rank, whole = dict[str, Tensor](), dict[str, Tensor]()
    learned = parameter_shapes(config).keys() - still(config, lora) | head_shapes(config, 1).keys()
    plain = merged(_noting(weights, learned, whole), targets(config, lora), lora, low_rank)
    save_weights(config, plain, folder, classes=classes, extra=extra)
    if adapter is None:
        return ""
    place = local(base)
    named = str(place.absolute()) if place.is_dir() else base
    task = "SEQ_CLS" if classes else "CAUSAL_LM"
    try:
        save_adapter(adapter, named, lora, low_rank, whole, pieces_of(config, classes), task)
    except UsageError as error:
        return f"adapter/ is not written: {error}; {folder.name}/ holds the merged model"
    return ""


def _noting(
    weights: Iterable[tuple[str, Tensor]], names: Collection[str], into: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        if name in names:
            into[name] = tensor
        yield name, tensor
