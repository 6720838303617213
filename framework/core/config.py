"""What all recipes share: choices, flattening, and the hash by which a run knows that it is the same run.

Config dataclasses stand in each room's own `config.py`, free of torch; this page only handles what was composed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any

from framework.core.errors import UsageError


class _NamedByValue(EnumMeta):
    def __getitem__(cls, name: str) -> Any:
        members: Mapping[str, Any] = cls.__members__
        by_value = {member.value: member for member in members.values()}
        return by_value[name] if name in by_value else super().__getitem__(name)


class Choice(Enum, metaclass=_NamedByValue):
    """An enumerated config value; recipes write the value (`kind: cosine`), code compares the member.

    OmegaConf looks members up by name, `Schedule["cosine"]`; that is why values answer there too.
    """

    def __str__(self) -> str:
        return str(self.value)


def require(condition: bool, message: str) -> None:
    """Refuse a recipe: `message` names the key, the value got, and what would be right."""
    if not condition:
        raise UsageError(message)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to dotted keys: {"batch": {"size": 8}} -> {"batch.size": 8}. Lists stay values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def without(flat: Mapping[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
    """`flat` less the keys that equal a prefix or stand below it."""
    drop = tuple(prefixes)
    return {k: v for k, v in flat.items() if not any(k == p or k.startswith(p + ".") for p in drop)}


def digest(value: Any) -> str:
    """The first 16 hex digits of the sha256 of `value` as canonical JSON: equal values, equal digests, anywhere."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two flat recipes differ, with both values; a missing key is None."""
    keys = sorted(set(a) | set(b))
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def recipes_folder() -> Path:
    """Where recipes and their corpora stand: inside the installed package, or at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def find_file(path: str) -> str:
    """`path` as it is, or, for `corpora/...` that is not in the working folder, the one that came with the recipes."""
    shipped = recipes_folder() / path
    return str(shipped) if path.startswith("corpora/") and not Path(path).exists() and shipped.exists() else path
