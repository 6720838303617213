"""Architectures by name: each recipes/model/NAME.yaml, the word behind `model=`, as a ModelConfig.

Left out: composing it with a command line, which only main does; `tests/test_recipes.py` shows that both are equal.
"""

import yaml

from framework.core.config import recipes_folder
from framework.core.errors import UsageError, nearest
from framework.models.config import ModelConfig
from framework.models.families.own import decoded


def presets() -> list[str]:
    """Their names, sorted."""
    return sorted(path.stem for path in (recipes_folder() / "model").glob("*.yaml"))


def preset(name: str) -> ModelConfig:
    """The architecture of that name; UsageError with the nearest one where there is none."""
    if name not in presets():
        raise UsageError(f"unknown model '{name}': {nearest(name, presets())}")
    text = (recipes_folder() / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    return ModelConfig(**decoded(ModelConfig(), yaml.safe_load(text)))
