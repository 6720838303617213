"""One decorator through which names in recipes find code: `@register("advantage", "gae")`.

Recipes hold names only, never class paths, so renaming code cannot break a recipe and a recipe cannot run foreign code.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from framework.core.errors import UsageError, nearest

KINDS = ("advantage", "policy_loss", "reward", "data_format", "family", "tracker", "task", "environment")

T = TypeVar("T")
_entries: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str) -> Callable[[T], T]:
    """Enter the decorated object under (kind, name). Entering another object there is an error; re-importing is not."""
    entries = _of(kind)

    def enter(entry: T) -> T:
        known = entries.get(name)
        if known is not None and _origin(known) != _origin(entry):
            raise UsageError(f"{kind} '{name}' is registered twice: by {_origin(known)} and by {_origin(entry)}")
        entries[name] = entry
        return entry

    return enter


def lookup(kind: str, name: str) -> Any:
    """The object entered under (kind, name); an unknown name is answered with the nearest one."""
    entries = _of(kind)
    if name not in entries:
        raise UsageError(f"unknown {kind} '{name}': {nearest(name, entries)}")
    return entries[name]


def names(kind: str) -> list[str]:
    """All names entered under `kind`, sorted."""
    return sorted(_of(kind))


def forget(module: str) -> None:
    """Take out what the code of `module`, or of a module below it, has entered."""
    for entries in _entries.values():
        for name in [name for name, entry in entries.items() if f"{_home(entry)}.".startswith(f"{module}.")]:
            del entries[name]


def _of(kind: str) -> dict[str, Any]:
    if kind not in _entries:
        raise UsageError(f"unknown kind '{kind}': {nearest(kind, KINDS)}")
    return _entries[kind]


def _home(entry: Any) -> str:
    return str(getattr(entry, "__module__", "?"))


def _origin(entry: Any) -> str:
    return f"{_home(entry)}.{getattr(entry, '__qualname__', type(entry).__name__)}"
