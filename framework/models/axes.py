"""The axes of ModelConfig in words, read out of the docstrings and comments of config.py: one truth, no second copy."""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from framework.models import config


@dataclass(frozen=True)
class Axis:
    """Example: Axis("model.qk_norm", "false", "RMS norm of each head's q and k ...", ())."""

    key: str
    default: str
    meaning: str  # formula and source
    choices: tuple[tuple[str, str], ...]  # (value, meaning)


def axes() -> list[Axis]:
    """One for every key below `model`, in the order of config.py."""
    return list(_axes(config.ModelConfig(), "model."))


def _axes(default: Any, prefix: str) -> Iterator[Axis]:
    comments = _comments()
    for entry in fields(default):
        value, key = getattr(default, entry.name), prefix + entry.name
        if is_dataclass(value):
            yield from _axes(value, f"{key}.")
            continue
        own = comments.get((type(default).__name__, entry.name), "")
        if isinstance(value, Enum):
            kind = type(value)
            choices = tuple((str(choice), comments.get((kind.__name__, choice.name), "")) for choice in kind)
            yield Axis(key, str(value), " ".join(filter(None, [_docstring(kind), own])), choices)
        else:
            yield Axis(key, str(value).lower() if isinstance(value, bool) else str(value), own, ())


def _docstring(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split())


def _comments() -> dict[tuple[str, str], str]:
    """(class, name that it assigns) -> what the comment behind it says."""
    source = inspect.getsource(config)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for cls in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for node in cls.body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                said = [by_line[line] for line in lines if line in by_line]
                found[cls.name, getattr(target, "id", "")] = " ".join(said)
    return found
