"""Our own layout, for architectures that nobody has published: names and axes as they are here.

It holds every axis, and whoever reads it needs this package: transformers has no such class.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from framework.core.errors import UsageError, nearest
from framework.core.registry import register
from framework.models.config import ModelConfig
from framework.models.families.family import HEADS, Family
from framework.models.families.settings import Keys
from framework.models.families.tensors import Entry, Place, Shape, pieces

_AXES = "axes"


@dataclass(frozen=True)
class Everything:
    """All axes under one key, by our names."""

    def read(self, theirs: Keys) -> dict[str, Any]:
        """See `settings.Setting`."""
        if not isinstance(theirs.get(_AXES), Mapping):
            raise UsageError(f"config.json does not say {_AXES}")
        return decoded(ModelConfig(), theirs[_AXES])

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See `settings.Setting`."""
        axes = _encoded(config)
        del axes["family"]
        return {_AXES: axes}


@dataclass(frozen=True)
class Own(Family):
    """Every tensor by its logical name, but for the heads'."""

    def pieces(self, shapes: Mapping[str, Shape], heads: int) -> dict[str, Place]:
        """See `Family`."""
        taken = {module for entry in HEADS for module in entry.ours}
        modules = dict.fromkeys(re.sub(r"\d+", "{}", name.rpartition(".")[0]) for name in shapes)
        table = [Entry(module, (module,)) for module in modules if module not in taken]
        return pieces((*table, *HEADS), shapes, heads)


def _encoded(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it: choices by their words."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values = {name: _encoded(x) if dataclasses.is_dataclass(x) else x for name, x in values.items()}
    return {name: x.value if isinstance(x, Enum) else x for name, x in values.items()}


def decoded(default: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The other way, typed as `default` is; UsageError for what is no axis or no choice of one."""
    found = {}
    for name, value in stored.items():
        if not hasattr(default, name):
            known = [field.name for field in dataclasses.fields(default)]
            raise UsageError(f"unknown axis '{name}': {nearest(name, known)}")
        example: Any = getattr(default, name)
        if dataclasses.is_dataclass(example):
            schema: Any = type(example)
            value = schema(**decoded(example, value))
        elif isinstance(example, Enum):
            value = _choice(name, type(example), value)
        elif isinstance(example, float):
            value = float(value)  # YAML reads 1e-5 as a word
        found[name] = value
    return found


def _choice(name: str, kind: type[Enum], value: Any) -> Enum:
    words = [member.value for member in kind]
    if value not in words:
        raise UsageError(f"{name}={value}: {nearest(str(value), words)}")
    return kind(value)


OWN = Own("framework", "Framework", "", (), (Everything(),), covers="every axis of model=, for this package alone")
register("family", OWN.model_type)(OWN)
