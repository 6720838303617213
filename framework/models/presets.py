"""Architectures by name: each recipes/model/NAME.yaml, the word behind `model=`, as a ModelConfig.

Left out: composing it with a command line, which only main does; `tests/test_recipes.py` shows that both are equal.
"""

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import yaml

from framework.core.config import recipes_folder
from framework.core.errors import UsageError, nearest
from framework.models.config import ModelConfig

C = TypeVar("C")


def presets() -> list[str]:
    """Their names, sorted."""
    return sorted(path.stem for path in (recipes_folder() / "model").glob("*.yaml"))


def preset(name: str) -> ModelConfig:
    """The architecture of that name; UsageError with the nearest one where there is none."""
    if name not in presets():
        raise UsageError(f"unknown model '{name}': {nearest(name, presets())}")
    text = (recipes_folder() / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    return _built(ModelConfig(), yaml.safe_load(text))


def _built(default: C, given: dict[str, Any]) -> C:
    """`default` with what is given, each value as the type that its field has."""
    values = {entry.name: getattr(default, entry.name) for entry in fields(default)}  # type: ignore[arg-type]
    for name, value in given.items():
        has = values[name]
        values[name] = _built(has, value) if is_dataclass(has) else type(has)(value)
    return type(default)(**values)
