"""Which parameters stand still in a training: by name, or all but the last layers.

Left out: what standing still saves (the engine keeps no gradient and no moments of them).
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from framework.core.config import require
from framework.core.errors import nearest

BEHIND_THE_LAYERS = ("norm", "head_transform", "head", "head_bias")


def frozen_names(names: Iterable[str], patterns: Sequence[str], last_layers: int, num_layers: int) -> frozenset[str]:
    """Those of a model's parameter `names` that do not learn.

    A pattern ("embedding", "layers.0", "layers.*.mlp") stands for every name that it matches or that lies below what it
    matches. `last_layers` > 0: so many layers learn, with the norm and the untied head behind them, nothing else. Heads
    for values or classes are not among `names` and always learn. UsageError: a pattern that matches nothing, more
    layers than there are, nothing left to learn.
    """
    names = list(names)
    require(
        last_layers <= num_layers,
        f"train.last_layers={last_layers}, but the model has {num_layers} layers; choose at most {num_layers}",
    )
    found = {name for pattern in patterns for name in matched(pattern, names, "train.freeze")}
    if last_layers:
        found |= {name for name in names if not _is_late(name, num_layers - last_layers)}
    require(
        len(found) < len(names),
        f"train.freeze={list(patterns)}, train.last_layers={last_layers}: nothing is left to learn",
    )
    return frozenset(found)


def matched(pattern: str, names: Sequence[str], key: str) -> list[str]:
    """The names for which `pattern` stands; UsageError, which names the recipe's `key`, where there is none."""
    found = [name for name in names if any(fnmatchcase(above, pattern) for above in _paths(name))]
    modules = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
    require(bool(found), f"{key}: '{pattern}' is no part of this model: {nearest(pattern, modules)}")
    return found


def _paths(name: str) -> list[str]:
    """ "layers.0.mlp.up.weight" -> "layers", "layers.0", "layers.0.mlp", ... and itself."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_late(name: str, first: int) -> bool:
    """Whether a parameter stands in layer `first` or behind it."""
    module, *rest = name.split(".")
    return int(rest[0]) >= first if module == "layers" else module in BEHIND_THE_LAYERS
