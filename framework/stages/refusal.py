"""A refused recipe in one line: what stands in Hydra's and OmegaConf's many-line errors, with what would be right.

Left out: Hydra itself, which only the command line knows; here are its errors' texts.
"""

import dataclasses
import re
from typing import Any

from framework.core.config import flatten, recipes_folder
from framework.core.errors import nearest
from framework.stages.config import STAGES
from framework.stages.peers import ours_for


def explain_refusal(stage: str, error: Exception) -> str:
    """Hydra's and OmegaConf's many-line errors as one line that names the key, the value and what would work."""
    if asked := re.search(r"Could not find '([^']+)'", str(error)):
        return _unknown_choice(asked.group(1))
    text = str(error.__cause__ or error)
    full = re.search(r"full_key: (\S+)", text)
    key = full.group(1) if full else ""
    missing = re.search(r"Key '([^']+)' (?:is )?not in", text)
    if missing:
        return unknown_key(stage, key or missing.group(1))
    choice = re.search(r"Invalid value '([^']*)', expected one of \[([^\]]*)\]", text)
    if choice:
        return f"{key}={choice.group(1)}: {nearest(choice.group(1).lower(), choice.group(2).lower().split(', '))}"
    kind = re.search(r"Value '([^']*)' .*could not be converted to (\w+)", text)
    if kind:
        return f"{key}={kind.group(1)} is not {_KINDS.get(kind.group(2), kind.group(2))}"
    if key and "is not a ListConfig" in text:
        return f"{key} takes a list: {key}=[a,b]"
    absent = re.search(r"(?:In 'experiment/([^']+)': )?Could not override '([^']+)'", text)
    if absent:
        return _foreign_group(stage, *absent.groups())
    section = re.search(r"Invalid type assigned: \w+ is not a subclass of (\w+)\. value: (.*)", text)
    if section and section.group(1).endswith(("Config", "Paths")):
        below = ", ".join(name for name in defaults_of(stage) if name.startswith(f"{key}."))
        return f"{key}={section.group(2)}: {key} is a section, its keys are {below}"
    if section or "is not Optional" in text:
        return f"{key}={section.group(2) if section else 'null'}: it takes a value"
    malformed = re.search(r"Error parsing override '([^']*)'", str(error))
    if malformed:
        return f"'{malformed.group(1)}' is not of the form key=value"
    first = text.splitlines()[0] if key else " ".join(str(error).split("\nSee https")[0].split())
    return f"{key}: {first}" if key else first


def _foreign_group(stage: str, experiment: str | None, group: str) -> str:
    if experiment:
        return f"experiment={experiment} is not for {stage}: it sets {group}, which {stage} does not have"
    return f"{stage} has no group '{group}': {nearest(group, groups_of(stage))}"


_KINDS = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false"}


def unknown_key(stage: str, key: str) -> str:
    """Ours for another framework's word, else the nearest name."""
    known = defaults_of(stage)
    if ours := ours_for(key, {*known, *groups()}):
        return f"unknown key '{key}': it is set by {ours} here. `framework {stage} --help` lists the keys"
    sections = {name.partition(".")[0] for name in known}
    hint = nearest(key, sections if "." not in key else known).split(" Choose")[0]
    return f"unknown key '{key}': {hint} `framework {stage} --help` lists them"


def _unknown_choice(asked: str) -> str:
    group, _, choice = asked.rpartition("/")
    if group in _PLUGINS:
        return f"unknown choice {group}={choice}: {_PLUGINS[group]}"
    group, _, choice = asked.partition("/")
    folder = recipes_folder() / group
    if not folder.is_dir():
        return f"unknown group '{group}': {nearest(group, groups())}"
    choices = [str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")]
    return f"unknown choice {group}={choice}: {nearest(choice, choices)}"


# group of Hydra's own -> which package brings its choices
_PLUGINS = {
    "hydra/sweeper": 'basic is there; optuna comes with pip install "framework[sweep]"',
    "hydra/launcher": 'basic is there; submitit_local and submitit_slurm come with pip install "framework[submitit]"',
}


def defaults_of(stage: str) -> dict[str, Any]:
    """Every key of a stage with its default, dotted."""

    def tree(schema: Any) -> dict[str, Any]:
        found = {}
        for field in dataclasses.fields(schema):
            factory = field.default_factory
            value = field.default if factory is dataclasses.MISSING else factory()
            found[field.name] = tree(value) if dataclasses.is_dataclass(value) else value
        return found

    return flatten(tree(STAGES[stage]))


def groups() -> list[str]:
    """All config groups of the recipes."""
    return [path.name for path in recipes_folder().iterdir() if path.is_dir() and path.name not in ("corpora", "sweep")]


def groups_of(stage: str) -> list[str]:
    """The groups from which a stage's recipe chooses."""
    import yaml

    recipe = yaml.safe_load((recipes_folder() / f"{stage}.yaml").read_text(encoding="utf-8"))
    return sorted({name for entry in recipe["defaults"] if isinstance(entry, dict) for name in entry} & set(groups()))
