"""Whether a folder's run is this run: recipe and parents, less what does not change the answer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from framework.core.config import differences, digest, flatten, without
from framework.core.errors import UsageError

# How long a run is. Raising one continues the run, so they are not part of what it is.
LENGTHS = ("train.steps", "train.epochs", "ppo.iterations")


@dataclass(frozen=True)
class Identity:
    """Two runs with equal identities give equal answers up to their common length."""

    recipe: dict[str, Any]  # dotted keys, as YAML gives them back
    parents: dict[str, str]
    lengths: dict[str, float]  # those of LENGTHS that the recipe has

    @property
    def digest(self) -> str:
        return digest({"recipe": self.recipe, "parents": self.parents})

    def conflicts(self, other: "Identity") -> dict[str, tuple[Any, Any]]:
        """Key -> (value here, value there) for all that keeps `other` from continuing this run."""
        found = differences(self.recipe, other.recipe)
        found |= {f"parents.{role}": pair for role, pair in differences(self.parents, other.parents).items()}
        shorter = {k: (v, other.lengths[k]) for k, v in self.lengths.items() if 0 < other.lengths.get(k, 0) < v}
        return found | shorter

    def reaches(self, lengths: Mapping[str, float]) -> bool:
        """Whether a run that went `lengths` far went as far as this one asks."""
        return all(lengths.get(key) == value for key, value in self.lengths.items())


def identify(recipe: Mapping[str, Any], parents: Mapping[str, str], ignore: Iterable[str]) -> Identity:
    """The identity of a run. `recipe` is the whole resolved one, nested; `ignore` lists keys or their prefixes."""
    tree = flatten(yaml.safe_load(yaml.safe_dump(dict(recipe))) or {})
    flat = {key: value for key, value in tree.items() if value is not None}  # none is the same as not said
    lengths = {key: flat[key] for key in LENGTHS if isinstance(flat.get(key), int | float)}
    return Identity(without(flat, [*ignore, *LENGTHS]), dict(parents), lengths)


def refuse(folder: Path, conflicts: Mapping[str, tuple[Any, Any]]) -> None:
    """Say which keys differ, and what to do."""
    listing = "; ".join(f"{key}: {there} there, {here} now" for key, (there, here) in sorted(conflicts.items()))
    raise UsageError(
        f"{folder} holds a run of another recipe ({listing}); give the old values to continue it, choose another "
        "run.dir, or remove the folder"
    )
